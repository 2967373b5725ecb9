"""Run the page's models, store their outputs, and turn stored outputs into detections without running a model."""

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
    # On the Hub's ZeroGPU hardware, spaces must be imported before torch.
    from spaces import GPU
except ImportError:

    def GPU(function: Any) -> Any:  # noqa: N802  the name in spaces
        """Stand-in for hardware whose device is always available."""
        return function


import torch

from gdino_hf.detection.prepared_images import prepare_image
from gdino_hf.detection.prompt_passes import prompt_outputs
from gdino_hf.detection.text_features import TextFeatureStore
from gdino_hf.model.label_faults import label_remarks
from gdino_hf.model.msda_backends import backend_for
from gdino_hf.model.text_prompt import build_prompt

from .safety import KEPT_SECONDS, Picture, Refused

KEPT_BYTES = 256 * 2**20
"""Default memory for stored outputs, in bytes."""
_BACKENDS = {"c": "C", "triton": "Triton", "hub": "CUDA kernel from the Hub", "torch": "PyTorch"}


@dataclass(frozen=True)
class Settings:
    """How stored outputs become detections.

    Attributes:
        threshold: Detections have a higher score than this, in 0..1.
        nms: IoU above which non-maximum suppression removes the lower-scoring of two boxes of one label; 1 keeps all.
        text_threshold: Smallest score of a label's best word, in 0..1.
        hidden: Labels whose detections are not shown.
    """

    threshold: float
    nms: float = 1.0
    text_threshold: float = 0.0
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Detection:
    """One detection: the visitor's label, its index among the labels, the score in 0..1, and the box.

    The box is xyxy in pixels of the upright picture.
    """

    label: str
    label_index: int
    score: float
    box: tuple[float, float, float, float]

    def as_json(self) -> dict[str, Any]:
        """Return the fields that `gdino detect` writes too."""
        return {"label": self.label, "label_index": self.label_index, "score": self.score, "box": list(self.box)}


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for one picture, before any threshold.

    Attributes:
        model: Name of the model on the page.
        labels: Labels to look for.
        negatives: Labels that compete for boxes but are left out of results.
        name: Name of the picture.
        data: File content of the picture.
        size: (width, height) of the picture in pixels.
        raw: Token logits and boxes, on the CPU.
        prompt: Which tokens belong to which label.
        post_process: The processor's method that turns outputs into detections.
        seconds: Duration of preprocessing and forward pass.
        device: Name of the device that ran the model.
        backend: Name of the implementation of deformable attention.
        remarks: What is odd about the labels, one sentence each.
        grounding: Whether to show only the best box of every label, as for the phrases of a sentence.
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
    remarks: tuple[str, ...] = ()
    grounding: bool = False

    def detections(self, settings: Settings) -> list[Detection]:
        """Return the detections for some settings, best first, without running a model."""
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
        """Return the best candidate, below the threshold too, or None; the page names it if it found nothing."""
        return next(iter(self.detections(Settings(threshold=0.0))), None)

    @property
    def num_bytes(self) -> int:
        """Memory in bytes that storing these outputs takes."""
        return len(self.data) + sum(x.numel() * x.element_size() for x in vars(self.raw).values())


