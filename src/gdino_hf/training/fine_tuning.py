"""Fine-tuning from start to finish: read the data, measure, train or resume, measure again, export."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from ..data.albumentations_pipeline import load_pipeline
from ..data.annotation_files import find_split
from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.reproducible_sampling import ReproducibleDataset, ReproducibleStream
from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import name_key
from ..whole_files import whole_folder, write_whole_text
from .arguments import DataArguments, GDinoTrainingArguments, ModelArguments
from .lora import add_adapters, merge_adapters
from .metrics import Measurement, measure
from .parameter_groups import count_parameters
from .replay import Collator, ReplayCollator, RowsWithReplay
from .saving import last_checkpoint
from .splits import Split, augmentation, read_split, split_file
from .trainer import GDinoTrainer
from .weight_interpolation import initial_weights, interpolate_weights

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
NO_SPLIT = "none"
"""Value of `val` and `test` that stands for no data."""
_BEFORE_FILE = "before.json"


@dataclass(frozen=True)
class DataSets:
    """All data sets of a run.

    Attributes:
        train: Training data.
        val: Validation data, measured during training.
        test: Test data, measured before and after training; `val` takes its place if there is none.
        replay: Data mixed into training so that the model does not forget it.
        zero_shot: Data measured before and after training to see what the model has forgotten.
        remarks: Splits that were found but cannot be used, one line each.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    replay: Split | None = None
    zero_shot: Split | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def final(self) -> Split | None:
        """The split that the finished model is evaluated on: test or val, if it has labels. Captions have no AP."""
        return next((split for split in (self.test, self.val) if split is not None and split.labels), None)

    def __iter__(self) -> Iterator[Split]:
        everything = (self.train, self.val, self.test, self.replay, self.zero_shot)
        return iter([split for split in everything if split is not None])


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        metrics: Metrics of `measure` under "before" and "after" for `DataSets.final`, and under "zero_shot_before" and
            "zero_shot_after" for `DataSets.zero_shot`; data sets that were not given are absent.
        final: Measurement of the finished model on `DataSets.final`.
        history: All log entries, in order.
        facts: Steps, minutes, seed, labels and numbers of parameters.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    final: Measurement | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def read_data(arguments: DataArguments) -> DataSets:
    """Find and read all data sets: those that are named, and val and test beside the training data.

    Args:
        arguments: The data options.

    Returns:
        The data sets.

    Raises:
        ValueError: A data set cannot be found or read.
    """
    if not arguments.data:
        raise ValueError("There is no data set to train on; name a COCO JSON file, or a folder with train.json.")
    train = split_file(arguments.data, "train", "DATA")
    read = partial(read_split, options=arguments.annotation_options())
    measure = partial(read, measured=True)
    unused: list[str] = []

    def named_or_beside(named: str | None, split: str) -> Split | None:
        if named is not None:
            return None if named == NO_SPLIT else measure(split_file(named, split, f"--{split}"), arguments.images)
        beside = None
        try:
            beside = find_split(train, split)
            return None if beside in (None, train) else measure(beside, arguments.images)
        # Nobody asked for this file, so it must not stop the training.
        except ValueError as error:
            why = reason(error).removesuffix("; repair it")
            what = f"{printable(beside)} was found as the {split} split and" if beside else f"The {split} split"
            unused.append(
                f"{what} is not used, because {why}; --{split} names another file, and --{split} {NO_SPLIT} silences "
                "this"
            )
            return None

    def separate(named: str | None, split: str, option: str, read: Callable[..., Split]) -> Split | None:
        return None if named in (None, NO_SPLIT) else read(split_file(named, split, option))

    zero_shot = separate(arguments.zero_shot, "val", "--zero-shot", measure)
    if zero_shot is not None and not zero_shot.labels:
        raise ValueError(
            f"--zero-shot {zero_shot.path} has captions, for which there is no AP; name a data set with labels."
        )
    splits = [
        read(train, arguments.images, arguments.streaming),
        named_or_beside(arguments.val, "val"),
        named_or_beside(arguments.test, "test"),
    ]
    train_split, val, test = keep_used_groups(splits)
    replay = separate(arguments.replay, "train", "--replay", read)
    assert train_split is not None
    return DataSets(train_split, val, test, replay, zero_shot, unused)


