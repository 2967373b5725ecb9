"""Claims about the whole model: batches, prompts, chunks, kept features, gradients, checkpointing and precision."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    DistilBertConfig,
    ResNetConfig,
    RobertaConfig,
)

from gdino_hf import GDinoForObjectDetection, GDinoModel
from gdino_hf.model.targets import prepare_targets
from random_models import make_random_model

# Batched and single products add up in a different order: float32 rounding over two encoder and decoder layers.
ROUNDING = 1e-4
CLS, SEP, PERIOD = "[CLS]", "[SEP]", "."


@pytest.fixture(scope="module")
def model(tiny_config):
    return lively(tiny_config)


def lively(config):
    """Make a random model in which image and text affect each other strongly."""
    model = make_random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_param" in name or "text_param" in name:
                parameter.fill_(0.5)
    return model


def tokens(tokenizer, *prompts):
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
    return dict(batch)


def pixels(*sizes, seed=0):
    """Make images of noise in several sizes, and a padded batch of them."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, height, width, generator=generator) for height, width in sizes]
    height, width = max(s[0] for s in sizes), max(s[1] for s in sizes)
    values, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        values[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = 1
    return images, {"pixel_values": values, "pixel_mask": mask, "image_sizes": list(sizes)}


def assert_same_predictions(ours, theirs, atol=ROUNDING):
    assert torch.equal(torch.isfinite(ours.logits), torch.isfinite(theirs.logits))
    finite = torch.isfinite(ours.logits)
    torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=atol)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=atol)


@torch.no_grad()
def test_batch_of_mixed_prompts_and_sizes_equals_singles(model, tiny_tokenizer):
    prompts = ["cat. remote control.", "a big red dog. person. cup. hat.", "bird."]
    images, batch = pixels((64, 96), (96, 64), (64, 64))
    together = model(**batch, **tokens(tiny_tokenizer, *prompts))
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = model(pixel_values=image[None], **tokens(tiny_tokenizer, prompt))
        row = copy.copy(together)
        row.logits, row.pred_boxes = together.logits[index, None], together.pred_boxes[index, None]
        assert_same_predictions(row, alone)


@torch.no_grad()
def test_without_image_sizes_padding_reaches_the_backbone_as_published(model, tiny_tokenizer):
    _, batch = pixels((64, 96), (96, 64))
    text = tokens(tiny_tokenizer, "cat. dog.")
    exact = model(**batch, **text)
    published = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], **text)
    assert not torch.allclose(exact.pred_boxes, published.pred_boxes, atol=1e-3)


@torch.no_grad()
def test_open_last_phrase_does_not_depend_on_padding(model, tiny_tokenizer):
    _, batch = pixels((64, 64))
    short = tokens(tiny_tokenizer, "cat. remote control")
    padded = tokens(tiny_tokenizer, "cat. remote control", "a big red dog. person. cup. hat.")
    padded = {name: x[:1] for name, x in padded.items()}
    assert padded["input_ids"].shape[1] > short["input_ids"].shape[1]
    assert_same_predictions(model(**batch, **short), model(**batch, **padded))


@torch.no_grad()
def test_unmasked_and_all_ones_masked_agree(model, tiny_tokenizer):
    _, batch = pixels((64, 96))
    text = tokens(tiny_tokenizer, "cat. dog.")
    assert_same_predictions(
        model(**batch, **text), model(pixel_values=batch["pixel_values"], input_ids=text["input_ids"])
    )


@torch.no_grad()
def test_one_prompt_serves_many_images(model, tiny_tokenizer):
    _, batch = pixels((64, 64), (64, 64))
    once = model(**batch, **tokens(tiny_tokenizer, "cat. dog."))
    twice = model(**batch, **tokens(tiny_tokenizer, "cat. dog.", "cat. dog."))
    assert_same_predictions(once, twice)


