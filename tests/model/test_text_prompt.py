"""Labels to prompts, and tokens to phrases."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertTokenizerFast
from transformers.models.grounding_dino.modeling_grounding_dino import (
    generate_masks_with_special_tokens_and_transfer_map,
)

from gdino_hf import GDinoConfig, GDinoProcessor
from gdino_hf.model.caption_prompt import build_caption
from gdino_hf.model.phrase_structure import phrase_structure
from gdino_hf.model.text_prompt import build_prompt, parse_labels, spans_from_ids, special_token_ids

PAD, UNK, CLS, SEP, PERIOD, QUESTION = 0, 1, 2, 3, 5, 6
SPECIAL = [CLS, SEP, PERIOD, QUESTION]
A, B, C, D = 50, 51, 52, 53


def rows(*prompts):
    """Prompts of token ids as a padded batch and its mask."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([prompt + [PAD] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return input_ids, mask


def blocks(*sizes):
    """Block-diagonal mask."""
    return torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()


def test_phrases_of_a_known_prompt():
    # [CLS] a . b c . [SEP]
    phrases = phrase_structure(*rows([CLS, A, PERIOD, B, C, PERIOD, SEP]), SPECIAL)
    assert phrases.phrase_ids.tolist() == [[-1, 0, -1, 1, 1, -1, -1]]
    assert phrases.position_ids.tolist() == [[0, 0, 1, 0, 1, 2, 0]]
    assert torch.equal(phrases.phrase_mask[0], blocks(1, 2, 3, 1))


def test_open_last_phrase_is_a_block_whatever_the_padding():
    short, longer = [CLS, A, PERIOD, B, C, SEP], [CLS, A, B, C, D, A, B, C, PERIOD, SEP]
    alone = phrase_structure(*rows(short), SPECIAL)
    padded = phrase_structure(*rows(short, longer), SPECIAL)
    assert alone.phrase_ids.tolist() == [[-1, 0, -1, 1, 1, -1]]
    assert alone.position_ids.tolist() == [[0, 0, 1, 0, 1, 0]]
    assert torch.equal(alone.phrase_mask[0], blocks(1, 2, 2, 1))
    assert torch.equal(padded.phrase_mask[0, :6, :6], alone.phrase_mask[0])
    assert torch.equal(padded.position_ids[0, :6], alone.position_ids[0])
    assert torch.equal(padded.phrase_ids[0, :6], alone.phrase_ids[0])


def test_phrase_without_end_token_ends_with_the_prompt():
    phrases = phrase_structure(*rows([CLS, A, B], [CLS, A, PERIOD, B, PERIOD]), SPECIAL)
    assert phrases.phrase_ids[0].tolist() == [-1, 0, 0, -1, -1]
    assert torch.equal(phrases.phrase_mask[0], blocks(1, 2, 1, 1))


def test_padding_attends_to_itself_alone():
    phrases = phrase_structure(*rows([CLS, A, PERIOD, SEP], [CLS, A, PERIOD, B, C, PERIOD, SEP]), SPECIAL)
    assert torch.equal(phrases.phrase_mask[0, 4:], torch.eye(7, dtype=torch.bool)[4:])
    assert phrases.position_ids[0, 4:].tolist() == [0, 0, 0]
    assert phrases.phrase_ids[0, 4:].tolist() == [-1, -1, -1]


def test_padding_with_the_id_of_a_word_is_still_padding():
    input_ids = torch.tensor([[CLS, A, PERIOD, SEP, A, A]])
    phrases = phrase_structure(input_ids, torch.tensor([[1, 1, 1, 1, 0, 0]]), SPECIAL)
    assert phrases.phrase_ids.tolist() == [[-1, 0, -1, -1, -1, -1]]


def test_consecutive_delimiters_name_no_phrase():
    phrases = phrase_structure(*rows([CLS, PERIOD, A, PERIOD, QUESTION, B, PERIOD, SEP]), SPECIAL)
    assert phrases.phrase_ids.tolist() == [[-1, -1, 0, -1, -1, 1, -1, -1]]
    assert torch.equal(phrases.phrase_mask[0], blocks(1, 1, 2, 1, 2, 1))


def test_closed_prompts_equal_transformers():
    chance = random.Random(0)
    for _ in range(50):
        prompts = []
        for _ in range(chance.randint(1, 4)):
            prompt = [CLS]
            for _ in range(chance.randint(1, 5)):
                prompt += [chance.randint(20, 90) for _ in range(chance.randint(1, 4))]
                prompt.append(chance.choice([PERIOD, QUESTION]))
            prompts.append([*prompt, SEP])
        input_ids, mask = rows(*prompts)
        ours = phrase_structure(input_ids, mask, SPECIAL)
        their_mask, their_positions = generate_masks_with_special_tokens_and_transfer_map(
            input_ids, torch.tensor(SPECIAL)
        )
        assert torch.equal(ours.phrase_mask, their_mask)
        assert torch.equal(ours.position_ids, their_positions)


