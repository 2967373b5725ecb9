"""The model's forward pass on a GPU as two recorded computations: the image backbone, and everything after it.

CUDA graphs rather than torch.compile: a graph is recorded in about the time of a few forward passes and needs no
compiler on the machine, and it launches the very kernels of the eager model, so results are the same. torch.compile
takes minutes at first, and again for other sizes, because a Swin backbone divides images into windows by size.

Image sizes are not rounded up: in published models, padding changes the results. Prompts are, since padding of the text
is masked everywhere.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.image_geometry import image_geometry
from ..model.modeling_gdino import GDinoForObjectDetection, GDinoModel
from ..model.msda_backends import candidates, implementation, requested_backend
from ..model.outputs_gdino import GDinoImageFeatures, GDinoModelOutput, GDinoTextFeatures
from .cuda_graphs import CudaRecorder
from .graph_cache import GraphCache, Recorder, Tensors

logger = logging.getLogger(__name__)

TEXT_STEP = 16
"""Prompts are padded to a multiple of this many tokens, so that fewer lengths occur."""

# The parts of a model that run before the recorded stages.
_BEFORE = ("backbone", "input_proj_vision", "text_backbone", "text_projection")
_TEXT = ("last_hidden_state", "attention_mask", "phrase_mask", "position_ids")


def use_graphs(model: Any, recorder: Recorder | None = None) -> None:
    """Let a model replay recordings of its forward pass, and log how it computes.

    Args:
        model: A `GDinoModel` or `GDinoForObjectDetection` in evaluation mode on a GPU. It is changed in place.
        recorder: Records computations; CUDA graphs by default.
    """
    cache = GraphCache(recorder or CudaRecorder())
    core = model.base_model
    backbone = core.backbone.conv_encoder.model
    core.backbone.fast_forward = GraphedBackbone(backbone, core.backbone.fast_forward, cache)
    core.fast_stages = GraphedStages(cache)
    kind = cache.recorder.device_type
    backend = next((name for name in candidates(kind) if implementation(name) is not None), "torch")
    logger.info(
        "Inference on %s in %s: deformable attention by %s, CUDA graphs for up to %d combinations of image size and "
        "prompt length.",
        torch.cuda.get_device_name(model.device) if kind == "cuda" else kind,
        str(model.dtype).removeprefix("torch."),
        backend,
        cache.most,
    )


class GraphedBackbone:
    """Forward of an image backbone that replays a recording where there is one.

    Args:
        backbone: The AutoBackbone, whose parameters stay as they are.
        forward: A faster forward of the same backbone, from (B, 3, H, W) pixels to maps; None for its own.
        cache: The recordings.
    """

    def __init__(self, backbone: Any, forward: Callable[[Tensor], list[Tensor]] | None, cache: GraphCache) -> None:
        self.backbone, self.forward, self.cache = backbone, forward, cache

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) pixels to feature maps (B, C_l, h_l, w_l), fine to coarse."""
        if torch.compiler.is_compiling():
            return list(self.backbone(pixel_values).feature_maps)
        settings = id(self.backbone), self.backbone.config._attn_implementation
        inputs = {"pixel_values": pixel_values}
        return list(self.cache.run("backbone", self._compute, inputs, self.backbone.modules, settings).values())

    def _compute(self, inputs: Tensors) -> Tensors:
        pixels = inputs["pixel_values"]
        maps = self.backbone(pixels).feature_maps if self.forward is None else self.forward(pixels)
        return {str(level): x for level, x in enumerate(maps)}


