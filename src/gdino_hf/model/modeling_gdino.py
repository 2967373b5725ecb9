"""Grounding DINO (Liu et al. 2023, arXiv:2303.05499): an image and a text in, boxes with token scores out.

backbone + text backbone -> encoder (fusion, text enhancer, deformable) -> query selection -> decoder -> heads
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, check_image_sizes, input_projections, project, project_by_size, resize_mask
from .box_ops import inverse_sigmoid
from .configuration_gdino import GDinoConfig
from .decoder import Decoder
from .denoising import make_denoising_queries
from .encoder import Encoder
from .heads import BoxHead, ContrastiveHead
from .image_geometry import image_geometry
from .losses import detection_losses
from .ms_deform_attn import MSDeformAttn
from .msda_hub import allow as allow_hub_kernel
from .outputs_gdino import GDinoImageFeatures, GDinoModelOutput, GDinoObjectDetectionOutput, GDinoTextFeatures
from .phrase_structure import phrase_structure
from .position_encoding import token_position_embedding
from .pretrained_gdino import GDinoPreTrainedModel
from .prompt_pairing import check_trainable, pair
from .query_selection import select_queries
from .targets import prepare_targets
from .text_backbone import build_text_backbone, first_position
from .token_blocks import by_blocks


class GDinoModel(GDinoPreTrainedModel):
    """Everything up to the decoder's hidden states; `GDinoForObjectDetection` puts the heads on top.

    Args:
        config: The architecture.
    """

    # Checkpoints of the whole detector load here too; the heads are not this class's business.
    _keys_to_ignore_on_load_unexpected = [
        *GDinoPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(bbox|class)_embed\.",
    ]

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__(config)
        width = config.d_model
        self.backbone = Backbone(config)
        self.input_proj_vision = input_projections(self.backbone.channels, config.num_feature_levels, width)
        self.text_backbone = build_text_backbone(config)
        # Set by gdino_hf.inference, which keeps the features of recent prompts.
        self._prompts: Any = None
        self._text_arguments = set(inspect.signature(self.text_backbone.forward).parameters)
        self.text_projection = nn.Linear(self.text_backbone.config.hidden_size, width)
        if config.embedding_init_target or not config.two_stage:
            self.query_position_embeddings = nn.Embedding(config.num_queries, width)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, width))
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
        self._choose_kernels()
        # Parts of the backbones that nothing reads: waiting for their gradients would stall data-parallel training.
        self._never_trained = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self.post_init()

    def _choose_kernels(self) -> None:
        if self.config.use_hub_kernels:
            allow_hub_kernel()
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.custom_kernels = not self.config.disable_custom_kernels

    def get_input_embeddings(self) -> nn.Module:
        """The text backbone's token embeddings."""
        return self.text_backbone.get_input_embeddings()

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> GDinoImageFeatures:
        """Run the image side up to the encoder, once for any number of prompts.

        Published models let a backbone see the padding of a batch, so an image's features depend on its neighbours.
        With image_sizes they do not: a batch gives what single images give.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.
            pixel_mask: (B, H, W), nonzero on real pixels; all are if None. Padding reaches the backbone.
            image_sizes: (height, width) of each image, which stands at the top left; takes the place of pixel_mask.

        Returns:
            The projected feature maps and their masks.

        Raises:
            ValueError: pixel_values is not (B, 3, H, W), B at least 1, or masks or sizes of images do not fit it.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}; add a batch axis.")
        channels = getattr(self.config.backbone_config, "num_channels", 3)
        if pixel_values.shape[0] == 0 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must hold at least one image of {channels} channels, got {tuple(pixel_values.shape)}; "
                "let the processor convert images."
            )
        if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
            raise ValueError(
                f"pixel_mask is {tuple(pixel_mask.shape)} but pixel_values is {tuple(pixel_values.shape)}; give one "
                "(H, W) mask per image."
            )
        pixel_values = pixel_values.to(self.level_embed.dtype)
        if image_sizes is not None and not check_image_sizes(image_sizes, pixel_values):
            maps, maps_real = project_by_size(self.backbone, self.input_proj_vision, pixel_values, image_sizes)
            return GDinoImageFeatures(feature_maps=tuple(maps), masks=tuple(maps_real), padding_seen=False)
        features = tuple(project(self.backbone, self.input_proj_vision, pixel_values))
        if pixel_mask is None or image_sizes is not None:
            return GDinoImageFeatures(feature_maps=features, padding_seen=False)
        masks = tuple(resize_mask(pixel_mask, (x.shape[-2], x.shape[-1])) for x in features)
        return GDinoImageFeatures(feature_maps=features, masks=masks, padding_seen=True)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> GDinoTextFeatures:
        """Run the text side up to the encoder, once for any number of images.

        Args:
            input_ids: (R, T) tokens of prompts "[CLS] label . label . [SEP]".
            attention_mask: (R, T), nonzero on real tokens; all are if None.
            token_type_ids: (R, T); zeros if None.

        Returns:
            The projected features and the phrases.

        Raises:
            ValueError: T is larger than config.max_text_len, or a shape is wrong.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (R, T) with at least one prompt, got {tuple(input_ids.shape)}.")
        if input_ids.shape[1] > self.config.max_text_len:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens but max_text_len is {self.config.max_text_len}; let the "
                "processor split the labels into chunks, or give fewer labels."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)} but input_ids is {tuple(input_ids.shape)}; give one "
                "number per token."
            )
        if self._prompts is not None and not torch.compiler.is_compiling():
            return self._prompts.get(self, input_ids, attention_mask, token_type_ids)
        return self._text_features(input_ids, attention_mask, token_type_ids)

    def _text_features(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> GDinoTextFeatures:
        real = attention_mask.bool()
        phrases = phrase_structure(input_ids, attention_mask, self.config.special_token_ids)
        dtype = self.level_embed.dtype
        blocked = torch.zeros_like(phrases.phrase_mask, dtype=dtype)
        blocked = blocked.masked_fill(~phrases.phrase_mask, torch.finfo(dtype).min)[:, None]
        arguments: dict[str, Any] = {"attention_mask": blocked}
        if "position_ids" in self._text_arguments:
            arguments["position_ids"] = phrases.position_ids + first_position(self.text_backbone)
        if "token_type_ids" in self._text_arguments:
            arguments["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.text_backbone(input_ids=input_ids, **arguments).last_hidden_state
        return GDinoTextFeatures(
            last_hidden_state=self.text_projection(hidden),
            input_ids=input_ids,
            attention_mask=real,
            phrase_ids=phrases.phrase_ids,
            phrase_mask=phrases.phrase_mask,
            position_ids=phrases.position_ids,
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        image_features: GDinoImageFeatures | None = None,
        text_features: GDinoTextFeatures | None = None,
        image_indices: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        box_heads: nn.ModuleList | list[nn.Module] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GDinoModelOutput | tuple:
        """Encode, select queries, decode.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.
            input_ids: (R, T) tokens of the prompts. R is B, or 1 for one prompt for all images, or any number with
                image_indices.
            attention_mask: (R, T), nonzero on real tokens.
            token_type_ids: (R, T).
            pixel_mask: (B, H, W), nonzero on real pixels.
            image_sizes: (height, width) of each image in the padded batch; see `get_image_features`.
            image_features: What `get_image_features` returned, instead of pixel_values.
            text_features: What `get_text_features` returned, instead of input_ids.
            image_indices: (R,) int64 image of each prompt, where prompts are chunks of long label lists.
            labels: As in `GDinoForObjectDetection.forward`; in training they bring denoising queries.
            box_heads: One box head per decoder layer; None leaves the references where they are.
            output_hidden_states: Also return the encoder's states and all proposals.
            return_dict: False returns a tuple.

        Returns:
            The states of every stage.

        Raises:
            ValueError: An input is missing or numbers of images and prompts do not go together.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if image_features is None:
            if pixel_values is None:
                raise ValueError("There is no image: give pixel_values or image_features.")
            image_features = self.get_image_features(pixel_values, pixel_mask, image_sizes)
        if text_features is None:
            if input_ids is None:
                raise ValueError("There is no text: give input_ids or text_features.")
            text_features = self.get_text_features(input_ids, attention_mask, token_type_ids)
        targets = None
        if labels is not None:
            check_trainable(image_features, text_features, image_indices)
            text_features = pair(image_features, text_features, None)[1]
            targets = prepare_targets(labels, text_features.phrase_ids, text_features.attention_mask)
        image_features, text_features = pair(image_features, text_features, image_indices)

        maps, masks = image_features.feature_maps, image_features.masks
        text_mask = text_features.attention_mask
        spatial_shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        vision = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        geometry = image_geometry(
            spatial_shapes,
            masks,
            self.config.d_model,
            self.config.positional_embedding_temperature,
            vision.device,
        )
        vision_mask = None if masks is None else geometry.mask
        positions = torch.cat(
            [x.to(vision.dtype) + level for x, level in zip(geometry.positions, self.level_embed, strict=True)], dim=1
        )
        text_positions = token_position_embedding(
            text_features.position_ids, self.config.d_model, self.config.text_position_temperature
        ).to(vision.dtype)
        vision, text, vision_states, text_states = self.encoder(
            vision,
            text_features.last_hidden_state,
            positions,
            text_positions,
            geometry.reference_points,
            spatial_shapes,
            vision_mask,
            text_mask,
            text_features.phrase_mask,
        )

        rows, selected = vision.shape[0], None
        if self.config.two_stage:
            selected = select_queries(
                vision,
                geometry.mask.expand(rows, -1),
                geometry.proposals.expand(rows, -1, -1),
                geometry.valid.expand(rows, -1),
                self.config.num_queries,
                lambda x: by_blocks(lambda block: self.enc_output_norm(self.enc_output(block)), x),
                lambda x: self.encoder_output_class_embed.scores(x, text, text_mask),
                self.encoder_output_bbox_embed,
                all_boxes=output_hidden_states,
            )
            references = selected.box_logits.detach().sigmoid()
        else:
            references = self.reference_points.weight.float().sigmoid().expand(rows, -1, -1)
        if self.config.embedding_init_target or selected is None:
            queries = self.query_position_embeddings.weight.expand(rows, -1, -1)
        else:
            queries = selected.features.detach()

        denoising = None
        if self.training and targets is not None:
            denoising = make_denoising_queries(
                targets,
                text_features.phrase_ids,
                text,
                num_denoising_queries=self.config.num_denoising_queries,
                label_noise=self.config.denoising_label_noise,
                box_noise=self.config.denoising_box_noise,
                num_queries=self.config.num_queries,
                label_embedding=self.denoising_label_embedding,
            )
        if denoising is not None:
            queries = torch.cat((denoising.content, queries), dim=1)
            references = torch.cat((denoising.reference_points, references), dim=1)
        states = self.decoder(
            queries,
            references,
            vision,
            text,
            geometry.valid_ratios,
            spatial_shapes,
            vision_mask,
            text_mask,
            None if denoising is None else denoising.attention_mask,
            box_heads,
            scale_positions=bool(image_features.padding_seen),
        )
        output = GDinoModelOutput(
            last_hidden_state=states.last_hidden_state,
            init_reference_points=references,
            intermediate_hidden_states=torch.stack(states.hidden_states, dim=1),
            intermediate_reference_points=torch.stack(states.output_references, dim=1),
            input_reference_points=torch.stack(states.input_references, dim=1),
            encoder_last_hidden_state_vision=vision,
            encoder_last_hidden_state_text=text,
            text_features=text_features,
            denoising=denoising,
        )
        if selected is not None:
            output.encoder_logits = self.encoder_output_class_embed.pad(selected.logits)
            output.encoder_pred_boxes = selected.box_logits.sigmoid()
        if output_hidden_states:
            output.encoder_vision_hidden_states = (*vision_states, vision)
            output.encoder_text_hidden_states = (*text_states, text)
            if selected is not None:
                output.enc_outputs_class = self.encoder_output_class_embed.pad(selected.all_logits)
                output.enc_outputs_coord_logits = selected.all_box_logits
        return output if return_dict is not False else output.to_tuple()


class GDinoForObjectDetection(GDinoPreTrainedModel):
    """Grounding DINO with its box and contrastive heads: detection of whatever the prompt names.

    Args:
        config: The architecture, the loss and the denoising.
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
        # Some writers store a copy of a shared head for every layer.
        copies = [
            rf"^{name}\.[1-9]\d*\."
            for name, shared in (
                ("bbox_embed", config.decoder_bbox_embed_share),
                ("class_embed", config.decoder_cls_embed_share),
            )
            if shared
        ]
        self._keys_to_ignore_on_load_unexpected = [*self._keys_to_ignore_on_load_unexpected, *copies]
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> GDinoImageFeatures:
        """See `GDinoModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_mask, image_sizes)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> GDinoTextFeatures:
        """See `GDinoModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask, token_type_ids)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        image_features: GDinoImageFeatures | None = None,
        text_features: GDinoTextFeatures | None = None,
        image_indices: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GDinoObjectDetectionOutput | tuple:
        """Detect, and with labels compute the loss.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.
            input_ids: (R, T) tokens of the prompts. R is B, or 1 for one prompt for all images, or any number with
                image_indices.
            attention_mask: (R, T), nonzero on real tokens; all are if None.
            token_type_ids: (R, T); zeros if None.
            pixel_mask: (B, H, W), nonzero on real pixels; all are if None.
            image_sizes: (height, width) of each image in the padded batch, so that padding changes nothing; the
                processor gives them. See `get_image_features`.
            image_features: What `get_image_features` returned, instead of pixel_values.
            text_features: What `get_text_features` returned, instead of input_ids.
            image_indices: (R,) int64 image of each prompt, where prompts are chunks of long label lists.
            labels: Per image {"class_labels": (N,) int64 index into the image's own labels, "boxes": (N, 4) cxcywh in
                [0, 1]}; N may be 0.
            output_hidden_states: Also return the encoder's states and all proposals.
            return_dict: False returns a tuple.

        Returns:
            Token logits, boxes, and with labels the loss.

        Raises:
            ValueError: An input is missing, numbers of images and prompts do not go together, or a label does not fit
                its image.
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
            box_heads=_per_layer(self.bbox_embed, self.config.decoder_layers),
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        prompts, denoising = outputs.text_features, outputs.denoising
        num_layers = self.config.decoder_layers
        # Without a loss to compute, only the last layer speaks.
        wanted = range(num_layers) if labels is not None else [num_layers - 1]
        predictions = [self._predict(outputs, layer) for layer in wanted]
        num_denoising = 0 if denoising is None else denoising.num_queries
        logits, pred_boxes = predictions[-1]

        result = GDinoObjectDetectionOutput(
            logits=logits[:, num_denoising:],
            pred_boxes=pred_boxes[:, num_denoising:],
            last_hidden_state=outputs.last_hidden_state[:, num_denoising:],
            init_reference_points=outputs.init_reference_points[:, num_denoising:],
            intermediate_hidden_states=outputs.intermediate_hidden_states[:, :, num_denoising:],
            intermediate_reference_points=outputs.intermediate_reference_points[:, :, num_denoising:],
            encoder_last_hidden_state_vision=outputs.encoder_last_hidden_state_vision,
            encoder_last_hidden_state_text=outputs.encoder_last_hidden_state_text,
            encoder_vision_hidden_states=outputs.encoder_vision_hidden_states,
            encoder_text_hidden_states=outputs.encoder_text_hidden_states,
            encoder_logits=outputs.encoder_logits,
            encoder_pred_boxes=outputs.encoder_pred_boxes,
            enc_outputs_class=outputs.enc_outputs_class,
            enc_outputs_coord_logits=outputs.enc_outputs_coord_logits,
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
        )
        if labels is not None:
            layer_logits = torch.stack([x for x, _ in predictions])
            layer_boxes = torch.stack([x for _, x in predictions])
            targets = prepare_targets(labels, prompts.phrase_ids, prompts.attention_mask)
            result.loss, result.loss_dict = detection_losses(
                self.config,
                targets,
                phrase_ids=prompts.phrase_ids,
                attention_mask=prompts.attention_mask,
                decoder_logits=layer_logits[:, :, num_denoising:],
                decoder_boxes=layer_boxes[:, :, num_denoising:],
                encoder_logits=outputs.encoder_logits,
                encoder_boxes=outputs.encoder_pred_boxes,
                denoising=denoising,
                denoising_logits=None if denoising is None else layer_logits[:, :, :num_denoising],
                denoising_boxes=None if denoising is None else layer_boxes[:, :, :num_denoising],
                region_embeddings=result.last_hidden_state,
                text_embeddings=outputs.encoder_last_hidden_state_text,
                input_ids=prompts.input_ids,
            )
            table = self.model.denoising_label_embedding
            if self.training and denoising is None and table is not None:
                # A batch without boxes must still give the table its (zero) gradient, or data-parallel training hangs.
                result.loss = result.loss + 0.0 * table.weight.sum()
            if self.config.auxiliary_loss:
                result.auxiliary_outputs = [
                    {"logits": x[:, num_denoising:], "pred_boxes": y[:, num_denoising:]} for x, y in predictions[:-1]
                ]
        return result if return_dict is not False else result.to_tuple()

    def _predict(self, outputs: GDinoModelOutput, layer: int) -> tuple[Tensor, Tensor]:
        """Token logits (R, Q, max_text_len) and boxes (R, Q, 4) of one decoder layer."""
        hidden = outputs.intermediate_hidden_states[:, layer]
        class_head = _per_layer(self.class_embed, self.config.decoder_layers)[layer]
        box_head = _per_layer(self.bbox_embed, self.config.decoder_layers)[layer]
        prompts = outputs.text_features
        logits = class_head(hidden, outputs.encoder_last_hidden_state_text, prompts.attention_mask)
        start = inverse_sigmoid(outputs.input_reference_points[:, layer], self.config.inverse_sigmoid_eps)
        return logits, (box_head(hidden).float() + start).sigmoid()


def _per_layer(heads: nn.ModuleList, num_layers: int) -> list[nn.Module]:
    return [heads[0] if len(heads) == 1 else heads[layer] for layer in range(num_layers)]
