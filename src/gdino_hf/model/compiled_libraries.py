"""Where the compiled libraries of an installed gdino_hf lie: plain shared libraries that know nothing of Python."""

import importlib.util
from pathlib import Path

_SUFFIXES = (".so", ".pyd", ".dylib", ".dll")


def find_compiled(name: str) -> Path | None:
    """The library whose file name begins with `name` in the folder of an installed gdino_hf, None without one."""
    try:
        spec = importlib.util.find_spec("gdino_hf")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob(f"{name}*")):
            if path.suffix in _SUFFIXES:
                return path
    return None