class GraphedStages:
    """`GDinoModel._stages` from recordings, where nothing but the usual outputs is asked for.

    Args:
        cache: The recordings.
    """

    def __init__(self, cache: GraphCache) -> None:
        self.cache = cache

    def __call__(
        self,
        core: GDinoModel,
        images: GDinoImageFeatures,
        prompts: GDinoTextFeatures,
        targets: Any,
        box_deltas: Any,
        attentions: bool,
        detailed: bool,
    ) -> GDinoModelOutput:
        """Encode, select queries and decode; see `GDinoModel.forward` for arguments and output."""
        heads = _heads(box_deltas)
        unusual = targets is not None or attentions or detailed or heads is None or hasattr(core, "_is_replica")
        if unusual or images.feature_maps[0].device.type != self.cache.recorder.device_type:
            return core._stages(images, prompts, targets, box_deltas, attentions, detailed)
        compute = _Stages(core, images, box_deltas)
        settings = (
            (id(core), *map(id, heads or ())),
            compute.settings,
            requested_backend(),
            core.config._attn_implementation,
        )

        def modules() -> Iterable[nn.Module]:
            yield core
            for child in (*(x for name, x in core.named_children() if name not in _BEFORE), *(heads or ())):
                yield from child.modules()

        text = pad_text(prompts, core.config.max_text_len)
        inputs = {f"map {level}": x for level, x in enumerate(images.feature_maps)}
        inputs |= {f"mask {level}": x for level, x in enumerate(images.masks or ())}
        found = self.cache.run("stages", compute, inputs | text, modules, settings)
        name = "encoder_last_hidden_state_text"
        found[name] = found[name][:, : prompts.position_ids.shape[1]]
        return GDinoModelOutput(**found, text_features=prompts)  # type: ignore[arg-type]


class _Stages:
    """`GDinoModel._stages` as a function of tensors by name, for images of one size."""

    def __init__(self, core: GDinoModel, images: GDinoImageFeatures, box_deltas: Any) -> None:
        self.core, self.box_deltas = core, box_deltas
        self.levels, self.masked = len(images.feature_maps), images.masks is not None
        self.padding_seen = bool(images.padding_seen)
        self.settings = self.levels, self.masked, self.padding_seen, box_deltas is not None
        # The geometry of images without padding is the same for all of one size. A recording reads these tensors, so
        # this object keeps them; those of `image_geometry`'s own cache come and go.
        maps, config = images.feature_maps, core.config
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        sine = config.d_model, config.positional_embedding_temperature
        self.geometry = None if self.masked else image_geometry(shapes, None, *sine, maps[0].device)

    def __call__(self, inputs: Tensors) -> Tensors:
        masks = tuple(inputs[f"mask {level}"] for level in range(self.levels)) if self.masked else None
        images = GDinoImageFeatures(
            feature_maps=tuple(inputs[f"map {level}"] for level in range(self.levels)),
            masks=masks,
            padding_seen=self.padding_seen,
        )
        texts: dict[str, Any] = {name: inputs[name] for name in _TEXT}
        prompts = GDinoTextFeatures(**texts)
        output = self.core._stages(images, prompts, None, self.box_deltas, False, False, self.geometry)
        return {name: x for name, x in output.items() if isinstance(x, Tensor)}


def pad_text(prompts: GDinoTextFeatures, longest: int) -> Tensors:
    """Pad prompts to a multiple of `TEXT_STEP` tokens, which are masked.

    Args:
        prompts: Features of R prompts of T tokens.
        longest: Largest number of tokens that the model accepts.

    Returns:
        The four tensors of the prompts that the stages read, by name, with T' >= T tokens each.
    """
    tokens = prompts.position_ids.shape[1]
    missing = max(min(-tokens % TEXT_STEP, longest - tokens), 0)
    text = {name: getattr(prompts, name) for name in _TEXT}
    if missing == 0:
        return text
    phrases = F.pad(text["phrase_mask"], (0, missing, 0, missing))
    # A token that may attend to none, not even to itself, would become NaN.
    phrases.diagonal(dim1=1, dim2=2)[:, tokens:] = True
    return {
        "last_hidden_state": F.pad(text["last_hidden_state"], (0, 0, 0, missing)),
        "attention_mask": F.pad(text["attention_mask"], (0, missing)),
        "phrase_mask": phrases,
        "position_ids": F.pad(text["position_ids"], (0, missing)),
    }


def _heads(box_deltas: Any) -> list[nn.Module] | None:
    """Return the modules that the function of the box deltas reads; None if that is unknown."""
    if box_deltas is None:
        return []
    owner = getattr(box_deltas, "__self__", None)
    known = isinstance(owner, GDinoForObjectDetection)
    return [owner.bbox_embed] if known and box_deltas == owner._box_deltas else None  # type: ignore[union-attr]
