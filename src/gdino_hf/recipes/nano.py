"""Train gdino-nano: a small open-vocabulary detector for a CPU.

    python -m gdino_hf.recipes.nano --data everyday --backbone csp_pan_head --text minilm \
        --output runs/nano --export runs/gdino-nano --minutes 110

Grounding DINO (Liu et al. 2023, arXiv:2303.05499) with 2 encoder and 3 decoder layers, width 128 and 100 queries, on
320x320 pixels. The image backbone (a detection-trained CSPNet + PAN, 256 channels a level) and the text encoder
(MiniLM-L3) stay frozen; 2.8 M parameters between and above them learn from photographs with boxes.

- Input: `--data` holds train.json and val.json in COCO format with `images/` beside them; `--backbone` and `--text` are
  what `conversion/convert_nanodet.py --head-features` and `conversion/convert_minilm.py` write.
- Teacher: the closed-set head that the image backbone was trained with gives the projections their start and the
  encoder's proposals a dense target; see closed_set.py.
- Prompts: a photograph's own names among absent ones, 20 to 60 in all. Photographs are mirrored, cropped, scaled and
  coloured; those with rare names come more often.
- Schedule: AdamW 4e-4, batch 8, level to half of the time, then straight down to a fiftieth; weights are averaged.
  Time, not steps, drives it, so the same command suits any machine. Interrupted and started again, it goes on from the
  last checkpoint, at most four minutes old, until the minutes are used up.
- Cost: 110 minutes on one core, about 2.5 s for a step of 8 photographs.
- Result: the model in float16 in `--export`; COCO's AP on val.json in `--output`/figures.json, the loss in log.jsonl.
  What to expect stands in gdino-nano's model card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from ..data.coco import category_names, read_coco
from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.repeat_factors import repeat_factors
from ..data.transforms import Compose, RandomColour, RandomHorizontalFlip, RandomScaleCrop
from ..evaluation.coco_results import average_precision, detect_coco
from ..model.configuration_gdino import GDinoConfig
from ..model.csp_pan import CspPanBackbone
from ..model.image_processing_gdino import GDinoImageProcessor
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.phrase_structure import phrase_structure
from ..model.processing_gdino import GDinoProcessor
from ..model.text_prompt import special_token_ids
from ..training.ema import WeightAverage
from ..training.saving import last_checkpoint
from ..training.time_budget import CLOCK_FILE, Clock
from .closed_set_teacher import ClosedSetHead, dense_loss, start_from_classifier

EMA_DECAY = 0.998
SAVE_EVERY_SECONDS = 240.0


def build(
    backbone: str, text: str, image_size: int = 320, **overrides: Any
) -> tuple[GDinoForObjectDetection, GDinoProcessor]:
    """The untrained model around its two pretrained parts, both frozen, and its processor.

    Args:
        backbone: Folder of a `CspPanBackbone`.
        text: Folder of a text encoder with its tokenizer.
        image_size: Side in pixels of the square every photograph becomes.
        **overrides: Fields of `GDinoConfig` other than the preset's.

    Returns:
        The model and its processor.
    """
    tokenizer = AutoTokenizer.from_pretrained(text)
    text_config = AutoConfig.from_pretrained(text)
    # Frozen parts hand on the same features at every step.
    text_config.hidden_dropout_prob = text_config.attention_probs_dropout_prob = 0.0
    image_backbone = CspPanBackbone.from_pretrained(backbone)
    # Where the parts stood on the machine that trained them is nobody's business.
    text_config._name_or_path = image_backbone.config._name_or_path = ""
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
    for part in frozen_parts(model):
        part.requires_grad_(False)
    image_processor = GDinoImageProcessor(size={"height": image_size, "width": image_size})
    return model, GDinoProcessor(image_processor=image_processor, tokenizer=tokenizer, max_text_len=config.max_text_len)


def frozen_parts(model: GDinoForObjectDetection) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The pretrained parts that stay as they are."""
    return model.model.backbone, model.model.text_backbone


