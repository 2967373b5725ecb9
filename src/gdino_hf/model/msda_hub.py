"""The hub backend of multi-scale deformable attention: compiled kernels from the Hub, or from a folder.

Nothing is fetched unless asked for: by GDINO_MSDA=hub, or by `use_hub_kernels` in a model's configuration, which holds
for the whole process. GDINO_MSDA_HUB names a folder with a built kernel (kernels/msda builds one) to load instead,
offline; the kernels package's own LOCAL_KERNELS works too.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

REPOSITORY = "gdino-hf/msda"
VERSION = 1
_FOLDER_VARIABLE = "GDINO_MSDA_HUB"
_FUNCTIONS = ("supports", "forward", "backward")
_allowed = False


def allow() -> None:
    """Let this process load the kernel without GDINO_MSDA=hub: a configuration asks for it."""
    global _allowed
    _allowed = True


def is_allowed() -> bool:
    """Whether a configuration asked for the kernel."""
    return _allowed


@functools.cache
def load() -> Any:
    """The kernel: a module with `supports`, `forward` and `backward` as in `msda_c.CpuLibrary`.

    Returns:
        The module, or None where it cannot be loaded; the reason is logged once.
    """
    folder = os.environ.get(_FOLDER_VARIABLE)
    try:
        from kernels import get_kernel, get_local_kernel  # type: ignore[attr-defined]

        if folder:
            module = get_local_kernel(Path(folder))
        else:
            # Asking for this kernel is the consent that trust_remote_code wants; it goes no further than this one.
            module = get_kernel(REPOSITORY, version=VERSION, trust_remote_code=[REPOSITORY])
        missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
        if missing:
            raise AttributeError(f"it has no {', '.join(missing)}")
        return module
    except Exception as error:  # whatever goes wrong in foreign code, the model runs without it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = ' (pip install "gdino-hf[kernels]")' if isinstance(error, ImportError) else ""
        logger.warning(
            "The deformable attention kernel of %s cannot be loaded: %s%s", folder or REPOSITORY, reason, remedy
        )
        return None
