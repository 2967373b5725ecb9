"""From pixels and tokens to the features that the encoder reads: both backbones and their projections."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import (
    Backbone,
    check_image_sizes,
    check_pixels,
    input_projections,
    project,
    project_by_size,
    resize_mask,
)
from .configuration_gdino import GDinoConfig
from .outputs_gdino import GDinoImageFeatures, GDinoTextFeatures
from .phrase_structure import phrase_structure
from .pretrained_gdino import GDinoPreTrainedModel, wants_dict
from .targets import compile_from_below
from .text_backbone import build_text_backbone, check_tokens, first_position


class FeatureExtraction(GDinoPreTrainedModel):
    """The part of `GDinoModel` that processes images and prompts separately, so its features can be reused.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: GDinoConfig) -> None:
        config.settle_backbone()
        super().__init__(config)
        self.backbone = Backbone(config)
        self.input_proj_vision = input_projections(self.backbone.channels, config.num_feature_levels, config.d_model)
        self.text_backbone = build_text_backbone(config)
        self.text_projection = nn.Linear(self.text_backbone.config.hidden_size, config.d_model)
        # Added to the position embedding of each level.
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))
        self._text_arguments = set(inspect.signature(self.text_backbone.forward).parameters)
        # A cache of text features by prompt, which gdino_hf.inference sets: an object whose get(model, input_ids,
        # attention_mask, token_type_ids) returns GDinoTextFeatures. Not used under torch.compile.
        self.text_feature_cache: Any = None
        # A faster way to run `GDinoModel._stages`, called with the model and that method's arguments, which
        # gdino_hf.inference sets. Not used under torch.compile.
        self.fast_stages: Callable[..., Any] | None = None

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the text backbone."""
        return self.text_backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the text backbone, as `resize_token_embeddings` does.

        Args:
            value: Embeddings of the text backbone's width.
        """
        self.text_backbone.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compute image features that can be used with any number of prompts.

        Published models let the padding of a batch reach the backbone, so an image's features depend on the other
        images in its batch. With image_sizes they do not: a batch gives the same results as single images.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.
            pixel_mask: (B, H, W) mask, nonzero on real pixels; None if all are real. Padding reaches the backbone.
            image_sizes: (B, 2) int64 tensor or list of pairs, the (height, width) in pixels of each image, which must
                be at the top left of its padded batch. If given, pixel_mask is ignored. If a module that contains the
                model is compiled, give a list: reading a tensor's values there breaks the graph.
            output_attentions: Whether to return the backbone's attention weights, too, which the attention
                implementation "eager" has. The configuration decides if None.
            output_hidden_states: Whether to return the states of the backbone's stages, too. The configuration decides
                if None. Images of several sizes have none, since the backbone runs once per size.
            return_dict: Whether to return an output object, as forward requires it, or a tuple. The configuration
                decides if None.

        Returns:
            `GDinoImageFeatures`: the feature maps, projected to the model's width, and their masks.

        Raises:
            ValueError: pixel_values is not (B, 3, H, W) with B at least 1, masks or image sizes do not fit it, or an
                argument requests the backbone's states of images of several sizes.
        """
        if isinstance(image_sizes, Tensor):
            # One copy from the device, instead of one for each number.
            image_sizes = image_sizes.tolist()
        requests = self._requests(output_attentions, output_hidden_states)
        if requests and image_sizes is not None and len({tuple(size) for size in image_sizes}) > 1:
            if output_attentions or output_hidden_states:
                raise ValueError(
                    f"{' and '.join(requests)} with image_sizes {image_sizes}: the backbone runs once per size, so it "
                    "has no states of the whole batch; give images of one size, or pixel_mask instead of image_sizes."
                )
            requests = {}
        features = self._image_features(pixel_values, pixel_mask, image_sizes, requests)
        return features if wants_dict(self.config, return_dict) else features.to_tuple()

    def _requests(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        """Return the keyword arguments that make a backbone return what the caller or the configuration requests."""
        config = self.config
        wanted = {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
        }
        return {name: True for name, value in wanted.items() if value}

    def _image_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None,
        requests: Mapping[str, bool],
    ) -> GDinoImageFeatures:
        """Compute image features; see `get_image_features`."""
        check_pixels(pixel_values, pixel_mask, getattr(self.config.backbone_config, "num_channels", 3))
        pixel_values = pixel_values.to(self.level_embed.dtype)
        if isinstance(image_sizes, Tensor):
            image_sizes = image_sizes.tolist()
        outputs: list[Any] = []
        backbone = partial(self.backbone.record, outputs, requests) if requests else self.backbone
        masks: tuple[Tensor, ...] | None = None
        padding_seen = pixel_mask is not None and image_sizes is None
        if image_sizes is not None and not check_image_sizes(image_sizes, pixel_values):
            maps, maps_real = project_by_size(backbone, self.input_proj_vision, pixel_values, image_sizes)
            features, masks = tuple(maps), tuple(maps_real)
        else:
            features = tuple(project(backbone, self.input_proj_vision, pixel_values))
        if pixel_mask is not None and padding_seen:
            masks = tuple(resize_mask(pixel_mask, (x.shape[-2], x.shape[-1])) for x in features)
        return GDinoImageFeatures(
            feature_maps=features, masks=masks, padding_seen=padding_seen, **_requested(requests, outputs)
        )

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compute text features that can be used with any number of images.

        Args:
            input_ids: (R, T) tokens of prompts of the form "[CLS] label . label . [SEP]".
            attention_mask: (R, T) mask, nonzero on real tokens; None if all are real.
            token_type_ids: (R, T) segment of each token; zeros if None.
            output_attentions: Whether to return the text backbone's attention weights, too, which the attention
                implementation "eager" has. The configuration decides if None.
            output_hidden_states: Whether to return the states of the text backbone's layers, too. The configuration
                decides if None.
            return_dict: Whether to return an output object, as forward requires it, or a tuple. The configuration
                decides if None.

        Returns:
            `GDinoTextFeatures`: the features, projected to the model's width, and the phrases of each prompt.

        Raises:
            ValueError: T is larger than config.max_text_len, or a shape is wrong.
        """
        requests = self._requests(output_attentions, output_hidden_states)
        features = self._checked_text_features(input_ids, attention_mask, token_type_ids, requests)
        return features if wants_dict(self.config, return_dict) else features.to_tuple()

    def _checked_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        requests: Mapping[str, bool],
    ) -> GDinoTextFeatures:
        """Compute text features or take them from the cache; see `get_text_features`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_tokens(input_ids, attention_mask, self.config.max_text_len)
        if self.text_feature_cache is not None and not requests and not torch.compiler.is_compiling():
            return self.text_feature_cache.get(self, input_ids, attention_mask, token_type_ids)
        return self._text_features(input_ids, attention_mask, token_type_ids, requests)

    def _text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None,
        requests: Mapping[str, bool] = MappingProxyType({}),
    ) -> GDinoTextFeatures:
        """Compute text features without the cache, letting tokens attend within their own phrase only (3.4)."""
        phrases = phrase_structure(input_ids, attention_mask, self.config.special_token_ids)
        dtype = self.level_embed.dtype
        blocked = torch.zeros_like(phrases.phrase_mask, dtype=dtype)
        blocked = blocked.masked_fill(~phrases.phrase_mask, torch.finfo(dtype).min)[:, None]
        arguments: dict[str, Any] = {"attention_mask": blocked, **requests}
        if "position_ids" in self._text_arguments:
            arguments["position_ids"] = phrases.position_ids + first_position(self.text_backbone)
        if "token_type_ids" in self._text_arguments:
            arguments["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        outputs = self.text_backbone(input_ids=input_ids, **arguments)
        return GDinoTextFeatures(
            last_hidden_state=self.text_projection(outputs.last_hidden_state),
            input_ids=input_ids,
            attention_mask=attention_mask.bool(),
            phrase_ids=phrases.phrase_ids,
            phrase_mask=phrases.phrase_mask,
            position_ids=phrases.position_ids,
            **_requested(requests, [outputs]),
        )


def _requested(requests: Mapping[str, bool], outputs: Sequence[Any]) -> dict[str, Any]:
    """Return the fields that were requested of a backbone's output by name, None where it has none of them."""
    names = [name.removeprefix("output_") for name in requests]
    return {name: getattr(output, name, None) or None for output in outputs for name in names}


compile_from_below(FeatureExtraction.get_image_features)
