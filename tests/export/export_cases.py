"""Small models to export, sizes and prompts to compare them on, and the comparison."""

from __future__ import annotations

import copy

import torch
from scipy.optimize import linear_sum_assignment

from gdino_hf.model.csp_pan import CspPanConfig

LOGITS, BOXES = 1e-3, 1e-4
"""Largest differences from PyTorch that runtimes may have: of logits, and of boxes in parts of the picture."""
TIE = 1e-4
"""Largest difference of two scores in the query selection that the rounding of a runtime may turn round."""


def small_config(config):
    """Return a config of one layer of each kind and one level, which is traced in seconds.

    Sums of the areas of several levels make the tracer's formulas long: every further level doubles the time.
    """
    config = copy.deepcopy(config)
    config.encoder_layers = config.decoder_layers = config.text_config.num_hidden_layers = 1
    config.num_feature_levels = 1
    config.num_queries = 12
    config.backbone_config = CspPanConfig(
        stem_width=4, stage_widths=[4, 4, 8, 8], stage_depths=[1, 1, 1, 1], pan_width=8
    )
    return config


def make_inputs(tokenizer, prompts, height, width, padded=True, seed=0):
    """Return inputs of one image per prompt; the last image of several is padded if asked for."""
    generator = torch.Generator().manual_seed(seed)
    text = tokenizer(list(prompts), padding=True, return_tensors="pt")
    mask = torch.ones(len(prompts), height, width, dtype=torch.int64)
    if padded and len(prompts) > 1:
        mask[-1, :, width - width // 3 :] = 0
    return {
        "pixel_values": torch.randn(len(prompts), 3, height, width, generator=generator),
        "pixel_mask": mask,
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
    }


def run_graphs(graphs, inputs):
    """Run a folder's graphs, the text graph first if there are two; inputs that a graph does not have are left out."""
    if "text" in graphs:
        return graphs["image"](inputs | graphs["text"](inputs))
    return graphs["model"](inputs)


def assert_agree(logits, boxes, expected, num_tokens):
    """Compare a runtime's outputs with the model's, queries with equal scores in either order.

    Rounding may swap two queries whose scores in the selection are equal within rounding. Each query is therefore
    compared with a query of the other side, each of which serves once, and a query that is not at its own place must
    have the score of the one there.
    """
    logits, boxes = torch.as_tensor(logits), torch.as_tensor(boxes)
    wanted = expected.logits[:, :, :num_tokens]
    assert logits.shape == wanted.shape
    assert boxes.shape == expected.pred_boxes.shape
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(logits), finite)
    for row in range(len(logits)):
        apart = torch.cdist(boxes[row], expected.pred_boxes[row], p=torch.inf)
        apart += (logits[row].nan_to_num(neginf=0)[:, None] - wanted[row].nan_to_num(neginf=0)[None]).abs().amax(-1)
        order = torch.as_tensor(linear_sum_assignment(apart)[1])
        scores = expected.encoder_logits[row].amax(-1)
        torch.testing.assert_close(scores[order], scores, rtol=0, atol=TIE)
        torch.testing.assert_close(logits[row], wanted[row, order], rtol=0, atol=LOGITS)
        torch.testing.assert_close(boxes[row], expected.pred_boxes[row, order], rtol=0, atol=BOXES)
