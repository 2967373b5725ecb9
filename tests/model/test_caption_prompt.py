"""Claims about captions as prompts: characters of a phrase become its tokens, and no others."""

import pytest
import torch
from PIL import Image

from gdino_hf.model.caption_prompt import build_caption, caption_tokens, phrase_tokens
from gdino_hf.model.phrase_structure import phrase_structure
from gdino_hf.model.text_prompt import special_token_ids


def tokens_of(tokenizer, prompt, places):
    return tokenizer.convert_ids_to_tokens([prompt.chunks[0].input_ids[place] for place in places])


@pytest.mark.parametrize(
    ("caption", "characters", "expected"),
    [
        ("Cattle near a Cat.", [(14, 17)], ["cat"]),
        ("cattle near a cat", [(0, 6)], ["cat", "##t", "##l", "##e"]),
        ("a red car and a red cup", [(16, 23)], ["red", "cup"]),
        # Two pairs, of the second only its word.
        ("a red car and a blue cup", [(2, 5), (16, 20)], ["red", "blue"]),
        # Characters before the phrase that have no token of their own, or lose their accent.
        ("  \u200b  une café, red", [(9, 13)], ["c", "##a", "##f", "##e"]),
        ("日本 red", [(3, 6)], ["red"]),
    ],
)
def test_characters_become_their_tokens(tiny_tokenizer, caption, characters, expected):
    prompt = build_caption(caption, tiny_tokenizer)
    assert tokens_of(tiny_tokenizer, prompt, phrase_tokens(prompt, characters)[1]) == expected


def test_sentences_are_phrases_as_the_model_reads_them(tiny_tokenizer):
    prompt = build_caption("a cat. is it red? the dog, 2.5 cups", tiny_tokenizer)
    ids = torch.tensor([prompt.chunks[0].input_ids])
    structure = phrase_structure(ids, torch.ones_like(ids), special_token_ids(tiny_tokenizer))
    for label, (start, end) in enumerate(prompt.chunks[0].spans):
        assert set(structure.phrase_ids[0, start:end].tolist()) == {label}
    assert int(structure.phrase_ids.max()) + 1 == len(prompt.labels)
    assert prompt.labels == ("a cat", "is it red", "the dog, 2", "5 cups")


def test_a_phrase_over_a_period_has_tokens_on_both_sides(tiny_tokenizer):
    prompt = build_caption("the cat. red dog", tiny_tokenizer)
    label, places = phrase_tokens(prompt, [(4, 12)])
    assert label == 0
    assert tokens_of(tiny_tokenizer, prompt, places) == ["cat", "red"]


def test_a_caption_is_closed_once(tiny_tokenizer):
    period = special_token_ids(tiny_tokenizer)[2]
    for caption in ("a cat", "a cat."):
        assert build_caption(caption, tiny_tokenizer).chunks[0].input_ids.count(period) == 1
    assert build_caption("a cat", tiny_tokenizer).chunks == build_caption("a cat.", tiny_tokenizer).chunks


def test_written_special_tokens_do_not_end_the_prompt(tiny_tokenizer):
    ids = build_caption("a [SEP] cat [CLS]", tiny_tokenizer).chunks[0].input_ids
    sep, cls = tiny_tokenizer.sep_token_id, tiny_tokenizer.cls_token_id
    assert (ids.count(cls), ids.count(sep)) == (1, 1)


def test_offsets_give_the_caption_back(tiny_tokenizer):
    caption = "Red  CATS, blue-dogs!"
    pieces = [caption[start:end] for _, start, end in caption_tokens(caption, tiny_tokenizer)]
    assert "".join(pieces) == caption.replace(" ", "")


@pytest.mark.parametrize(("caption", "what"), [("...", "nothing"), ("", "nothing"), ("cat " * 300, "300|301")])
def test_refuses_captions(tiny_tokenizer, caption, what):
    with pytest.raises(ValueError, match=what):
        build_caption(caption, tiny_tokenizer)
    with pytest.raises(TypeError, match="string"):
        build_caption(["cat"], tiny_tokenizer)


@pytest.mark.parametrize("pair", [(0, 0), (3, 2), (-1, 2), (0, 99), (0,), ("0", "1"), (0.0, 1.0), None])
def test_refuses_pairs(tiny_tokenizer, pair):
    with pytest.raises(ValueError, match="tokens_positive"):
        phrase_tokens(build_caption("a cat", tiny_tokenizer), [pair])


def test_the_processor_turns_characters_into_a_positive_map(tiny_processor):
    image = Image.new("RGB", (64, 64))
    prompt = build_caption("cattle near a cat. a red dog", tiny_processor.tokenizer)
    boxes = [
        {"bbox": [0, 0, 0, 5], "tokens_positive": [[0, 6]]},  # no area: it goes, and the others keep their phrases
        {"bbox": [0, 0, 32, 32], "tokens_positive": [[14, 17]]},
        {"bbox": [32, 32, 32, 32], "tokens_positive": [[21, 28]]},
    ]
    inputs = tiny_processor(images=[image], text=[prompt], annotations=[{"annotations": boxes}])
    label = inputs["labels"][0]
    marked = [[int(place) for place in row.nonzero()[:, 0]] for row in label["positive_map"]]
    assert [tokens_of(tiny_processor.tokenizer, prompt, row) for row in marked] == [["cat"], ["red", "dog"]]
    assert label["class_labels"].tolist() == [0, 1]
    assert label["boxes"].tolist() == [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]


def test_characters_of_labels_are_refused(tiny_processor):
    annotations = [{"annotations": [{"bbox": [0, 0, 3, 3], "tokens_positive": [[0, 3]]}]}]
    with pytest.raises(ValueError, match="build_caption"):
        tiny_processor(images=[Image.new("RGB", (64, 64))], text=["cat"], annotations=annotations)
