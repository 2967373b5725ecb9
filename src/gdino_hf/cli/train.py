"""Fine-tune a model on your own boxes: checkpoints, curves, figures and the finished model in runs/train/NAME.

Options come from flags, from a YAML file (--config), or from both; flags win. `accelerate launch -m gdino_hf train ...`
trains on several processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError, UsageError
from .run_folder import new_run_folder

HELP = "fine-tune a model on your own boxes"
READS_ITS_OPTIONS = True
ARGUMENTS_FILE = "arguments.yaml"
_PLACES = ("data", "images", "val", "test", "replay", "zero_shot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the options are dataclasses that need torch, which no other verb's --help should wait for."""


def run(args: argparse.Namespace) -> int:
    """Train; returns 0.

    Raises:
        UsageError: Nothing was trained: an option, a data set or the model cannot be used.
        OutputError: The training stopped: a photograph cannot be read, or the disk takes no more.
    """
    from gdino_hf.training.fine_tuning import fine_tune, read_data
    from gdino_hf.training.report import push, summary, write_report
    from gdino_hf.training.saving import SavingError

    from .detector import Detector

    options = _parse(args.rest)
    data, model_arguments, training = options.data, options.model, options.training
    try:
        sets = read_data(data)
    except (OSError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    for remark in (remark for split in sets for remark in split.remarks):
        if training.should_save:
            print(f"warning: {remark}", file=sys.stderr)
    detector = Detector(model_arguments.model, sets.train.labels or ["object"], device="cpu")
    folder = _folder(options)
    training.output_dir = str(folder)
    repository = (training.hub_model_id or folder.name) if training.push_to_hub else None
    # The finished model is pushed, with its figures, and not every checkpoint.
    training.push_to_hub = False
    try:
        outcome = fine_tune(
            detector.model, detector.processor, sets, data, model_arguments, training, resume=options.resume is not None
        )
        if training.should_save:
            for remark in write_report(folder, outcome, sets):
                print(f"warning: {remark}", file=sys.stderr)
            print(summary(outcome, sets))
            print(f"{folder / 'model'}: the finished model; figures and curves beside it")
    except SavingError as error:
        raise OutputError(_one_line(error)) from error
    except (ImportError, OSError, ValueError) as error:
        raise OutputError(
            f"training stopped ({_one_line(error)}); --resume {folder} goes on from its last checkpoint"
        ) from error
    if repository is not None and training.should_save:
        try:
            print(push(folder, repository))
        except OSError as error:
            raise OutputError(_one_line(error)) from error
    return 0


@dataclass
class _Options:
    """What the command line says, sorted."""

    data: Any
    model: Any
    training: Any
    name: str | None
    runs: str
    resume: str | None
    given: dict[str, Any]


def _parse(rest: Sequence[str]) -> _Options:
    """Read flags and YAML into the three dataclasses."""
    from transformers import HfArgumentParser

    from gdino_hf.training.arguments import DataArguments, GDinoTrainingArguments, ModelArguments

    kinds = (DataArguments, ModelArguments, GDinoTrainingArguments)
    parser = HfArgumentParser(
        kinds,
        prog="gdino train",
        usage="gdino train DATA [--config FILE] [--name NAME] [--resume FOLDER] [options]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("place", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with options by their names")
    parser.add_argument("--name", help="of the run's folder; the data set's by default")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with this run, with its options")
    early, _ = parser.parse_known_args(rest)
    known = {name for kind in kinds for name in kind.__dataclass_fields__}
    stored: dict[str, Any] = {}
    if early.resume is not None:
        stored |= _yaml(Path(early.resume) / ARGUMENTS_FILE, parser, known)
    if early.config is not None:
        stored |= _yaml(early.config, parser, known)
    parser.set_defaults(**stored)
    namespace = parser.parse_args(rest)
    if namespace.place is not None:
        namespace.data = namespace.place
    values = {name: value for name, value in vars(namespace).items() if name in known}
    if values["output_dir"]:
        raise UsageError("--output_dir is where a run's folder would be; give --runs and --name")
    fresh = HfArgumentParser(kinds)
    given = {name: value for name, value in values.items() if value != fresh.get_default(name)}
    for name in _PLACES:
        if given.get(name):
            # A run may be resumed from another folder.
            given[name] = str(Path(given[name]).expanduser().absolute())
    try:
        made = [kind(**{n: values[n] for n in kind.__dataclass_fields__ if n in values}) for kind in kinds]
        data, model, training = made
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    return _Options(data, model, training, namespace.name, namespace.runs, namespace.resume, given)


def _yaml(path: Path, parser: argparse.ArgumentParser, known: set[str]) -> dict[str, Any]:
    """Options out of a file, as argparse takes defaults."""
    import difflib

    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML ({_one_line(error)}); give options as name: value") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; give options as name: value")
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "gdino train --help lists them"
            raise UsageError(f"{path} has the option {key!r}, which there is not; {hint}")
        options[name] = [value] if name in lists and value is not None and not isinstance(value, list) else value
    return options


def _folder(options: _Options) -> Path:
    """The run's folder, made by the first process for all of them."""
    import yaml
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if options.resume is not None:
        folder = Path(options.resume)
        if not folder.is_dir():
            raise UsageError(f"--resume {folder} is no folder; give one of an earlier run")
        return folder
    state = PartialState(cpu=options.training.use_cpu or None)
    made: list[Any] = [None, None]
    if state.is_main_process:
        place = Path(options.data.data)
        try:
            folder = new_run_folder("train", options.name or place.with_suffix("").name, options.runs)
            text = yaml.safe_dump(options.given, allow_unicode=True)
            (folder / ARGUMENTS_FILE).write_text(text, encoding="utf-8")
            made = [str(folder), None]
        except UsageError as error:
            made = [None, str(error)]
    if state.num_processes > 1:
        broadcast_object_list(made)
    if made[0] is None:
        raise UsageError(made[1])
    return Path(made[0])


def _one_line(error: BaseException) -> str:
    """What went wrong, without the traceback that a data loader's worker wraps around it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if "Traceback" in str(error) else lines[0]).strip().rstrip(".")
