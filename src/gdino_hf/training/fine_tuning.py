"""Fine-tune a detector on someone's own boxes, measure it before and after, and leave everything in one folder."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.reproducible_sampling import ReproducibleDataset, ReproducibleStream
from .arguments import DataArguments, GDinoTrainingArguments, ModelArguments
from .lora import add_adapters, merge_adapters
from .metrics import Measurement, measure
from .parameter_groups import count_parameters
from .replay import Collator, MixedCollator, Mixture
from .saving import last_checkpoint
from .splits import Split, augmentation, find_split, read_split, split_file
from .trainer import GDinoTrainer
from .weight_interpolation import blend, starting_weights

MODEL_FOLDER = "model"
_BEFORE_FILE = "before.json"


@dataclass(frozen=True)
class DataSets:
    """All that a run reads.

    Attributes:
        train: Learned from.
        val: Measured while training.
        test: Measured at the end; where there is none, `val` is.
        replay: Mixed in against forgetting.
        zero_shot: Measured before and after.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    replay: Split | None = None
    zero_shot: Split | None = None

    @property
    def final(self) -> Split | None:
        """What the finished model is measured on; of captions there is no average precision."""
        return next((split for split in (self.test, self.val) if split is not None and split.labels), None)

    def __iter__(self) -> Iterator[Split]:
        everything = (self.train, self.val, self.test, self.replay, self.zero_shot)
        return iter([split for split in everything if split is not None])


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        metrics: COCO's metrics, of what was asked for: "before" and "after" on the last data set measured,
            "zero_shot_before" and "zero_shot_after".
        final: The finished model on the last data set measured.
        history: What was logged, in order.
        facts: Steps, minutes, seed and the like.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    final: Measurement | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def read_data(arguments: DataArguments) -> DataSets:
    """Find and read every data set that is named, or lies beside one that is.

    Args:
        arguments: Where they are.

    Returns:
        The data sets.

    Raises:
        ValueError: One cannot be found or read.
    """
    if not arguments.data:
        raise ValueError("There is no data set to learn from; name a COCO json, or a folder with train.json.")
    train = split_file(arguments.data, "train", "DATA")
    read = partial(read_split, unreadable=arguments.unreadable)

    def other(named: str | None, split: str) -> Split | None:
        if named is not None:
            return read(split_file(named, split, f"--{split}"), arguments.images)
        beside = find_split(train, split)
        return read(beside, arguments.images) if beside is not None and beside != train else None

    def apart(named: str | None, split: str, option: str) -> Split | None:
        return None if named is None else read(split_file(named, split, option))

    zero_shot = apart(arguments.zero_shot, "val", "--zero-shot")
    if zero_shot is not None and not zero_shot.labels:
        raise ValueError(f"--zero-shot {zero_shot.path} has captions, of which there is no AP; name one with labels.")
    return DataSets(
        train=read(train, arguments.images, arguments.streaming),
        val=other(arguments.val, "val"),
        test=other(arguments.test, "test"),
        replay=apart(arguments.replay, "train", "--replay"),
        zero_shot=zero_shot,
    )


