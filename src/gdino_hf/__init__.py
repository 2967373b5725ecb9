"""Grounding DINO as a transformers model: open-vocabulary detection that trains, batches and works offline.

Importing this package makes `AutoModel`, `AutoProcessor` and `pipeline` know the model type `gdino`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

NANO = str(Path(__file__).parent / "checkpoints" / "gdino-nano")
"""Folder of gdino-nano, the small model that ships inside the package."""

_HOMES = {
    "GDinoConfig": "model.configuration_gdino",
    "GDinoModel": "model.modeling_gdino",
    "GDinoForObjectDetection": "model.modeling_gdino",
    "GDinoImageProcessor": "model.image_processing_gdino",
    "GDinoProcessor": "model.processing_gdino",
    "GDinoZeroShotObjectDetectionPipeline": "model.pipeline_gdino",
    "GDinoDataCollator": "data.collator",
    "accelerate": "acceleration",
}

__all__ = [
    "NANO",
    "__version__",
    "register_auto_classes",
    *sorted(_HOMES),
]

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .data.collator import GDinoDataCollator as GDinoDataCollator
    from .model.configuration_gdino import GDinoConfig as GDinoConfig
    from .model.image_processing_gdino import GDinoImageProcessor as GDinoImageProcessor
    from .model.modeling_gdino import GDinoForObjectDetection as GDinoForObjectDetection
    from .model.modeling_gdino import GDinoModel as GDinoModel
    from .model.pipeline_gdino import GDinoZeroShotObjectDetectionPipeline as GDinoZeroShotObjectDetectionPipeline
    from .model.processing_gdino import GDinoProcessor as GDinoProcessor


def register_auto_classes() -> None:
    """Make transformers' auto classes and its zero-shot detection pipeline know the model type `gdino`.

    Runs by itself on `import gdino_hf`; calling it again changes nothing.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
        AutoTokenizer,
        BertTokenizerFast,
    )

    from .inference.optimize import install as install_optimizer
    from .model.configuration_gdino import GDinoConfig
    from .model.image_processing_gdino import GDinoImageProcessor
    from .model.modeling_gdino import GDinoForObjectDetection, GDinoModel
    from .model.pipeline_gdino import register_pipeline
    from .model.processing_gdino import GDinoProcessor

    AutoConfig.register("gdino", GDinoConfig, exist_ok=True)
    AutoModel.register(GDinoConfig, GDinoModel, exist_ok=True)
    AutoModelForZeroShotObjectDetection.register(GDinoConfig, GDinoForObjectDetection, exist_ok=True)
    AutoImageProcessor.register(GDinoConfig, image_processor_classes={"pil": GDinoImageProcessor}, exist_ok=True)
    AutoProcessor.register(GDinoConfig, GDinoProcessor, exist_ok=True)
    AutoTokenizer.register(GDinoConfig, tokenizer_class=BertTokenizerFast, exist_ok=True)
    register_pipeline()
    install_optimizer()


def _is_the_command() -> bool:
    """Whether this is `gdino` or `python -m gdino_hf`, which registers with its first class; --help is quick."""
    program = getattr(sys, "argv", [""])[0] if getattr(sys, "argv", None) else ""
    if program == "-m":
        return "gdino_hf" in sys.orig_argv[: sys.orig_argv.index("-m") + 2]
    return Path(program).name in ("gdino", "gdino.exe")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Inside a command registration waited until here: a processor is loaded through the auto classes of its parts.
    register_auto_classes()
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if not _is_the_command():
    register_auto_classes()