@torch.no_grad()
def test_chunks_share_the_image(model, tiny_tokenizer):
    images, batch = pixels((64, 64), (64, 64))
    text = tokens(tiny_tokenizer, "cat. dog.", "person. cup.", "cat. dog.")
    calls = []
    handle = model.model.backbone.register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    chunked = model(**batch, **text, image_indices=torch.tensor([0, 0, 1]))
    handle.remove()
    assert calls == [2]
    for row, image in enumerate([0, 0, 1]):
        alone = model(pixel_values=images[image][None], **{name: x[row, None] for name, x in text.items()})
        picked = copy.copy(chunked)
        picked.logits, picked.pred_boxes = chunked.logits[row, None], chunked.pred_boxes[row, None]
        assert_same_predictions(picked, alone)


@torch.no_grad()
def test_cached_features_give_the_same_as_inputs(model, tiny_tokenizer):
    _, batch = pixels((64, 96), (96, 64))
    text = tokens(tiny_tokenizer, "cat. dog.", "person. hat. cup.")
    image_features = model.get_image_features(**batch)
    text_features = model.get_text_features(**text)
    direct = model(**batch, **text)
    for kwargs in (
        {"image_features": image_features, "text_features": text_features},
        {"image_features": image_features, **text},
        {**batch, "text_features": text_features},
    ):
        cached = model(**kwargs)
        assert torch.equal(cached.logits, direct.logits)
        assert torch.equal(cached.pred_boxes, direct.pred_boxes)


@torch.no_grad()
def test_fewer_image_tokens_than_queries_still_gives_every_query(tiny_config, tiny_tokenizer):
    config = copy.deepcopy(tiny_config)
    config.num_queries = 50
    _, batch = pixels((16, 16))
    outputs = lively(config)(**batch, **tokens(tiny_tokenizer, "cat."))
    assert outputs.pred_boxes.shape == (1, 50, 4)
    assert torch.isfinite(outputs.pred_boxes).all()


