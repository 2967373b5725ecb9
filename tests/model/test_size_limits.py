"""Claims about the largest sizes of a configuration."""

import pytest
from transformers import BertConfig, SwinConfig

from gdino_hf import GDinoConfig
from gdino_hf.model.size_limits import check_sizes


@pytest.mark.parametrize("name", ["tiny", "base", "mm-tiny", "mm-base", "mm-large", "nano"])
def test_published_models_are_far_below_the_limits(name):
    check_sizes(GDinoConfig.preset(name).to_dict())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder_layers": 201}, "encoder_layers must be at most 200, got 201"),
        ({"depths": [2, 2, 180, 20]}, "depths must be at most 200, got 204"),
        ({"depths": [1] * 33}, r"len\(depths\) must be at most 32, got 33"),
        ({"stage_depths": [10**9]}, "stage_depths must be at most 200"),
        ({"a": {"b": [{"num_hidden_layers": 10**9}]}}, "a.b.num_hidden_layers must be at most 200"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be at most 16,777,216"),
        ({"max_text_len": 65_537}, "max_text_len must be at most 65,536"),
        ({"text_config": {"num_labels": 10**9}}, "text_config.num_labels must be at most 100,000"),
        ({"id2label": dict.fromkeys(range(100_001), "x")}, r"len\(id2label\) must be at most 100,000, got 100,001"),
        ({"num_queries": 10_001}, "num_queries must be at most 10,000, got 10,001"),
    ],
)
def test_what_is_above_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        check_sizes(fields)


def test_numbers_that_are_no_sizes_are_free():
    check_sizes(
        {"rope_theta": 10**9, "pad_token_id": 2**40, "seed": 2**62, "id2label": {str(2**30): "x"}, "flag": True}
    )


@pytest.mark.parametrize(
    "part", [{"text_config": BertConfig(num_hidden_layers=10**9)}, {"backbone_config": SwinConfig(depths=[10**9])}]
)
def test_configuration_objects_are_checked_too(part):
    with pytest.raises(ValueError, match="must be at most 200, got 1,000,000,000"):
        GDinoConfig(**part)