class Models:
    """The models of the page, which run one at a time because each uses every core or the whole GPU.

    Args:
        loaded: Model name -> (GDinoForObjectDetection, its GDinoProcessor).
    """

    def __init__(self, loaded: Mapping[str, tuple[Any, Any]]) -> None:
        if not loaded:
            raise ValueError("There is no model to show; load at least one.")
        self._loaded = {name: (model, _fitted(processor, model)) for name, (model, processor) in loaded.items()}
        self._lock = threading.Lock()
        self._on_device = GPU(self._forward)
        self.forwards = 0
        """Number of forward passes so far; tests check that moving a slider adds none."""
        for model, _ in self._loaded.values():
            model.eval()
            if model.device.type == "cpu":
                model.optimize_for_inference()
        self._texts = {name: TextFeatureStore(model) for name, (model, _) in self._loaded.items()}

    @property
    def names(self) -> list[str]:
        """Names of the models in the order given; the first is the default."""
        return list(self._loaded)

    def check(self, name: str, labels: Sequence[str], negatives: Sequence[str] = ()) -> None:
        """Refuse a model name or labels that cannot be used with any picture.

        Args:
            name: One of `names`.
            labels: Labels to look for.
            negatives: Labels that compete for boxes but are left out of results.

        Raises:
            Refused: There is no such model, or its processor refuses a label.
        """
        self._prompt(name, labels, negatives)

    def run(
        self,
        name: str,
        picture: Picture,
        labels: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        grounding: bool = False,
    ) -> Outputs:
        """Run one model on one picture.

        Args:
            name: One of `names`.
            picture: The picture.
            labels: Labels to look for.
            negatives: Labels that compete for boxes but are left out of results.
            grounding: Whether to show only the best box of every label.

        Returns:
            The model's outputs, from which thresholds select detections.

        Raises:
            Refused: There is no such model, or its processor refuses a label.
        """
        start = time.perf_counter()
        prompt = self._prompt(name, labels, negatives)
        processor = self._loaded[name][1]
        try:
            # On ZeroGPU this process has no GPU to pin memory for.
            prepared = prepare_image(processor, picture.image, "cpu")
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error
        with self._lock:
            self.forwards += 1
            logits, boxes, device, backend = self._on_device(name, prepared, prompt.chunks)
        return Outputs(
            model=name,
            labels=tuple(labels),
            negatives=tuple(negatives),
            name=picture.name,
            data=picture.data,
            size=picture.image.size,
            raw=SimpleNamespace(logits=logits, pred_boxes=boxes),
            prompt=SimpleNamespace(prompts=[prompt]),
            post_process=processor.post_process_grounded_object_detection,
            seconds=time.perf_counter() - start,
            device=device,
            backend=_BACKENDS[backend],
            remarks=tuple(label_remarks(prompt, processor.tokenizer)),
            grounding=grounding,
        )

    def _prompt(self, name: str, labels: Sequence[str], negatives: Sequence[str]) -> Any:
        """Return the prompt of the labels."""
        if name not in self._loaded:
            raise Refused(f"There is no model of this name here; choose one of {', '.join(self._loaded)}.")
        asked = {label.casefold() for label in labels}
        for label in negatives:
            if label.casefold() in asked:
                raise Refused(f"{label!r} is a label and a negative label; leave it in one of them.")
        processor = self._loaded[name][1]
        try:
            return build_prompt(list(labels), processor.tokenizer, processor.max_text_len, list(negatives))
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error

    def _forward(self, name: str, prepared: Any, chunks: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, str, str]:
        """Return logits and boxes on the CPU, and the names of device and backend.

        On ZeroGPU this runs in a process of its own: only there is a GPU, and all results can be pickled.
        """
        model = self._loaded[name][0]
        with torch.inference_mode():
            rows = [
                (logits.float().cpu(), boxes.float().cpu())
                for _, _, logits, boxes in prompt_outputs(model, self._texts[name], chunks, [prepared])
            ]
        logits, boxes = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return logits, boxes, _device_name(model.device), _backend(model)


class KeptOutputs:
    """Store of the outputs of recent requests, by keys that cannot be guessed.

    The browser holds only the key, so nothing that it sends back needs to be trusted.

    Args:
        most_bytes: Largest size of all outputs together in bytes; beyond it the least recently used are removed.
        seconds: How long outputs are kept after their last use.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES, seconds: float = KEPT_SECONDS) -> None:
        self._most_bytes, self._seconds = most_bytes, seconds
        self._entries: OrderedDict[str, tuple[float, Outputs]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, outputs: Outputs, replaces: str | None = None) -> str:
        """Store outputs.

        Args:
            outputs: The outputs to store.
            replaces: Key of the outputs that the same visitor saw before, which are removed.

        Returns:
            The key of the stored outputs.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._entries.pop(replaces or "", None)
            self._entries[key] = (time.monotonic(), outputs)
            self._drop_old()
        return key

    def get(self, key: str | None) -> Outputs | None:
        """Return stored outputs, or None if they were removed or never stored."""
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
        """Remove expired outputs; called regularly, so that they are removed even if no further requests come."""
        with self._lock:
            self._drop_old()

    def _drop_old(self) -> None:
        total = sum(outputs.num_bytes for _, outputs in self._entries.values())
        oldest = time.monotonic() - self._seconds
        while self._entries:
            used, outputs = next(iter(self._entries.values()))
            # The newest stays even if it alone is too large, because its visitor is looking at it.
            if used >= oldest and (total <= self._most_bytes or len(self._entries) == 1):
                return
            self._entries.popitem(last=False)
            total -= outputs.num_bytes


def _fitted(processor: Any, model: Any) -> Any:
    """Return a processor whose prompt length fits the model; labels that exceed one prompt go into further prompts."""
    processor = copy.copy(processor)
    processor.max_text_len = min(processor.max_text_len, model.config.max_text_len)
    return processor


def _backend(model: Any) -> str:
    """Return the name of the implementation of deformable attention that this model's decoder uses."""
    config = model.config
    heads, points = config.decoder_attention_heads, config.decoder_n_points
    value = torch.zeros(1, 1, heads, config.d_model // heads, device=model.device, dtype=model.dtype)
    locations = torch.zeros(1, 1, heads, config.num_feature_levels, points, 2, device=model.device)
    return backend_for(value, locations)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
