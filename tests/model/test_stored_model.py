"""Claims about weights on disk: load_state_dict reads what save_pretrained wrote, as Trainer needs to resume."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, NomicBertConfig, Trainer, TrainingArguments

from gdino_hf import GDinoForObjectDetection, GDinoModel

DINOV2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 64,
    "out_features": ["stage1", "stage2"],
}


def architecture(tiny_config, name):
    config = copy.deepcopy(tiny_config)
    if name == "dinov2":
        config.backbone_config = Dinov2Config(**DINOV2)
    if name == "dinov2-swiglu":
        config.backbone_config = Dinov2Config(**DINOV2, use_swiglu_ffn=True)
    if name == "nomic-bert":
        # Files of this model hold queries, keys and values in one tensor.
        config.text_config = NomicBertConfig(
            vocab_size=config.text_config.vocab_size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    return config


def fresh(config, seed, model_class=GDinoForObjectDetection):
    """Make a random model that shares no constant tensor with another one."""
    torch.manual_seed(seed)
    model = model_class(copy.deepcopy(config))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def assert_same_weights(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("name", ["swin", "dinov2", "dinov2-swiglu", "nomic-bert"])
@pytest.mark.parametrize("reloaded", [False, True], ids=["built", "from_pretrained"])
def test_load_state_dict_accepts_the_names_of_files(tiny_config, tmp_path, name, reloaded):
    config = architecture(tiny_config, name)
    source, target = fresh(config, seed=1), fresh(config, seed=2)
    source.save_pretrained(tmp_path / "source")
    if reloaded:
        target.save_pretrained(tmp_path / "target")
        target = GDinoForObjectDetection.from_pretrained(tmp_path / "target")
    file = load_file(tmp_path / "source" / "model.safetensors")
    assert file.keys() != source.state_dict().keys(), "the case has no differing names to test"
    keys = target.load_state_dict(file, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == []
    assert_same_weights(target, source)


def test_the_core_model_and_a_wrapped_model_accept_them_too(tiny_config, tmp_path):
    source, target = (fresh(tiny_config, seed, GDinoModel) for seed in (1, 2))
    source.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    target.load_state_dict(file)
    assert_same_weights(target, source)
    wrapper = torch.nn.ModuleDict({"inner": fresh(tiny_config, 3, GDinoModel)})
    wrapper.load_state_dict({f"inner.{key}": tensor for key, tensor in file.items()})
    assert_same_weights(wrapper["inner"], source)


def test_names_in_memory_still_load_and_unknown_ones_are_reported(tiny_config):
    source, target = fresh(tiny_config, 1), fresh(tiny_config, 2)
    state = {**source.state_dict(), "model.backbone.nothing": torch.zeros(1)}
    kept = list(state)
    keys = target.load_state_dict(state, strict=False)
    assert keys.unexpected_keys == ["model.backbone.nothing"]
    assert keys.missing_keys == []
    assert_same_weights(target, source)
    assert list(state) == kept


def test_trainer_resumes_with_the_backbone_of_the_checkpoint(tiny_config, tmp_path):
    config = architecture(tiny_config, "swin")
    row = {
        "pixel_values": torch.randn(3, 64, 64),
        "input_ids": torch.tensor([config.special_token_ids[0], 60, *config.special_token_ids[2:0:-1]]),
    }
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}]

    def collate(rows):
        return {key: torch.stack([r[key] for r in rows]) for key in row} | {"labels": labels * len(rows)}

    def trainer(model):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            save_steps=1,
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=[row], data_collator=collate)

    first = trainer(fresh(config, 1))
    first.train()
    # No step is left, so the model must equal the checkpoint.
    again = trainer(fresh(config, 2))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 1
    assert_same_weights(again.model, first.model)
