"""Fine-tune a model on your own boxes; write checkpoints, curves, metrics and the model to runs/train/NAME.

Options come from flags, from a YAML file (--config), or from both; flags take precedence.
`accelerate launch -m gdino_hf train ...` trains in several processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from gdino_hf.data.places import is_there, split_place, with_split
from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable
from gdino_hf.whole_files import remove_empty, write_whole_text

from .argparse_internals import DefaultsInHelp, long_options
from .errors import OutputError, UsageError
from .picture_options import PICTURE_OPTIONS, add_picture_options, picture_settings
from .run_folder import new_run_folder, place_name

HELP = "fine-tune a model on your own boxes"
READS_ITS_OPTIONS = True
ARGUMENTS_FILE = "arguments.yaml"
_PLACES = ("data", "dataset_name", "images", "val", "test", "replay", "zero_shot", "model", "albumentations")
# Lines of a library's message to show: the first says what is wrong, the next ones often how to mend it.
_MOST_LINES = 3
_NOT_IN_YAML = ("help", "config", "resume", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the options are dataclasses that need torch, and importing it would slow down `gdino --help`."""


def run(args: argparse.Namespace) -> int:
    """Fine-tune the model; return 0.

    Raises:
        UsageError: Nothing was trained, because an option, a data set or the model cannot be used.
        OutputError: Training stopped, because a photograph cannot be read or the disk is full.
    """
    try:
        for name in ("fine_tuning", "loggers", "run_report", "saving"):
            import_module(f"gdino_hf.training.{name}")
    except ModuleNotFoundError as error:
        raise UsageError(f'training needs {error.name}; pip install "gdino-hf[train]"') from error
    options = _parse(args.rest)
    with picture_settings(options.pictures):
        return _train(options)


