"""Evaluate a model on annotated images; write metrics, curves and predictions.

DATA is a data set of any form that gdino train takes: COCO or LVIS JSON, ODVG JSON Lines, YOLO, Pascal VOC,
CreateML, LabelMe, a Hugging Face data set, or WebDataset tars; DATA:test names a split. Results go to a new folder,
runs/eval/NAME.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.evaluation import LVIS_LABELS, LVIS_PER_PROMPT, MAX_DETECTIONS
from gdino_hf.model.printable import printable

from .convention_options import add_conventions, annotation_options
from .errors import INTERRUPTED, OutputError, UsageError
from .eval_predictions import PREDICTIONS, Predictor, Task, add_engines, predictor
from .inputs import read_labels
from .model_options import add_dtype, check_labels
from .numbers import fraction, positive
from .query_options import add_nms
from .run_folder import new_run_folder, place_name

HELP = "evaluate a model, or stored predictions, on annotated images"
_MOST_PRINTED_LABELS = 20
_TABLE_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("data", nargs="?", metavar="DATA", help="annotation file, folder or Hub id; see above")
    parser.add_argument("--images", metavar="DIR", help="folder of the photographs (default: images/ beside DATA)")
    parser.add_argument(
        "--model", default="nano", help="Hub id, folder, or nano, the built-in model (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", help="evaluate only these of DATA's labels, written as for gdino detect (default: all)"
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help=f"evaluate the {PREDICTIONS} of an earlier run on DATA, or COCO results (a JSON list of {{image_id, "
        "category_id, bbox, score}), without loading a model",
    )
    parser.add_argument(
        "--table",
        metavar="YAML",
        help="instead of DATA: YAML list of data sets with name, annotations and optionally images, labels and "
        "prompts ({label: text to ask for}); writes a table with their average",
    )
    parser.add_argument(
        "--protocol",
        default="auto",
        choices=("auto", "coco", "lvis", "phrases", "referring"),
        help="COCO AP, LVIS fixed AP, recall of a caption's phrases, or accuracy of referring expressions (default: "
        "the one that DATA is annotated for, but never referring)",
    )
    add_conventions(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="evaluate only the first N images")
    parser.add_argument("--batch", type=positive, default=8, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--max-detections",
        type=positive,
        metavar="N",
        help=f"detections kept per image (default: {MAX_DETECTIONS}; for LVIS {LVIS_PER_PROMPT} of every prompt)",
    )
    parser.add_argument(
        "--labels-per-prompt",
        type=positive,
        metavar="N",
        help=f"largest number of labels in one prompt (default: as many as fit; for LVIS {LVIS_LABELS})",
    )
    parser.add_argument(
        "--score",
        choices=("mean", "max"),
        help="how a label's token scores are combined (default: mean, as published; max for referring expressions)",
    )
    add_nms(parser)
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="lowest score of detections that are drawn and count in the confusion matrix, 0..1 (default: the one with "
        "the highest F1)",
    )
    parser.add_argument("--name", help="name of the run's folder (default: that of DATA)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: %(default)s)")
    parser.add_argument("--resume", metavar="DIR", help="folder of a stopped run to continue")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    add_engines(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and write the results; return 0, or 1 if an image or a data set could not be used.

    Raises:
        UsageError: The data, the predictions, the model or an option cannot be used.
        OutputError: The results cannot be written.
    """
    _check_options(args)
    try:
        with predictor(args) as predicting:
            return _run_table(args, predicting) if args.table else _run_one(args, predicting)
    except ImportError as error:
        raise UsageError(reason(error)) from error


def _check_options(args: argparse.Namespace) -> None:
    if (args.data is None) == (args.table is None):
        raise UsageError("give DATA or --table YAML, one of them")
    if args.predictions:
        for option in ("labels", "table", "resume", "limit", "nms"):
            if getattr(args, option) is not None:
                raise UsageError(f"--predictions FILE and --{option} exclude each other; leave one out")
    if args.table:
        for option in ("images", "labels"):
            if getattr(args, option):
                raise UsageError(f"--{option} belongs to one data set; write {option} in {args.table}")
    if args.resume and not any(Path(args.resume).rglob(PREDICTIONS)):
        raise UsageError(f"--resume {args.resume} holds no {PREDICTIONS}; give the folder of a run that was stopped")