def test_phrase_structure_compiles_to_one_graph():
    compiled = torch.compile(phrase_structure, fullgraph=True, backend="eager")
    arguments = rows([CLS, A, PERIOD, B, C, PERIOD, SEP], [CLS, A, PERIOD, SEP])
    for ours, expected in zip(
        vars(compiled(*arguments, SPECIAL)).values(), vars(phrase_structure(*arguments, SPECIAL)).values(), strict=True
    ):
        assert torch.equal(ours, expected)


def test_spans_and_phrases_agree_with_tokenizing_the_text_at_once(tiny_tokenizer):
    labels = ["cat", "Remote  Control", "traffic light", "zebra", "left hat"]
    prompt = build_prompt(labels, tiny_tokenizer)
    (chunk,) = prompt.chunks
    assert list(chunk.input_ids) == tiny_tokenizer("cat. remote control. traffic light. zebra. left hat.")["input_ids"]
    phrases = phrase_structure(*rows(list(chunk.input_ids)), special_token_ids(tiny_tokenizer))
    for index, (start, end) in enumerate(chunk.spans):
        assert (phrases.phrase_ids[0] == index).nonzero()[:, 0].tolist() == list(range(start, end))
        assert tiny_tokenizer.decode(chunk.input_ids[start:end]) == " ".join(labels[index].lower().split())
    assert chunk.label_indices == (0, 1, 2, 3, 4)
    assert list(chunk.spans) == spans_from_ids(chunk.input_ids, SPECIAL, len(chunk.input_ids))


def test_label_inside_another_label_keeps_its_own_span(tiny_tokenizer):
    (chunk,) = build_prompt(["cats", "cat", "big cat"], tiny_tokenizer).chunks
    assert chunk.spans == ((1, 2), (3, 4), (5, 7))
    assert tiny_tokenizer.convert_ids_to_tokens(chunk.input_ids) == (
        ["[CLS]", "cats", ".", "cat", ".", "big", "cat", ".", "[SEP]"]
    )


@pytest.mark.parametrize(
    "text", ["cat. remote control.", "cat. remote control", " cat .remote control. ", "cat..remote control"]
)
def test_string_equals_list_with_or_without_last_period(text, tiny_tokenizer):
    assert build_prompt(text, tiny_tokenizer) == build_prompt(["cat", "remote control"], tiny_tokenizer)


def test_caller_keeps_the_spelling(tiny_tokenizer):
    prompt = build_prompt([" Cat ", "St. Ball", "dog?", "Hat."], tiny_tokenizer, negative_labels=["DOG"])
    assert prompt.labels == ("Cat", "St. Ball", "dog?", "Hat.", "DOG")
    assert prompt.num_positives == 4
    (chunk,) = prompt.chunks
    assert tiny_tokenizer.decode(chunk.input_ids) == "[CLS] cat. st ball. dog. hat. dog. [SEP]"


def test_delimiters_inside_a_label_do_not_split_it(tiny_tokenizer):
    (chunk,) = build_prompt(["red. blue? cup", "dog"], tiny_tokenizer).chunks
    assert chunk.spans == ((1, 4), (5, 6))


def test_special_tokens_spelled_out_in_a_label_are_left_out(tiny_tokenizer):
    (chunk,) = build_prompt(["cat [SEP] dog", "[CLS] hat"], tiny_tokenizer).chunks
    assert tiny_tokenizer.decode(chunk.input_ids) == "[CLS] cat dog. hat. [SEP]"


def test_unknown_characters_beside_words_are_still_a_label(tiny_tokenizer):
    (chunk,) = build_prompt(["🐈 cat", "cat"], tiny_tokenizer).chunks
    assert chunk.input_ids[1] == UNK
    assert chunk.spans == ((1, 3), (4, 5))


def test_accents_and_case_follow_the_tokenizer(tiny_tokenizer):
    assert build_prompt(["CÄT"], tiny_tokenizer).chunks == build_prompt(["cat"], tiny_tokenizer).chunks


def test_duplicate_labels_stay_two_phrases(tiny_tokenizer):
    prompt = build_prompt(["cat", "dog", "Cat"], tiny_tokenizer)
    assert prompt.labels == ("cat", "dog", "Cat")
    assert prompt.chunks[0].spans == ((1, 2), (3, 4), (5, 6))


def test_chunks_hold_every_label_once_and_whole(tiny_tokenizer):
    words = ["cat", "remote control", "traffic light", "big red ball", "zebra"]
    labels = [f"{word} {letter}" for word in words for letter in "abcdefg"]
    whole = build_prompt(labels, tiny_tokenizer, 256)
    for limit in (12, 13, 20, 64):
        prompt = build_prompt(labels, tiny_tokenizer, limit)
        assert [i for chunk in prompt.chunks for i in chunk.label_indices] == list(range(len(labels)))
        pieces = {}
        for chunk in prompt.chunks:
            assert len(chunk.input_ids) <= limit
            assert (chunk.input_ids[0], *chunk.input_ids[-2:]) == (CLS, PERIOD, SEP)
            for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
                pieces[index] = chunk.input_ids[start:end]
        (one,) = whole.chunks
        assert pieces == {i: one.input_ids[s:e] for i, (s, e) in zip(one.label_indices, one.spans, strict=True)}


