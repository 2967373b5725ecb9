"""Options of a fine-tuning run, as dataclasses that are filled from the command line or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import TrainingArguments

from ..data.annotation_options import (
    AnnotationOptions,
    BoxesFollow,
    BoxFormat,
    Crowds,
    FirstPixel,
    Groups,
    Paths,
    Sizes,
    Unreadable,
)
from ..data.object_tables import HUB
from ..data.places import is_there
from ..evaluation.coco_results import METRICS
from ..evaluation.lvis import LVIS_METRICS
from ..model.option_flags import checked_flag
from .loggers import check_loggers
from .parameter_groups import check_groups

# Step limit if there is a time budget, which ends the run first.
_UNLIMITED_STEPS = 10**7
# Names of metrics in transformers' examples.
_TORCHMETRICS = {"map": "AP", "map_50": "AP50", "map_75": "AP75"}
# Smallest valid values of options that transformers does not check.
_MINIMUM = {
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
    """Options about data: what to train on, what to measure on, how to augment and prompt.

    Raises:
        ValueError: A value is out of range.
    """

    _argument_group_name = "data"

    data: str = field(
        default="",
        metadata={
            "help": "training data: COCO JSON, ODVG JSON lines, YOLO, Pascal VOC, CreateML, LabelMe, a Hugging Face "
            "data set or WebDataset tars, or a folder with the splits train, val and test"
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "the same as data, as transformers' examples call it; cppe-5 is an id"},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    images: str | None = field(
        default=None, metadata={"help": "folder of the images; images/ beside the annotation file by default"}
    )
    val: str | None = field(
        default=None,
        metadata={"help": "validation data, or none; the split val beside the training file by default"},
    )
    test: str | None = field(
        default=None,
        metadata={
            "help": "test data for the final metrics, or none; the split test beside the training file by default"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read rows when needed, for data larger than memory; needs max_steps or minutes"},
    )
    unreadable: Unreadable = field(
        default="stop",
        metadata={
            "help": "what to do about an image that is missing or cannot be read: stop the training, or skip the image"
        },
    )
    crowds: Crowds = field(
        default="ignore",
        metadata={
            "help": "boxes marked iscrowd, or difficult in Pascal VOC: ignore them, or keep them as boxes like all "
            "others"
        },
    )
    boxes_follow: BoxesFollow = field(
        default="auto",
        metadata={
            "help": "what boxes of pictures with an EXIF orientation are pixels of: the upright picture, the stored "
            "one, or auto, by the annotated width and height"
        },
    )
    sizes: Sizes = field(
        default="stop",
        metadata={"help": "annotated sizes that are the picture's in proportion only: stop, or scale the boxes"},
    )
    groups: Groups = field(
        default="leave-out",
        metadata={"help": "classes without boxes that only group others: leave-out, or keep"},
    )
    paths: Paths = field(
        default="inside",
        metadata={
            "help": "images whose path leads outside the data set's folder: refuse them, or take images from anywhere, "
            "for annotation files from people you trust"
        },
    )
    box_format: BoxFormat = field(
        default="auto",
        metadata={
            "help": "what the four numbers of a box in objects are: corner and size, two corners, center and size, or "
            "auto, by all boxes"
        },
    )
    first_pixel: FirstPixel = field(
        default="1", metadata={"help": "number of the first pixel in Pascal VOC documents, 1 as VOC has it"}
    )
    augment: Literal["photo", "any-way-up", "small-set", "none"] = field(
        default="photo",
        metadata={
            "help": "augmentation. photo: mirror, scale, crop and change colours; any-way-up: also turn upside down, "
            "for microscope or aerial images; small-set: several sizes and mosaics of four images"
        },
    )
    albumentations: str | None = field(
        default=None,
        metadata={
            "help": "albumentations pipeline that albumentations.save wrote, as JSON or YAML, in place of augment"
        },
    )
    least_labels: int | None = field(
        default=None,
        metadata={
            "help": "fewest labels in a training prompt, absent ones included; by default all that fit, 20 for replay"
        },
    )
    most_labels: int | None = field(
        default=None,
        metadata={
            "help": "most labels in a training prompt, absent ones included; by default all that fit, 60 for replay"
        },
    )
    replay: str | None = field(
        default=None,
        metadata={"help": "data to mix in so that the model does not forget it: COCO JSON, or a folder with train"},
    )
    replay_share: float = field(
        default=0.25, metadata={"help": "share of replayed images among all, above 0 and below 1"}
    )
    start_share: float = field(
        default=0.0,
        metadata={
            "help": "weight interpolation: share of the initial weights in the final ones, 0..1; a larger share means "
            "less forgetting"
        },
    )
    zero_shot: str | None = field(
        default=None, metadata={"help": "data whose AP before and after training shows what the model has forgotten"}
    )

    def __post_init__(self) -> None:
        checked_flag(self.streaming, "streaming")
        if self.dataset_name is not None:
            if self.data and self.data != self._place():
                raise ValueError(f"data is {self.data} and dataset_name is {self.dataset_name}; give one of them.")
            self.data = self._place()
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share must be above 0 and below 1, got {self.replay_share}.")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must be at least 0 and below 1, got {self.start_share}.")
        if self.streaming and self.replay is not None:
            raise ValueError("streaming and replay cannot be combined; leave one of them out.")
        for bounds in (self.prompt_length(0), self.prompt_length(None)):
            if not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(
                    f"least_labels and most_labels must be 1 <= least <= most, got {bounds[0]} and {bounds[1]}."
                )

    def _place(self) -> str:
        """Return the data set that `dataset_name` and `dataset_config_name` stand for."""
        name = str(self.dataset_name)
        if is_there(name):
            return name
        # Ids without a slash, as early data sets have them, would look like folders.
        name = name if "/" in name else HUB + name
        return name if self.dataset_config_name is None else f"{name}@{self.dataset_config_name}"

    def annotation_options(self) -> AnnotationOptions:
        """Return the conventions of the annotation files."""
        names = [item.name for item in fields(AnnotationOptions) if hasattr(self, item.name)]
        return AnnotationOptions(**{name: getattr(self, name) for name in names})

    def prompt_length(self, names: int | None) -> tuple[int, int]:
        """Return the fewest and the most labels of a training prompt, before labels that do not fit are dropped.

        Args:
            names: Number of names in the data set, all of which are prompted by default; None for replayed images,
                whose prompts vary in length like those gdino-nano was trained with.
        """
        least, most = (20, 60) if names is None else (max(20, names), max(60, names))
        if self.most_labels is not None:
            most, least = self.most_labels, min(least, self.most_labels)
        if self.least_labels is not None:
            least, most = self.least_labels, max(most, self.least_labels) if self.most_labels is None else most
        return least, most


@dataclass
class ModelArguments:
    """Options about the model: which one, its image size, denoising and adapters.

    Raises:
        ValueError: A value is out of range.
    """

    _argument_group_name = "model"

    model: str = field(
        default="nano",
        metadata={
            "help": "model to start from: Hub id, folder, or nano",
            "aliases": ["--model_name_or_path", "--model-name-or-path"],
        },
    )
    image_square_length: int | None = field(
        default=None,
        metadata={"help": "longest side that every image is resized to, in pixels, as transformers' examples call it"},
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "accepted as transformers' examples have it; no weight depends on the number of labels"},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "height and width that every image is resized to, or one number for the shortest side, in pixels"
        },
    )
    denoising_queries: int | None = field(
        default=None,
        metadata={"help": "noisy boxes per image that the decoder learns to correct; 0 turns denoising off"},
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "rank of low-rank adapters to train instead of the trunk; 0 trains the trunk itself"},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "adapters are scaled by alpha / rank; twice the rank by default"}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability in the adapters, at least 0 and below 1"}
    )

    def __post_init__(self) -> None:
        if self.image_size is not None and (len(self.image_size) > 2 or min(self.image_size) < 32):
            raise ValueError(f"image_size must be one or two numbers, each at least 32 pixels, got {self.image_size}.")
        if self.image_square_length is not None and (self.image_square_length < 32 or self.image_size is not None):
            raise ValueError(
                f"image_square_length must be at least 32 pixels, and stand without image_size, got "
                f"{self.image_square_length} and {self.image_size}."
            )
        if self.denoising_queries is not None and self.denoising_queries < 0:
            raise ValueError(f"denoising_queries must be at least 0, got {self.denoising_queries}.")
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_rank must be at least 0 and lora_dropout at least 0 and below 1, got {self.lora_rank} and "
                f"{self.lora_dropout}."
            )


@dataclass
class GDinoTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for detectors, and options about parameter groups, EMA and time.

    Raises:
        ImportError: A logger named by `report_to` is not installed.
        ValueError: A value is out of range.
    """

    _argument_group_name = "training"

    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "images per step and device", "aliases": ["--batch-size"]}
    )
    num_train_epochs: float = field(
        default=12.0, metadata={"help": "passes over the training data", "aliases": ["--epochs"]}
    )
    max_steps: int = field(default=-1, metadata={"help": "number of steps, in place of epochs; -1 counts epochs"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of the trunk"})
    backbone_lr_factor: float = field(
        default=0.1, metadata={"help": "factor on the learning rate for the image backbone"}
    )
    text_lr_factor: float = field(default=0.1, metadata={"help": "factor on the learning rate for the text encoder"})
    freeze: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "parameter groups that are not trained: backbone, text, trunk, or none"},
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "decay of the moving average of weights (EMA) that is measured and exported; 0 for no average"
        },
    )
    minutes: float | None = field(
        default=None,
        metadata={"help": "time budget over all runs, in place of epochs; the learning rate schedule follows it"},
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "weight decay of matrices; norms and biases have none"})
    max_grad_norm: float = field(default=0.1, metadata={"help": "gradients are clipped to this norm"})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "learning rate schedule: linear, cosine, constant_with_warmup, ..."}
    )
    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})
    save_steps: float = field(default=100, metadata={"help": "steps between two checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "number of checkpoints to keep"})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "metric for load_best_model_at_end: AP, AP50 or another COCO metric"}
    )
    accelerator_config: dict | str | None = field(
        default=None, metadata={"help": "settings of accelerate, as JSON or the path of a JSON file"}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "leave off: the collator needs the images"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "leave off: every trained parameter gets a gradient in every step"}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end or self.save_strategy == "best":
            self._choose_metric()
        if self.minutes is not None:
            if self.minutes <= 0:
                raise ValueError(f"minutes must be above 0, got {self.minutes}.")
            if self.max_steps <= 0:
                self.max_steps = _UNLIMITED_STEPS
        if self.accelerator_config is None:
            # Each process reads streamed rows itself: images and boxes of different sizes cannot be sent as one tensor.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        check_loggers(self.report_to)
        self.freeze = check_groups(self.freeze)
        if self.device.type == "cpu":
            # Pinned memory speeds up copies to a GPU; without one, PyTorch warns about it in every epoch.
            self.dataloader_pin_memory = False
        for name, minimum in _MINIMUM.items():
            # `not >=` rather than `<`, so that NaN is refused too.
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}.")

    def _choose_metric(self) -> None:
        """Select checkpoints by the highest AP, unless another metric of COCO or LVIS is named."""
        name = (self.metric_for_best_model or "AP").removeprefix("eval_")
        name = _TORCHMETRICS.get(name, name)
        known = dict.fromkeys((*METRICS, *LVIS_METRICS))
        if name not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, got {name}.")
        self.metric_for_best_model = name
        self.greater_is_better = True
