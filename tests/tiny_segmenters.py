"""Tiny segmenters of transformers with seeded random weights, and the masks that calling them by hand gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
)

SIDE = 64
_PROMPT = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
_DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
_PADDED = {
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "num_pos_feats": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {**_PROMPT, "image_embedding_size": 8},
    "mask_decoder_config": _DECODER,
}
_SAM2 = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 12,
            "image_size": [SIDE, SIDE],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [12, 24, 48, 96],
            "num_attention_heads_per_stage": [1, 1, 2, 4],
            "window_size_per_stage": [4, 2, 2, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [96, 48, 24, 12],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {**_PROMPT, "patch_size": 16},
    "mask_decoder_config": _DECODER,
}
# transformers reads memories of 64 channels, whatever the config says, and of less than the hidden size alone.
_SAM2_VIDEO = {
    "vision_config": {**_SAM2["vision_config"], "fpn_hidden_size": 128},
    "prompt_encoder_config": {**_SAM2["prompt_encoder_config"], "hidden_size": 128},
    "mask_decoder_config": {**_DECODER, "hidden_size": 128},
    "image_size": SIDE,
    "memory_attention_hidden_size": 128,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
    "memory_fuser_intermediate_dim": 64,
    "num_maskmem": 3,
    "max_object_pointers_in_encoder": 5,
}
_SAM3 = {
    "vision_config": {
        "model_type": "sam3_vision_model",
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "pretrain_image_size": SIDE,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "prompt_encoder_config": _PROMPT,
    "mask_decoder_config": _DECODER,
}
_PARTS = {
    "sam": (SamConfig, SamModel, _PADDED),
    "sam_hq": (SamHQConfig, SamHQModel, {**_PADDED, "mask_decoder_config": {**_DECODER, "vit_dim": 32}}),
    "sam2": (Sam2Config, Sam2Model, _SAM2),
    "sam3_tracker": (Sam3TrackerConfig, Sam3TrackerModel, _SAM3),
}
KINDS = tuple(_PARTS)


def make_segmenter(kind, seed=0):
    """A model in eval mode whose masks depend on the picture and on the box."""
    config, model, values = _PARTS[kind]
    torch.manual_seed(seed)
    return _shaken(model(config(**json.loads(json.dumps(values)))).eval())


def _shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_segmenter(kind, folder, seed=0):
    """Save a model with the file of its processor's settings, as checkpoints on the Hub have it; returns the folder."""
    folder = Path(folder)
    make_segmenter(kind, seed).save_pretrained(folder)
    half = kind == "sam3_tracker"
    settings = {
        "image_mean": [0.5] * 3 if half else [0.485, 0.456, 0.406],
        "image_std": [0.5] * 3 if half else [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
    }
    if kind.startswith("sam_") or kind == "sam":
        settings |= {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
        settings |= {"image_processor_type": "SamImageProcessor"}
    else:
        settings |= {"size": {"height": SIDE, "width": SIDE}}
        settings |= {"image_processor_type": "Sam3ImageProcessor" if half else "Sam2ImageProcessor"}
    processor = {"sam": "SamProcessor", "sam_hq": "SamHQProcessor", "sam2": "Sam2Processor"}
    settings["processor_class"] = processor.get(kind, "Sam3TrackerProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def by_hand(model, folder, image, boxes):
    """The logits, (N, height, width), that transformers' processor and model give for boxes, in one call.

    Without torchvision, which the processors of SAM 2 and SAM 3 need, their steps are written out.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    height, width = image.height, image.width
    if type(model).__name__.startswith(("SamModel", "SamHQ")) or is_torchvision_available():
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(images=image, input_boxes=[np.asarray(boxes).tolist()], return_tensors="pt")
        sizes = [inputs.pop("original_sizes")]
        sizes += [inputs.pop("reshaped_input_sizes")] if "reshaped_input_sizes" in inputs else []
        with torch.no_grad():
            made = model(**inputs, multimask_output=False)
        return processor.post_process_masks(made.pred_masks, *sizes, binarize=False)[0][:, 0].numpy()
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True).float() / 255
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    scaled = torch.tensor(np.asarray(boxes), dtype=torch.float32) * torch.tensor([SIDE / width, SIDE / height] * 2)
    with torch.no_grad():
        made = model(pixel_values=(pixels - mean) / std, input_boxes=scaled[None], multimask_output=False)
        return F.interpolate(made.pred_masks[0], (height, width), mode="bilinear", align_corners=False)[:, 0].numpy()


def photo(size, seed=0):
    """A smooth random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def make_video_segmenter(seed=0):
    """A tiny SAM 2 video model in eval mode, with random weights."""
    torch.manual_seed(seed)
    return _shaken(Sam2VideoModel(Sam2VideoConfig(**json.loads(json.dumps(_SAM2_VIDEO)))).eval())


def save_video_segmenter(folder, seed=0):
    """Save a SAM 2 video model, as checkpoints on the Hub have it; returns the folder."""
    make_video_segmenter(seed).save_pretrained(folder)
    return folder
