"""Claims about loading kernels from the Hub: only when asked, and never an error. Loading a real build is tested beside
it, in kernels/msda/tests."""

import copy
import logging
import sys

import pytest
import torch

from gdino_hf import GDinoModel
from gdino_hf.model import msda_backends, msda_hub
from gdino_hf.model.ms_deform_attn import MSDeformAttn


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process that has asked for nothing yet."""
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
    return msda_backends.ms_deform_attn(value, [3, 4, 2, 1], locations, weights)


def test_without_the_kernels_package_the_model_runs_and_the_log_names_the_remedy(monkeypatch, caplog):
    expected = sample()
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setenv("GDINO_MSDA", "hub")
    with caplog.at_level(logging.WARNING, logger=msda_hub.__name__):
        for _ in range(2):
            assert torch.equal(sample(), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.name == msda_hub.__name__]
    assert 'pip install "gdino-hf[kernels]"' in line


def test_a_folder_without_a_build_is_one_log_line(monkeypatch, caplog, tmp_path):
    expected = sample()
    monkeypatch.setenv("GDINO_MSDA", "hub")
    monkeypatch.setenv("GDINO_MSDA_HUB", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger=msda_hub.__name__):
        for _ in range(2):
            assert torch.equal(sample(), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.name == msda_hub.__name__]
    assert str(tmp_path) in line


def test_nothing_is_fetched_unless_a_configuration_or_the_environment_asks(tiny_config, monkeypatch):
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
def test_a_configuration_can_switch_every_custom_kernel_off(tiny_config, disabled):
    config = copy.deepcopy(tiny_config)
    config.disable_custom_kernels = disabled
    layers = [module for module in GDinoModel(config).modules() if isinstance(module, MSDeformAttn)]
    assert layers
    assert all(layer.custom_kernels is not disabled for layer in layers)
