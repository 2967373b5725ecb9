"""Models behind one lock, what they found kept, and kept outputs turned into detections without a model."""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

try:
    # On ZeroGPU hardware of the Hub this has to come before torch.
    from spaces import GPU
except ImportError:

    def GPU(function: Any) -> Any:  # noqa: N802  the name that is missing
        """Stand-in: elsewhere the device is there all the time."""
        return function


import torch

from gdino_hf.model.msda_backends import backend_for

from .safety import KEPT_SECONDS, Picture, Refused

KEPT_BYTES = 256 * 2**20
_BACKENDS = {"c": "C", "triton": "Triton", "hub": "CUDA kernel from the Hub", "torch": "PyTorch"}


@dataclass(frozen=True)
class Settings:
    """How kept outputs become detections.

    Attributes:
        threshold: Detections score above it, 0..1.
        nms: IoU above which the lesser of two boxes of one label goes; 1 keeps both.
        text_threshold: A label's best word scores at least this, 0..1.
        hidden: Labels that are switched off.
    """

    threshold: float
    nms: float = 1.0
    text_threshold: float = 0.0
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Detection:
    """One box: the caller's label, its place among the labels, the score in 0..1, and xyxy in upright pixels."""

    label: str
    label_index: int
    score: float
    box: tuple[float, float, float, float]

    def as_json(self) -> dict[str, Any]:
        """The same fields that `gdino detect` writes."""
        return {"label": self.label, "label_index": self.label_index, "score": self.score, "box": list(self.box)}


@dataclass(frozen=True)
class Outputs:
    """What a model said about one picture, before any threshold.

    Attributes:
        model: Its name on the page.
        labels: What was asked for.
        negatives: What competed.
        name: The picture's name.
        data: The picture's file.
        size: (width, height) in pixels.
        raw: Token logits and boxes on the CPU.
        prompt: Which tokens belong to which label.
        post_process: The processor's.
        seconds: Of preparation and forward.
        device: Where it ran.
        backend: What sampled the image features.
        grounding: One box for every label, its best: what grounding a sentence asks for.
    """

    model: str
    labels: tuple[str, ...]
    negatives: tuple[str, ...]
    name: str
    data: bytes
    size: tuple[int, int]
    raw: SimpleNamespace
    prompt: SimpleNamespace
    post_process: Any
    seconds: float
    device: str
    backend: str
    grounding: bool = False

    def detections(self, settings: Settings) -> list[Detection]:
        """Detections, best first; no model runs."""
        found = self.post_process(
            self.raw,
            self.prompt,
            threshold=settings.threshold,
            text_threshold=settings.text_threshold,
            target_sizes=[self.size[::-1]],
            nms_threshold=settings.nms if settings.nms < 1 else None,
            multi_label=self.grounding,
        )[0]
        rows = zip(
            found["text_labels"],
            found["labels"].tolist(),
            found["scores"].tolist(),
            found["boxes"].tolist(),
            strict=True,
        )
        every = [Detection(label, index, score, tuple(box)) for label, index, score, box in rows]
        if self.grounding:
            firsts: dict[int, Detection] = {}
            for detection in every:
                firsts.setdefault(detection.label_index, detection)
            every = list(firsts.values())
        return [detection for detection in every if detection.label not in settings.hidden]

    def best(self) -> Detection | None:
        """The best candidate whatever the thresholds: what an empty result would have shown."""
        return next(iter(self.detections(Settings(threshold=0.0))), None)

    @property
    def num_bytes(self) -> int:
        """Memory that keeping this takes."""
        return len(self.data) + sum(x.numel() * x.element_size() for x in vars(self.raw).values())


