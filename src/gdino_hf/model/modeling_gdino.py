"""Grounding DINO (Liu et al. 2023, arXiv:2303.05499): an image and a text in, boxes with token scores out.

image backbone, text backbone -> encoder (feature enhancer) -> query selection -> decoder -> box and class heads
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .box_ops import inverse_sigmoid
from .configuration_gdino import GDinoConfig
from .decoder import BoxDeltas, Decoder, DecoderStates
from .denoising import DenoisingQueries, denoising_layout, make_denoising_queries
from .encoder import Encoder, Memory
from .feature_extraction import FeatureExtraction
from .heads import BoxHead, ContrastiveHead
from .image_geometry import ImageGeometry, image_geometry
from .losses import LossWeights, absent_denoising_terms, detection_losses
from .ms_deform_attn import MSDeformAttn
from .msda_hub import allow as allow_hub_kernel
from .output_assembly import detection_output, model_output
from .outputs_gdino import (
    GDinoImageFeatures,
    GDinoModelOutput,
    GDinoObjectDetectionOutput,
    GDinoTextFeatures,
)
from .position_encoding import token_position_embedding
from .pretrained_gdino import GDinoPreTrainedModel, say_attention_is_eager, wants_dict
from .prompt_pairing import check_trainable, pair, required
from .query_selection import SelectedQueries, select_queries
from .targets import OpaqueLabels, Targets, check_replica, compile_from_below, prepare_targets
from .token_blocks import by_blocks


class GDinoModel(FeatureExtraction):
    """The core model, from pixels and tokens to the decoder's output; `GDinoForObjectDetection` adds the heads.

    Args:
        config: The model's configuration.
    """

    # Checkpoints of the whole detector also load into this class, which ignores their heads.
    _keys_to_ignore_on_load_unexpected = [
        *GDinoPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(bbox|class)_embed\.",
    ]

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__(config)
        width = config.d_model
        if config.embedding_init_target or not config.two_stage:
            self.query_position_embeddings = nn.Embedding(config.num_queries, width)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.two_stage:
            self.enc_output = nn.Linear(width, width)
            self.enc_output_norm = nn.LayerNorm(width, config.layer_norm_eps)
            self.encoder_output_bbox_embed = BoxHead(config)
            self.encoder_output_class_embed = ContrastiveHead(config)
        else:
            self.reference_points = nn.Embedding(config.num_queries, 4)
        self.denoising_label_embedding = (
            nn.Embedding(config.denoising_label_embeddings, width) if config.denoising_label_embeddings > 0 else None
        )
        if config.use_hub_kernels:
            allow_hub_kernel()
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.custom_kernels = not config.disable_custom_kernels
        # Backbone parameters that no output depends on. They stay frozen, because data-parallel training would wait for
        # their gradients.
        self.unused_parameters = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        image_features: GDinoImageFeatures | None = None,
        text_features: GDinoTextFeatures | None = None,
        image_indices: Tensor | None = None,
        labels: list[dict[str, Tensor]] | OpaqueLabels | None = None,
        box_deltas: BoxDeltas | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> GDinoModelOutput | tuple:
        """Encode image and text, select queries and decode them. Other arguments: see `GDinoForObjectDetection`.

        Args:
            labels: Training labels, see `GDinoForObjectDetection.forward`; in training mode they add denoising queries.
            box_deltas: Function of a decoder layer's index and its (R, Q, D) query features that returns the deltas by
                which the layer's box head moves the boxes, (R, Q, 4) before the sigmoid. Without it the boxes stay
                where query selection put them.

        Returns:
            The states of every stage.

        Raises:
            TypeError: There is no argument of a given name.
            ValueError: An input is missing, or the numbers of images, prompts and labels do not fit.
        """
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        detailed = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if attentions:
            say_attention_is_eager(config)
        if image_features is None:
            pixels = required(pixel_values, "image", "pixel_values")
            image_features = self._image_features(pixels, pixel_mask, image_sizes, {})
        if text_features is None:
            tokens = required(input_ids, "text", "input_ids")
            text_features = self._checked_text_features(tokens, attention_mask, token_type_ids, {})
        if labels is not None:
            check_trainable(image_features, text_features, image_indices)
        images, prompts = pair(image_features, text_features, image_indices)
        targets = None if labels is None else self._targets(labels, prompts)

        stages = GDinoModel._stages if self.fast_stages is None or torch.compiler.is_compiling() else self.fast_stages
        output = stages(self, images, prompts, targets, box_deltas, attentions, detailed)
        return output if wants_dict(config, return_dict) else output.to_tuple()

    def _stages(
        self,
        images: GDinoImageFeatures,
        prompts: GDinoTextFeatures,
        targets: Targets | None,
        box_deltas: BoxDeltas | None,
        attentions: bool,
        detailed: bool,
        geometry: ImageGeometry | None = None,
    ) -> GDinoModelOutput:
        """Encode, select queries and decode; the geometry is computed unless given."""
        memory = self._encode(images, prompts, attentions, geometry)
        queries, references, selected = self._select_queries(memory, all_boxes=detailed)
        denoises = targets is not None and self.training
        denoising = self._denoising_queries(targets, memory, prompts) if denoises else None
        states = self._decode(queries, references, denoising, memory, box_deltas, attentions, detailed)
        return model_output(memory, selected, states, prompts, self.config.max_text_len, detailed)

    def _encode(
        self,
        images: GDinoImageFeatures,
        prompts: GDinoTextFeatures,
        output_attentions: bool,
        geometry: ImageGeometry | None,
    ) -> Memory:
        """Let image and text features attend to each other in the encoder (3.1)."""
        config, masks = self.config, images.masks
        spatial_shapes = tuple((x.shape[-2], x.shape[-1]) for x in images.feature_maps)
        vision = images.last_hidden_state
        geometry = geometry or image_geometry(
            spatial_shapes, masks, config.d_model, config.positional_embedding_temperature, vision.device
        )
        vision_mask = None if masks is None else geometry.mask
        levels = self.level_embed.to(vision.device)
        positions = [x.to(vision.dtype) + y for x, y in zip(geometry.positions, levels, strict=True)]
        text_positions = token_position_embedding(
            prompts.position_ids, config.d_model, config.text_position_temperature
        ).to(vision.dtype)
        vision_states, text_states, attentions = self.encoder(
            vision,
            prompts.last_hidden_state,
            torch.cat(positions, dim=1),
            text_positions,
            geometry.reference_points,
            spatial_shapes,
            vision_mask,
            prompts.attention_mask,
            prompts.phrase_mask,
            output_attentions,
        )
        # The layers may be spread over several devices.
        return Memory(
            vision=vision_states[-1].to(vision.device),
            text=text_states[-1].to(vision.device),
            vision_states=vision_states,
            text_states=text_states,
            attentions=attentions,
            spatial_shapes=spatial_shapes,
            geometry=geometry,
            vision_mask=vision_mask,
            text_mask=prompts.attention_mask.to(vision.device),
            padding_seen=bool(images.padding_seen),
        )

    def _select_queries(self, memory: Memory, all_boxes: bool) -> tuple[Tensor, Tensor, SelectedQueries | None]:
        """Return the queries' features (R, Q, D), their boxes (R, Q, 4), and what they were selected from (3.2)."""
        rows, selected = memory.vision.shape[0], None
        numbers = torch.arange(self.config.num_queries, device=memory.vision.device)
        if self.config.two_stage:
            geometry = memory.geometry
            selected = select_queries(
                memory.vision,
                geometry.mask.expand(rows, -1),
                geometry.proposals.expand(rows, -1, -1),
                geometry.valid.expand(rows, -1),
                self.config.num_queries,
                lambda x: by_blocks(lambda block: self.enc_output_norm(self.enc_output(block)), x).to(x.device),
                lambda x: self.encoder_output_class_embed(x, memory.text, memory.text_mask, padded=False).to(x.device),
                lambda x: self.encoder_output_bbox_embed(x).to(x.device),
                all_boxes=all_boxes,
            )
            references = selected.box_logits.detach().sigmoid()
        else:
            references = self.reference_points(numbers).float().sigmoid().expand(rows, -1, -1)
        if self.config.embedding_init_target or selected is None:
            return self.query_position_embeddings(numbers).expand(rows, -1, -1), references, selected
        return selected.features.detach(), references, selected

    # What depends on the labels stays outside of compiled graphs: the number of boxes differs from batch to batch, and
    # each new number of an image's boxes would be compiled anew.
    @torch.compiler.disable
    def _targets(self, labels: list[dict[str, Tensor]] | OpaqueLabels, prompts: GDinoTextFeatures) -> Targets:
        """Check and concatenate the labels of the batch."""
        if getattr(self, "_is_replica", False):
            check_replica(labels, len(prompts.phrase_ids))
        return prepare_targets(labels, prompts.phrase_ids, prompts.attention_mask)

    @torch.compiler.disable
    def _denoising_queries(
        self, targets: Targets, memory: Memory, prompts: GDinoTextFeatures
    ) -> DenoisingQueries | None:
        """Return queries made of noisy copies of the labels (DINO, Zhang et al. 2022, 3.3)."""
        return make_denoising_queries(
            targets,
            prompts.phrase_ids,
            memory.text,
            num_denoising_queries=self.config.num_denoising_queries,
            label_noise=self.config.denoising_label_noise,
            box_noise=self.config.denoising_box_noise,
            num_queries=self.config.num_queries,
            label_embedding=self.denoising_label_embedding,
        )

    def _decode(
        self,
        queries: Tensor,
        references: Tensor,
        denoising: DenoisingQueries | None,
        memory: Memory,
        box_deltas: BoxDeltas | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> DecoderStates:
        """Refine denoising and matching queries and their boxes layer by layer (3.3)."""
        if denoising is not None:
            queries = torch.cat((denoising.content, queries), dim=1)
            references = torch.cat((denoising.reference_points, references), dim=1)
        return self.decoder(
            queries,
            references,
            memory.vision,
            memory.text,
            memory.geometry.valid_ratios,
            memory.spatial_shapes,
            memory.vision_mask,
            memory.text_mask,
            None if denoising is None else denoising.attention_mask,
            box_deltas,
            scale_positions=memory.padding_seen,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class GDinoForObjectDetection(GDinoPreTrainedModel):
    """Grounding DINO with box and class heads, which detects whatever the prompt names.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__(config)
        self.model = GDinoModel(config)
        num_box_heads = 1 if config.decoder_bbox_embed_share else config.decoder_layers
        num_class_heads = 1 if config.decoder_cls_embed_share else config.decoder_layers
        self.bbox_embed = nn.ModuleList(BoxHead(config) for _ in range(num_box_heads))
        self.class_embed = nn.ModuleList(ContrastiveHead(config) for _ in range(num_class_heads))
        if config.two_stage and config.two_stage_bbox_embed_share:
            self._tied_weights_keys = {"model.encoder_output_bbox_embed": "bbox_embed.0"}
        # Some programs store a copy of a shared head for every layer.
        shared = {"bbox": config.decoder_bbox_embed_share, "class": config.decoder_cls_embed_share}
        copies = [rf"^{name}_embed\.[1-9]\d*\." for name, is_shared in shared.items() if is_shared]
        self._keys_to_ignore_on_load_unexpected = [*self._keys_to_ignore_on_load_unexpected, *copies]
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compute image features that can be used with any number of prompts; see `GDinoModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values, pixel_mask, image_sizes, output_attentions, output_hidden_states, return_dict
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
        """Compute text features that can be used with any number of images; see `GDinoModel.get_text_features`."""
        return self.model.get_text_features(
            input_ids, attention_mask, token_type_ids, output_attentions, output_hidden_states, return_dict
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        image_features: GDinoImageFeatures | None = None,
        text_features: GDinoTextFeatures | None = None,
        image_indices: Tensor | None = None,
        labels: list[dict[str, Tensor]] | OpaqueLabels | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> GDinoObjectDetectionOutput | tuple:
        """Detect the objects that the prompts name; with `labels`, also compute the loss.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.
            input_ids: (R, T) tokens of the prompts. R is B, or 1 for one prompt for all images, or any number if
                image_indices is given.
            attention_mask: (R, T) mask, nonzero on real tokens; None if all are real.
            token_type_ids: (R, T) segment of each token; zeros if None.
            pixel_mask: (B, H, W) mask, nonzero on real pixels; None if all are real.
            image_sizes: (height, width) in pixels of each image in the padded batch, which keeps padding from changing
                any result. The processor returns it. See `get_image_features`.
            image_features: Output of `get_image_features`, instead of pixel_values.
            text_features: Output of `get_text_features`, instead of input_ids.
            image_indices: (R,) int64 index of each prompt's image, needed if long label lists take several prompts.
            labels: One dict per image with "class_labels", (N,) int64 index of each box's label in the image's prompt,
                and "boxes", (N, 4) cxcywh in [0, 1]. N may be 0.
            output_attentions: Whether to return the attention weights of encoder and decoder, too. Attention is then
                computed eagerly, whatever `attn_implementation` says. The configuration decides if None.
            output_hidden_states: Whether to return the states of every layer of encoder and decoder and all proposals,
                too. The configuration decides if None.
            return_dict: Whether to return an output object or a tuple. The configuration decides if None.

        Returns:
            Token logits, boxes, and the loss if labels were given.

        Raises:
            TypeError: There is no argument of a given name.
            ValueError: An input is missing, the numbers of images and prompts do not fit, or a label does not fit its
                image.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            pixel_mask=pixel_mask,
            image_sizes=image_sizes,
            image_features=image_features,
            text_features=text_features,
            image_indices=image_indices,
            labels=labels,
            box_deltas=self._box_deltas,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits, boxes = self._predict(outputs, all_layers=labels is not None)
        loss, loss_dict, num_denoising = None, None, 0
        if labels is not None:
            loss, loss_dict, num_denoising = self._loss(outputs, labels, logits, boxes)
        auxiliary = labels is not None and self.config.auxiliary_loss
        result = detection_output(outputs, logits, boxes, loss, loss_dict, auxiliary, num_denoising)
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    def _box_deltas(self, layer: int, queries: Tensor) -> Tensor:
        """Return by how much a decoder layer's box head moves the boxes of its queries, before the sigmoid."""
        return self.bbox_embed[layer if len(self.bbox_embed) > 1 else 0](queries)

    def _predict(self, outputs: GDinoModelOutput, all_layers: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return token logits (R, Q, max_text_len) and boxes (R, Q, 4) of all decoder layers or only the last."""
        num_layers, shared = self.config.decoder_layers, len(self.class_embed) == 1
        text, text_mask = outputs.encoder_last_hidden_state_text, outputs.text_features.attention_mask
        logits, boxes = [], []
        for layer in range(num_layers) if all_layers else [num_layers - 1]:
            hidden = outputs.intermediate_hidden_states[:, layer]
            start = inverse_sigmoid(outputs.input_reference_points[:, layer], self.config.inverse_sigmoid_eps)
            logits.append(self.class_embed[0 if shared else layer](hidden, text, text_mask).to(hidden.device))
            boxes.append((self._box_deltas(layer, hidden).to(start.device, torch.float32) + start).sigmoid())
        return logits, boxes

    @torch.compiler.disable
    def _loss(
        self,
        outputs: GDinoModelOutput,
        labels: list[dict[str, Tensor]] | OpaqueLabels,
        logits: list[Tensor],
        boxes: list[Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """Return the training loss, its unweighted terms by name, and the number of denoising queries."""
        prompts, config = outputs.text_features, self.config
        # The core model has checked the labels. They are prepared again because only tensors may travel in outputs:
        # DataParallel and accelerate cannot gather anything else.
        targets = prepare_targets(labels, prompts.phrase_ids, prompts.attention_mask, check=False)
        denoising = denoising_layout(targets, config.num_denoising_queries) if self.training else None
        num_denoising = 0 if denoising is None else denoising.num_queries
        loss, terms = detection_losses(
            LossWeights.from_config(config),
            targets,
            phrase_ids=prompts.phrase_ids,
            attention_mask=prompts.attention_mask,
            decoder_logits=torch.stack(logits),
            decoder_boxes=torch.stack(boxes),
            encoder_logits=outputs.encoder_logits,
            encoder_boxes=outputs.encoder_pred_boxes,
            denoising=denoising,
            region_embeddings=outputs.last_hidden_state[:, num_denoising:],
            text_embeddings=outputs.encoder_last_hidden_state_text,
            input_ids=prompts.input_ids,
        )
        if self.training and denoising is None and config.num_denoising_queries > 0:
            terms |= absent_denoising_terms(terms)
            table = self.model.denoising_label_embedding
            if table is not None:
                # Without boxes in the batch the table would get no gradient at all, and data-parallel training would
                # hang.
                loss = loss + 0.0 * table.weight.sum()
        return loss, terms, num_denoising


compile_from_below(GDinoForObjectDetection.get_image_features)
