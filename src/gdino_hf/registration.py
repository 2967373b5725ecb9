"""Registration of the model type `gdino` with transformers, deferred until one of transformers' auto classes is used.

Importing torch and the auto classes takes seconds, so `import gdino_hf` does neither. Instead it watches for the
modules in `ENTRANCES`: when one of them has been loaded, whoever imported it, its entry methods are wrapped. The first
call of any of them registers the model type, puts the originals back and continues with the original. No module of
gdino_hf is imported while transformers is still being imported, so there can be no import cycle.

Only public names of transformers are wrapped (tried with 5.23). Should one of them move to another module, the auto
classes would know `gdino` only after `from gdino_hf import <a class>` or `register_auto_classes()`, and
test_registration.py would fail.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType
from typing import Any, cast

_AUTO = "transformers.models.auto"

ENTRANCES: dict[str, dict[str, tuple[str, ...]]] = {
    f"{_AUTO}.configuration_auto": {"AutoConfig": ("from_pretrained", "for_model")},
    f"{_AUTO}.modeling_auto": {
        "AutoModel": ("from_pretrained", "from_config"),
        "AutoModelForZeroShotObjectDetection": ("from_pretrained", "from_config"),
    },
    f"{_AUTO}.processing_auto": {"AutoProcessor": ("from_pretrained",)},
    f"{_AUTO}.image_processing_auto": {"AutoImageProcessor": ("from_pretrained",)},
    f"{_AUTO}.tokenization_auto": {"AutoTokenizer": ("from_pretrained",)},
    # pipeline() asks the registry for the class of its task.
    "transformers.pipelines": {"PIPELINE_REGISTRY": ("check_task",)},
    # optimize_for_inference must also work on a model class that was imported from its own module.
    "gdino_hf.model.pretrained_gdino": {"GDinoPreTrainedModel": ("optimize_for_inference",)},
}
"""For each watched module the objects whose methods register the model type when they are first called."""

_restore: list[Callable[[], None]] = []
_registering = threading.RLock()


def register_auto_classes() -> None:
    """Make transformers' auto classes and its zero-shot detection pipeline know the model type `gdino`.

    Runs automatically when an auto class or a public class of gdino_hf is first used; calling it again changes nothing.
    """
    # Threads that import transformers' lazy names at the same time get ImportErrors.
    with _registering:
        _register()
        # Restore last: a thread that calls an original method must find the type registered.
        while _restore:
            _restore.pop()()


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
        AutoTokenizer,
        BertTokenizerFast,
    )

    # Before 5.20, transformers itself offers a placeholder under this name where torchvision is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .inference.optimize import install as install_optimizer
    from .model.configuration_gdino import GDinoConfig
    from .model.image_processing_gdino import GDinoImageProcessor
    from .model.modeling_gdino import GDinoForObjectDetection, GDinoModel
    from .model.processing_gdino import GDinoProcessor

    AutoConfig.register("gdino", GDinoConfig, exist_ok=True)
    AutoModel.register(GDinoConfig, GDinoModel, exist_ok=True)
    AutoModelForZeroShotObjectDetection.register(GDinoConfig, GDinoForObjectDetection, exist_ok=True)
    AutoImageProcessor.register(GDinoConfig, image_processor_classes={"pil": GDinoImageProcessor}, exist_ok=True)
    AutoProcessor.register(GDinoConfig, GDinoProcessor, exist_ok=True)
    AutoTokenizer.register(GDinoConfig, tokenizer_class=BertTokenizerFast, exist_ok=True)
    install_optimizer()
    if "transformers.pipelines" in sys.modules:
        # Loading it takes seconds, so do not load it here; its first use calls this function again.
        from .model.pipeline_gdino import register_pipeline

        register_pipeline()


def register_when_used() -> None:
    """Wrap the entry methods of the watched modules, now if they are loaded, otherwise when they are."""
    if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    # A program that removed the package from sys.modules and imports it again has a watcher of the removed copy.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_watcher(finder)]
    sys.meta_path.insert(0, _Watcher())
    for name in ENTRANCES:
        if name in sys.modules:
            # import_module waits if another thread is still loading the module.
            _wrap_entrances(importlib.import_module(name))


def _is_watcher(finder: Any) -> bool:
    return (type(finder).__module__, type(finder).__name__) == (_Watcher.__module__, _Watcher.__name__)


class _Watcher:
    """Finder on sys.meta_path: finds watched modules through the other finders and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ENTRANCES:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Watcher) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    # Any object with these two methods is a loader; the ABC takes longer to import than this package.
                    spec.loader = cast(Any, _WrappingLoader(spec.loader))
                return spec
        return None


class _WrappingLoader:
    """Delegates to a module's own loader, reinstates that loader, and then wraps the module's entry methods."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        # Forward everything else: tools ask a loader for source code and resources.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _wrap_entrances(module)


def _wrap_entrances(module: ModuleType) -> None:
    for owner_name, methods in ENTRANCES[module.__name__].items():
        owner = getattr(module, owner_name, None)
        for method in methods:
            if hasattr(owner, method):
                _wrap(owner, method)


def _wrap(owner: Any, name: str) -> None:
    """Replace a method by one that registers the model type when it is first called."""
    inherited = name not in vars(owner)
    previous = vars(owner).get(name)
    original = getattr(owner, name)
    is_class_method = isinstance(owner, type) and isinstance(original, MethodType)

    @functools.wraps(original.__func__ if is_class_method else original)
    def first_call(*args: Any, **kwargs: Any) -> Any:
        register_auto_classes()
        if is_class_method:
            return original.__func__(*args, **kwargs)
        # Registration may have replaced the method, as it does with optimize_for_inference.
        current = getattr(owner, name)
        return (original if current is first_call else current)(*args, **kwargs)

    wrapper = classmethod(first_call) if is_class_method else first_call
    setattr(owner, name, wrapper)

    def restore() -> None:
        if vars(owner).get(name) is wrapper:
            # If another library has wrapped the method in the meantime, leave it alone.
            delattr(owner, name) if inherited else setattr(owner, name, previous)

    _restore.append(restore)
