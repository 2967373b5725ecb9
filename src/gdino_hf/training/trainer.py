"""The stock Trainer with what detectors need: learning rates per part, averaged weights, AP, safe checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler

from ..data.reproducible_sampling import ReproducibleDataset, ReproducibleSampler
from ..evaluation.ground_truth import GroundTruth
from .arguments import GDinoTrainingArguments
from .ema import AVERAGE_FILE, WeightAverage
from .metrics import measure
from .parameter_groups import freeze, parameter_groups
from .progress import ShortLog, ShortProgress
from .saving import UNFINISHED, publish, saving
from .time_budget import Clock, by_time, ticks


class GDinoTrainer(Trainer):
    """`transformers.Trainer` for GDinoForObjectDetection.

    - Parts named in `args.freeze` do not train and stay in eval mode; the others have their own learning rates.
    - `evaluate()` runs over `eval_dataset` and gives COCO's metrics as eval_AP, eval_AP50 and so on.
    - With `args.ema_decay`, evaluation, checkpoints and `average_into_model()` use averaged weights; training goes on
      from its own.
    - Batches of an accumulated step count by their boxes, so that the step is that of one large batch.
    - The parts of the loss are logged, each the mean over all steps since the last log and over all processes.
    - With a ReproducibleDataset as `train_dataset`, a resumed run sees the same data as an uninterrupted one; see
      data/reproducible_sampling.py.
    - A checkpoint is written under another name and renamed: whatever stops it, the last one stays whole.
    - `args.minutes` ends the training after so much time and lays the learning rate out over it.

    Args:
        model: The model, or one with adapters around it.
        args: What Trainer takes and more.
        labels: The names to detect in evaluation.
        truth: What there is to find in `eval_dataset`; by default what its rows say.
        row_weights: How often each row of `train_dataset` comes in an epoch; once by default.
        **kwargs: As in Trainer; `processing_class` is the processor, `eval_dataset` rows as `open_dataset` gives them.
    """

    # Assigned by the stock Trainer, which is read as Any.
    args: GDinoTrainingArguments
    control: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: GDinoTrainingArguments | None = None,
        *,
        labels: Sequence[str] = (),
        truth: GroundTruth | None = None,
        row_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or GDinoTrainingArguments()
        self.frozen = freeze(_plain(model), args.freeze)
        super().__init__(model, args, **kwargs)
        self.labels = list(labels)
        self.truth = truth
        self.row_weights = row_weights
        self.sampler: ReproducibleSampler | None = None
        self.clock = Clock(args.minutes)
        self.average = WeightAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.add_callback(_Steps(self))
        for kind, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortLog)):
            if self.pop_callback(kind) is not None:
                self.add_callback(short)
        self._parts: dict[str, Tensor] = {}
        self._num_losses = 0
        # Of the batches that make up the step under way; none where one batch is the whole step.
        self._batch_weights: Iterator[float] = iter(())

    @property
    def detector(self) -> Any:
        """The GDinoForObjectDetection that is trained, or inside the adapters that are."""
        return _plain(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not isinstance(self.train_dataset, ReproducibleDataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.sampler = ReproducibleSampler(
            len(self.train_dataset),
            seed=args.seed,
            weights=self.row_weights,
            # Short steps cannot be parted among processes evenly.
            multiple=1 if args.dataloader_drop_last else step,
        )
        return self.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group per part and kind of parameter; see `parameter_groups`."""
        if self.optimizer is None:
            args = self.args
            factors = {"backbone": args.backbone_lr_factor, "text": args.text_lr_factor}
            groups = parameter_groups(model or self.model, args.learning_rate, args.weight_decay, factors)
            kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def check_settings(self) -> None:
        """Try what training begins with, so that a mistake shows before anything long is done.

        Raises:
            ImportError: The optimizer is not installed.
            TypeError: The optimizer or the schedule has no such option.
            ValueError: Nothing can be trained, or a setting is out of range.
        """
        self.create_optimizer_and_scheduler(num_training_steps=1)
        # Made anew where the model may have been parted among devices.
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stock schedule over the steps, or over the time where that is limited."""
        if self.clock.limit is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        args, optimizer = self.args, optimizer or self.optimizer
        stock = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(ticks()),
            num_training_steps=ticks(),
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(stock, LambdaLR):
            raise ValueError(f"minutes cannot drive the schedule {args.lr_scheduler_type}; use linear or cosine.")
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        factors = [by_time(self.clock, factor, num_training_steps) for factor in stock.lr_lambdas]
        self.lr_scheduler = LambdaLR(optimizer, factors)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock loop sees that a training is over after a step only: one that is resumed would go beyond its end.
        if self.state.global_step >= self.state.max_steps or self.clock.fraction >= 1:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one step, and how much of its boxes each has."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([sum(len(x["boxes"]) for x in batch["labels"]) for batch in batches], device=device)
        if len(batches) > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            # Each batch's loss is a mean over its own boxes; weighed like this, their sum is the mean over all boxes.
            weights = len(batches) * counts.clamp(min=1) / counts.sum().clamp(min=1)
            self._batch_weights = iter(weights.tolist())
        return batches, num_items

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's own loss, its parts noted down."""
        for module in self.frozen:
            module.eval()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        weight = next(self._batch_weights, 1.0)
        loss = weight * loss
        for name, value in outputs["loss_dict"].items():
            self._parts[name] = self._parts.get(name, 0.0) + weight * value.detach()
        self._num_losses += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss since the last log, and the time spent."""
        if self._num_losses and "loss" in logs:
            means = {name: float(total) / self._num_losses for name, total in self._parts.items()}
            self._parts, self._num_losses = {}, 0
            everywhere = gather_object([means])
            # A process without a box has no denoising, and so fewer parts than the others.
            names = sorted({name for each in everywhere for name in each})
            logs |= {name: sum(each.get(name, 0.0) for each in everywhere) / len(everywhere) for name in names}
        super().log({**logs, "minutes": round(self.clock.seconds / 60, 3)}, *args, **kwargs)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has its averaged weights, if there are any."""
        with self.average.in_place() if self.average is not None else nullcontext():
            yield

    def average_into_model(self) -> None:
        """Let the model keep the averaged weights, as for its export."""
        if self.average is not None:
            self.average.put_into_model()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """COCO's metrics of the averaged weights.

        Args:
            eval_dataset: Rows; the trainer's own by default.
            ignore_keys: Of no use here.
            metric_key_prefix: Before every name.

        Returns:
            Each metric, 0..1, under its name with the prefix.

        Raises:
            ValueError: There are no rows to evaluate on.
        """
        own = eval_dataset is None
        rows = self.eval_dataset if own else eval_dataset
        if rows is None:
            raise ValueError("There is nothing to evaluate on; give eval_dataset.")
        was_training = self.model.training
        with self.averaged():
            found = measure(
                self.detector,
                self.processing_class,
                rows,
                self.labels,
                self.args.per_device_eval_batch_size,
                truth=self.truth if own else None,
            ).figures
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / UNFINISHED) if self._is_saving else run

    _is_saving = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        with saving(run) as unfinished:
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            if self.args.should_save:
                written = unfinished / f"checkpoint-{step}"
                if self.average is not None:
                    self.average.save(written)
                self.clock.save(written)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(run, step, self.state, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            # What was best is the average.
            self.average.load(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.clock.load(Path(checkpoint))
            if self.average is not None:
                self.average.load(Path(checkpoint))
            elif (Path(checkpoint) / AVERAGE_FILE).is_file():
                raise ValueError(f"{checkpoint} has averaged weights; set ema_decay to go on from it.")
        super()._load_optimizer_and_scheduler(checkpoint)


class _Steps(TrainerCallback):
    """What happens around the steps: the average, and the end of the time."""

    def __init__(self, trainer: GDinoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock.start()
        if args.should_save:
            # Of a checkpoint that a killed run was writing nothing may get into the next one.
            shutil.rmtree(Path(args.output_dir) / UNFINISHED, ignore_errors=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where a resumed run of several processes skips batches, the data loader does not find the sampler.
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.clock.limit is not None:
            # Processes that disagreed about the time would have other learning rates, and stop at other steps.
            seconds = torch.tensor(trainer.clock.seconds, device=trainer.args.device)
            trainer.clock.tick(trainer.accelerator.reduce(seconds, reduction="mean").item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)
        if self.trainer.clock.fraction >= 1:
            control.should_training_stop = control.should_save = True


def _plain(model: Any) -> Any:
    """The detector inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
