"""Tests of batches: the model's inputs and targets say about an image what its row says."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.data.negatives import PromptSampler
from gdino_hf.data.transforms import RandomChoiceResize, RandomColour, RandomHorizontalFlip
from gdino_hf.model.phrase_structure import phrase_structure
from gdino_hf.model.text_prompt import special_token_ids

VOCABULARY = ["cat", "dog", "cup", "person", "ball", "bird"]


def row(boxes, names, crowd=None, size=(64, 48)):
    """Return an example; without `crowd` it has no crowd marks."""
    example = {"image": Image.new("RGB", size, (90, 120, 30)), "boxes": boxes, "names": names}
    return example if crowd is None else {**example, "crowd": crowd}


ROWS = [
    row([[0, 0, 32, 24], [16, 12, 64, 48]], ["cat", "cup"]),
    row([[32, 12, 48, 36]], ["dog"]),
    row([], []),
]


def words(processor, batch, image):
    """Return the text of each phrase of an image's prompt."""
    ids, mask = batch["input_ids"][image], batch["attention_mask"][image]
    phrases = phrase_structure(ids[None], mask[None], special_token_ids(processor.tokenizer)).phrase_ids[0]
    return [processor.tokenizer.decode(ids[phrases == index]) for index in range(int(phrases.max()) + 1)]


def test_boxes_become_relative_and_class_labels_index_the_prompt(tiny_processor):
    batch = GDinoDataCollator(tiny_processor, labels=["dog", "cat", "cup"])(ROWS)
    first, second, third = batch["labels"]
    assert first["boxes"].tolist() == [[0.25, 0.25, 0.5, 0.5], [0.625, 0.625, 0.75, 0.75]]
    assert first["class_labels"].tolist() == [1, 2]
    assert second["boxes"].tolist() == [[0.625, 0.5, 0.25, 0.5]]
    assert second["class_labels"].tolist() == [0]
    assert third["boxes"].shape == (0, 4)
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 3


def test_sampled_prompts_include_each_images_own_names(tiny_processor):
    collator = GDinoDataCollator(tiny_processor, prompt_sampler=PromptSampler(VOCABULARY, (3, 5)))
    for _ in range(5):
        batch = collator(ROWS)
        for image, example in enumerate(ROWS):
            asked = words(tiny_processor, batch, image)
            assert 3 <= len(asked) <= 5
            assert [asked[index] for index in batch["labels"][image]["class_labels"]] == example["names"]


def test_without_labels_prompts_hold_the_names_of_the_batch(tiny_processor):
    batch = GDinoDataCollator(tiny_processor)(ROWS)
    assert words(tiny_processor, batch, 2) == ["cat", "cup", "dog"]
    assert len(words(tiny_processor, GDinoDataCollator(tiny_processor)(ROWS[2:]), 0)) == 1


def test_crowds_are_not_targets(tiny_processor):
    rows = [row([[0, 0, 32, 24], [0, 0, 64, 48]], ["cat", "person"], crowd=[False, True])]
    batch = GDinoDataCollator(tiny_processor)(rows)
    assert words(tiny_processor, batch, 0) == ["cat"]
    assert batch["labels"][0]["class_labels"].tolist() == [0]


def test_names_of_crowds_are_not_negatives(tiny_processor):
    collator = GDinoDataCollator(tiny_processor, labels=["person", "cat", "cup"])
    boxes = [[0, 0, 32, 24], [0, 0, 64, 48]]
    assert words(tiny_processor, collator([row(boxes, ["cat", "person"], crowd=[False, True])]), 0) == ["cat", "cup"]
    assert len(words(tiny_processor, collator([row(boxes, ["person", "person"], crowd=[False, True])]), 0)) == 3
    alone = GDinoDataCollator(tiny_processor, labels=["person"])
    assert "person" not in words(tiny_processor, alone([row(boxes[:1], ["person"], crowd=[True])]), 0)


def test_the_transform_is_applied_to_image_and_boxes(tiny_processor):
    batch = GDinoDataCollator(tiny_processor, labels=["cat", "cup"], transform=RandomHorizontalFlip(1.0))(ROWS[:1])
    assert batch["labels"][0]["boxes"].tolist() == [[0.75, 0.25, 0.5, 0.5], [0.375, 0.625, 0.75, 0.75]]


@pytest.fixture
def short_processor(tiny_processor, tiny_tokenizer):
    """A processor whose prompts hold 12 tokens: [CLS], five one-token labels with their periods, and [SEP]."""
    from gdino_hf.model.processing_gdino import GDinoProcessor

    return GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=12)


def test_an_image_rotated_by_exif_is_upright_before_the_transform(tiny_processor):
    # The stored image is 48 x 64, rotated by 90 degrees; boxes are pixels of the upright 64 x 48 image.
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (48, 64), (90, 120, 30)).save(file, "jpeg", exif=exif)
    example = {**row([[0, 0, 16, 48]], ["cat"]), "image": Image.open(file)}
    batch = GDinoDataCollator(tiny_processor, labels=["cat"], transform=RandomHorizontalFlip(1.0))([example])
    assert batch["labels"][0]["boxes"].tolist() == [[56 / 64, 0.5, 0.25, 1.0]]


