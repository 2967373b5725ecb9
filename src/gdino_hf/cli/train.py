"""Fine-tune a model on your own boxes: checkpoints, curves, figures and the finished model in runs/train/NAME.

Options come from flags, from a YAML file (--config), or from both; flags win. `accelerate launch -m gdino_hf train ...`
trains on several processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import OutputError, UsageError
from .run_folder import new_run_folder

HELP = "fine-tune a model on your own boxes"
READS_ITS_OPTIONS = True
ARGUMENTS_FILE = "arguments.yaml"
_PLACES = ("data", "images", "val", "test", "replay", "zero_shot", "model")
# Of a message: libraries say the matter first and what they know about it in further lines.
_MOST_LINES = 3
_NOT_IN_YAML = ("help", "config", "resume", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the options are dataclasses that need torch, which no other verb's --help should wait for."""


def run(args: argparse.Namespace) -> int:
    """Train; returns 0.

    Raises:
        UsageError: Nothing was trained: an option, a data set or the model cannot be used.
        OutputError: The training stopped: a photograph cannot be read, or the disk takes no more.
    """
    import torch
    from safetensors import SafetensorError

    try:
        from gdino_hf.training.fine_tuning import FineTuning, read_data
        from gdino_hf.training.run_report import push, summary, write_report
        from gdino_hf.training.saving import SavingError, last_checkpoint
    except ModuleNotFoundError as error:
        raise UsageError(f'training needs {error.name}; pip install "gdino-hf[train]"') from error

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
    detector = Detector(model_arguments.model, sets.train.labels or ["object"], device="cpu", optimize=False)
    folder = _folder(options)
    training.output_dir = str(folder)
    repository = (training.hub_model_id or folder.name) if training.push_to_hub else None
    # The finished model is pushed, with its figures, and not every checkpoint.
    training.push_to_hub = False
    try:
        fine_tuning = FineTuning(detector.model, detector.processor, sets, data, model_arguments, training)
    except (ImportError, TypeError, ValueError) as error:
        if options.resume is None and training.should_save:
            # Nothing was done, so nothing is left behind.
            shutil.rmtree(folder)
        raise UsageError(_one_line(error)) from error

    def how_to_go_on() -> str:
        last = last_checkpoint(folder)
        return f"--resume {folder} goes on from {last.name}" if last else f"--resume {folder} starts again"

    try:
        outcome = fine_tuning.run(resume=options.resume is not None)
        if training.should_save:
            for remark in write_report(folder, outcome, sets):
                print(f"warning: {remark}", file=sys.stderr)
            print(summary(outcome, sets))
            print(f"{folder / 'model'}: the finished model; figures and curves beside it")
    except SavingError as error:
        raise OutputError(_one_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise OutputError(
            "the device has too little memory; with a smaller --batch-size and more --gradient-accumulation-steps, "
            f"or with --gradient-checkpointing, {how_to_go_on()}"
        ) from error
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        raise OutputError(f"training stopped ({_one_line(error)}); {how_to_go_on()}") from error
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

    class Parser(HfArgumentParser):
        """One whose mistakes are told like all others."""

        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    kinds = (DataArguments, ModelArguments, GDinoTrainingArguments)
    parser = Parser(
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
    if namespace.output_dir:
        raise UsageError("--output_dir is where a run's folder would be; give --runs and --name")
    for name in _PLACES:
        if getattr(namespace, name):
            setattr(namespace, name, os.path.expanduser(getattr(namespace, name)))
    fresh = HfArgumentParser(kinds)
    known = [name for kind in kinds for name in kind.__dataclass_fields__ if hasattr(namespace, name)]
    values = {name: getattr(namespace, name) for name in known}
    given = {name: value for name, value in values.items() if value != fresh.get_default(name)}
    for name in _PLACES:
        # A run may be resumed from another folder. A model may also be on the Hub.
        if given.get(name) and (name != "model" or Path(given[name]).exists()):
            given[name] = os.path.abspath(given[name])
    try:
        made = [kind(**{n: values[n] for n in kind.__dataclass_fields__ if n in values}) for kind in kinds]
        data, model, training = made
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    return _Options(data, model, training, namespace.name, namespace.runs, namespace.resume, given)


def _yaml(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Options out of a file as a command line has them, so that they are judged alike."""
    import difflib
    import json

    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML ({_one_line(error)}); give options as name: value") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; give options as name: value")
    options = {flag[2:]: action for flag, action in parser._option_string_actions.items() if flag.startswith("--")}
    options = {flag: action for flag, action in options.items() if action.dest not in _NOT_IN_YAML}
    arguments = []
    for key, value in content.items():
        flag = next((form for form in (str(key), str(key).replace("_", "-")) if form in options), None)
        if flag is None:
            near = difflib.get_close_matches(str(key), options, n=1)
            hint = f"did you mean {near[0]}?" if near else "gdino train --help lists them"
            raise UsageError(f"{path} has the option {key!r}, which there is not; {hint}")
        action = options[flag]
        if value is None:
            if action.default is not None:
                raise UsageError(f"{path} has no value for {key}; give one, or leave the option out")
            continue
        if action.nargs == "+":
            arguments += [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        elif action.nargs == 0:
            # Flags without a value, which --no-... are.
            arguments += [f"--{flag}"] if value else []
        elif isinstance(value, (dict, list)):
            arguments.append(f"--{flag}={json.dumps(value)}")
        else:
            # YAML takes a bare no for false, which is what some options are called.
            is_word = value is False and action.choices is not None and "no" in action.choices
            arguments.append(f"--{flag}={'no' if is_word else value}")
    return arguments


def _folder(options: _Options) -> Path:
    """The run's folder, made by the first process for all of them."""
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
    """A folder of its own, or that of an earlier run, with the options that a run is resumed with."""
    import yaml

    if options.resume is not None:
        folder = Path(options.resume)
    else:
        place = Path(os.path.abspath(options.data.data))
        folder = new_run_folder("train", options.name or (place.stem if place.is_file() else place.name), options.runs)
    # Whole or as it was, whenever the process is killed.
    unfinished = folder / f"{ARGUMENTS_FILE}.unfinished"
    try:
        unfinished.write_text(yaml.safe_dump(options.given, allow_unicode=True), encoding="utf-8")
        os.replace(unfinished, folder / ARGUMENTS_FILE)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({_one_line(error)}); make room, or name another") from error
    return folder


def _one_line(error: BaseException) -> str:
    """What went wrong, without the traceback that a data loader's worker wraps around it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if "Traceback" in str(error) else " ".join(lines[:_MOST_LINES])).rstrip(".")
