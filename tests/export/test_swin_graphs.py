"""Claims about Swin backbones outside of PyTorch: their maps agree on other sizes than the graph was traced with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, SwinConfig

from gdino_hf.detection.graph_sessions import TORCH_FREE
from gdino_hf.export.graph_formats import RUNTIMES, write_graph
from gdino_hf.export.graphs import GraphPlan
from gdino_hf.model.swin_export import export_forward

STAGES = ["stage1", "stage2"]
# Both compute sums of at most a few hundred products of numbers around one.
ROUNDING = 1e-4


class Maps(nn.Module):
    """Pixels in, the maps of both stages out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # The second block of a stage has shifted windows.
        config = SwinConfig(embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, out_features=STAGES)
        self.backbone = AutoBackbone.from_config(config)

    def forward(self, pixel_values):
        """Return (B, C, h, w) maps by stage."""
        return dict(zip(STAGES, export_forward(self.backbone, pixel_values), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model_format", ["onnx", "openvino"])
def test_maps_agree_on_other_sizes_and_batches(model_format, tmp_path):
    if model_format == "onnx":
        pytest.importorskip("onnxscript")
    library = pytest.importorskip(RUNTIMES[model_format]["name"])
    module = Maps().eval()
    plan = GraphPlan("model", module, {"pixel_values": torch.randn(2, 3, 192, 320)}, {})
    session = TORCH_FREE[model_format](library, write_graph(plan, model_format, tmp_path)["model"], {}, 1)
    for size in ((1, 63, 95), (3, 113, 150), (2, 33, 65), (1, 192, 320)):
        pixel_values = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = module.backbone(pixel_values).feature_maps
        found = session.run({"pixel_values": pixel_values.numpy()})
        for stage, wanted in zip(STAGES, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found[stage]), wanted, rtol=0, atol=ROUNDING)