def test_a_chunk_is_filled_to_the_last_token(tiny_tokenizer):
    # [CLS] and [SEP], and a word and a period per label.
    assert len(build_prompt(["cat"] * 5, tiny_tokenizer, 12).chunks) == 1
    assert len(build_prompt(["cat"] * 5, tiny_tokenizer, 11).chunks) == 2


def test_label_that_just_fits(tiny_tokenizer):
    label = "cat " * 9
    assert build_prompt([label], tiny_tokenizer, 12).chunks[0].spans == ((1, 10),)
    with pytest.raises(ValueError, match="has 9 tokens but a prompt of 11 takes at most 8; shorten it"):
        build_prompt([label], tiny_tokenizer, 11)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "list of labels is empty"),
        ((), "list of labels is empty"),
        ("", "names nothing"),
        (" . ", "names nothing"),
        ([""], "Label 0 is empty"),
        (["cat", " \t"], "Label 1 is empty"),
        (["cat", "..."], "has nothing to look for"),
        (["?"], "has nothing to look for"),
        (["[SEP]"], "has nothing to look for"),
        (["x" * 10_000], "has 10000 characters but a prompt of 256 tokens takes at most 4096; shorten it"),
        (["cats " * 2_000], "has 9999 characters but a prompt of 256 tokens takes at most 4096; shorten it"),
        (["cat " * 500], "has 500 tokens but a prompt of 256 takes at most 253; shorten it"),
    ],
)
def test_labels_that_cannot_be_used_are_named(labels, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        build_prompt(labels, tiny_tokenizer)


@pytest.mark.parametrize("labels", [None, 3, [3], ["cat", None], {"cat": 1}, b"cat"])
def test_labels_of_another_type_are_refused(labels):
    with pytest.raises(TypeError, match="a string or a list of strings"):
        parse_labels(labels)


def test_special_ids_are_the_tokenizers(tiny_tokenizer):
    assert special_token_ids(tiny_tokenizer) == SPECIAL


def test_vocabulary_without_question_mark_keeps_unknown_words():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    assert special_token_ids(tokenizer) == [2, 3, 5]
    assert build_prompt(["zebra cat"], tokenizer).chunks[0].input_ids == (2, 1, 6, 5, 3)


def test_vocabulary_without_period_is_refused():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    with pytest.raises(ValueError, match="use another encoder"):
        build_prompt(["cat"], tokenizer)


def test_negative_labels_stand_in_every_chunk(tiny_tokenizer):
    prompt = build_prompt(["cat", "dog", "cup"], tiny_tokenizer, max_text_len=8, negative_labels=["hat"])
    assert [chunk.label_indices for chunk in prompt.chunks] == [(0, 1, 3), (2, 3)]
    decoded = tiny_tokenizer.batch_decode([list(chunk.input_ids) for chunk in prompt.chunks], skip_special_tokens=True)
    assert decoded == ["cat. dog. hat.", "cup. hat."]
    for chunk in prompt.chunks:
        words = [tiny_tokenizer.decode(chunk.input_ids[start:end]) for start, end in chunk.spans]
        assert words == [prompt.labels[index] for index in chunk.label_indices]


def test_negative_labels_that_leave_no_room_are_refused(tiny_tokenizer):
    assert len(build_prompt(["cat"], tiny_tokenizer, 8, ["hat", "cup"]).chunks) == 1
    with pytest.raises(ValueError, match=r"negative labels have 4 tokens and the label 'remote control' has 3"):
        build_prompt(["cat", "remote control"], tiny_tokenizer, 8, ["hat", "cup"])


@pytest.mark.parametrize("length", [3, 2, 1, 0, -5, True, 4.0, "9", None])
def test_a_prompt_length_without_room_for_a_label_is_refused_everywhere(length, tiny_processor, tiny_tokenizer):
    for call in (
        lambda: build_prompt(["cat"], tiny_tokenizer, length),
        lambda: build_caption("a cat", tiny_tokenizer, length),
        lambda: GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=length),
    ):
        with pytest.raises(ValueError, match=r"^max_text_len is .+; give the number of tokens .+ at least 4: \[CLS\]"):
            call()
    if type(length) is int:
        with pytest.raises(ValueError, match=r"max_text_len must be at least 4, got"):
            GDinoConfig.from_dict({"max_text_len": length})


def test_the_shortest_prompt_holds_one_token(tiny_processor, tiny_tokenizer):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=4)
    assert processor(text=["cat", "dog"])["input_ids"].shape == (2, 4)
    with pytest.raises(ValueError, match="has 2 tokens but a prompt of 4 takes at most 1; shorten it"):
        processor(text=["remote control"])
