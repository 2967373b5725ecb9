"""Show that words, not class indices, drive detection: train on some colour-shape pairs, detect pairs never seen.

    python -m gdino_hf.recipes.scenes --output runs/scenes

Everything starts from random weights: a small convolutional backbone, a one-layer text encoder with a vocabulary of 14
words, and Grounding DINO's encoder and decoder. Nothing pretrained is used.

- Training: scenes with 36 colour-shape pairs, drawn on the fly; prompts of 12 to 36 of these pairs. The other 12 pairs
  appear in no image and in no prompt.
- Test: images with all 48 pairs, and one prompt of all 48. So "red circle" (never seen) competes with "red square" and
  "blue circle" (both seen) for every box. A model that outputs class numbers would have no output for the unseen pairs;
  a model that memorized whole pairs would give their boxes the name of a seen pair.
- Figures: COCO's AP and AP50 over the 12 unseen pairs and over the 36 seen ones, in figures.json of `--output`. The
  loss goes to log.jsonl, the model with averaged weights to model/, the test set as COCO files to data/, and four
  scenes of unseen pairs with detected boxes to unseen.png.
- Schedule: AdamW, level until half of the run, then falling linearly. The run ends after `--steps` or `--minutes`,
  whichever comes first, and the schedule follows the one that is nearer its end. To resume an interrupted run, repeat
  the command: it continues from the last checkpoint, which is at most four minutes old.
- Cost: 9 minutes on one core, half a second for a step of 16 scenes.
- Result of one run: AP50 0.946 on unseen pairs and 0.946 on seen ones (AP 0.811 and 0.857). The test demands 0.5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BertConfig, BertTokenizerFast

from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.reproducible_sampling import ReproducibleDataset
from ..evaluation.coco_results import average_precision, detect_coco
from ..model.configuration_gdino import GDinoConfig
from ..model.csp_pan import CspPanConfig
from ..model.image_processing_gdino import GDinoImageProcessor
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from ..model.text_prompt import special_token_ids
from ..training.trainer import GDinoTrainer
from ..visualize import draw_detections
from .recipe_training import train_to_the_end, training_arguments, write_figures
from .scene_images import COLOURS, OUTLINES, PAIRS, SEEN, UNSEEN, Scenes, write_coco

# Seeds far above the training seeds, so that no test scene is a training scene.
TEST_SEED = 2**31
PICTURE_SEED = TEST_SEED + 1
# Smallest valid value of each numeric option.
MINIMUM = {
    "minutes": 0.01,
    "steps": 1,
    "image_size": 32,
    "batch_size": 1,
    "learning_rate": 1e-8,
    "test_scenes": 1,
    "seed": 0,
}


def build(image_size: int = 160, **overrides: Any) -> tuple[GDinoForObjectDetection, GDinoProcessor]:
    """Build a small model with random weights throughout, and its processor.

    Args:
        image_size: Height and width of the images in pixels.
        **overrides: Fields of `GDinoConfig` that differ from this recipe's.

    Returns:
        The model and its processor.
    """
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *COLOURS, *OUTLINES]
    tokenizer = BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=True)
    fields: dict[str, Any] = {
        "backbone_config": CspPanConfig(
            stem_width=16, stage_widths=(16, 32, 48, 64), stage_depths=(1, 1, 1, 1), pan_width=64
        ),
        "text_config": BertConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "d_model": 96,
        "num_feature_levels": 3,
        "encoder_layers": 1,
        "encoder_ffn_dim": 192,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "decoder_ffn_dim": 192,
        "decoder_attention_heads": 4,
        "num_queries": 40,
        "special_token_ids": special_token_ids(tokenizer),
        "num_denoising_queries": 20,
    }
    config = GDinoConfig.preset("nano", **{**fields, **overrides})
    image_processor = GDinoImageProcessor(size={"height": image_size, "width": image_size})
    processor = GDinoProcessor(image_processor=image_processor, tokenizer=tokenizer, max_text_len=config.max_text_len)
    return GDinoForObjectDetection(config), processor


def measure(
    model: GDinoForObjectDetection, processor: GDinoProcessor, annotations: Path
) -> dict[str, dict[str, float]]:
    """Measure average precision over unseen and over seen pairs, with one prompt of all pairs.

    Args:
        model: The trained model.
        processor: The model's processor.
        annotations: COCO JSON of scenes with all pairs.

    Returns:
        AP and AP50 under "unseen" and "seen".
    """
    detections = detect_coco(model, processor, annotations)
    content = json.loads(annotations.read_text(encoding="utf-8"))
    figures = {}
    for part, pairs in (("unseen", UNSEEN), ("seen", SEEN)):
        categories = [category for category in content["categories"] if category["name"] in pairs]
        chosen = {category["id"] for category in categories}
        truth = [item for item in content["annotations"] if item["category_id"] in chosen]
        subset = annotations.with_name(f"{annotations.stem}_{part}.json")
        subset.write_text(json.dumps({**content, "categories": categories, "annotations": truth}), encoding="utf-8")
        found = average_precision(subset, [item for item in detections if item["category_id"] in chosen])
        figures[part] = {name: round(found[name], 4) for name in ("AP", "AP50")}
    return figures


@torch.no_grad()
def picture(model: GDinoForObjectDetection, processor: GDinoProcessor, side: int = 320) -> Image.Image:
    """Draw four scenes of unseen pairs side by side, with the boxes detected for a prompt of all pairs.

    Args:
        model: The trained model.
        processor: The model's processor.
        side: Height and width of each scene in pixels.

    Returns:
        The picture, four times as wide as high.
    """
    rows = list(Scenes(4, UNSEEN, seed=PICTURE_SEED, image_size=side, noise=0))
    inputs = processor(images=[row["image"] for row in rows], text=list(PAIRS))
    results = processor.post_process_grounded_object_detection(
        model(**inputs),
        inputs,
        threshold=0.35,
        text_threshold=0.0,
        target_sizes=[(side, side)] * len(rows),
        nms_threshold=0.5,
        score="mean",
    )
    sheet = Image.new("RGB", (side * len(rows), side))
    for column, (row, result) in enumerate(zip(rows, results, strict=True)):
        sheet.paste(draw_detections(row["image"], result), (side * column, 0))
    return sheet


def make_trainer(args: argparse.Namespace, model: GDinoForObjectDetection, processor: GDinoProcessor) -> GDinoTrainer:
    """Return a trainer of the whole model, whose data set has one new scene for each example of each step."""
    return GDinoTrainer(
        model,
        training_arguments(
            args.output,
            minutes=args.minutes,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            # Nothing is pretrained, so all parameters train at the same rate.
            freeze=[],
            backbone_lr_factor=1.0,
            text_lr_factor=1.0,
            max_grad_norm=1.0,
            seed=args.seed,
            use_cpu=True,
        ),
        train_dataset=ReproducibleDataset(
            Scenes(args.steps * args.batch_size, SEEN, seed=args.seed, image_size=args.image_size)
        ),
        data_collator=GDinoDataCollator(processor, prompt_sampler=PromptSampler(SEEN, (12, len(SEEN))), seed=args.seed),
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train or resume, then evaluate; return the metrics."""
    torch.manual_seed(args.seed)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = build(args.image_size)
    steps, minutes = train_to_the_end(make_trainer(args, model, processor))
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    test = output / "data" / "test.json"
    test.parent.mkdir(exist_ok=True)
    write_coco(Scenes(args.test_scenes, PAIRS, seed=TEST_SEED, image_size=args.image_size), test)
    figures: dict[str, Any] = {
        "minutes": round(minutes, 2),
        "steps": steps,
        "scenes": steps * args.batch_size,
        **measure(model, processor, test),
    }
    picture(model, processor).save(output / "unseen.png", optimize=True)
    write_figures(output, figures)
    return figures


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for checkpoints, log, model and test set")
    parser.add_argument("--minutes", type=float, default=20, help="time budget, over all runs in the folder")
    parser.add_argument("--steps", type=int, default=1000, help="largest number of training steps")
    parser.add_argument("--image-size", type=int, default=160, help="height and width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="scenes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--test-scenes", type=int, default=300, help="number of scenes in the test set")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, scenes and prompts")
    args = parser.parse_args(arguments)
    for name, minimum in MINIMUM.items():
        # `not >=` rather than `<`, so that NaN is refused too.
        if not getattr(args, name) >= minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {getattr(args, name)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print the metrics."""
    print(json.dumps(train(parse_arguments(arguments)), indent=2))


if __name__ == "__main__":
    main()