def _open(args: argparse.Namespace, data: Any, images: Any, labels: Sequence[str] | None, say: bool = True) -> Task:
    """Read the ground truth of a data set and choose its protocol.

    Raises:
        ValueError: The data set cannot be read, or not be evaluated with the given protocol.
    """
    from gdino_hf.data.annotation_files import annotation_file
    from gdino_hf.evaluation.open_ground_truth import EVALUATED_SPLITS, open_ground_truth

    # Labels that were asked for by name are kept.
    groups: Any = args.groups if labels is None else "keep"
    options = annotation_options(args, groups=groups)
    file = annotation_file(data, *EVALUATED_SPLITS)
    if Path(data).expanduser().is_dir() and say:
        # Which split of a folder that is.
        print(f"gdino eval: {file}", file=sys.stderr)
    truth = open_ground_truth(file, images, options)
    if not truth.references:
        raise ValueError(f"{data} has no images; give a data set that has some")
    captions = truth.has_captions
    protocol = truth.protocol if args.protocol == "auto" else args.protocol
    if captions != (protocol in ("phrases", "referring")):
        raise ValueError(
            f"{data} {'has captions' if captions else 'has labels and no captions'}, which --protocol {protocol} "
            "does not judge; leave the option out"
        )
    if protocol == "lvis" and not truth.is_federated:
        raise ValueError(
            f"{data} has no neg_category_ids or neg_names, which LVIS' protocol needs; leave --protocol out"
        )
    if labels is not None:
        chosen = truth.restricted_to(labels)
        if not any(len(reference["labels"]) for reference in chosen.references.values()):
            raise ValueError(f"{data} has nothing of --labels {', '.join(labels)}; name labels it has")
        truth = chosen
    return Task(str(data), truth, protocol)


def _run_one(args: argparse.Namespace, predicting: Predictor) -> int:
    labels = None if args.labels is None else read_labels(args.labels)
    try:
        task = _open(args, args.data, args.images, labels, predicting.is_first)
        stored = _stored_predictions(args.predictions, task) if args.predictions else None
    except ValueError as error:
        raise UsageError(reason(error)) from error
    name = args.name or place_name(args.data)
    if stored is None:
        _demand_metric()
        predicting.load(task.truth.labels)
        folder = predicting.folder(name)
        predictions = predicting.predict(task, folder)
        if predictions is None:
            return predicting.status
    elif predicting.is_first:
        predictions = stored
        folder = new_run_folder("eval", name, args.runs)
    else:
        return 0
    try:
        evaluation = _judge(args, task, predictions, folder)
    except ValueError as error:
        raise UsageError(reason(error)) from error
    print(_label_table(evaluation))
    print(f"\n{_count(task, evaluation, predictions)}")
    print(f"results: {printable(folder)}")
    return 1 if predictions.failed else 0


def _stored_predictions(path: str, task: Task) -> Any:
    """Read predictions from a file, and restrict the ground truth to the labels that they were made for.

    Raises:
        ValueError: The file cannot be read, or its predictions do not belong to the data set.
    """
    from gdino_hf.evaluation.coco_results import is_coco_results_file, read_coco_results
    from gdino_hf.evaluation.prediction_file import read_predictions

    if is_coco_results_file(path):
        return read_coco_results(path, task.truth)
    predictions = read_predictions(path)
    kind, labels = predictions.header.get("kind", "boxes"), predictions.header.get("labels", [])
    if kind != task.kind:
        raise ValueError(f"{path} has predictions of {kind}, which --protocol {task.protocol} does not judge")
    if not predictions.images:
        raise ValueError(f"{path} has predictions of no image")
    if task.kind == "boxes" and labels != task.truth.labels:
        task.truth = task.truth.restricted_to(labels)
        if not any(len(reference["labels"]) for reference in task.truth.references.values()):
            few = ", ".join(labels[:3]) + ", ..." * (len(labels) > 3)
            raise ValueError(f"{path} is of other labels ({few}), of which {task.data} has nothing")
    return predictions