def keep_used_groups(splits: Sequence[Split | None]) -> list[Split | None]:
    """Read splits again whose left-out groups have boxes in another split, and are therefore classes.

    Args:
        splits: Splits of one data set, of which some may be absent.

    Returns:
        The splits in the same order.
    """
    used = {name_key(name): name for split in splits if split is not None for name in split.labels}
    result = []
    for split in splits:
        if split is not None and any(name_key(name) in used for name in split.groups):
            options = replace(split.options, used=tuple(used.values()))
            streaming = not hasattr(split.rows, "__len__")
            split = read_split(split.path, split.images, streaming, options, measured="truth" in vars(split))
        result.append(split)
    return result


def fit_model(model: Any, processor: Any, arguments: ModelArguments) -> Any:
    """Apply the model options: image size, denoising queries and adapters.

    Args:
        model: A GDinoForObjectDetection.
        processor: The model's processor, whose image size is changed in place.
        arguments: The model options.

    Returns:
        The model, wrapped in a PeftModel if adapters were asked for.
    """
    size = arguments.image_size
    if size is not None:
        own = processor.image_processor.size
        if len(size) == 2 or "height" in own:
            processor.image_processor.size = {"height": size[0], "width": size[-1]}
        else:
            longest = round(own["longest_edge"] * size[0] / own["shortest_edge"])
            processor.image_processor.size = {"shortest_edge": size[0], "longest_edge": longest}
    if arguments.image_square_length is not None:
        side = arguments.image_square_length
        processor.image_processor.size = {"max_height": side, "max_width": side}
    if arguments.denoising_queries is not None:
        model.config.num_denoising_queries = arguments.denoising_queries
    if arguments.lora_rank:
        return add_adapters(model, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    return model


def make_trainer(
    model: Any, processor: Any, sets: DataSets, data: DataArguments, args: GDinoTrainingArguments
) -> GDinoTrainer:
    """Build the trainer with its data, prompts, augmentation and replay, and check its settings.

    Args:
        model: Model from `fit_model`.
        processor: The model's processor.
        sets: Data sets from `read_data`.
        data: The data options.
        args: The training options.

    Returns:
        The trainer.

    Raises:
        ImportError: An optional dependency that the settings need is not installed.
        TypeError: The optimizer or the schedule has no option of that name.
        ValueError: Settings contradict each other.
    """
    val = sets.val if sets.val is not None and sets.val.labels else None
    if val is None and args.eval_strategy != "no":
        raise ValueError("eval_strategy needs validation data with labels; name some with --val.")
    if data.streaming and args.max_steps <= 0:
        raise ValueError("streaming needs an end, because the number of rows is unknown; give max_steps or minutes.")
    num_queries = model.config.num_queries
    for split in sets:
        if split.most_boxes > num_queries:
            logger.warning(
                "%s has an image of %d boxes, but the model finds at most %d (num_queries) in one; the others cannot "
                "be learned, so cut such images into parts.",
                split.path,
                split.most_boxes,
                num_queries,
            )
    size = processor.image_processor.size

    def collator(split: Split, replayed: bool = False) -> Collator:
        length = data.prompt_length(None if replayed else len(split.labels))
        # A caption is its own prompt.
        sampler = PromptSampler(split.labels, length) if split.labels else None
        transform = (
            augmentation(data.augment, size, split.rows)
            if data.albumentations is None
            else load_pipeline(data.albumentations)
        )
        return GDinoDataCollator(processor, prompt_sampler=sampler, transform=transform, seed=args.seed)

    collate, weights = collator(sets.train), None
    if data.streaming:
        rows: Any = ReproducibleStream(sets.train.rows, seed=args.seed, on_error=data.unreadable, endless=True)
    elif sets.replay is not None:
        both = RowsWithReplay(sets.train.rows, sets.replay.rows)
        rows, weights = ReproducibleDataset(both, data.unreadable), both.weights(data.replay_share)
        collate = ReplayCollator(collate, collator(sets.replay, replayed=True))
    else:
        rows = ReproducibleDataset(sets.train.rows, data.unreadable)
    trainer = GDinoTrainer(
        model,
        args,
        labels=[] if val is None else val.labels,
        truth=None if val is None else val.truth,
        row_weights=weights,
        train_dataset=rows,
        eval_dataset=None if val is None else val.rows,
        processing_class=processor,
        data_collator=collate,
    )
    trainer.check_settings()
    return trainer


class FineTuning:
    """A fine-tuning run, set up and checked; `run` carries it out.

    Args:
        model: A GDinoForObjectDetection, which is trained in place.
        processor: The model's processor.
        sets: Data sets from `read_data`.
        data: The data options.
        model_arguments: The model options.
        args: The training options; checkpoints and the finished model go to `args.output_dir`.

    Raises:
        ImportError: An optional dependency that the settings need is not installed.
        TypeError: The optimizer or the schedule has no option of that name.
        ValueError: Settings contradict each other.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sets: DataSets,
        data: DataArguments,
        model_arguments: ModelArguments,
        args: GDinoTrainingArguments,
    ) -> None:
        self.processor, self.sets, self.args = processor, sets, args
        self.folder = Path(args.output_dir)
        # The model is measured before training at the image size that it came with.
        self.initial_processor = copy.deepcopy(processor)
        self.start_share = data.start_share
        self.initial = initial_weights(model) if data.start_share else None
        # Adapters start from random weights, which must be the same in all processes.
        set_seed(args.seed)
        model = fit_model(model, processor, model_arguments)
        self.trainer = make_trainer(model, processor, sets, data, args)

    def run(self, resume: bool = False) -> Outcome:
        """Measure, train or resume, measure again and export.

        Args:
            resume: Continue from the last checkpoint in `output_dir`, if there is one.

        Returns:
            The result.

        Raises:
            ValueError: The checkpoint does not fit the settings, or an image cannot be read.
            OSError: A checkpoint cannot be written.
        """
        args, trainer, sets = self.args, self.trainer, self.sets
        outcome = Outcome(metrics=self._measure_before())
        last = last_checkpoint(self.folder) if resume else None
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        parameters = count_parameters(trainer.model)
        trainer.copy_ema_to_model()
        detector = merge_adapters(trainer.model).eval()
        if self.initial is not None:
            interpolate_weights(detector, self.initial, self.start_share)
        if sets.final is not None:
            outcome.final = self._measure(detector, self.processor, sets.final)
            outcome.metrics["after"] = outcome.final.figures
        if sets.zero_shot is not None:
            outcome.metrics["zero_shot_after"] = self._measure(detector, self.processor, sets.zero_shot).figures
        if args.should_save:
            with whole_folder(self.folder / MODEL_FOLDER) as folder:
                detector.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        outcome.history = trainer.state.log_history
        outcome.facts = {
            "steps": trainer.state.global_step,
            "minutes": round(trainer.time_budget.seconds / 60, 2),
            "seed": args.seed,
            "labels": sets.train.labels,
            "parameters": {
                group: dict(zip(("all", "trained"), counts, strict=True)) for group, counts in parameters.items()
            },
        }
        return outcome

    def _measure_before(self) -> dict[str, dict[str, float]]:
        """Measure the model before training, or read what an earlier run in the same folder measured."""
        path = self.folder / _BEFORE_FILE
        known: list[Any] = [None]
        if self.args.should_save and path.is_file():
            known = [json.loads(path.read_text(encoding="utf-8"))]
        if PartialState().num_processes > 1:
            broadcast_object_list(known)
        if known[0] is not None:
            return known[0]
        wanted = {"before": self.sets.final, "zero_shot_before": self.sets.zero_shot}
        detector = self.trainer.detector
        metrics = {
            name: self._measure(detector, self.initial_processor, split).figures
            for name, split in wanted.items()
            if split is not None
        }
        if self.args.should_save:
            write_whole_text(path, json.dumps(metrics) + "\n")
        return metrics

    def _measure(self, model: Any, processor: Any, split: Split) -> Measurement:
        return measure(
            model,
            processor,
            split.rows,
            split.labels,
            self.args.per_device_eval_batch_size,
            progress=f"measure {split.name}",
            truth=split.truth,
        )
