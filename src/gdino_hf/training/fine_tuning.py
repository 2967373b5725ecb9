"""Fine-tune a detector on someone's own boxes, measure it before and after, and leave everything in one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.collator import GDinoDataCollator
from ..data.negatives import PromptSampler
from ..data.visits import VisitedRows, VisitedStream
from .arguments import DataArguments, GDinoTrainingArguments, ModelArguments
from .guard import blend, starting_weights
from .lora import add_adapters, merge_adapters
from .metrics import Measurement, measure
from .mixture import Collator, MixedCollator, Mixture
from .parts import count_parameters
from .saving import last_checkpoint
from .sources import Split, augmentation, find_split, read_split, split_file
from .trainer import GDinoTrainer

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

    def other(named: str | None, split: str) -> Split | None:
        if named is not None:
            return read_split(split_file(named, split, f"--{split}"), arguments.images)
        beside = find_split(train, split)
        return read_split(beside, arguments.images) if beside is not None and beside != train else None

    def apart(named: str | None, split: str, option: str) -> Split | None:
        return None if named is None else read_split(split_file(named, split, option))

    return DataSets(
        train=read_split(train, arguments.images, arguments.streaming),
        val=other(arguments.val, "val"),
        test=other(arguments.test, "test"),
        replay=apart(arguments.replay, "train", "--replay"),
        zero_shot=apart(arguments.zero_shot, "val", "--zero-shot"),
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
    """

    size = processor.image_processor.size

    def collator(split: Split) -> Collator:
        # Captions bring their own prompts.
        sampler = PromptSampler(split.labels, (data.least_labels, data.most_labels)) if split.labels else None
        transform = augmentation(data.augment, size, split.rows)
        return GDinoDataCollator(processor, prompt_sampler=sampler, transform=transform, seed=args.seed)

    collate, weights = collator(sets.train), None
    if data.streaming:
        rows: Any = VisitedStream(sets.train.rows, seed=args.seed, on_error=data.unreadable)
    elif sets.replay is not None:
        mixture = Mixture(sets.train.rows, sets.replay.rows)
        rows, weights = VisitedRows(mixture, data.unreadable), mixture.weights(data.replay_share)
        collate = MixedCollator(collate, collator(sets.replay))
    else:
        rows = VisitedRows(sets.train.rows, data.unreadable)
    val = sets.val if sets.val is not None and sets.val.labels else None
    return GDinoTrainer(
        model,
        args,
        labels=[] if val is None else val.labels,
        row_weights=weights,
        train_dataset=rows,
        eval_dataset=None if val is None else val.rows,
        processing_class=processor,
        data_collator=collate,
    )


def fine_tune(
    model: Any,
    processor: Any,
    sets: DataSets,
    data: DataArguments,
    model_arguments: ModelArguments,
    args: GDinoTrainingArguments,
    resume: bool = False,
) -> Outcome:
    """Measure, train or go on training, measure again and export to `args.output_dir`.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor.
        sets: From `read_data`.
        data: How prompts and augmentation are.
        model_arguments: Size of photographs, denoising and adapters.
        args: How it is trained; `output_dir` gets checkpoints and the finished model.
        resume: Go on from the last checkpoint in `output_dir`, if there is one.

    Returns:
        What it came to.

    Raises:
        ValueError: Settings do not go together.
        OSError: A photograph cannot be read, or a checkpoint not be written.
    """
    folder = Path(args.output_dir)
    outcome = Outcome(metrics=_before(model, processor, sets, args))
    start = starting_weights(model) if data.start_share else None
    model = fit_model(model, processor, model_arguments)
    trainer = make_trainer(model, processor, sets, data, args)
    last = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    parameters = count_parameters(trainer.model)
    trainer.average_into_model()
    detector = merge_adapters(trainer.model).eval()
    if start is not None:
        blend(detector, start, data.start_share)
    if sets.final is not None:
        outcome.final = _measure(detector, processor, sets.final, args)
        outcome.metrics["after"] = outcome.final.figures
    if sets.zero_shot is not None:
        outcome.metrics["zero_shot_after"] = _measure(detector, processor, sets.zero_shot, args).figures
    if args.should_save:
        detector.save_pretrained(folder / MODEL_FOLDER)
        processor.save_pretrained(folder / MODEL_FOLDER)
    outcome.history = trainer.state.log_history
    outcome.facts = {
        "steps": trainer.state.global_step,
        "minutes": round(trainer.clock.seconds / 60, 2),
        "seed": args.seed,
        "labels": sets.train.labels,
        "parameters": {part: dict(zip(("all", "trained"), counts, strict=True)) for part, counts in parameters.items()},
    }
    return outcome


def _before(model: Any, processor: Any, sets: DataSets, args: GDinoTrainingArguments) -> dict[str, dict[str, float]]:
    """What the model finds before it learns, measured once for all the runs of a folder."""
    path = Path(args.output_dir) / _BEFORE_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    model.to(args.device)
    wanted = {"before": sets.final, "zero_shot_before": sets.zero_shot}
    metrics = {
        name: _measure(model, processor, split, args).figures for name, split in wanted.items() if split is not None
    }
    if args.should_save:
        path.write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    return metrics


def _measure(model: Any, processor: Any, split: Split, args: GDinoTrainingArguments) -> Measurement:
    batch_size = args.per_device_eval_batch_size
    return measure(model, processor, split.rows, split.labels, batch_size, progress=f"measure {split.name}")
