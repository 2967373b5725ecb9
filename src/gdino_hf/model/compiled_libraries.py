"""Search for the compiled libraries of an installed gdino_hf, which are plain shared libraries, not Python modules."""

import importlib.util
from pathlib import Path

_SUFFIXES = (".so", ".pyd", ".dylib", ".dll")


def find_compiled(name: str) -> Path | None:
    """Return the path of a compiled library in the folder of the installed gdino_hf.

    Args:
        name: Beginning of the library's file name, such as "_msda_cpu".

    Returns:
        The path, or None if gdino_hf is not installed or was installed without a C compiler.
    """
    try:
        spec = importlib.util.find_spec("gdino_hf")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob(f"{name}*")):
            if path.suffix in _SUFFIXES:
                return path
    return None
