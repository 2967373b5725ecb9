"""The outputs of the original implementation are reproduced from its checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gdino_hf import GDinoForObjectDetection
from gdino_hf.conversion.engine import convert

LOGIT_TOLERANCE = 1e-3
BOX_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(shared, tmp_path_factory):
    """Convert the checkpoint, load it as usual, and read the stored inputs and outputs."""
    folder = shared / "golden" / "official_swin_w7"
    target = tmp_path_factory.mktemp("golden")
    convert(folder / "checkpoint.pth", target)
    model, info = GDinoForObjectDetection.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), load_file(folder / "cases.safetensors")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_original_outputs_are_reproduced(golden, case):
    model, tensors = golden
    assert model.dtype == torch.float32  # the file is in half precision, the computation is not
    with torch.no_grad():
        outputs = model(
            pixel_values=tensors[f"{case}.pixel_values"].float(),
            pixel_mask=tensors[f"{case}.pixel_mask"],
            input_ids=tensors[f"{case}.input_ids"],
            attention_mask=tensors[f"{case}.attention_mask"],
        )
    expected = tensors[f"{case}.pred_logits"]
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(outputs.logits), finite)
    torch.testing.assert_close(outputs.logits[finite], expected[finite], rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(outputs.pred_boxes, tensors[f"{case}.pred_boxes"], rtol=0, atol=BOX_TOLERANCE)
