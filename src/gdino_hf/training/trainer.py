"""`GDinoTrainer`: the stock Trainer with learning rates per parameter group, an EMA, AP and safe checkpoints.

This is the one file that overrides private methods of Trainer: _get_train_sampler, _run_epoch, _get_output_dir,
_save_checkpoint, _load_best_model and _load_optimizer_and_scheduler (tried with transformers 5.20 and 5.23). Where
transformers renames one, the stock behaviour returns in its place, and tests/training/test_trainer.py and
test_resume.py fail.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler

from ..data.reproducible_sampling import ReproducibleDataset, ReproducibleSampler
from ..evaluation.coco_results import METRICS
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.lvis import LVIS_METRICS
from ..model.pretrained_gdino import GDinoPreTrainedModel
from .arguments import GDinoTrainingArguments
from .ema import EMA_FILE, ExponentialMovingAverage
from .kept_memory import kept_memory
from .loss_record import LossRecord, mean_of_processes
from .metrics import measure
from .parameter_groups import freeze, optimizer_groups
from .prepare import prepare_for_training
from .progress import ShortLog, ShortProgress
from .saving import UNFINISHED, publish, saving
from .time_budget import SCHEDULE_STEPS, TimeBudget, follow_time


class GDinoTrainer(Trainer):
    """`transformers.Trainer` for GDinoForObjectDetection.

    - Parameter groups named in `args.freeze` are not trained and stay in eval mode; the others have their own learning
      rates.
    - `evaluate()` detects in `eval_dataset` and returns average precision as eval_AP, eval_AP50 and so on.
    - With `args.ema_decay`, an exponential moving average of the weights is evaluated, saved in checkpoints and put
      into the model by `copy_ema_to_model()`; training continues with the model's own weights.
    - Gradient accumulation weighs batches by their number of boxes, so a step equals that of one large batch.
    - Every term of the loss is logged, as a mean over all steps since the last log and over all processes.
    - With a ReproducibleDataset as `train_dataset`, a resumed run sees the same data as an uninterrupted one; see
      data/reproducible_sampling.py.
    - Checkpoints are written under a temporary name and renamed, so an interruption never leaves half a checkpoint.
    - On a CPU, encoder and backbone run the training steps of `prepare_for_training`, and the process keeps the memory
      that a step frees (`kept_memory`) until the training ends.
    - `args.minutes` ends the training after that time, and the learning rate schedule follows it.

    A recipe with further loss terms overrides `detection_loss`.

    Args:
        model: A GDinoForObjectDetection, or one with adapters around it.
        args: Training options.
        labels: Labels to detect in evaluation.
        truth: Ground truth of `eval_dataset`; by default it is made from the rows.
        row_weights: How often each row of `train_dataset` is sampled per epoch; once by default.
        **kwargs: Arguments of Trainer. `processing_class` is the processor, `eval_dataset` holds rows from
            `open_dataset`.
    """

    # Declared here because mypy reads the stock Trainer, which assigns them, as Any.
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
        self.frozen = freeze(_without_adapters(model), args.freeze)
        super().__init__(model, args, **kwargs)
        self.labels = list(labels)
        self.truth = truth
        self.row_weights = row_weights
        self.sampler: ReproducibleSampler | None = None
        self.time_budget = TimeBudget(args.minutes)
        self.loss_record = LossRecord()
        self.ema = ExponentialMovingAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.add_callback(_StepHooks(self))
        for kind, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortLog)):
            if self.pop_callback(kind) is not None:
                self.add_callback(short)
        self.loss_terms: dict[str, Tensor] = {}
        self.num_losses = 0
        # Weights of the batches accumulated in the current step; empty if the step is a single batch.
        self._batch_weights: Iterator[float] = iter(())

    @property
    def detector(self) -> Any:
        """The GDinoForObjectDetection being trained, without the adapters around it."""
        return _without_adapters(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not isinstance(self.train_dataset, ReproducibleDataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.sampler = ReproducibleSampler(
            len(self.train_dataset),
            seed=args.seed,
            weights=self.row_weights,
            # An incomplete last step could not be divided evenly among processes.
            multiple=1 if args.dataloader_drop_last else step,
        )
        return self.sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock Trainer does; the loss that is returned is the mean of all steps, also after resuming."""
        on_cpu = self.args.device.type == "cpu" and isinstance(self.detector, GDinoPreTrainedModel)
        if on_cpu:
            prepare_for_training(self.detector)
        with kept_memory() if on_cpu else nullcontext():
            result = super().train(*args, **kwargs)
        return result._replace(training_loss=result.metrics.get("train_loss", result.training_loss))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer with the learning rates and weight decays of `optimizer_groups`."""
        if self.optimizer is None:
            args = self.args
            factors = {"backbone": args.backbone_lr_factor, "text": args.text_lr_factor}
            groups = optimizer_groups(model or self.model, args.learning_rate, args.weight_decay, factors)
            kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def check_settings(self) -> None:
        """Create optimizer and schedule once, so that wrong settings fail before anything slow happens.

        Raises:
            ImportError: The optimizer is not installed.
            TypeError: The optimizer or the schedule has no option of that name.
            ValueError: Nothing is left to train, or a setting is out of range.
        """
        self._check_metric()
        self.create_optimizer_and_scheduler(num_training_steps=1)
        # Discard them: training creates its own, when the model may be wrapped for several devices.
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False

    def _check_metric(self) -> None:
        """Refuse a metric for choosing the best checkpoint that the evaluation data does not have."""
        wanted, truth = self.args.metric_for_best_model, self.truth
        if truth is None or wanted is None:
            return
        known = LVIS_METRICS if truth.is_federated else METRICS
        if wanted.removeprefix("eval_") not in known:
            kind = "annotated for some labels per image" if truth.is_federated else "annotated for all labels"
            raise ValueError(
                f"metric_for_best_model is {wanted}, but the validation data is {kind}, whose metrics are "
                f"{', '.join(known)}; choose one of them."
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the stock schedule over the steps, or over the time budget if there is one."""
        if self.time_budget.limit is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        args, optimizer = self.args, optimizer or self.optimizer
        stock = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(SCHEDULE_STEPS),
            num_training_steps=SCHEDULE_STEPS,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(stock, LambdaLR):
            raise ValueError(
                f"minutes cannot be combined with the schedule {args.lr_scheduler_type}; use linear or cosine."
            )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        factors = [follow_time(self.time_budget, factor, num_training_steps) for factor in stock.lr_lambdas]
        self.lr_scheduler = LambdaLR(optimizer, factors)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock loop checks for the end only after a step, so resuming a finished run would take one more step.
        if self.state.global_step >= self.state.max_steps or self.time_budget.fraction >= 1:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Fetch the batches of one step, and weigh each by its share of the step's boxes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([sum(len(x["boxes"]) for x in batch["labels"]) for batch in batches], device=device)
        if len(batches) > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            # Each batch's loss is a mean over its own boxes, and Trainer averages the batches; with these weights, that
            # average is the mean over all boxes.
            weights = len(batches) * counts.clamp(min=1) / counts.sum().clamp(min=1)
            self._batch_weights = iter(weights.tolist())
        return batches, num_items

    def detection_loss(self, model: Any, inputs: Any, **kwargs: Any) -> tuple[Tensor, Mapping[str, Tensor], Any]:
        """Compute the loss of one batch; recipes override this to add terms.

        Args:
            model: The model, possibly wrapped for several processes.
            inputs: The collator's batch.
            **kwargs: Arguments of the stock `compute_loss`.

        Returns:
            The loss to minimize, its unweighted terms by name for the log, and the model's outputs.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return loss, outputs["loss_dict"], outputs

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the loss with frozen groups in eval mode, and remember its terms for the log."""
        for module in self.frozen:
            module.eval()
        loss, terms, outputs = self.detection_loss(model, inputs, **kwargs)
        weight = next(self._batch_weights, 1.0)
        for name, value in terms.items():
            self.loss_terms[name] = self.loss_terms.get(name, 0.0) + weight * value.detach()
        self.num_losses += 1
        return (weight * loss, outputs) if return_outputs else weight * loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, adding the mean loss terms since the last log and the minutes spent."""
        if self.num_losses and "loss" in logs:
            means = {name: float(total) / self.num_losses for name, total in self.loss_terms.items()}
            self.loss_terms, self.num_losses = {}, 0
            logs |= mean_of_processes(means)
        if "train_loss" in logs and self.loss_record.is_complete:
            # The stock mean is that of the steps since training was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log({**logs, "minutes": round(self.time_budget.seconds / 60, 3)}, *args, **kwargs)

    @contextmanager
    def ema_applied(self) -> Iterator[None]:
        """Use the averaged weights inside the `with` block, if there is an EMA."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            yield

    def copy_ema_to_model(self) -> None:
        """Replace the model's weights with the averaged ones, for example before export; without an EMA, do nothing."""
        if self.ema is not None:
            self.ema.copy_to_model()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute average precision as `measure` does, of the averaged weights if there is an EMA.

        Args:
            eval_dataset: Rows to evaluate on; the trainer's `eval_dataset` by default.
            ignore_keys: Ignored; part of Trainer's signature.
            metric_key_prefix: Prefix of the metrics' names.

        Returns:
            The metrics in [0, 1], named PREFIX_AP, PREFIX_AP50 and so on.

        Raises:
            ValueError: There are no rows to evaluate on.
        """
        own = eval_dataset is None
        rows = self.eval_dataset if own else eval_dataset
        if rows is None:
            raise ValueError("There are no rows to evaluate on; give eval_dataset.")
        was_training = self.model.training
        with self.ema_applied():
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
            losses = self.loss_record.content(self)
            if self.args.should_save:
                written = unfinished / f"checkpoint-{step}"
                self.loss_record.save(losses, written)
                if self.ema is not None:
                    self.ema.save(written)
                self.time_budget.save(written)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(run, step, self.state, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            # The metric that chose this checkpoint was measured with the averaged weights.
            self.ema.load(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.time_budget.load(Path(checkpoint))
            self.loss_record.load(Path(checkpoint))
            if self.ema is not None:
                self.ema.load(Path(checkpoint))
            elif (Path(checkpoint) / EMA_FILE).is_file():
                raise ValueError(f"{checkpoint} has averaged weights; set ema_decay to continue from it.")
        super()._load_optimizer_and_scheduler(checkpoint)


class _StepHooks(TrainerCallback):
    """Update the EMA after every step, and end training when the time budget is used up."""

    def __init__(self, trainer: GDinoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.time_budget.start()
        self.trainer.loss_record.restore(self.trainer)
        if args.should_save:
            # Remove what a killed run left, or its files would get into the next checkpoint.
            shutil.rmtree(Path(args.output_dir) / UNFINISHED, ignore_errors=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # When a resumed run with several processes skips batches, accelerate does not tell the sampler the epoch.
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.time_budget.limit is not None:
            # All processes must use the same elapsed time, or their learning rates and last steps would differ.
            seconds = torch.tensor(trainer.time_budget.seconds, device=trainer.args.device)
            trainer.time_budget.tick(trainer.accelerator.reduce(seconds, reduction="mean").item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(state.global_step)
        if self.trainer.time_budget.fraction >= 1:
            control.should_training_stop = control.should_save = control.should_log = True


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