def _run_table(args: argparse.Namespace, predicting: Predictor) -> int:
    from tqdm import tqdm

    from gdino_hf.evaluation.table import average_row, read_table

    try:
        entries = read_table(args.table)
    except ValueError as error:
        raise UsageError(reason(error)) from error
    if args.protocol in ("phrases", "referring"):
        raise UsageError(f"--table compares average precision; --protocol {args.protocol} takes DATA")
    _demand_metric()
    detector = predicting.load([])
    folder = predicting.folder(args.name or Path(args.table).stem)
    rows: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    incomplete = False
    for entry in tqdm(entries, desc="data sets", disable=None, leave=False):
        try:
            task = _open(args, entry.annotations, entry.images, entry.labels, predicting.is_first)
            task.prompts = entry.prompts_of(task.truth.labels)
            check_labels(detector.processor, task.prompts or task.truth.labels)
            (folder / entry.name).mkdir(exist_ok=True)
            predictions = predicting.predict(task, folder / entry.name)
            if predictions is None:
                if predicting.status == INTERRUPTED:
                    return INTERRUPTED
                continue
            evaluation = _judge(args, task, predictions, folder / entry.name)
        # A data set that cannot be used must not stop the others.
        except (UsageError, ValueError) as error:
            failed[entry.name] = reason(error)
            if predicting.is_first:
                tqdm.write(f"gdino eval: {entry.name}: {failed[entry.name]}", file=sys.stderr)
            continue
        incomplete = incomplete or bool(predictions.failed)
        rows[entry.name] = {name: evaluation.figures[name] for name in _TABLE_METRICS} | {
            "images": evaluation.num_images
        }
    if not predicting.is_first:
        return 0
    average = average_row(list(rows.values()), _TABLE_METRICS)
    _write_table(folder, rows, average, failed, args.model)
    named = f"average of {len(rows)}" + (f" of {len(entries)}" if failed else "")
    body = [
        [name, str(row["images"]), *(_number(row[metric]) for metric in _TABLE_METRICS)] for name, row in rows.items()
    ]
    body.append([named, "", *(_number(average[metric]) for metric in _TABLE_METRICS)])
    print(_table(["data set", "images", *_TABLE_METRICS], body))
    print(f"\nresults: {printable(folder)}")
    return 1 if failed or incomplete else 0


def _demand_metric() -> None:
    """Raise if the package that computes the metrics is missing, before prediction takes hours."""
    from importlib.util import find_spec

    if find_spec("faster_coco_eval") is None:
        raise UsageError('average precision needs faster-coco-eval; pip install "gdino-hf[train]"')


def _judge(args: argparse.Namespace, task: Task, predictions: Any, folder: Path) -> Any:
    """Compute and write the metrics of one data set.

    Raises:
        ValueError: Predictions and ground truth do not belong together.
    """
    from gdino_hf.evaluation.evaluate import evaluate_predictions, write_report

    most = args.max_detections or predictions.header.get("max_detections") or MAX_DETECTIONS
    evaluation = evaluate_predictions(task.truth, predictions, task.protocol, most, args.threshold)
    try:
        remarks = write_report(folder, evaluation, task.truth, predictions)
    except OSError as error:
        raise OutputError(
            f"{folder}: the results cannot be written ({reason(error)}); make room, and continue with --resume {folder}"
        ) from error
    for remark in remarks:
        print(f"gdino eval: {remark}", file=sys.stderr)
    return evaluation


def _write_table(
    folder: Path, rows: dict[str, dict[str, float]], average: dict[str, float], failed: dict[str, str], model: str
) -> None:
    from gdino_hf.evaluation.evaluate import write_csv
    from gdino_hf.whole_files import write_whole_text

    content = {"model": model, "data sets": rows, "average": average, "failed": failed}
    try:
        write_whole_text(folder / "table.json", json.dumps(content, indent=2) + "\n")
        lines = [(name, row["images"], *(row[metric] for metric in _TABLE_METRICS)) for name, row in rows.items()]
        lines.append(("average", "", *average.values()))
        write_csv(folder / "table.csv", ("data set", "images", *_TABLE_METRICS), lines)
    except OSError as error:
        raise OutputError(f"{folder}: the table cannot be written ({reason(error)})") from error


def _label_table(evaluation: Any) -> str:
    """Format all metrics, and those of each label if there are few enough to read."""
    figures = evaluation.figures
    if not evaluation.per_label:
        return _table(list(figures), [[_number(value) for value in figures.values()]])
    overall = _table(list(figures), [[_number(value) for value in figures.values()]])
    if len(evaluation.per_label) > _MOST_PRINTED_LABELS:
        return overall
    columns = ("boxes", "AP", "AP50", "AP75", "AR")
    body = [[name, *(_number(row[column]) for column in columns)] for name, row in evaluation.per_label.items()]
    return f"{overall}\n\n{_table(['label', *columns], body)}"


def _table(header: list[str], body: list[list[str]]) -> str:
    """Align the columns of a table, the first to the left and the others to the right."""
    body = [[printable(cell) for cell in row] for row in body]
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (header, *body))
    ]
    return "\n".join(line.rstrip() for line in lines)


def _number(value: Any) -> str:
    """Format a number with three digits, or a dash if there was nothing to find."""
    if isinstance(value, int):
        return str(value)
    return "-" if value < 0 else f"{value:.3f}"


def _count(task: Task, evaluation: Any, predictions: Any) -> str:
    judged, there, failed = evaluation.num_images, len(task.truth.references), len(predictions.failed)
    count = f"{judged} image{'s' * (judged != 1)} judged"
    if judged < there:
        count += f" of {there}"
    return f"{count}; {failed} could not be used, see above and metrics.json" if failed else count
