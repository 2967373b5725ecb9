"""What a run is made with: the model and how it computes, the labels, and which boxes count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..detection.loading import NANO_FOLDER
from ..detection.tiles import OVERLAP
from ..detection.vocabulary import Vocabulary
from ..model.picture_limits import PictureLimits
from ..model.pixel_depth import check_depth
from ..model.printable import printable
from ..model.text_prompt import shorten
from .label_store import MANIFEST, LabelStore

FORMAT = "gdino-labels-1"
SHARD_SIZE = 200
"""Pictures in a shard by default. A process that is killed loses the work on one shard."""

NMS = 0.7
"""IoU above which the lower-scoring of two boxes of one label is dropped by default."""

# What a model computes depends on these files of its folder.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")


@dataclass(frozen=True)
class LabelJob:
    """How pictures are labelled. Everything but `device` and `readers` decides what the results are.

    Attributes:
        model: "nano", Hub id or folder.
        device: "auto" (the first GPU, or the CPU), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16", or "int8" on a CPU.
        batch_size: Largest number of pictures or tiles in one forward pass.
        pad: Whether pictures of like sizes share a forward pass, padded to one size. Otherwise only small pictures of
            equal sizes do, and each tile has a pass of its own, which is faster on a CPU.
        tiles: Side in pixels of overlapping tiles in which larger pictures are looked at beside the whole; None looks
            at the whole alone.
        overlap: Part of a tile's side that it shares with its neighbour, in [0, 1).
        readers: Threads that read pictures beside the model.
        shard_size: Number of pictures in a shard.
        options: Fields of `gdino_hf.detection.prompt_passes.Options`.
        segmenter: Hub id or folder of the segmenter that makes masks; None makes none.
        tighten: Whether boxes become the bounds of their masks.
    """

    model: str = "nano"
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 1
    pad: bool = True
    tiles: int | None = None
    overlap: float = OVERLAP
    readers: int = 2
    shard_size: int = SHARD_SIZE
    options: Mapping[str, Any] = field(default_factory=lambda: {"nms_threshold": NMS})
    segmenter: str | None = None
    tighten: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "readers", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")


def run_settings(
    job: LabelJob,
    vocabulary: Vocabulary,
    sources: list[str],
    fingerprint: str,
    segmenter_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Return the settings that a manifest records, as JSON gives them back.

    Args:
        job: How pictures are labelled.
        vocabulary: What to look for.
        sources: Absolute paths and addresses.
        fingerprint: `model_fingerprint` of the model.
        segmenter_fingerprint: That of the segmenter; None without one.
    """
    values = asdict(job)
    if job.segmenter is None:
        del values["segmenter"], values["tighten"]
    for name in ("device", "readers"):
        del values[name]
    if job.tiles is None:
        del values["overlap"]
    options = {name: value for name, value in sorted(values.pop("options").items()) if value is not None}
    limits = {**asdict(PictureLimits.current()), "bit_depth": check_depth(None)}
    settings = {
        **values,
        "fingerprint": fingerprint,
        **({} if segmenter_fingerprint is None else {"segmenter_fingerprint": segmenter_fingerprint}),
        **options,
        "picture_limits": limits,
        "vocabulary": vocabulary.settings(),
        "sources": sources,
    }
    read_back: dict[str, Any] = json.loads(json.dumps(settings))
    return read_back


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for equal settings; they stand in each shard."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(model: str) -> str | None:
    """Return a hash of everything that a model's results depend on: its weights, configuration and processor.

    Args:
        model: "nano", Hub id or folder.

    Returns:
        64 hexadecimal digits; None if its files are not on this machine.

    Raises:
        OSError: A file cannot be read.
    """
    folder = _model_folder(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_FILES and path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
            digest.update(f"{path.name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def check_fingerprint(model: str, fingerprint: str | None) -> None:
    """Refuse a model whose files are not those of another machine.

    Args:
        model: "nano", Hub id or folder.
        fingerprint: `model_fingerprint` of the other machine; None for any.

    Raises:
        ValueError: It is another one.
    """
    if fingerprint is not None and model_fingerprint(model) != fingerprint:
        raise ValueError(f"its files of {printable(model)} are not those of the machine that asks")


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], store: LabelStore) -> None:
    """Refuse to go on with a run that was begun with other settings.

    Args:
        earlier: Settings of the manifest.
        now: Settings of this run.
        store: Files of the run.

    Raises:
        ValueError: They differ; the message names the first difference.
    """
    for name in dict.fromkeys((*now, *earlier)):
        # The same model may lie in another folder, which its fingerprint tells.
        if name in ("model", "segmenter") or earlier.get(name) == now.get(name):
            continue
        was, wanted = (_shown(name, settings) for settings in (earlier, now))
        changed = f"{was} then, {wanted} now" if was != wanted else "something else"
        raise ValueError(
            f"{store.shown} holds labels that were made with another {name.replace('_', ' ')} ({changed}); "
            "repeat the command as it was, or choose another folder."
        )


def read_manifest(store: LabelStore) -> dict[str, Any] | None:
    """Return a run's manifest; None if the folder has none.

    Raises:
        ValueError: It is damaged, or of another program.
    """
    if not store.exists(MANIFEST):
        return None
    where = f"{store.shown}/{MANIFEST}"
    try:
        manifest = json.loads(store.read(MANIFEST))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read; choose another folder.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is no manifest of labels ({FORMAT}); choose another folder.")
    return manifest


def write_manifest(store: LabelStore, settings: Mapping[str, Any], **totals: Any) -> None:
    """Write a run's manifest.

    Args:
        store: Files of the run.
        settings: Settings of the run.
        **totals: "finished" and, once it is, what all shards hold together.

    Raises:
        OSError: It cannot be written.
    """
    manifest = {"format": FORMAT, "software": software(), **totals, "settings": settings}
    store.write(
        MANIFEST, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "backslashreplace")
    )


def software() -> dict[str, str]:
    """Return the versions of the libraries that results may depend on in their last digits."""
    import PIL
    import torch
    import transformers

    from .. import __version__

    return {
        "gdino_hf": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
    }


def _model_folder(model: str) -> Path | None:
    if model == "nano":
        return NANO_FOLDER
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    value = settings.get(name)
    if name == "vocabulary" and isinstance(value, dict):
        value = ", ".join(str(entry["label"]) for entry in value["labels"])
    if name.endswith("fingerprint"):
        value = settings.get("model" if name == "fingerprint" else "segmenter")
    return shorten(value, 60) if value is not None else "none"
