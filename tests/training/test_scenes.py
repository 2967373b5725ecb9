"""Claims about the recipe on generated scenes: what it learns, what it writes, and that it goes on where it stopped."""

import json

import pytest
import torch

from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.data.scenes import SEEN, UNSEEN, Scenes, write_coco
from gdino_hf.training import scenes as recipe

# Two colours and two shapes; the first pair is one of UNSEEN.
FOUR = ["red circle", "red square", "blue circle", "blue square"]


def test_words_are_recombined(tmp_path):
    """The short cut of the whole run: three pairs are trained, the fourth is found among them."""
    assert FOUR[0] in UNSEEN
    assert set(FOUR[1:]) <= set(SEEN)
    torch.manual_seed(0)
    model, processor = recipe.build(image_size=64, num_queries=8, num_denoising_queries=8)
    easy = {"image_size": 64, "num_shapes": (1, 2), "sizes": (0.3, 0.6)}
    write_coco(Scenes(32, FOUR, seed=1, **easy), tmp_path / "test.json")
    before = recipe.measure(model, processor, tmp_path / "test.json")
    model.train()
    steps, batch_size = 80, 16
    rows = Scenes(steps * batch_size, FOUR[1:], **easy)
    collator = GDinoDataCollator(processor, labels=FOUR[1:])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10, (steps - step) / (0.4 * steps))
        batch = collator([rows[index] for index in range(step * batch_size, (step + 1) * batch_size)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = recipe.measure(model, processor, tmp_path / "test.json")
    assert before["unseen"]["AP50"] < 0.05
    # About 0.6 with several seeds; a model that knew pairs by heart would give the box a trained name and stay near 0.
    assert after["unseen"]["AP50"] > 0.25


def test_test_scenes_hold_every_pair_and_are_none_of_the_training_ones():
    names = {name for row in Scenes(300, seed=recipe.TEST_SEED) for name in row["names"]}
    assert names == {*SEEN, *UNSEEN}
    # A run that goes on draws its scenes from the seed plus the steps done.
    assert recipe.TEST_SEED > 10**9


def test_every_word_is_a_token_of_its_own():
    _, processor = recipe.build(image_size=64)
    tokenizer = processor.tokenizer
    for pair in (*SEEN, *UNSEEN):
        ids = tokenizer(pair, add_special_tokens=False)["input_ids"]
        assert len(ids) == 2
        assert tokenizer.unk_token_id not in ids


@pytest.mark.slow
def test_trains_resumes_and_measures(tmp_path):
    from gdino_hf import GDinoForObjectDetection, GDinoProcessor

    def run(steps):
        options = ["--output", str(tmp_path), "--minutes", "5", "--steps", str(steps), "--batch-size", "2"]
        return recipe.train(recipe.parse_arguments([*options, "--image-size", "64", "--test-scenes", "12"]))

    first = run(3)
    assert first["steps"] == 3
    second = run(5)
    assert second["steps"] == 5
    assert second["minutes"] >= first["minutes"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == second
    assert figures["unseen"].keys() == figures["seen"].keys() == {"AP", "AP50"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    model = GDinoForObjectDetection.from_pretrained(tmp_path / "model").eval()
    processor = GDinoProcessor.from_pretrained(tmp_path / "model")
    assert recipe.measure(model, processor, tmp_path / "data" / "test.json") == {
        part: figures[part] for part in ("unseen", "seen")
    }


@pytest.mark.training
def test_unseen_pairs_are_found(tmp_path):
    """The command of the README, which takes about ten minutes."""
    figures = recipe.train(recipe.parse_arguments(["--output", str(tmp_path)]))
    assert figures["minutes"] < 30
    assert figures["unseen"]["AP50"] > 0.5
