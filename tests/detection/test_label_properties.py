"""Properties of labels, whatever they are: every box carries the text it was asked with, in any order and chunking."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gdino_hf import Detector, Vocabulary
from gdino_hf.model.text_prompt import label_tokens
from random_models import make_random_model

WORDS = ["cat", "cats", "hot", "dog", "big cats", "remote", "control", "red", "car", "x", "7", "the"]
ODD = ["!", "?", ".", "café", "猫", "🦊", "ﬁ", "İ", "'s", "/", "#1", "-", "\u200b", "A"]
# A label needs one word that the tokenizer knows.
LABEL = st.builds(
    lambda parts, known, place: " ".join([*parts[:place], known, *parts[place:]]),
    st.lists(st.sampled_from(WORDS + ODD), max_size=8),
    st.sampled_from(WORDS),
    st.integers(0, 8),
)
LONG = st.builds(
    lambda word, count: " ".join([word] * count), st.sampled_from(["cat", "red", "dog"]), st.integers(1, 59)
)
LABELS = st.lists(LABEL | LONG, min_size=1, max_size=8)
# Fixtures are not reset between examples: none of them changes.
QUIET = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def detector(tiny_config, tiny_processor):
    return Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)


@settings(QUIET, max_examples=150)
@given(labels=LABELS, per_prompt=st.none() | st.integers(1, 3), length=st.integers(62, 256))
def test_every_phrase_of_a_prompt_is_its_label(tiny_tokenizer, labels, per_prompt, length):
    vocabulary = Vocabulary(labels, labels_per_prompt=per_prompt)
    prompt = vocabulary.prompt(tiny_tokenizer, length)
    assert vocabulary.labels == tuple(dict.fromkeys(label.strip() for label in labels))
    seen = []
    for chunk in prompt.chunks:
        assert len(chunk.input_ids) <= length
        assert per_prompt is None or len(chunk.label_indices) <= per_prompt
        for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
            seen.append(index)
            (wanted,) = label_tokens([prompt.labels[index]], tiny_tokenizer)
            assert list(chunk.input_ids[start:end]) == wanted
    assert sorted(seen) == list(range(len(vocabulary)))


@settings(QUIET, max_examples=12)
@given(labels=st.lists(LABEL, min_size=1, max_size=5), data=st.data(), per_prompt=st.none() | st.integers(1, 2))
@pytest.mark.filterwarnings("ignore::gdino_hf.model.label_faults.LabelWarning")
def test_boxes_and_presence_do_not_depend_on_order(detector, labels, data, per_prompt):
    picture = Image.effect_mandelbrot((72, 64), (-2, -1.2, 1, 1.2), 40).convert("RGB")
    first = detector(picture, Vocabulary(labels, labels_per_prompt=per_prompt), threshold=0.2)
    order = data.draw(st.permutations([*labels, labels[0]]))
    second = detector(picture, Vocabulary(order, labels_per_prompt=per_prompt), threshold=0.2)
    assert second.presence == first.presence
    assert set(first.presence) == {label.strip() for label in labels}
    assert set(first.text_labels) <= set(first.presence)
    assert second.text_labels == first.text_labels
    assert (second.boxes == first.boxes).all()
