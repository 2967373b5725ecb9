"""The extra "torch": what all but `gdino_hf.runtime` needs, and the sentence that names it where it is missing."""

import importlib.util
import sys

MODULES = ("torch", "transformers", "safetensors", "huggingface_hub", "scipy")
"""Modules of the packages that the extra "torch" brings."""


def missing_module() -> str | None:
    """Return the name of the first module of the extra that is not installed, or None; nothing is imported."""
    for name in MODULES:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            return name
    return None


def remedy(what: str, module: str) -> str:
    """Return the sentence for something that cannot be used without the extra.

    Args:
        what: What was asked for, such as "Detector".
        module: Name of the module that is missing.
    """
    return (
        f'{what} needs {module}; pip install "gdino-hf[torch]" (exported models run without it, see gdino_hf.runtime).'
    )