@pytest.mark.parametrize("mode", ["P", "RGBA", "I;16", "1"])
def test_images_of_any_mode_look_the_same_in_training_as_at_inference(tiny_processor, mode):
    picture = Image.effect_noise((64, 48), 90)
    picture = Image.fromarray(np.asarray(picture) * np.uint16(257)) if mode == "I;16" else picture.convert(mode)
    asked = tiny_processor(images=picture, text=["cat"])["pixel_values"]
    example = {**row([[0, 0, 16, 48]], ["cat"]), "image": picture}
    assert torch.equal(GDinoDataCollator(tiny_processor, labels=["cat"])([example])["pixel_values"], asked)
    changed = GDinoDataCollator(tiny_processor, labels=["cat"], transform=RandomColour(probability=1.0))([example])
    assert not torch.equal(changed["pixel_values"], asked)


def test_a_positive_in_another_case_is_not_a_negative(short_processor):
    labels = ["ball", "bird", "cup", "person", "hat", "lion", "table", "chair", "Dog"]
    batch = GDinoDataCollator(short_processor, labels=labels)([row([[0, 0, 32, 24]], ["dog"])])
    assert batch["labels"][0]["boxes"].shape == (1, 4)


def test_negatives_are_dropped_first_when_the_prompt_is_full(short_processor):
    collator = GDinoDataCollator(short_processor, prompt_sampler=lambda names, rng: [*VOCABULARY, "bottle"])
    batch = collator([row([[0, 0, 32, 24], [0, 0, 16, 12]], ["bottle", "bird"])])
    asked = words(short_processor, batch, 0)
    assert len(asked) == 5
    assert [asked[index] for index in batch["labels"][0]["class_labels"]] == ["bottle", "bird"]


def test_boxes_are_dropped_only_if_their_names_do_not_fit(short_processor):
    batch = GDinoDataCollator(short_processor)([row([[0, 0, 32, 24]] * 6, VOCABULARY)])
    asked = words(short_processor, batch, 0)
    assert len(asked) == 5
    assert asked == [name for name in VOCABULARY if name in asked]
    assert batch["labels"][0]["class_labels"].tolist() == [0, 1, 2, 3, 4]


def test_a_name_outside_the_fixed_labels_is_rejected(tiny_processor):
    with pytest.raises(ValueError, match="dog"):
        GDinoDataCollator(tiny_processor, labels=["cat", "cup"])(ROWS)


def test_labels_and_prompt_sampler_exclude_each_other(tiny_processor):
    with pytest.raises(ValueError, match="exclude"):
        GDinoDataCollator(tiny_processor, labels=["cat"], prompt_sampler=PromptSampler(VOCABULARY))


def test_one_seed_gives_one_sequence_of_batches(tiny_processor):
    def prompts(seed):
        collator = GDinoDataCollator(tiny_processor, prompt_sampler=PromptSampler(VOCABULARY, (2, 6)), seed=seed)
        return [words(tiny_processor, collator(ROWS), 0) for _ in range(4)]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_a_model_trains_on_a_batch(tiny_config, tiny_processor):
    import copy

    from gdino_hf.model.modeling_gdino import GDinoForObjectDetection

    torch.manual_seed(0)
    model = GDinoForObjectDetection(copy.deepcopy(tiny_config)).train()
    batch = GDinoDataCollator(tiny_processor, prompt_sampler=PromptSampler(VOCABULARY, (3, 5)))(ROWS)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert loss > 0


CAPTION = "Cattle left of a cat. A red dog, 2 cats"


def caption_row(pairs, caption=CAPTION, names=None):
    """Return a grounding example with one box per list of spans."""
    boxes = [[0, 0, 32, 24 + index] for index in range(len(pairs))]
    return {**row(boxes, names or ["phrase"] * len(pairs)), "caption": caption, "spans": pairs}


def phrases(processor, batch, image):
    """Return the text of the target tokens of each box."""
    ids = batch["input_ids"][image]
    maps = batch["labels"][image]["positive_map"]
    return [processor.tokenizer.decode(ids[: maps.shape[1]][marked]) for marked in maps]


def test_targets_of_caption_boxes_are_the_tokens_of_their_phrases(tiny_processor):
    spans = [[[17, 20]], [[24, 31]], [[0, 6]], [[17, 20], [35, 39]]]
    batch = GDinoDataCollator(tiny_processor, labels=["cup"])([caption_row(spans), row([[0, 0, 9, 9]], ["cup"])])
    assert phrases(tiny_processor, batch, 0) == ["cat", "red dog", "cattle", "cat cats"]
    assert batch["labels"][0]["class_labels"].tolist() == [0, 1, 0, 0]
    assert "positive_map" not in batch["labels"][1]
    assert words(tiny_processor, batch, 1) == ["cup"]