def warm_start(
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    teacher: ClosedSetHead,
    rows: Any,
    names: Sequence[str],
    num_images: int = 64,
) -> None:
    """Start the projections from the teacher's class weights; see `start_from_classifier`.

    Args:
        model: From `build`.
        processor: From `build`.
        teacher: The detector head that belongs to the image backbone.
        rows: The training set; images spread over it give the statistics.
        names: The teacher's names in its order.
        num_images: How many images.
    """
    chosen = range(0, len(rows), max(1, len(rows) // num_images))
    images = [rows[index]["image"].convert("RGB") for index in chosen]
    inputs = processor(images=images, text=list(names))
    if len(inputs["input_ids"]) > len(images):
        raise ValueError(f"{len(names)} names are more than one prompt holds; raise max_text_len.")
    hidden: list[Tensor] = []
    hook = model.model.text_projection.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        text = model.get_text_features(inputs["input_ids"][:1], inputs["attention_mask"][:1])
        maps = model.model.backbone(inputs["pixel_values"])
    hook.remove()
    start_from_classifier(model, teacher, maps, text, hidden[0])
    model.train()


def learning_rate(fraction: float) -> float:
    """Factor on the peak after a part (0..1) of the time: a short rise, level to half of it, then a straight line."""
    if fraction < 0.02:
        return fraction / 0.02
    return min(1.0, 0.02 + 0.98 * (1 - fraction) / 0.5)


class TimedRun(TrainerCallback):
    """The budget of time, averaged weights and the log around a stock Trainer.

    Args:
        average: Of the trained weights, on the model's device.
        clock: Says when to stop.
        log: File that gets a line of JSON per log.
    """

    def __init__(self, average: WeightAverage, clock: Clock, log: Path) -> None:
        self.average, self.clock, self.log, self.saved = average, clock, log, clock.seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average, and stop or save when it is time."""
        self.average.update(state.global_step)
        self.clock.tick()
        if self.clock.fraction >= 1:
            control.should_training_stop = control.should_save = True
        elif self.clock.seconds - self.saved > SAVE_EVERY_SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the average and the time in the checkpoint, of which the time is the last file."""
        self.saved = self.clock.seconds
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.average.save(checkpoint)
        self.clock.save(checkpoint)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line of JSON per log."""
        line = {"step": state.global_step, "minutes": round(self.clock.seconds / 60, 3), **(logs or {})}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def timed_run(model: torch.nn.Module, folder: Path, minutes: float) -> tuple[TimedRun, Path | None]:
    """What a recipe needs to go on where it was stopped.

    Args:
        model: On its device.
        folder: Of checkpoints and log.jsonl.
        minutes: Of training, over all runs of the folder.

    Returns:
        The callback, its average and clock as they were, and the last whole checkpoint if there is one.
    """
    run = TimedRun(WeightAverage(model, EMA_DECAY), Clock(minutes), folder / "log.jsonl")
    last = last_checkpoint(folder, last_file=CLOCK_FILE)
    if last is not None:
        run.average.load(last)
        run.clock.load(last)
        run.saved = run.clock.seconds
    return run, last


class NanoTrainer(Trainer):
    """The stock Trainer, with frozen parts in eval mode, the teacher's loss added, and the loss's parts in the log.

    Args:
        *args: As in Trainer.
        teacher: The image backbone's own detector head.
        names: Its names in its order.
        teacher_weight: Of its class term, whose quality focal loss is small beside the focal loss it accompanies.
        **kwargs: As in Trainer.
    """

    def __init__(
        self, *args: Any, teacher: ClosedSetHead, names: Sequence[str], teacher_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_weight = teacher_weight
        self.teacher = teacher.to(self.args.device)
        self.classes = {name: index for index, name in enumerate(names)}
        self._parts: dict[str, Tensor] = {}
        self._steps = 0
        self._maps: tuple[Tensor, ...] = ()
        self.model.model.backbone.register_forward_hook(self._keep_maps)

    def _keep_maps(self, module: torch.nn.Module, inputs: Any, maps: Any) -> None:
        self._maps = tuple(maps)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's own loss, and how far the encoder's proposals are from the teacher's."""
        for part in frozen_parts(self.model):
            part.eval()
        texts = inputs.pop("text")
        outputs = model(**inputs, output_hidden_states=True)
        known = [torch.tensor([self.classes.get(label, -1) for label in labels]) for labels in texts]
        phrase_ids = phrase_structure(
            inputs["input_ids"], inputs["attention_mask"], self.model.config.special_token_ids
        ).phrase_ids
        teacher_scores, teacher_boxes = self.teacher(self._maps)
        dense = dense_loss(
            outputs.enc_outputs_class,
            outputs.enc_outputs_coord_logits.sigmoid(),
            teacher_scores,
            teacher_boxes,
            torch.nn.utils.rnn.pad_sequence(known, batch_first=True, padding_value=-1).to(phrase_ids.device),
            phrase_ids,
            inputs["attention_mask"],
        )
        config = self.model.config
        loss = outputs.loss + (
            self.teacher_weight * config.class_loss_coefficient * dense.ce
            + config.bbox_loss_coefficient * dense.bbox
            + config.giou_loss_coefficient * dense.giou
        )
        parts = {**outputs.loss_dict, "dense_ce": dense.ce, "dense_bbox": dense.bbox, "dense_giou": dense.giou}
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()
        self._steps += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every part since the last log."""
        if self._steps:
            logs = {**logs, **{name: round(float(value) / self._steps, 4) for name, value in self._parts.items()}}
            self._parts, self._steps = {}, 0
        super().log(logs, *args, **kwargs)


class Repeated(torch.utils.data.Dataset):
    """Rows of a data set, some of them more than once.

    Args:
        rows: The rows.
        factors: How often each stands in this data set; a fraction is a probability.
        seed: Of the choice.
    """

    def __init__(self, rows: Any, factors: list[float], seed: int) -> None:
        rng = random.Random(seed)
        self.rows = rows
        self.indices = [
            index
            for index, factor in enumerate(factors)
            for _ in range(math.floor(factor) + (rng.random() < factor % 1))
        ]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.indices[index]]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on training, measure and export; returns the figures."""
    torch.manual_seed(args.seed)
    output, data = Path(args.output), Path(args.data)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = build(args.backbone, args.text, args.image_size)
    rows = read_coco(data / "train.json")
    names = category_names(data / "train.json")
    teacher = ClosedSetHead.from_pretrained(args.backbone)
    if teacher.num_classes != len(names):
        raise ValueError(
            f"The detector of {args.backbone} has {teacher.num_classes} classes but train.json {len(names)} names; "
            "give the names it was trained with, in its order."
        )
    if args.start:
        model.load_state_dict(GDinoForObjectDetection.from_pretrained(args.start).state_dict())
    else:
        warm_start(model, processor, teacher, rows, names)
    # The average is on the model's device from the beginning.
    run, last = timed_run(model.to(args.device), output, args.minutes)
    clock = run.clock
    steps = 0 if last is None else int(last.name.split("-")[1])
    collator = GDinoDataCollator(
        processor,
        prompt_sampler=PromptSampler(names, (args.least_labels, args.most_labels)),
        transform=Compose(
            [
                RandomHorizontalFlip(),
                RandomScaleCrop(scale=(0.75, 1.7), probability=0.6),
                RandomColour(strength=0.2, probability=0.4),
            ]
        ),
        # A later run must not repeat the pictures of an earlier one.
        seed=args.seed + steps,
        return_text=True,
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    # One pass over all parameters: on a CPU, hundreds of small tensors otherwise cost more than their arithmetic.
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(clock.fraction))
    trainer = NanoTrainer(
        model=model,
        teacher=teacher,
        names=names,
        teacher_weight=args.teacher_weight,
        args=TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=args.batch_size,
            max_steps=10**7,
            max_grad_norm=0.5,
            logging_steps=25,
            save_strategy="no",
            save_total_limit=2,
            remove_unused_columns=False,
            ignore_data_skip=True,
            report_to=[],
            seed=args.seed,
            use_cpu=args.device == "cpu",
            dataloader_num_workers=args.workers,
            disable_tqdm=True,
        ),
        train_dataset=Repeated(rows, repeat_factors(rows["names"], args.rare), args.seed),
        data_collator=collator,
        optimizers=(optimizer, schedule),
        callbacks=[run],
    )
    if clock.fraction < 1:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        steps = trainer.state.global_step
    run.average.put_into_model()
    model.eval()
    figures: dict[str, Any] = {
        "minutes": clock.seconds / 60,
        "steps": steps,
        "samples": steps * args.batch_size,
    }
    if args.export:
        export(model, processor, Path(args.export))
        # What is measured is what is shipped: float16 moves a few scores.
        model = GDinoForObjectDetection.from_pretrained(args.export).to(model.device).eval()
    figures |= average_precision(data / "val.json", detect_coco(model, processor, data / "val.json"))
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def export(model: GDinoForObjectDetection, processor: GDinoProcessor, folder: Path) -> None:
    """Write model and processor, weights in float16; loading brings them back to float32."""
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.json, val.json and images/")
    parser.add_argument("--backbone", required=True, help="image backbone's folder")
    parser.add_argument("--text", required=True, help="text encoder's folder")
    parser.add_argument("--output", required=True, help="checkpoints and logs")
    parser.add_argument("--start", help="folder of an earlier model to go on from instead of random weights")
    parser.add_argument("--export", help="where the finished model goes")
    parser.add_argument("--minutes", type=float, default=110, help="of training, over all runs")
    parser.add_argument("--image-size", type=int, default=320, help="side of the square photographs become, in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="peak")
    parser.add_argument("--least-labels", type=int, default=20, help="of a prompt")
    parser.add_argument("--most-labels", type=int, default=60, help="of a prompt")
    parser.add_argument("--rare", type=float, default=0.3, help="names on a smaller share of images come more often")
    parser.add_argument("--teacher-weight", type=float, default=16, help="of the teacher's class scores in the loss")
    parser.add_argument("--workers", type=int, default=0, help="processes that load photographs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print the figures."""
    print(json.dumps(train(parse_arguments(arguments)), indent=2))


if __name__ == "__main__":
    main()
