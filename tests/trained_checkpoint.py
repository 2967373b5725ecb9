"""A small checkpoint in transformers' own format that has learned to find two things, for tests that compare results.

A random model would not do: which of its scores exceed a threshold is chance, and it likes periods as much as words.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import (
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from tiny_peers import tiny_bert, tiny_peer_config, tiny_swin

LABELS = ["a cat", "a remote control"]
COLORS = {"a cat": (220, 30, 30), "a remote control": (30, 60, 230)}
BOXES = {"a cat": (10, 6, 24, 20), "a remote control": (52, 30, 36, 28)}
"""(x, y, width, height) in pixels of what each label names in the picture."""
STEPS = 100
KINDS = {
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}
# transformers' code has these ids of "." and "?" as constants.
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS = "a cat remote control dog hat person car tree face shield sword star , - the on"


def picture() -> Image.Image:
    """Return the grey picture with a red and a blue rectangle that the model has learned."""
    image = Image.new("RGB", (96, 64), (128, 128, 128))
    for label, (x, y, w, h) in BOXES.items():
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLORS[label])
    return image


def tokenizer() -> BertTokenizerFast:
    """Return a tokenizer of a few words with BERT's own ids of the special tokens."""
    free = iter(range(200, 1000))
    vocabulary = {**SPECIAL, **{word: next(free) for word in WORDS.split()}}
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{index}]": index for index in range(1100) if index not in taken}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True)


def save_trained_checkpoint(folder: Path, kind: str = "grounding-dino") -> Path:
    """Train a model for a few seconds and save it as transformers' class would.

    Args:
        folder: An empty folder; the checkpoint is written to a folder in it.
        kind: "grounding-dino" or "mm-grounding-dino".

    Returns:
        Folder of the checkpoint.
    """
    from gdino_hf import GDinoForObjectDetection, GDinoProcessor

    config_class, model_class = KINDS[kind]
    dropouts = {"dropout": 0.0, "fusion_droppath": 0.0, "text_enhancer_dropout": 0.0}
    text = tiny_bert(1100, num_attention_heads=2)
    config = tiny_peer_config(config_class, tiny_swin(16), text, num_queries=10, **dropouts)
    torch.manual_seed(0)
    image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    processor = GroundingDinoProcessor(image_processor=image_processor, tokenizer=tokenizer())
    model_class(config).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    model = GDinoForObjectDetection.from_pretrained(folder / "start", num_denoising_queries=0).train()
    ours = GDinoProcessor(image_processor, processor.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    annotations = [
        {"bbox": box, "category_id": LABELS.index(label), "area": box[2] * box[3], "iscrowd": 0}
        for label, box in BOXES.items()
    ]
    batch = ours(picture(), LABELS, annotations={"annotations": annotations})
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder / "gdino")
    # The names of the weights are transformers' own, so its class reads them and writes its own checkpoint.
    model_class.from_pretrained(folder / "gdino", config=config).save_pretrained(folder / "theirs")
    processor.save_pretrained(folder / "theirs")
    return folder / "theirs"
