"""Grounding DINO as a transformers model: open-vocabulary detection that trains, batches and works offline.

Importing this package makes `AutoModel`, `AutoProcessor` and `pipeline` know the model type `gdino`. It imports neither
torch nor transformers: that happens when a class is first used. Both come with the extra "torch"; `gdino_hf.runtime`
runs exported models without it.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import register_auto_classes, register_when_used
from .torch_extra import missing_module, remedy

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
    "Detector": "detection.detector",
    "Detections": "detection.detections",
    "Vocabulary": "detection.vocabulary",
    "drop_in": "integrations.replacement",
    "fit_thresholds": "detection.thresholds",
    "use_fast_attention": "acceleration",
}

_WITHOUT_TORCH = ("Detections", "Vocabulary")

__all__ = [
    "NANO",
    "__version__",
    "register_auto_classes",
    *sorted(_HOMES),
]

if TYPE_CHECKING:
    from .acceleration import use_fast_attention as use_fast_attention
    from .data.collator import GDinoDataCollator as GDinoDataCollator
    from .detection.detections import Detections as Detections
    from .detection.detector import Detector as Detector
    from .detection.thresholds import fit_thresholds as fit_thresholds
    from .detection.vocabulary import Vocabulary as Vocabulary
    from .integrations.replacement import drop_in as drop_in
    from .model.configuration_gdino import GDinoConfig as GDinoConfig
    from .model.image_processing_gdino import GDinoImageProcessor as GDinoImageProcessor
    from .model.modeling_gdino import GDinoForObjectDetection as GDinoForObjectDetection
    from .model.modeling_gdino import GDinoModel as GDinoModel
    from .model.pipeline_gdino import GDinoZeroShotObjectDetectionPipeline as GDinoZeroShotObjectDetectionPipeline
    from .model.processing_gdino import GDinoProcessor as GDinoProcessor


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = None if name in _WITHOUT_TORCH else missing_module()
    if missing is not None:
        raise ImportError(remedy(f"gdino_hf.{name}", missing), name=missing)
    if name not in _WITHOUT_TORCH:
        # Register now, because a processor is loaded through the auto classes of its parts.
        register_auto_classes()
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _refuse_subinterpreters() -> None:
    """Raise an ImportError outside the process's main interpreter, where importing torch can wait forever."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        with suppress(ImportError, AttributeError):
            interpreters = import_module(name)
            if interpreters.get_current() == interpreters.get_main():
                return
            break
    else:
        return
    raise ImportError(
        "gdino_hf cannot be imported in a subinterpreter, because PyTorch and NumPy do not support them: use "
        "processes, or threads of the main interpreter, which can share one model."
    )


_refuse_subinterpreters()
register_when_used()