def fit_model(model: Any, processor: Any, arguments: ModelArguments) -> Any:
    """Set the size of photographs and the denoising, and put adapters on if asked for.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor; photographs get their new size in it.
        arguments: What is wanted.

    Returns:
        The model, or one with adapters around it.
    """
    size = arguments.image_size
    if size is not None:
        own = processor.image_processor.size
        if len(size) == 2 or "height" in own:
            processor.image_processor.size = {"height": size[0], "width": size[-1]}
        else:
            longest = round(own["longest_edge"] * size[0] / own["shortest_edge"])
            processor.image_processor.size = {"shortest_edge": size[0], "longest_edge": longest}
    if arguments.denoising_queries is not None:
        model.config.num_denoising_queries = arguments.denoising_queries
    if arguments.lora_rank:
        return add_adapters(model, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    return model


def make_trainer(
    model: Any, processor: Any, sets: DataSets, data: DataArguments, args: GDinoTrainingArguments
) -> GDinoTrainer:
    """Everything put together.

    Args:
        model: From `fit_model`.
        processor: Its processor.
        sets: From `read_data`.
        data: How prompts and augmentation are.
        args: How it is trained.

    Returns:
        The trainer.

    Raises:
        ImportError: Something that is asked for is not installed.
        TypeError: The optimizer or the schedule has no such option.
        ValueError: Settings do not go together.
    """
    val = sets.val if sets.val is not None and sets.val.labels else None
    if val is None and args.eval_strategy != "no":
        raise ValueError("eval_strategy needs a data set with labels to measure on; name one as --val.")
    if data.streaming and args.max_steps <= 0:
        raise ValueError("streaming needs an end, as nobody knows how many rows there are; give max_steps or minutes.")
    size = processor.image_processor.size

    def collator(split: Split, replayed: bool = False) -> Collator:
        length = data.prompt_length(None if replayed else len(split.labels))
        # Captions bring their own prompts.
        sampler = PromptSampler(split.labels, length) if split.labels else None
        transform = augmentation(data.augment, size, split.rows)
        return GDinoDataCollator(processor, prompt_sampler=sampler, transform=transform, seed=args.seed)

    collate, weights = collator(sets.train), None
    if data.streaming:
        rows: Any = ReproducibleStream(sets.train.rows, seed=args.seed, on_error=data.unreadable, endless=True)
    elif sets.replay is not None:
        mixture = Mixture(sets.train.rows, sets.replay.rows)
        rows, weights = ReproducibleDataset(mixture, data.unreadable), mixture.weights(data.replay_share)
        collate = MixedCollator(collate, collator(sets.replay, replayed=True))
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
    """A fine-tuning that is set up but has done nothing yet.

    Args:
        model: A GDinoForObjectDetection; it is trained itself.
        processor: Its processor.
        sets: From `read_data`.
        data: How prompts and augmentation are.
        model_arguments: Size of photographs, denoising and adapters.
        args: How it is trained; `output_dir` gets checkpoints and the finished model.

    Raises:
        ImportError: Something that is asked for is not installed.
        TypeError: The optimizer or the schedule has no such option.
        ValueError: Settings do not go together.
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
        # Before training, photographs have the size that the model came with.
        self.first_processor = copy.deepcopy(processor)
        self.start_share = data.start_share
        self.start = starting_weights(model) if data.start_share else None
        # Adapters start at random, in every process alike.
        set_seed(args.seed)
        model = fit_model(model, processor, model_arguments)
        self.trainer = make_trainer(model, processor, sets, data, args)

    def run(self, resume: bool = False) -> Outcome:
        """Measure, train or go on training, measure again and export.

        Args:
            resume: Go on from the last checkpoint in `output_dir`, if there is one.

        Returns:
            What it came to.

        Raises:
            ValueError: The checkpoint is of other settings.
            OSError: A photograph cannot be read, or a checkpoint not be written.
        """
        args, trainer, sets = self.args, self.trainer, self.sets
        outcome = Outcome(metrics=self._before())
        last = last_checkpoint(self.folder) if resume else None
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        parameters = count_parameters(trainer.model)
        trainer.average_into_model()
        detector = merge_adapters(trainer.model).eval()
        if self.start is not None:
            blend(detector, self.start, self.start_share)
        if sets.final is not None:
            outcome.final = self._measure(detector, self.processor, sets.final)
            outcome.metrics["after"] = outcome.final.figures
        if sets.zero_shot is not None:
            outcome.metrics["zero_shot_after"] = self._measure(detector, self.processor, sets.zero_shot).figures
        if args.should_save:
            detector.save_pretrained(self.folder / MODEL_FOLDER)
            self.processor.save_pretrained(self.folder / MODEL_FOLDER)
        outcome.history = trainer.state.log_history
        outcome.facts = {
            "steps": trainer.state.global_step,
            "minutes": round(trainer.clock.seconds / 60, 2),
            "seed": args.seed,
            "labels": sets.train.labels,
            "parameters": {
                part: dict(zip(("all", "trained"), counts, strict=True)) for part, counts in parameters.items()
            },
        }
        return outcome

    def _before(self) -> dict[str, dict[str, float]]:
        """What the model finds before it learns, measured once for all the runs of a folder."""
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
            name: self._measure(detector, self.first_processor, split).figures
            for name, split in wanted.items()
            if split is not None
        }
        if self.args.should_save:
            # Whole or not there, whenever the process is killed.
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(metrics) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
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