@pytest.mark.parametrize(
    "overrides",
    [
        {"two_stage": False},
        {"embedding_init_target": False},
        {"decoder_layers": 1},
        {"num_feature_levels": 1},
        {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False},
        {"two_stage_bbox_embed_share": True},
        {"class_head": "cosine"},
        {"class_head": "scaled_bias"},
        {"fusion_type": "gated"},
        {"denoising_label_embeddings": 16},
        {"contrastive_loss_coefficient": 1.0},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(tiny_config, tiny_tokenizer, overrides, tmp_path):
    config = copy.deepcopy(tiny_config)
    for name, value in overrides.items():
        setattr(config, name, value)
    model = lively(config).train()
    _, batch = pixels((64, 96), (96, 64))
    text = tokens(tiny_tokenizer, "cat. dog. hat.", "person. remote control.")
    labels = [
        {"class_labels": torch.tensor([2, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.6, 0.4, 0.5, 0.3]])},
    ]
    torch.manual_seed(0)
    loss = model(**batch, **text, labels=labels).loss
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The softmax does not depend on key biases, so only these may be without gradient.
    assert not [name for name in silent if not name.endswith("key.bias")], silent
    model.eval().save_pretrained(tmp_path)
    again = GDinoForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same_predictions(again(**batch, **text), model(**batch, **text), atol=0)


def test_batch_loss_is_the_box_weighted_mean_of_its_images(model, tiny_tokenizer):
    model = copy.deepcopy(model)
    prompts = ["cat. remote control.", "a big red dog. person. cup. hat.", "bird."]
    images, batch = pixels((64, 96), (96, 64), (64, 64))
    generator = torch.Generator().manual_seed(3)
    labels = []
    for count, names in ((3, 2), (1, 4), (0, 1)):
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
        labels.append({"class_labels": torch.randint(names, (count,), generator=generator), "boxes": boxes})
    together = model(**batch, **tokens(tiny_tokenizer, *prompts), labels=labels).loss
    weighted = 0.0
    for image, prompt, label in zip(images, prompts, labels, strict=True):
        alone = model(pixel_values=image[None], **tokens(tiny_tokenizer, prompt), labels=[label]).loss
        # The loss of an image without boxes is divided by 1.
        weighted = weighted + max(1, len(label["boxes"])) * alone
    torch.testing.assert_close(together, weighted / 4, rtol=1e-4, atol=1e-4)


def test_labels_are_checked_once_per_step(model, tiny_tokenizer, monkeypatch):
    """Every check reads values, for which a GPU has to finish its work."""
    calls = []

    def counting(*args, check=True):
        calls.append(check)
        return prepare_targets(*args, check=check)

    monkeypatch.setattr("gdino_hf.model.modeling_gdino.prepare_targets", counting)
    _, batch = pixels((64, 64))
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    model(**batch, **tokens(tiny_tokenizer, "cat. dog."), labels=labels)
    assert calls.count(True) == 1


def test_outputs_leave_out_denoising_queries(tiny_config, tiny_tokenizer):
    model, num_queries = lively(tiny_config).train(), tiny_config.num_queries
    _, batch = pixels((64, 64))
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    inputs = {**batch, **tokens(tiny_tokenizer, "cat. dog."), "labels": labels}
    assert model.model(**inputs).last_hidden_state.shape[1] == num_queries + 20
    outputs = model(**inputs)
    assert [len(outputs.pred_boxes[0]), len(outputs.logits[0])] == [num_queries] * 2
    assert [len(x["pred_boxes"][0]) for x in outputs.auxiliary_outputs] == [num_queries]
    for name in ("last_hidden_state", "init_reference_points"):
        assert outputs[name].shape[1] == num_queries
    for name in ("intermediate_hidden_states", "intermediate_reference_points"):
        assert outputs[name].shape[:3] == (1, tiny_config.decoder_layers, num_queries)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_in_the_order_of_their_fields_and_the_loss_comes_first(model, tiny_tokenizer, training):
    """Trainer and return_dict=False find outputs by position, as in transformers' own detectors."""
    model.train(training)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    _, batch = pixels((64, 64))
    inputs = {**batch, **tokens(tiny_tokenizer, "cat. dog."), "labels": labels}
    outputs = model(**inputs)
    assert list(outputs)[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    for output in (outputs, model.model(**inputs, output_hidden_states=True)):
        assert list(output) == [field.name for field in fields(output) if getattr(output, field.name) is not None]
    assert model(**inputs, return_dict=False)[0].ndim == 0


def test_gradient_checkpointing_changes_no_gradient(tiny_config, tiny_tokenizer):
    _, batch = pixels((64, 64))
    text = tokens(tiny_tokenizer, "cat. dog.")
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    gradients = []
    for checkpointing in (False, True):
        model = lively(tiny_config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(**batch, **text, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_auto_model_gives_the_core_model(tiny_config):
    assert type(AutoModel.from_config(copy.deepcopy(tiny_config))) is GDinoModel


BACKBONES = {
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    ),
    "convnext": ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    ),
    "dinov2": Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        out_features=["stage1", "stage2"],
    ),
}
TEXT_ENCODERS = {
    "roberta": RobertaConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ),
    "distilbert": DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
    "bert": BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ),
}


@pytest.mark.parametrize(("backbone", "text"), [("resnet", "roberta"), ("convnext", "distilbert"), ("dinov2", "bert")])
def test_any_backbone_and_text_encoder(tiny_config, tiny_tokenizer, backbone, text, tmp_path):
    config = copy.deepcopy(tiny_config)
    config.backbone_config, config.text_config = BACKBONES[backbone], TEXT_ENCODERS[text]
    model = lively(config)
    _, batch = pixels((64, 64), (64, 48))
    inputs = {**batch, **tokens(tiny_tokenizer, "cat. dog.", "person. hat.")}
    with torch.no_grad():
        outputs = model(**inputs)
        assert torch.isfinite(outputs.pred_boxes).all()
        model.save_pretrained(tmp_path)
        again = GDinoForObjectDetection.from_pretrained(tmp_path).eval()
        boxes = again(**inputs).pred_boxes
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # The same weights at another address may take another path through the BLAS, which rounds differently.
    torch.testing.assert_close(boxes, outputs.pred_boxes, rtol=0, atol=1e-6)


