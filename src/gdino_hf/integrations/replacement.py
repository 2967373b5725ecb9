"""drop_in(): transformers' own names load the models of gdino_hf, until it is undone.

What changes is `from_pretrained` of the classes in `_replacements`, and the entries that two auto classes have for our
configuration. Objects that were loaded before, and
classes that are called directly, stay as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..registration import register_auto_classes

Replacement = Callable[..., Any]
"""Called with the original method and with the arguments of a call; returns what the call returns."""

_THEIRS = "transformers.models"
_lock = threading.RLock()
_restore: list[Callable[[], None]] = []
_in_use = 0


class DropIn:
    """What `drop_in` returns: undone by calling it or its `undo`, or by leaving a `with` block."""

    def __init__(self) -> None:
        self._is_undone = False

    def undo(self) -> None:
        """Make transformers' names load transformers' classes again, once every call of `drop_in` is undone.

        A second call changes nothing.
        """
        global _in_use
        with _lock:
            if self._is_undone:
                return
            self._is_undone = True
            _in_use -= 1
            if _in_use == 0:
                _put_back()

    def __call__(self) -> None:
        self.undo()

    def __enter__(self) -> DropIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def drop_in() -> DropIn:
    """Make transformers' own names load the models of gdino_hf for Grounding DINO checkpoints.

        gdino_hf.drop_in()                    # for the whole program
        with gdino_hf.drop_in(): ...          # for a block

    `AutoConfig`, `AutoModel`, `AutoModelForZeroShotObjectDetection`, `AutoProcessor`, `AutoImageProcessor` and
    `pipeline` then give ours for checkpoints of the types grounding-dino, mm-grounding-dino and gdino, and so does
    `from_pretrained` of transformers' classes for the former two. Scripts and tools run unchanged: the classes have
    transformers' names (see `gdino_hf.integrations.stand_ins`), and results its conventions.

    Calls may be nested and repeated; the names are transformers' again when each of them is undone. Objects that were
    loaded meanwhile stay ours.

    Returns:
        An object with `undo()`, which can be called itself, and which is a context manager.
    """
    global _in_use
    with _lock:
        if _in_use == 0:
            _replace_all()
        _in_use += 1
    return DropIn()


def _replace_all() -> None:
    from transformers import AutoModel, AutoModelForZeroShotObjectDetection

    from .stand_ins import GroundingDinoForObjectDetection, GroundingDinoModel

    register_auto_classes()
    try:
        _restore.append(_register(AutoModel, GroundingDinoModel))
        _restore.append(_register(AutoModelForZeroShotObjectDetection, GroundingDinoForObjectDetection))
        for owner, replacement in _replacements().items():
            _restore.append(_replace(owner, replacement))
    except BaseException:
        _put_back()
        raise


def _register(auto_class: Any, ours: type) -> Callable[[], None]:
    """Make an auto class build our class from our configuration, and return a function that undoes it."""
    from .stand_ins import GroundingDinoConfig

    auto_class.register(GroundingDinoConfig, ours, exist_ok=True)

    def restore() -> None:
        # transformers has no public method that takes an entry back.
        auto_class._model_mapping._extra_content.pop(GroundingDinoConfig, None)

    return restore


def _put_back() -> None:
    while _restore:
        _restore.pop()()


def _replacements() -> dict[type, Replacement]:
    """Return the classes whose `from_pretrained` is replaced, and by what."""
    from transformers import AutoConfig, AutoProcessor

    from ..model.image_processing_gdino import GDinoImageProcessor
    from .stand_ins import GroundingDinoForObjectDetection, GroundingDinoModel, GroundingDinoProcessor

    named: dict[str, tuple[str, type]] = {
        "GroundingDinoForObjectDetection": ("grounding_dino.modeling_grounding_dino", GroundingDinoForObjectDetection),
        "GroundingDinoModel": ("grounding_dino.modeling_grounding_dino", GroundingDinoModel),
        "MMGroundingDinoForObjectDetection": (
            "mm_grounding_dino.modeling_mm_grounding_dino",
            GroundingDinoForObjectDetection,
        ),
        "MMGroundingDinoModel": ("mm_grounding_dino.modeling_mm_grounding_dino", GroundingDinoModel),
        "GroundingDinoProcessor": ("grounding_dino.processing_grounding_dino", GroundingDinoProcessor),
        "GroundingDinoImageProcessorPil": (
            "grounding_dino.image_processing_pil_grounding_dino",
            GDinoImageProcessor,
        ),
        "GroundingDinoImageProcessor": ("grounding_dino.image_processing_grounding_dino", GDinoImageProcessor),
    }
    found: dict[type, Replacement] = {AutoConfig: _config, AutoProcessor: _processor}
    for name, (module, ours) in named.items():
        try:
            owner = getattr(import_module(f"{_THEIRS}.{module}"), name)
        except ImportError:
            # The image processor of torchvision, where torchvision is missing: nobody can load it.
            continue
        found[owner] = functools.partial(_load_ours, ours)
    return found


def _load_ours(ours: Any, original: Replacement, *args: Any, **kwargs: Any) -> Any:
    return ours.from_pretrained(*args, **kwargs)


def _config(original: Replacement, *args: Any, **kwargs: Any) -> Any:
    from transformers import GroundingDinoConfig as TheirConfig
    from transformers import MMGroundingDinoConfig as TheirMMConfig

    from ..model.configuration_gdino import GDinoConfig
    from .stand_ins import GroundingDinoConfig

    loaded = original(*args, **kwargs)
    config = loaded[0] if isinstance(loaded, tuple) else loaded
    if type(config) not in (TheirConfig, TheirMMConfig, GDinoConfig):
        return loaded
    # Read again, because our class reads the file's fields, not the defaults of theirs.
    options = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "code_revision")}
    return GroundingDinoConfig.from_pretrained(*args, name_or_path=config.name_or_path, **options)


def _processor(original: Replacement, *args: Any, **kwargs: Any) -> Any:
    from ..model.processing_gdino import GDinoProcessor
    from .stand_ins import GroundingDinoProcessor

    loaded = original(*args, **kwargs)
    if type(loaded) is not GDinoProcessor:
        return loaded
    return GroundingDinoProcessor(
        loaded.image_processor,
        loaded.tokenizer,
        max_text_len=loaded.max_text_len,
        nms_threshold=loaded.nms_threshold,
    )


def _replace(owner: type, replacement: Replacement) -> Callable[[], None]:
    """Replace the class method `from_pretrained`, and return a function that undoes it."""
    name = "from_pretrained"
    is_inherited = name not in vars(owner)
    previous = vars(owner).get(name)
    original = getattr(owner, name).__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        # A subclass is a class of the caller's own. Undone replacements may live on in the wrapper of another library.
        if cls is not owner or not _in_use:
            return original(cls, *args, **kwargs)
        return replacement(functools.partial(original, cls), *args, **kwargs)

    wrapper: Any = classmethod(from_pretrained)
    setattr(owner, name, wrapper)

    def restore() -> None:
        if vars(owner).get(name) is wrapper:
            delattr(owner, name) if is_inherited else setattr(owner, name, previous)

    return restore