def _train(options: _Options) -> int:
    import torch
    from safetensors import SafetensorError

    from gdino_hf.detection.exported_folder import is_export
    from gdino_hf.training.fine_tuning import FineTuning, read_data
    from gdino_hf.training.loggers import failed_logger
    from gdino_hf.training.run_report import push, summary, write_report
    from gdino_hf.training.saving import SavingError, last_checkpoint

    from .model_options import load_detector

    data, model_arguments, training = options.data, options.model, options.training
    try:
        sets = read_data(data)
    except (OSError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    for remark in (*sets.remarks, *(remark for split in sets for remark in split.remarks)):
        if training.should_save:
            print(f"warning: {printable(remark)}", file=sys.stderr)
    if is_export(model_arguments.model):
        raise UsageError(
            f"--model {model_arguments.model} is an exported model; give the model that it was exported from"
        )
    detector = load_detector(model_arguments.model, sets.train.labels, device="cpu", optimize=False)
    place = Path(options.output_dir or Path(options.runs) / "train").expanduser()
    missing = [path for path in (place, *place.parents) if not path.exists()]
    folder = _folder(options)
    training.output_dir = str(folder)
    repository = (training.hub_model_id or folder.name) if training.push_to_hub else None
    # Push the finished model with its metrics, not every checkpoint.
    training.push_to_hub = False
    try:
        fine_tuning = FineTuning(detector.model, detector.processor, sets, data, model_arguments, training)
    except (ImportError, TypeError, ValueError) as error:
        if options.resume is None and training.should_save:
            # Nothing was done, so leave nothing behind.
            shutil.rmtree(folder)
            remove_empty(path for path in missing if path != folder)
        raise UsageError(_one_line(error)) from error

    def how_to_go_on() -> str:
        last = last_checkpoint(folder)
        return f"--resume {folder} goes on from {last.name}" if last else f"--resume {folder} starts again"

    try:
        outcome = fine_tuning.run(resume=options.resume is not None)
        if training.should_save:
            for remark in write_report(folder, outcome, sets):
                print(f"warning: {printable(remark)}", file=sys.stderr)
            print(summary(outcome, sets))
            print(f"{printable(folder / 'model')}: the finished model; metrics and curves are beside it")
    except SavingError as error:
        raise OutputError(_one_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise OutputError(
            "the device has too little memory; with a smaller --batch-size and more --gradient-accumulation-steps, "
            f"or with --gradient-checkpointing, {how_to_go_on()}"
        ) from error
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        raise OutputError(f"training stopped ({_one_line(error)}); {how_to_go_on()}") from error
    except Exception as error:
        logger = failed_logger(error)
        if logger is None:
            raise
        offline = "; WANDB_MODE=offline logs without a network" if logger == "wandb" else ""
        raise OutputError(f"{logger} failed ({_one_line(error)}){offline}; then {how_to_go_on()}") from error
    except KeyboardInterrupt:
        if training.should_save:
            print(f"\nstopped; {how_to_go_on()}", file=sys.stderr)
        raise
    if repository is not None and training.should_save:
        try:
            print(push(folder, repository, training.hub_private_repo, training.hub_token))
        except OSError as error:
            raise OutputError(_one_line(error)) from error
    return 0


@dataclass
class _Options:
    """The command line's options, grouped."""

    data: Any
    model: Any
    training: Any
    pictures: argparse.Namespace
    name: str | None
    runs: str
    resume: str | None
    output_dir: str | None
    given: dict[str, Any]


def _parse(rest: Sequence[str]) -> _Options:
    """Parse flags and YAML into the three dataclasses."""
    from transformers import HfArgumentParser

    from gdino_hf.training.arguments import DataArguments, GDinoTrainingArguments, ModelArguments

    class Parser(HfArgumentParser):
        """A parser whose errors are printed like those of the other subcommands."""

        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    kinds = (DataArguments, ModelArguments, GDinoTrainingArguments)
    parser = Parser(
        kinds,
        prog="gdino train",
        usage="gdino train DATA [--config FILE] [--name NAME] [--resume FOLDER] [options]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=DefaultsInHelp,
    )
    parser.add_argument("place", nargs="?", metavar="DATA", help="data set, as --data")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with options as name: value")
    parser.add_argument("--name", help="name of the run's folder; by default the data set's")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: %(default)s)")
    parser.add_argument("--resume", metavar="FOLDER", help="folder of a run to continue with its options")
    add_picture_options(parser, absent=argparse.SUPPRESS)
    early, _ = parser.parse_known_args(rest)
    if early.resume is not None and not (Path(early.resume) / ARGUMENTS_FILE).is_file():
        raise UsageError(f"--resume {early.resume} has no {ARGUMENTS_FILE}; give a run's folder, or start it again")
    namespace = argparse.Namespace()
    for path in (Path(early.resume) / ARGUMENTS_FILE if early.resume is not None else None, early.config):
        if path is not None:
            arguments = _yaml(path, parser)
            try:
                parser.parse_args(arguments, namespace)
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from error
    parser.parse_args(rest, namespace)
    if namespace.place is not None:
        namespace.data = namespace.place
    if namespace.output_dir and (namespace.name or namespace.resume):
        raise UsageError("--output_dir and --name or --resume exclude each other; give one of them")
    for name in _PLACES:
        if getattr(namespace, name):
            setattr(namespace, name, os.path.expanduser(getattr(namespace, name)))
    fresh = HfArgumentParser(kinds)
    known = [name for kind in kinds for name in kind.__dataclass_fields__ if hasattr(namespace, name)]
    values = {name: getattr(namespace, name) for name in known}
    given = {name: value for name, value in values.items() if value != fresh.get_default(name)}
    given.pop("output_dir", None)
    pictures = {name: getattr(namespace, name) for name in PICTURE_OPTIONS if hasattr(namespace, name)}
    given |= pictures
    for name in _PLACES:
        # Made absolute, because a run may be resumed from another working directory; Hub ids and addresses stay.
        if given.get(name) not in (None, "", "none"):
            base, split = split_place(given[name])
            given[name] = with_split(os.path.abspath(base), split) if is_there(base) else given[name]
    try:
        made = [kind(**{n: values[n] for n in kind.__dataclass_fields__ if n in values}) for kind in kinds]
        data, model, training = made
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    return _Options(
        data,
        model,
        training,
        argparse.Namespace(**pictures),
        namespace.name,
        namespace.runs,
        namespace.resume,
        namespace.output_dir,
        given,
    )


def _yaml(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Read options from a YAML file as command-line arguments, so that both are checked in the same way."""
    import difflib
    import json

    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML ({_one_line(error)}); give options as name: value") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; give options as name: value")
    options = {flag: action for flag, action in long_options(parser).items() if action.dest not in _NOT_IN_YAML}
    arguments = []
    for key, value in content.items():
        flag = next((form for form in (str(key), str(key).replace("_", "-")) if form in options), None)
        if flag is None:
            near = difflib.get_close_matches(str(key), options, n=1)
            hint = f"did you mean {near[0]}?" if near else "gdino train --help lists them"
            raise UsageError(f"{path} has the unknown option {key!r}; {hint}")
        action = options[flag]
        if value is None:
            if action.default is not None:
                raise UsageError(f"{path} has no value for {key}; give one, or leave the option out")
            continue
        if action.nargs == "+":
            arguments += [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        elif action.nargs == 0:
            # Flags without a value, such as --no-...
            if not isinstance(value, bool):
                raise UsageError(f"{path} has {key}: {value!r:.40}; give true or false")
            arguments += [f"--{flag}"] if value else []
        elif isinstance(value, (dict, list)):
            arguments.append(f"--{flag}={json.dumps(value)}")
        else:
            # YAML reads a bare `no` as false, but some options have "no" as a choice.
            is_word = value is False and action.choices is not None and "no" in action.choices
            arguments.append(f"--{flag}={'no' if is_word else value}")
    return arguments


def _folder(options: _Options) -> Path:
    """Make the run's folder in the first process and tell the others."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=options.training.use_cpu or None)
    made: list[Any] = [None, None]
    if state.is_main_process:
        try:
            made = [str(_prepare_folder(options)), None]
        except UsageError as error:
            made = [None, str(error)]
    if state.num_processes > 1:
        broadcast_object_list(made)
    if made[0] is None:
        raise UsageError(made[1])
    return Path(made[0])


def _prepare_folder(options: _Options) -> Path:
    """Make a new folder, or take that of the run to resume, and write the options there for a later --resume."""
    import yaml

    if options.resume is not None:
        folder = Path(options.resume)
    elif options.output_dir:
        folder = _named_folder(options.output_dir)
    else:
        folder = new_run_folder("train", options.name or place_name(options.data.data), options.runs)
    try:
        write_whole_text(folder / ARGUMENTS_FILE, yaml.safe_dump(options.given, allow_unicode=True))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({_one_line(error)}); make room, or choose another") from error
    return folder


def _named_folder(name: str) -> Path:
    """Make the folder that --output_dir names, as transformers' examples do; one with files in it is not touched."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({_one_line(error)}); choose another --output_dir") from error
    if not is_empty:
        raise UsageError(f"{folder} has files; choose another --output_dir, or continue its run with --resume {folder}")
    return folder


def _one_line(error: BaseException) -> str:
    """Describe an error in one line, keeping the remedy that libraries add in further lines."""
    return reason(error, name_file=True, most_lines=_MOST_LINES)