def test_geometry_stays_float32_in_bfloat16(tiny_config, tiny_tokenizer):
    model = lively(tiny_config).to(torch.bfloat16)
    _, batch = pixels((64, 96))
    seen = []
    for module in model.modules():
        if type(module).__name__ == "MSDeformAttn":
            module.register_forward_pre_hook(lambda m, args: seen.append(args[2].dtype))
    with torch.no_grad():
        outputs = model(**batch, **tokens(tiny_tokenizer, "cat. dog."))
    assert set(seen) == {torch.float32}
    assert len(seen) == 4
    assert outputs.pred_boxes.dtype == torch.float32
    assert outputs.intermediate_reference_points.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None, "pixel_mask": None, "image_sizes": None}, "no image"),
        ({"image_sizes": [(64, 65)]}, "image_sizes"),
        ({"image_sizes": [(64, 64), (64, 64)]}, "image_sizes"),
        ({"input_ids": None}, "no text"),
        ({"pixel_values": torch.zeros(3, 64, 64)}, "batch axis"),
        ({"pixel_mask": torch.ones(1, 32, 32)}, "pixel_mask"),
        ({"image_indices": torch.tensor([0, 0])}, "image_indices"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.int64), "attention_mask": None, "token_type_ids": None}, "65"),
        ({"labels": [{"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}]}, "2 labels"),
        ({"labels": [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 1.2, 0.1]])}]}, "leaves"),
        ({"labels": [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]])}]}, "width"),
        ({"labels": []}, "entries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_raises_a_clear_error(model, tiny_tokenizer, change, message):
    _, batch = pixels((64, 64))
    inputs = {**batch, **tokens(tiny_tokenizer, "cat. dog."), **change}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_prompts_and_images_that_do_not_pair_are_refused(model, tiny_tokenizer):
    _, batch = pixels((64, 64), (64, 64))
    with pytest.raises(ValueError, match="2 images and 3 prompts"):
        model(**batch, **tokens(tiny_tokenizer, "cat.", "dog.", "hat."))


@pytest.mark.parametrize("boxes", [0, 1])
def test_pixels_that_are_nan_are_named(model, tiny_tokenizer, boxes):
    inputs = {"pixel_values": torch.full((1, 3, 64, 64), torch.nan), **tokens(tiny_tokenizer, "cat.")}
    labels = [{"class_labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}]
    with pytest.raises(ValueError, match="NaN or infinity in pixel_values"):
        model(**inputs, labels=labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(1, 1, 64, 64)}, r"one image of 3 channels, got \(1, 1, 64, 64\)"),
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, r"at least one image of 3 channels, got \(0, 3, 64, 64\)"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask is \(1, 2\) but input_ids is \(1, 4\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"at least one prompt, got \(0, 4\)"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"input_ids must be \(R, T\) .* got \(4,\)"),
    ],
)
def test_wrong_shapes_are_refused(model, changes, message):
    start, end, period, _ = model.config.special_token_ids
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 64), "input_ids": torch.tensor([[start, 60, period, end]])}
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes})


def test_unused_parameters_stay_frozen_after_loading(tiny_folder):
    for loaded in (GDinoForObjectDetection.from_pretrained(tiny_folder), GDinoModel.from_pretrained(tiny_folder)):
        frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
        assert [name.rpartition("swin.")[2] for name in frozen] == ["layernorm.weight", "layernorm.bias"]
