"""Train gdino-nano: a small open-vocabulary detector for a CPU.

    python -m gdino_hf.training.nano --data everyday --backbone csp_pan --text minilm --output runs/nano --minutes 60

The image backbone (detection-trained CSPNet + PAN) and the text encoder (MiniLM-L3) stay frozen; the Grounding DINO
trunk between and above them learns from photographs with boxes. `--data` holds train.json and val.json in COCO format
with `images/` beside them, `--backbone` and `--text` what `conversion/convert_nanodet.py --head-features` and
`conversion/convert_minilm.py` write. Prompts hold the photograph's names among sampled absent ones; photographs are
mirrored, cropped and scaled. Started again, the command goes on from the last checkpoint until the minutes are used up.
At the end it measures AP on val.json and writes the model in float16 to `--export`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..data.coco import category_names, read_coco
from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.sampling import repeat_factors
from ..data.transforms import Compose, RandomColour, RandomHorizontalFlip, RandomScaleCrop
from ..evaluation.coco import average_precision, detect_coco
from ..model.configuration_gdino import GDinoConfig
from ..model.csp_pan import CspPanBackbone
from ..model.image_processing_gdino import GDinoImageProcessor
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from ..model.text_prompt import special_token_ids

IMAGE_SIZE = 320
RARE = 0.03  # names on fewer images than this share are drawn more often
EMA_DECAY = 0.998
SAVE_EVERY_SECONDS = 240.0


def build(backbone: str, text: str, **overrides: Any) -> tuple[GDinoForObjectDetection, GDinoProcessor]:
    """The untrained model around its two pretrained parts, both frozen, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(text)
    text_config = AutoConfig.from_pretrained(text)
    # Frozen parts hand on the same features at every step.
    text_config.hidden_dropout_prob = text_config.attention_probs_dropout_prob = 0.0
    image_backbone = CspPanBackbone.from_pretrained(backbone)
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
    model.model.backbone.requires_grad_(False)
    model.model.text_backbone.requires_grad_(False)
    image_processor = GDinoImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return model, GDinoProcessor(image_processor=image_processor, tokenizer=tokenizer, max_text_len=config.max_text_len)


class Clock:
    """Minutes of training, over all the runs of a folder."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.path, self.limit = folder / "clock.json", 60.0 * minutes
        self.before = json.loads(self.path.read_text())["seconds"] if self.path.exists() else 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Used so far."""
        return self.before + time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """Used so far, as a part of the limit, at most 1."""
        return min(1.0, self.seconds / self.limit)

    def save(self) -> None:
        """Write the time down."""
        self.path.write_text(json.dumps({"seconds": self.seconds}))


def learning_rate(fraction: float) -> float:
    """Factor on the peak: a short rise, a plateau to half of the time, then a straight line down."""
    if fraction < 0.02:
        return fraction / 0.02
    return min(1.0, 0.02 + 0.98 * (1 - fraction) / 0.5)


class Average(TrainerCallback):
    """Exponential moving average of the weights, and the budget of time."""

    def __init__(self, model: torch.nn.Module, clock: Clock, log: Path) -> None:
        self.clock, self.log, self.saved = clock, log, time.monotonic()
        self.weights: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Average, and stop or save when it is time."""
        # Early averages forget the random start quickly.
        decay = min(EMA_DECAY, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.weights:
                    self.weights[name].lerp_(parameter, 1 - decay)
        if self.clock.fraction >= 1:
            control.should_training_stop = control.should_save = True
        elif time.monotonic() - self.saved > SAVE_EVERY_SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the average and the time beside the checkpoint."""
        self.saved = time.monotonic()
        save_file(self.weights, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average.safetensors")
        self.clock.save()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line of JSON per log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "minutes": self.clock.seconds / 60, **(logs or {})}) + "\n")

    def put_into(self, model: torch.nn.Module) -> None:
        """Replace the model's trained weights by their average."""
        model.load_state_dict(self.weights, strict=False)


class NanoTrainer(Trainer):
    """The stock Trainer, with the frozen parts in eval mode and the loss's parts in the log."""

    parts: dict[str, float]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One step."""
        model.train()
        for module in model.modules():
            if getattr(module, "is_frozen_part", False):
                module.eval()
        return super().training_step(model, inputs, *args, **kwargs)


class Repeated(torch.utils.data.Dataset):
    """Rows of a data set, the rare ones more than once."""

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
    model, processor = build(args.backbone, args.text)
    for part in (model.model.backbone, model.model.text_backbone):
        part.is_frozen_part = True
    rows = read_coco(data / "train.json")
    names = category_names(data / "train.json")
    dataset = Repeated(rows, repeat_factors(rows["names"], RARE), args.seed)
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
        seed=random.SystemRandom().randrange(2**31) if (output / "clock.json").exists() else args.seed,
    )
    clock = Clock(output, args.minutes)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(clock.fraction))
    average = Average(model, clock, output / "log.jsonl")
    last = get_last_checkpoint(str(output))
    if last is not None:
        average.weights = load_file(Path(last) / "average.safetensors")
    trainer = NanoTrainer(
        model=model,
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
        train_dataset=dataset,
        data_collator=collator,
        optimizers=(optimizer, schedule),
        callbacks=[average],
    )
    if clock.fraction < 1:
        trainer.train(resume_from_checkpoint=last)
    average.put_into(model)
    model.eval()
    figures: dict[str, Any] = {
        "minutes": clock.seconds / 60,
        "steps": trainer.state.global_step,
        "samples": trainer.state.global_step * args.batch_size,
    }
    if args.export:
        export(model, processor, Path(args.export))
    figures |= average_precision(data / "val.json", detect_coco(model, processor, data / "val.json"))
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def export(model: GDinoForObjectDetection, processor: GDinoProcessor, folder: Path) -> None:
    """Write model and processor, weights in float16; loading brings them back to float32."""
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.json, val.json and images/")
    parser.add_argument("--backbone", required=True, help="image backbone's folder")
    parser.add_argument("--text", required=True, help="text encoder's folder")
    parser.add_argument("--output", required=True, help="checkpoints and logs")
    parser.add_argument("--export", help="where the finished model goes")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--least-labels", type=int, default=10)
    parser.add_argument("--most-labels", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0, help="processes that load photographs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    figures = train(parser.parse_args())
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
