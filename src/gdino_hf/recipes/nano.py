"""Train gdino-nano: a small open-vocabulary detector for a CPU.

    python -m gdino_hf.recipes.nano --data everyday --backbone csp_pan_head --text minilm \
        --output runs/nano --export runs/gdino-nano --minutes 110

Grounding DINO (Liu et al. 2023, arXiv:2303.05499) with 2 encoder and 3 decoder layers, width 128 and 100 queries, on
images of 320x320 pixels. The image backbone (a CSPNet + PAN trained for detection, 256 channels per level) and the text
encoder (MiniLM-L3) stay frozen; the trunk's 2.8 M parameters are trained on photographs with boxes.

- Input: `--data` holds train.json and val.json in COCO format beside `images/`. `--backbone` and `--text` are folders
  written by `gdino_hf.recipes.nanodet_backbone --head-features` and `gdino_hf.recipes.minilm_text_encoder`.
- Teacher: the closed-set head that the image backbone was trained with initializes the projections and gives the
  encoder's proposals a dense target; see closed_set_teacher.py.
- Prompts: the photograph's own names among absent ones, 20 to 60 in all. Photographs are mirrored, cropped, scaled and
  changed in colour; those with rare names are sampled more often.
- Schedule: AdamW with a peak learning rate of 4e-4 and batch size 8, level until half of the time, then falling
  linearly; weights are averaged. Time drives the schedule, so the same command suits any machine. To resume an
  interrupted run, repeat the command: it continues from the last checkpoint, which is at most four minutes old.
- Cost: 110 minutes on one core, about 2.5 s for a step of 8 photographs.
- Result: the model in float16 in `--export`, COCO metrics on val.json in figures.json of `--output`, the loss in
  log.jsonl. The model card of gdino-nano says what accuracy to expect.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..data.coco import category_names, read_coco
from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.repeat_factors import repeat_factors
from ..data.reproducible_sampling import ReproducibleDataset
from ..data.transforms import Compose, RandomColour, RandomHorizontalFlip, RandomScaleCrop, Transform
from ..evaluation.coco_results import average_precision, detect_coco
from ..model.configuration_gdino import GDinoConfig
from ..model.csp_pan import CspPanBackbone
from ..model.image_processing_gdino import GDinoImageProcessor
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.phrase_structure import phrase_structure
from ..model.processing_gdino import GDinoProcessor
from ..model.text_prompt import name_key, special_token_ids
from ..training.saving import last_checkpoint
from ..training.trainer import GDinoTrainer
from .closed_set_teacher import ClosedSetHead, DenseLoss, dense_loss, same_weights, start_from_classifier
from .recipe_training import train_to_the_end, training_arguments, write_figures

# The pretrained parts, which are not trained further.
FROZEN_GROUPS = ("backbone", "text")
# A small decoder finds one object several times; the processor suppresses that by default.
NMS = 0.6


def build(
    backbone: str, text: str, image_size: int = 320, **overrides: Any
) -> tuple[GDinoForObjectDetection, GDinoProcessor]:
    """Build the untrained model around its two pretrained parts, and its processor.

    Args:
        backbone: Folder of a `CspPanBackbone`.
        text: Folder of a text encoder with its tokenizer.
        image_size: Height and width that every photograph is resized to, in pixels.
        **overrides: Fields of `GDinoConfig` that differ from the preset "nano".

    Returns:
        The model and its processor.
    """
    tokenizer = AutoTokenizer.from_pretrained(text)
    text_config = AutoConfig.from_pretrained(text)
    # Frozen parts need no dropout: it would only add noise to their features.
    text_config.hidden_dropout_prob = text_config.attention_probs_dropout_prob = 0.0
    image_backbone = CspPanBackbone.from_pretrained(backbone)
    # Do not publish the folders that the parts were loaded from.
    text_config.name_or_path = image_backbone.config.name_or_path = ""
    config = GDinoConfig.preset(
        "nano",
        backbone_config=image_backbone.config,
        text_config=text_config,
        special_token_ids=special_token_ids(tokenizer),
        **overrides,
    )
    model = GDinoForObjectDetection(config)
    model.model.backbone.conv_encoder.model.load_state_dict(image_backbone.state_dict())
    encoder = AutoModel.from_pretrained(text, add_pooling_layer=False)
    model.model.text_backbone.load_state_dict(encoder.state_dict())
    image_processor = GDinoImageProcessor(size={"height": image_size, "width": image_size})
    return model, GDinoProcessor(image_processor, tokenizer, max_text_len=config.max_text_len, nms_threshold=NMS)


def warm_start(
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    teacher: ClosedSetHead,
    rows: Any,
    names: Sequence[str],
    num_images: int = 64,
) -> None:
    """Initialize the projections from the teacher's class weights; see `start_from_classifier`.

    Args:
        model: Model from `build`, changed in place.
        processor: Processor from `build`.
        teacher: Detection head that belongs to the image backbone.
        rows: Training data; feature statistics come from images spread evenly over it.
        names: Names of the teacher's classes, in its order.
        num_images: Number of images for the statistics.
    """
    chosen = range(0, len(rows), max(1, len(rows) // num_images))
    images = [rows[index]["image"].convert("RGB") for index in chosen]
    inputs = processor(images=images, text=list(names))
    if len(inputs["input_ids"]) > len(images):
        raise ValueError(f"{len(names)} names do not fit in one prompt; raise max_text_len.")
    hidden: list[Tensor] = []
    hook = model.model.text_projection.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        text = model.get_text_features(inputs["input_ids"][:1], inputs["attention_mask"][:1])
        maps = model.model.backbone(inputs["pixel_values"])
    hook.remove()
    start_from_classifier(model, teacher, maps, text, hidden[0])
    model.train()


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch.

    Attributes:
        scores: (B, S, C) in [0, 1], scores of all cells.
        boxes: (B, S, 4) cxcywh in [0, 1].
        phrase_classes: (B, N) int64 class of each label of the prompt, -1 for a label the teacher does not know.
        phrase_ids: (B, T) index of the label that each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) nonzero on real tokens.
    """

    scores: Tensor
    boxes: Tensor
    phrase_classes: Tensor
    phrase_ids: Tensor
    attention_mask: Tensor


