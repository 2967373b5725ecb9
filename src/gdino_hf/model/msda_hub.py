"""The Hub backend of multi-scale deformable attention: compiled kernels loaded by the `kernels` package.

Nothing is downloaded unless requested, either by GDINO_MSDA=hub or by `use_hub_kernels` in a model's configuration,
which then applies to the whole process. To work offline, set GDINO_MSDA_HUB to a folder with a kernel built from
kernels/msda, or use the kernels package's own LOCAL_KERNELS.
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
    """Allow the Hub kernel for the rest of this process, as a configuration with `use_hub_kernels` requests."""
    global _allowed
    _allowed = True


def is_allowed() -> bool:
    """Return whether a configuration has requested the Hub kernel."""
    return _allowed


@functools.cache
def load() -> Any:
    """Load the kernel, from GDINO_MSDA_HUB if that is set, else from the Hub.

    Returns:
        A module with the functions of `msda_c.CpuLibrary`, or None if it cannot be loaded; the reason is logged once.
    """
    folder = os.environ.get(_FOLDER_VARIABLE)
    try:
        from kernels import get_kernel, get_local_kernel  # type: ignore[attr-defined]

        if folder:
            module = get_local_kernel(Path(folder))
        else:
            # Requesting this kernel counts as trust_remote_code consent, for this repository only.
            module = get_kernel(REPOSITORY, version=VERSION, trust_remote_code=[REPOSITORY])
        missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
        if missing:
            raise AttributeError(f"the module lacks {', '.join(missing)}")
        return module
    except Exception as error:  # the model must stay usable whatever third-party code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = ' (pip install "gdino-hf[kernels]")' if isinstance(error, ImportError) else ""
        logger.warning(
            "The deformable attention kernel of %s cannot be loaded: %s%s", folder or REPOSITORY, reason, remedy
        )
        return None
