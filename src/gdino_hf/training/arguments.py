"""What a fine-tuning can be told, as dataclasses that a YAML file or the command line fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ..evaluation.coco_results import METRICS
from .parameter_groups import check_parts

# Steps of a training that time ends.
_NO_END = 10**7
# Least value of numbers that transformers takes as they are.
_LEAST = {
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "backbone_lr_factor": 0.0,
    "text_lr_factor": 0.0,
}


@dataclass
class DataArguments:
    """What is learned from, and measured on.

    Raises:
        ValueError: A value is out of range.
    """

    _argument_group_name = "data"

    data: str = field(
        default="",
        metadata={"help": "COCO json or ODVG json lines to learn from, or a folder with train, val and test"},
    )
    images: str | None = field(default=None, metadata={"help": "folder of the photographs; images/ beside the file"})
    val: str | None = field(default=None, metadata={"help": "measured while training; val beside the training file"})
    test: str | None = field(default=None, metadata={"help": "measured at the end; test beside the training file"})
    streaming: bool = field(
        default=False, metadata={"help": "read rows as they are needed, of a set larger than memory; needs max_steps"}
    )
    unreadable: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "what a picture does that cannot be read: stop the training, or be passed over"},
    )
    augment: Literal["photo", "any-way-up", "small-set", "none"] = field(
        default="photo",
        metadata={
            "help": "photo: mirror, scale, crop and colour; any-way-up: also upside down, as under a microscope or "
            "from above; small-set: several sizes and mosaics of four"
        },
    )
    least_labels: int | None = field(
        default=None,
        metadata={"help": "labels of a training prompt, absent ones included; all that fit, and 20 where replayed"},
    )
    most_labels: int | None = field(
        default=None,
        metadata={"help": "labels of a training prompt, absent ones included; all that fit, and 60 where replayed"},
    )
    replay: str | None = field(
        default=None, metadata={"help": "data set of what the model must not forget, mixed in; COCO json or a folder"}
    )
    replay_share: float = field(default=0.25, metadata={"help": "replayed photographs among all, above 0 and below 1"})
    start_share: float = field(
        default=0.0,
        metadata={"help": "part of the starting weights in the finished ones, 0..1: more of it forgets less"},
    )
    zero_shot: str | None = field(
        default=None, metadata={"help": "data set whose AP before and after goes into the report: what was forgotten"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share must be above 0 and below 1, got {self.replay_share}.")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must be at least 0 and below 1, got {self.start_share}.")
        if self.streaming and self.replay is not None:
            raise ValueError("streaming and replay exclude each other; leave one of them out.")
        for bounds in (self.prompt_length(0), self.prompt_length(None)):
            if not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(
                    f"least_labels and most_labels must be 1 <= least <= most, got {bounds[0]} and {bounds[1]}."
                )

    def prompt_length(self, names: int | None) -> tuple[int, int]:
        """Least and most labels of a training prompt, before what does not fit is left out.

        Args:
            names: How many names there are to ask for, all of them at once by default; None for replayed photographs,
                whose prompts vary in length as those that gdino-nano learned with.
        """
        least, most = (20, 60) if names is None else (max(20, names), max(60, names))
        if self.most_labels is not None:
            most, least = self.most_labels, min(least, self.most_labels)
        if self.least_labels is not None:
            least, most = self.least_labels, max(most, self.least_labels) if self.most_labels is None else most
        return least, most


@dataclass
class ModelArguments:
    """What is trained.

    Raises:
        ValueError: A value is out of range.
    """

    _argument_group_name = "model"

    model: str = field(default="nano", metadata={"help": "Hub id, folder, or nano"})
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "height and width every photograph becomes, or one number for the shortest side, in pixels"},
    )
    denoising_queries: int | None = field(
        default=None, metadata={"help": "boxes with noise per photograph that the decoder learns to repair; 0 for none"}
    )
    lora_rank: int = field(default=0, metadata={"help": "train low-rank adapters of the trunk instead of the trunk"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "scale of the adapters; twice the rank by default"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout inside the adapters, 0..1"})

    def __post_init__(self) -> None:
        if self.image_size is not None and (len(self.image_size) > 2 or min(self.image_size) < 32):
            raise ValueError(f"image_size must be one or two numbers of at least 32 pixels, got {self.image_size}.")
        if self.denoising_queries is not None and self.denoising_queries < 0:
            raise ValueError(f"denoising_queries must be at least 0, got {self.denoising_queries}.")
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_rank must be at least 0 and lora_dropout within 0..1, got {self.lora_rank} and "
                f"{self.lora_dropout}."
            )


@dataclass
class GDinoTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with a detector's defaults, and what a learning rate per part needs.

    Raises:
        ValueError: A value is out of range.
    """

    _argument_group_name = "training"

    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "photographs of a step, on each device", "aliases": ["--batch-size"]}
    )
    num_train_epochs: float = field(
        default=12.0, metadata={"help": "passes over the training set", "aliases": ["--epochs"]}
    )
    max_steps: int = field(default=-1, metadata={"help": "steps in place of epochs; -1 for epochs"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak, of the trunk"})
    backbone_lr_factor: float = field(default=0.1, metadata={"help": "on the learning rate, for the image backbone"})
    text_lr_factor: float = field(default=0.1, metadata={"help": "on the learning rate, for the text encoder"})
    freeze: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "parts that stay as they are: backbone, text, trunk or none"},
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "of the averaged weights that are measured and shipped; 0 for none"}
    )
    minutes: float | None = field(
        default=None,
        metadata={"help": "train so long, over all runs, in place of epochs; the learning rate follows the time"},
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "of matrices; norms and biases have none"})
    max_grad_norm: float = field(default=0.1, metadata={"help": "gradients are cut to this length"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "linear, cosine, constant_with_warmup, ..."})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of the log"})
    save_steps: float = field(default=100, metadata={"help": "steps between two checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that stay"})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "what load_best_model_at_end goes by: AP, AP50 or another of COCO's figures"}
    )
    accelerator_config: dict | str | None = field(
        default=None, metadata={"help": "accelerate's own settings, as JSON or a file of it"}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "leave off: photographs are needed"})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "leave off: every trained parameter has a gradient in every step"}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end or self.save_strategy == "best":
            self._choose_metric()
        if self.minutes is not None:
            if self.minutes <= 0:
                raise ValueError(f"minutes must be above 0, got {self.minutes}.")
            if self.max_steps <= 0:
                self.max_steps = _NO_END
        if self.accelerator_config is None:
            # Of streamed rows each process takes its own; photographs and boxes cannot be sent as one tensor.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        self.freeze = check_parts(self.freeze)
        if self.device.type == "cpu":
            # There is nothing to copy to, and PyTorch warns of it in every epoch.
            self.dataloader_pin_memory = False
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}.")

    def _choose_metric(self) -> None:
        """What is best: the highest AP unless another of COCO's figures is named."""
        name = (self.metric_for_best_model or "AP").removeprefix("eval_")
        if name not in METRICS:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(METRICS)}, got {name}.")
        self.metric_for_best_model = name
        self.greater_is_better = True