class NanoTrainer(GDinoTrainer):
    """GDinoTrainer with the teacher's dense loss on the encoder's proposals.

    Args:
        *args: Arguments of GDinoTrainer.
        teacher: The image backbone's own detection head.
        names: Names of the teacher's classes, in its order.
        teacher_weight: Weight of the teacher's class term. Its quality focal loss is small compared with the focal loss
            that it is added to.
        image_sizes: Heights and widths in pixels, one of which each batch gets; none leaves batches as they are.
        **kwargs: Arguments of GDinoTrainer. The collator must return "text", the labels of each prompt.
    """

    def __init__(
        self,
        *args: Any,
        teacher: ClosedSetHead,
        names: Sequence[str],
        teacher_weight: float,
        image_sizes: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_weights = {"dense": teacher_weight}
        self.image_sizes = list(image_sizes)
        self.teacher = teacher.to(self.args.device)
        self.classes = {name_key(name): index for index, name in enumerate(names)}
        self._maps: tuple[Tensor, ...] = ()
        self.detector.model.backbone.register_forward_hook(self._keep_maps)

    def _keep_maps(self, module: torch.nn.Module, inputs: Any, maps: Any) -> None:
        self._maps = tuple(maps)

    def detection_loss(self, model: Any, inputs: Any, **kwargs: Any) -> tuple[Tensor, Mapping[str, Tensor], Any]:
        """Add the teacher's terms to the model's own loss."""
        inputs = self._at_a_size(inputs) if self.image_sizes else dict(inputs)
        labels = inputs.pop("text")
        loss, terms, outputs = super().detection_loss(model, {**inputs, "output_hidden_states": True}, **kwargs)
        config = self.detector.config
        for name, part in self.teacher_losses(self._lesson(inputs, labels), outputs).items():
            loss = loss + (
                self.teacher_weights[name] * config.class_loss_coefficient * part.ce
                + config.bbox_loss_coefficient * part.bbox
                + config.giou_loss_coefficient * part.giou
            )
            terms = {**terms, f"{name}_ce": part.ce, f"{name}_bbox": part.bbox, f"{name}_giou": part.giou}
        return loss, terms, outputs

    def _at_a_size(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Resize a batch that has no padding to one of the sizes, chosen by seed and step alone."""
        side = random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.image_sizes)
        pixels = F.interpolate(inputs["pixel_values"], (side, side), mode="bilinear", antialias=True)
        mask = inputs["pixel_mask"].new_ones(len(pixels), side, side)
        sizes = torch.full_like(inputs["image_sizes"], side)
        return {**inputs, "pixel_values": pixels, "pixel_mask": mask, "image_sizes": sizes}

    def teacher_losses(self, lesson: Lesson, outputs: Any) -> dict[str, DenseLoss]:
        """Compare the model's outputs with the teacher's; recipes with more to learn from it override this.

        Args:
            lesson: The teacher's scores and boxes of the batch, and which tokens they are about.
            outputs: The model's outputs, with those of all proposals and layers.

        Returns:
            Losses by name.
        """
        dense = dense_loss(
            outputs.enc_outputs_class,
            outputs.enc_outputs_coord_logits.sigmoid(),
            lesson.scores,
            lesson.boxes,
            lesson.phrase_classes,
            lesson.phrase_ids,
            lesson.attention_mask,
        )
        return {"dense": dense}

    def teacher_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of a batch that the teacher reads: those that the model's backbone just computed."""
        return self._maps

    def _lesson(self, inputs: Mapping[str, Any], labels: Sequence[Sequence[str]]) -> Lesson:
        """Ask the teacher about a batch, given the labels of its prompts."""
        phrase_ids = phrase_structure(
            inputs["input_ids"], inputs["attention_mask"], self.detector.config.special_token_ids
        ).phrase_ids
        classes = [torch.tensor([self.classes.get(name_key(label), -1) for label in prompt]) for prompt in labels]
        scores, boxes = self.teacher(self.teacher_maps(inputs["pixel_values"]))
        return Lesson(
            scores=scores,
            boxes=boxes,
            phrase_classes=pad_sequence(classes, batch_first=True, padding_value=-1).to(phrase_ids.device),
            phrase_ids=phrase_ids,
            attention_mask=inputs["attention_mask"],
        )


def teacher_of(backbone: str, names: Sequence[str]) -> ClosedSetHead:
    """Read the detection head of an image backbone.

    Args:
        backbone: Folder of the backbone.
        names: Names of the training data.

    Returns:
        The head.

    Raises:
        ValueError: The head has another number of classes than there are names.
    """
    teacher = ClosedSetHead.from_pretrained(backbone)
    if teacher.num_classes != len(names):
        raise ValueError(
            f"The detector of {backbone} has {teacher.num_classes} classes but train.json has {len(names)} names; "
            "use the names that the detector was trained with, in its order."
        )
    return teacher


def augmentation(strong: bool = False) -> Transform:
    """Return the augmentation of training photographs.

    Args:
        strong: Whether more photographs are cropped, scaled and changed in colour, and each by more.
    """
    return Compose(
        [
            RandomHorizontalFlip(),
            RandomScaleCrop(scale=(0.6, 2.0) if strong else (0.75, 1.7), probability=0.85 if strong else 0.6),
            RandomColour(strength=0.35 if strong else 0.2, probability=0.8 if strong else 0.4),
        ]
    )


def make_collator(args: argparse.Namespace, processor: GDinoProcessor, names: Sequence[str]) -> GDinoDataCollator:
    """Return the collator, which augments photographs and samples their prompts."""
    return GDinoDataCollator(
        processor,
        prompt_sampler=PromptSampler(names, (args.least_labels, args.most_labels)),
        transform=augmentation(),
        seed=args.seed,
        return_text=True,
    )


def make_trainer(
    args: argparse.Namespace,
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    teacher: ClosedSetHead,
    rows: Any,
    names: Sequence[str],
) -> NanoTrainer:
    """Build the trainer from model, teacher and data.

    Args:
        args: The command line's options.
        model: The initialized model.
        processor: The model's processor.
        teacher: The image backbone's own detection head.
        rows: Training data from `read_coco`.
        names: Names of the teacher's classes, in its order; also the vocabulary of absent labels.

    Returns:
        The trainer.
    """
    return NanoTrainer(
        model=model,
        teacher=teacher,
        names=names,
        teacher_weight=args.teacher_weight,
        args=training_arguments(
            args.output,
            minutes=args.minutes,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            freeze=list(FROZEN_GROUPS),
            max_grad_norm=0.5,
            seed=args.seed,
            use_cpu=args.device == "cpu",
            dataloader_num_workers=args.workers,
        ),
        train_dataset=ReproducibleDataset(rows),
        row_weights=repeat_factors(rows["names"], args.rare),
        data_collator=make_collator(args, processor, names),
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train or resume, export, then evaluate; return the metrics."""
    torch.manual_seed(args.seed)
    output, data = Path(args.output), Path(args.data)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = build(args.backbone, args.text, args.image_size)
    rows = read_coco(data / "train.json")
    names = category_names(data / "train.json")
    teacher = teacher_of(args.backbone, names)
    # A checkpoint brings its own weights.
    if last_checkpoint(output) is None:
        if args.start:
            start = GDinoForObjectDetection.from_pretrained(args.start)
            if not same_weights(start.model.backbone, model.model.backbone):
                raise ValueError(
                    f"The image backbone of {args.start} was trained further than that of {args.backbone}, so its "
                    "teacher cannot read it; continue with gdino_hf.recipes.nano_mixed."
                )
            model.load_state_dict(start.state_dict())
        else:
            warm_start(model, processor, teacher, rows, names)
    trainer = make_trainer(args, model, processor, teacher, rows, names)
    steps, minutes = train_to_the_end(trainer)
    figures: dict[str, Any] = {"minutes": minutes, "steps": steps, "samples": steps * args.batch_size}
    if args.export:
        export(model, processor, Path(args.export))
        # Measure the exported model: rounding to float16 changes a few scores.
        model = GDinoForObjectDetection.from_pretrained(args.export).to(model.device).eval()
    figures |= average_precision(data / "val.json", detect_coco(model, processor, data / "val.json"))
    write_figures(output, figures)
    return figures


def half_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by name, in float16; integers stay."""
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }


def export(model: GDinoForObjectDetection, processor: GDinoProcessor, folder: Path) -> None:
    """Write model and processor with weights in float16; loading converts them back to float32."""
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=half_weights(model))
    processor.save_pretrained(folder)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.json, val.json and images/")
    parser.add_argument("--backbone", required=True, help="folder of the image backbone")
    parser.add_argument("--text", required=True, help="folder of the text encoder")
    parser.add_argument("--output", required=True, help="folder for checkpoints, log and metrics")
    parser.add_argument("--start", help="folder of a trained model to start from, in place of random weights")
    parser.add_argument("--export", help="folder for the finished model")
    parser.add_argument("--minutes", type=float, default=110, help="time budget, over all runs")
    parser.add_argument("--image-size", type=int, default=320, help="height and width of the model's input in pixels")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--rare", type=float, default=0.3, help="names on a smaller share of images are sampled more")
    add_shared_options(parser)
    return parser.parse_args(arguments)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training that this recipe shares with `nano_mixed`."""
    parser.add_argument("--batch-size", type=int, default=8, help="photographs per step")
    parser.add_argument("--least-labels", type=int, default=20, help="fewest labels in a prompt")
    parser.add_argument("--most-labels", type=int, default=60, help="most labels in a prompt")
    parser.add_argument("--teacher-weight", type=float, default=16, help="weight of the teacher's class scores")
    parser.add_argument("--workers", type=int, default=0, help="processes that load photographs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, sampling and augmentation")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print the metrics."""
    print(json.dumps(train(parse_arguments(arguments)), indent=2))


if __name__ == "__main__":
    main()