def test_a_mirrored_caption_keeps_its_phrases(tiny_processor):
    spans = [[[0, 14]], [[17, 20]]]
    batch = GDinoDataCollator(tiny_processor, transform=RandomHorizontalFlip(1.0))([caption_row(spans)])
    assert phrases(tiny_processor, batch, 0) == ["cattle right of", "cat"]


def test_a_phrase_without_a_word_is_logged_and_left_out(tiny_processor, caplog):
    rows = [caption_row([[[17, 20]], [[20, 21]]], names=["cat", "a period"]), caption_row([[[0, 1]]], caption="?!.")]
    batch = GDinoDataCollator(tiny_processor)([rows[0]])
    assert phrases(tiny_processor, batch, 0) == ["cat"]
    assert "a period" in caplog.text
    # To the tokenizer punctuation is a word, but the delimiters are not.
    assert len(GDinoDataCollator(tiny_processor)([caption_row([[[0, 1]]], caption="?.")])["labels"][0]["boxes"]) == 0


def test_phrases_of_a_long_caption_take_turns(short_processor):
    example = caption_row(
        [[[6, 9]], [[56, 59]]], caption="a red cat with a very long sentence that goes on and on. dog"
    )
    seen = set()
    for epoch in range(6):
        batch = GDinoDataCollator(short_processor)([{**example, "sample_key": (epoch, 0)}])
        assert batch["input_ids"].shape[1] <= 12
        seen.update(phrases(short_processor, batch, 0))
    assert seen == {"cat", "dog"}


def test_among_hundreds_of_labels_no_positive_is_dropped(tiny_processor):
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = list({"".join(rng.choices(letters, k=rng.randint(2, 20))) for _ in range(400)})
    collator = GDinoDataCollator(tiny_processor, labels=vocabulary, return_text=True)
    for _ in range(10):
        names = rng.sample(vocabulary, 8)
        batch = collator([row([[0, 0, 32, 24]] * 8, names)])
        assert batch["input_ids"].shape[1] <= tiny_processor.max_text_len
        assert [batch["text"][0][index] for index in batch["labels"][0]["class_labels"]] == names
        assert len(batch["text"][0]) > 8


def test_positives_that_do_not_fit_take_turns_over_epochs(short_processor):
    example = row([[0, 0, 32, 24]] * 6, VOCABULARY)
    seen = []
    for epoch in range(4):
        batch = GDinoDataCollator(short_processor, return_text=True)([{**example, "sample_key": (epoch, 0)}])
        seen.append({batch["text"][0][index] for index in batch["labels"][0]["class_labels"]})
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(VOCABULARY)
    assert all(len(names) == 5 for names in seen)


def test_a_mirrored_label_may_be_outside_the_fixed_labels(tiny_processor):
    collator = GDinoDataCollator(
        tiny_processor, labels=["left hat", "cup"], transform=RandomHorizontalFlip(1.0), return_text=True
    )
    batch = collator([row([[0, 0, 32, 24]], ["left hat"])])
    assert [batch["text"][0][index] for index in batch["labels"][0]["class_labels"]] == ["right hat"]


def test_images_resized_by_a_transform_are_not_resized_again(tiny_processor):
    transform = RandomChoiceResize([{"height": 40, "width": 48}])
    batch = GDinoDataCollator(tiny_processor, labels=["cat", "cup"], transform=transform)(ROWS[:1])
    assert batch["pixel_values"].shape[2:] == (40, 48)
    assert batch["labels"][0]["boxes"].tolist() == [[0.25, 0.25, 0.5, 0.5], [0.625, 0.625, 0.75, 0.75]]

    def some(example, rng):
        return transform(example, rng) if example["names"] else example

    batch = GDinoDataCollator(tiny_processor, labels=["dog", "cat", "cup"], transform=some)(ROWS)
    assert batch["image_sizes"].tolist() == [[40, 48], [40, 48], [64, 85]]


def test_a_model_trains_on_captions(tiny_config, tiny_processor):
    import copy

    from gdino_hf.model.modeling_gdino import GDinoForObjectDetection

    torch.manual_seed(0)
    model = GDinoForObjectDetection(copy.deepcopy(tiny_config)).train()
    batch = GDinoDataCollator(tiny_processor, labels=["cup"])(
        [caption_row([[[17, 20]], [[24, 31]]]), caption_row([]), row([[0, 0, 9, 9]], ["cup"])]
    )
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert loss > 0


@pytest.mark.slow
def test_workers_of_a_loader_draw_differently(tiny_processor):
    collator = GDinoDataCollator(tiny_processor, prompt_sampler=_draw)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader([ROWS[2]] * 2, batch_size=1, num_workers=2, collate_fn=collator, generator=generator)
    first, second = (words(tiny_processor, batch, 0) for batch in loader)
    assert first != second


def _draw(names: list[str], rng: random.Random) -> list[str]:
    return [rng.choice("abcdefghijklmnopqrstuvwxyz") * length for length in range(1, 5)]
