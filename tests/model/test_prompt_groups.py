"""Long label lists run in groups of prompts: the same results, in memory that does not grow with the list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import GDinoProcessor
from gdino_hf.model import prompt_groups
from gdino_hf.model.prompt_groups import forward_in_groups
from random_models import make_random_model

# Groups of another size are other matrix products.
ROUNDING = 1e-4
MANY = [f"{x} {y}" for x in "abcde" for y in "uvwxyz"]


def picture(width=80, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tiny_config):
    return make_random_model(tiny_config)


@pytest.fixture
def watched(model):
    """Numbers of rows that every pass of the decoder had, and of images that every pass of the backbone had."""
    rows, images = [], []
    handles = [
        model.model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))),
        model.model.backbone.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0]))),
    ]
    yield rows, images
    for handle in handles:
        handle.remove()


@pytest.fixture
def short_processor(tiny_processor, tiny_tokenizer):
    return GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=20)


@pytest.mark.parametrize("num_images", [1, 2])
def test_groups_give_the_results_of_one_pass(num_images, model, short_processor, watched, monkeypatch):
    rows, images = watched
    inputs = short_processor(images=[picture(seed=seed) for seed in range(num_images)], text=[MANY] * num_images)
    num_rows = len(inputs["input_ids"])
    assert num_rows > 3 * num_images
    with torch.no_grad():
        whole = model(**inputs)
        assert (rows, images) == ([num_rows], [num_images])
        together = forward_in_groups(model, inputs)
        assert torch.equal(together.logits, whole.logits)
        assert torch.equal(together.pred_boxes, whole.pred_boxes)
        rows.clear()
        images.clear()
        # Pictures as large as the limit: each pass has as many prompts as there are pictures.
        monkeypatch.setattr(prompt_groups, "IMAGE_TOKENS_AT_ONCE", 1)
        grouped = forward_in_groups(model, inputs)
    assert (max(rows), sum(rows), images) == (num_images, num_rows, [num_images])
    torch.testing.assert_close(grouped.logits, whole.logits, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(grouped.pred_boxes, whole.pred_boxes, rtol=0, atol=ROUNDING)
    results = [
        short_processor.post_process_grounded_object_detection(outputs, inputs, threshold=0.1)
        for outputs in (whole, grouped)
    ]
    for first, second in zip(*results, strict=True):
        assert sorted(first["text_labels"]) == sorted(second["text_labels"])


def test_pictures_of_several_sizes_stay_with_their_prompts(model, short_processor, monkeypatch):
    monkeypatch.setattr(prompt_groups, "IMAGE_TOKENS_AT_ONCE", 1)
    inputs = short_processor(images=[picture(80, 64, 1), picture(50, 70, 2)], text=[MANY, ["cat"]])
    with torch.no_grad():
        torch.testing.assert_close(
            forward_in_groups(model, inputs).logits, model(**inputs).logits, rtol=0, atol=ROUNDING
        )


def test_one_prompt_per_picture_is_the_usual_pass(model, tiny_processor, watched):
    inputs = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=["cat"])
    with torch.no_grad():
        assert torch.equal(forward_in_groups(model, inputs).logits, model(**inputs).logits)
    assert watched[0] == [2, 2]


def test_a_configuration_of_tuples_gives_the_same_results(tiny_config, tiny_processor, short_processor, monkeypatch):
    expected = make_random_model(tiny_config)
    tuples = make_random_model(tiny_config)
    tuples.config.return_dict = False
    few, many = tiny_processor(picture(), text=["cat"]), short_processor(images=picture(), text=MANY)
    with torch.no_grad():
        for limit in (prompt_groups.IMAGE_TOKENS_AT_ONCE, 1):
            monkeypatch.setattr(prompt_groups, "IMAGE_TOKENS_AT_ONCE", limit)
            for inputs in (few, many):
                first, second = (forward_in_groups(each, inputs) for each in (expected, tuples))
                assert torch.equal(first.logits, second.logits)


def test_outputs_that_are_nan_are_refused_instead_of_finding_nothing(model, tiny_processor):
    inputs = tiny_processor(picture(), text=["cat"])
    for name in ("logits", "pred_boxes"):
        with torch.no_grad():
            outputs = forward_in_groups(model, inputs)
        outputs[name][0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"float32 hold NaN; load it in float32 or bfloat16"):
            tiny_processor.post_process_grounded_object_detection(outputs, inputs)
        with pytest.raises(ValueError, match="hold NaN"):
            tiny_processor.image_processor.post_process_object_detection(outputs)
