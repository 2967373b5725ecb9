"""Claims about the Hub kernel: it loads only on request, and a failure is a log line.

kernels/msda/tests load a real build.
"""

import copy
import logging
import sys

import pytest
import torch

from gdino_hf import GDinoModel
from gdino_hf.model import msda_backends, msda_hub, msda_operator
from gdino_hf.model.ms_deform_attn import MSDeformAttn


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Reset the backend to the state of a new process."""
    monkeypatch.delenv("GDINO_MSDA", raising=False)
    monkeypatch.setattr(msda_hub, "_allowed", False)
    msda_hub.load.cache_clear()
    yield
    msda_hub.load.cache_clear()


def sample():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 14, 2, 8, generator=generator)
    locations = torch.rand(1, 3, 2, 2, 2, 2, generator=generator)
    weights = torch.rand(1, 3, 2, 2, 2, generator=generator)
    return msda_operator.ms_deform_attn(value, [3, 4, 2, 1], locations, weights)


def test_missing_kernels_package_is_logged_with_the_remedy_and_the_model_runs(monkeypatch, caplog):
    expected = sample()
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setenv("GDINO_MSDA", "hub")
    with caplog.at_level(logging.WARNING, logger=msda_hub.__name__):
        for _ in range(2):
            assert torch.equal(sample(), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.name == msda_hub.__name__]
    assert 'pip install "gdino-hf[kernels]"' in line


def test_folder_without_a_build_is_logged_once(monkeypatch, caplog, tmp_path):
    expected = sample()
    monkeypatch.setenv("GDINO_MSDA", "hub")
    monkeypatch.setenv("GDINO_MSDA_HUB", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger=msda_hub.__name__):
        for _ in range(2):
            assert torch.equal(sample(), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.name == msda_hub.__name__]
    assert str(tmp_path) in line


def test_hub_kernel_is_a_candidate_only_on_request(tiny_config, monkeypatch):
    assert msda_backends.candidates("cuda") == ["triton"]
    assert msda_backends.candidates("cpu") == ["c"]
    config = copy.deepcopy(tiny_config)
    GDinoModel(config)
    assert msda_backends.candidates("cuda") == ["triton"]
    config.use_hub_kernels = True
    GDinoModel(config)
    assert msda_backends.candidates("cuda") == ["hub", "triton"]
    assert msda_backends.candidates("cpu") == ["c"]
    monkeypatch.setenv("GDINO_MSDA", "torch")
    assert msda_backends.candidates("cuda") == []


@pytest.mark.parametrize("disabled", [False, True])
def test_configuration_can_disable_every_custom_kernel(tiny_config, disabled):
    config = copy.deepcopy(tiny_config)
    config.disable_custom_kernels = disabled
    layers = [module for module in GDinoModel(config).modules() if isinstance(module, MSDeformAttn)]
    assert layers
    assert all(layer.custom_kernels is not disabled for layer in layers)
