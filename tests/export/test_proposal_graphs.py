"""Claims about proposals outside of PyTorch: the same tokens have one, also where a cell lies on the margin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gdino_hf.detection.graph_sessions import TORCH_FREE
from gdino_hf.export.graph_formats import RUNTIMES, write_graph
from gdino_hf.export.graphs import GraphPlan
from gdino_hf.model.image_geometry import make_proposals


class Proposals(nn.Module):
    """A mask of real cells in, which of them have a proposal out."""

    def forward(self, pixel_mask):
        """Return (B, h * w) int64, 1 where a token has a proposal."""
        shape = (pixel_mask.shape[1], pixel_mask.shape[2])
        return {"valid": make_proposals([shape], pixel_mask.flatten(1) > 0, [pixel_mask > 0])[1].long()}


def valid_tokens(height, width):
    mask = torch.ones(1, height, width, dtype=torch.int64)
    return Proposals()(mask)["valid"].view(height, width)


def test_only_the_outermost_of_fifty_cells_are_on_the_margin():
    # Centres are odd multiples of 1 / 2n, and 0.01 is one of them for n = 50, 150, 250, ...
    for number in range(1, 1200):
        centres = torch.arange(1, 2 * number, 2, dtype=torch.int64)
        # In whole numbers: 0.01 < centre / 2n < 0.99.
        inside = (100 * centres > 2 * number) & (100 * centres < 198 * number)
        assert torch.equal(valid_tokens(1, number)[0], inside.long()), number
        if number == 50:
            assert inside.tolist() == [False, *[True] * 48, False]


@pytest.mark.parametrize("model_format", ["onnx", "openvino"])
def test_runtimes_give_the_same_tokens_a_proposal(model_format, tmp_path):
    if model_format == "onnx":
        pytest.importorskip("onnxscript")
    library = pytest.importorskip(RUNTIMES[model_format]["name"])
    plan = GraphPlan("model", Proposals(), {"pixel_mask": torch.ones(2, 12, 20, dtype=torch.int64)}, {})
    session = TORCH_FREE[model_format](library, write_graph(plan, model_format, tmp_path)["model"], {}, 1)
    for height, width in ((16, 50), (50, 67), (150, 3), (7, 250), (100, 49)):
        mask = torch.ones(2, height, width, dtype=torch.int64)
        mask[1, :, 50:] = 0  # the second picture is padded to 50 columns
        found = torch.from_numpy(session.run({"pixel_mask": mask.numpy()})["valid"])
        assert torch.equal(found, Proposals()(mask)["valid"]), (height, width)
