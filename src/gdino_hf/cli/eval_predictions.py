"""The predictions that `gdino eval` judges: made by this process, by several, or by a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import INTERRUPTED, OutputError, UsageError
from .model_options import load_detector
from .numbers import positive
from .ray_options import add_ray, read_cluster
from .run_folder import new_run_folder

PREDICTIONS = "predictions.jsonl"


@dataclass
class Task:
    """A data set and the protocol it is evaluated with.

    Attributes:
        data: Name of the data set as the user gave it.
        truth: Its ground truth.
        protocol: "coco", "lvis", "phrases" or "referring".
        prompts: What to ask for instead of each label; None for the labels.
    """

    data: str
    truth: Any
    protocol: str
    prompts: list[str] | None = None

    @property
    def kind(self) -> str:
        """What is predicted: "phrases" or "boxes"."""
        return "phrases" if self.protocol in ("phrases", "referring") else "boxes"


def add_engines(parser: argparse.ArgumentParser) -> None:
    """Declare the options of several processes and machines."""
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes, which share the cores (default: 1); with --ray the most parts at a time (default: as many as "
        "the cluster has room for)",
    )
    add_ray(parser)


@contextmanager
def predictor(args: argparse.Namespace) -> Iterator[Predictor]:
    """Join the other processes of the run, if there are any, during the `with` block.

    Raises:
        OutputError: Another process was lost.
        UsageError: The options or the variables of the launcher cannot be used.
    """
    from gdino_hf.labeling.evaluation_run import Engine
    from gdino_hf.labeling.label_computing import same_arithmetic
    from gdino_hf.labeling.label_workers import WorkerError
    from gdino_hf.labeling.rank_group import rank_group
    from gdino_hf.labeling.ranks import Ranks

    with ExitStack() as stack:
        try:
            cluster = read_cluster(args)
            stack.enter_context(same_arithmetic())
            group = stack.enter_context(rank_group(Ranks.of_environment()))
            engine = Engine(1 if cluster is not None else args.workers or 1, group, cluster)
        except WorkerError as error:
            raise OutputError(reason(error)) from error
        except ValueError as error:
            raise UsageError(reason(error)) from error
        yield Predictor(args, engine)


class Predictor:
    """Predicts data sets with the model of the command line.

    Args:
        args: Parsed options.
        engine: `gdino_hf.labeling.evaluation_run.Engine`, who predicts.

    Attributes:
        status: Exit status if `predict` returned nothing: that of a run that the user stopped, or 0 in processes that
            leave the rest to the first one.
    """

    def __init__(self, args: argparse.Namespace, engine: Any) -> None:
        self.status = 0
        self._args, self._engine = args, engine
        self._detector: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that talks to the user and writes the results."""
        return bool(self._engine.group.ranks.rank == 0)

    def load(self, labels: list[str]) -> Any:
        """Load the model and check labels; if other processes predict, it stays on the CPU.

        Raises:
            UsageError: The model or a label cannot be used.
        """
        from transformers.utils import logging

        # The bar over the images is the one to show; transformers' bar for loading weights would only flash by.
        logging.disable_progress_bar()
        args = self._args
        if self._engine.is_single:
            self._detector = load_detector(args.model, labels, device=args.device, dtype=args.dtype)
        else:
            self._detector = load_detector(args.model, labels, device="cpu", optimize=False)
        return self._detector

    def folder(self, name: str) -> Path:
        """Return the folder of the run, which is the same in all processes.

        Raises:
            UsageError: It cannot be made.
        """
        folder = None
        if self.is_first:
            folder = Path(self._args.resume or new_run_folder("eval", name, self._args.runs))
        return Path(self._engine.group.share(folder))

    def predict(self, task: Task, folder: Path) -> Any:
        """Predict a data set, storing predictions as they are made; return None if there is nothing to judge here.

        Raises:
            OutputError: The predictions cannot be written.
            UsageError: The folder holds those of another model or data set.
        """
        from gdino_hf.evaluation.predict import prediction_limits
        from gdino_hf.labeling.label_workers import WorkerError

        args = self._args
        if task.kind != "boxes" and args.nms is not None:
            raise UsageError(f"--nms is for data with labels, and {task.data} has captions; leave it out")
        options: dict[str, Any] = {"score": args.score or ("max" if task.protocol == "referring" else "mean")}
        if task.kind == "boxes":
            options |= prediction_limits(task.protocol)
            given = {"max_detections": args.max_detections, "labels_per_prompt": args.labels_per_prompt}
            given["nms_threshold"] = self._detector.processor.nms_threshold if args.nms is None else args.nms
            options |= {name: value for name, value in given.items() if value is not None}
        labels = {"labels": task.truth.labels, "prompts": task.prompts or task.truth.labels}
        header = {"model": args.model, "data": task.data, "kind": task.kind, **labels, **options, "dtype": args.dtype}
        if task.kind == "boxes":
            options |= {"labels": task.truth.labels, "prompts": task.prompts}
        path = folder / PREDICTIONS
        try:
            with self._first_opens(path, header) as store:
                return self._run(task, options, store)
        except KeyboardInterrupt:
            print(f"stopped; to continue, give the same command and --resume {args.resume or folder}", file=sys.stderr)
            self.status = INTERRUPTED
            return None
        except ValueError as error:
            raise UsageError(reason(error)) from error
        except WorkerError as error:
            raise OutputError(f"{reason(error)}; continue with --resume {printable(folder)}") from error
        except OSError as error:
            raise OutputError(
                f"{path}: the predictions cannot be written ({reason(error)}); continue with --resume"
            ) from error

    def _first_opens(self, path: Path, header: dict[str, Any]) -> Any:
        """Open the file of predictions, which the first process makes or finds to be of the same settings.

        Raises:
            OSError: It cannot be written.
            ValueError: It is of other settings.
        """
        from gdino_hf.evaluation.prediction_file import PredictionFile

        if not self.is_first:
            why = self._engine.group.share(None)
            if why is not None:
                raise ValueError(why)
            return PredictionFile(path, header)
        try:
            store = PredictionFile(path, header)
        except (OSError, ValueError) as error:
            self._engine.group.share(reason(error))
            raise
        self._engine.group.share(None)
        return store

    def _run(self, task: Task, options: dict[str, Any], store: Any) -> Any:
        if not self._engine.is_single:
            return self._run_shards(task, options, store)
        from gdino_hf.evaluation.phrases import predict_phrases
        from gdino_hf.evaluation.predict import predict

        run = predict_phrases if task.kind == "phrases" else predict
        return run(
            self._detector.model,
            self._detector.processor,
            task.truth.rows,
            batch_size=self._args.batch,
            limit=self._args.limit,
            store=store,
            progress="evaluate",
            **options,
        )

    def _run_shards(self, task: Task, options: dict[str, Any], store: Any) -> Any:
        from tqdm import tqdm

        from gdino_hf.labeling.evaluation_order import EvaluationOrder
        from gdino_hf.labeling.evaluation_run import predict_shards

        args = self._args
        order = EvaluationOrder(
            args.model, args.device, args.dtype, task.kind == "phrases", options, batch_size=args.batch
        )
        total = len(task.truth.rows) if args.limit is None else min(args.limit, len(task.truth.rows))
        if self.is_first and not sys.stderr.isatty():
            print(f"evaluate: {total} images", file=sys.stderr, flush=True)
        # Each process counts its own share; the first one shows it.
        with tqdm(desc="evaluate", total=total, disable=None if self.is_first else True, leave=False) as bar:
            return predict_shards(
                order,
                task.truth.rows,
                store,
                self._engine,
                limit=args.limit,
                tell=lambda tally: bar.update(tally.pictures) and None,
                say=lambda line: tqdm.write(f"gdino eval: {printable(line)}", file=sys.stderr),
            )