class Models:
    """The models of the page. They take turns: one forward uses every core or the whole GPU.

    Args:
        loaded: For each name on the page a GDinoForObjectDetection and its GDinoProcessor.
    """

    def __init__(self, loaded: Mapping[str, tuple[Any, Any]]) -> None:
        if not loaded:
            raise ValueError("There is no model to show; load at least one.")
        self._loaded = {name: (model, _fitted(processor, model)) for name, (model, processor) in loaded.items()}
        self._lock = threading.Lock()
        self._on_device = GPU(self._forward)
        self.forwards = 0
        """How often a model ran: moving a slider must not change it."""
        for model, _ in self._loaded.values():
            model.eval()
            if model.device.type == "cpu":
                model.optimize_for_inference()

    @property
    def names(self) -> list[str]:
        """In the order given; the first is the default."""
        return list(self._loaded)

    def check(self, name: str, labels: Sequence[str], negatives: Sequence[str] = ()) -> None:
        """Refuse what no picture would change.

        Args:
            name: One of `names`.
            labels: What to look for.
            negatives: What competes but is left out of results.

        Raises:
            Refused: There is no such model, or its tokenizer or processor refuses a label.
        """
        self._prepare(name, None, labels, negatives)

    def run(
        self,
        name: str,
        picture: Picture,
        labels: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        grounding: bool = False,
    ) -> Outputs:
        """Ask one model about one picture.

        Args:
            name: One of `names`.
            picture: The photograph.
            labels: What to look for.
            negatives: What competes but is left out of results.
            grounding: Show one box for every label.

        Returns:
            Everything it said.

        Raises:
            Refused: There is no such model, or its tokenizer or processor refuses a label.
        """
        start = time.perf_counter()
        inputs = self._prepare(name, picture.image, labels, negatives)
        with self._lock:
            self.forwards += 1
            logits, boxes, device, backend = self._on_device(name, dict(inputs))
        return Outputs(
            model=name,
            labels=tuple(labels),
            negatives=tuple(negatives),
            name=picture.name,
            data=picture.data,
            size=picture.image.size,
            raw=SimpleNamespace(logits=logits, pred_boxes=boxes),
            prompt=SimpleNamespace(prompts=inputs.prompts),
            post_process=self._loaded[name][1].post_process_grounded_object_detection,
            seconds=time.perf_counter() - start,
            device=device,
            backend=_BACKENDS[backend],
            grounding=grounding,
        )

    def _prepare(self, name: str, image: Any, labels: Sequence[str], negatives: Sequence[str]) -> Any:
        """Inputs of the model for a picture, or for the labels alone."""
        if name not in self._loaded:
            raise Refused(f"There is no model of this name here; choose among {', '.join(self._loaded)}.")
        asked = {label.casefold() for label in labels}
        for label in negatives:
            if label.casefold() in asked:
                raise Refused(f"{label!r} is a label and a negative label; leave it in one of them.")
        try:
            # One list per image: labels that end in a period could mean one prompt per image otherwise.
            return self._loaded[name][1](images=image, text=[list(labels)], negative_labels=list(negatives) or None)
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error

    def _forward(self, name: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, str, str]:
        """Logits and boxes on the CPU, the device and the backend; all of it can travel between processes.

        On ZeroGPU there is a device in here only, so its name is asked for in here too.
        """
        model = self._loaded[name][0]
        moved = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        with torch.inference_mode():
            outputs = model(**moved)
        logits, boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
        return logits, boxes, _device_name(model.device), _backend(model)


class Kept:
    """The outputs of the last requests, by a key that cannot be guessed; old ones go when there are too many.

    What the browser holds is the key alone, so nothing that is sent back needs to be trusted.

    Args:
        most_bytes: Memory of all of them together.
        seconds: How long one is kept after it was last used.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES, seconds: float = KEPT_SECONDS) -> None:
        self._most_bytes, self._seconds = most_bytes, seconds
        self._entries: OrderedDict[str, tuple[float, Outputs]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, outputs: Outputs, replaces: str | None = None) -> str:
        """Keep outputs.

        Args:
            outputs: What to keep.
            replaces: Key of what the same visitor saw before, which goes.

        Returns:
            The key.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._entries.pop(replaces or "", None)
            self._entries[key] = (time.monotonic(), outputs)
            self._drop_old()
        return key

    def get(self, key: str | None) -> Outputs | None:
        """What was kept, or None if nothing was or it is gone."""
        with self._lock:
            self._drop_old()
            entry = self._entries.get(key or "")
            if entry is None:
                return None
            self._entries[key or ""] = (time.monotonic(), entry[1])
            self._entries.move_to_end(key or "")
            return entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def sweep(self) -> None:
        """Drop what was not used for a while, even if nobody asks for anything any more."""
        with self._lock:
            self._drop_old()

    def _drop_old(self) -> None:
        total = sum(outputs.num_bytes for _, outputs in self._entries.values())
        oldest = time.monotonic() - self._seconds
        while self._entries:
            used, outputs = next(iter(self._entries.values()))
            # The newest stays even if it alone is too large: its visitor is looking at it.
            if used >= oldest and (total <= self._most_bytes or len(self._entries) == 1):
                return
            self._entries.popitem(last=False)
            total -= outputs.num_bytes


def _fitted(processor: Any, model: Any) -> Any:
    """A processor whose prompts are no longer than the model reads; more labels go to further prompts."""
    processor = copy.copy(processor)
    processor.max_text_len = min(processor.max_text_len, model.config.max_text_len)
    return processor


def _backend(model: Any) -> str:
    """Name of the implementation of deformable attention that runs for this model's decoder."""
    config = model.config
    heads, points = config.decoder_attention_heads, config.decoder_n_points
    value = torch.zeros(1, 1, heads, config.d_model // heads, device=model.device, dtype=model.dtype)
    locations = torch.zeros(1, 1, heads, config.num_feature_levels, points, 2, device=model.device)
    return backend_for(value, locations)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
