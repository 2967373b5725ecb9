"""Label any number of pictures: boxes in shards that are written whole, and data sets in the formats of other tools.

The same command goes on with a run that was stopped or killed. `accelerate launch -m gdino_hf label ...` shares the
pictures between processes.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import INTERRUPTED, OutputError, UsageError
from .format_option import FORMAT_NAMES
from .mask_options import add_masks, check_masks
from .model_options import add_dtype
from .numbers import fraction, positive, results_place
from .query_options import Query, add_nms, add_tiles, read_query
from .ray_options import add_ray, read_cluster
from .split_option import add_split, check_split, write_split_folders

HELP = "label any number of pictures, in shards, with several processes"
# As in gdino_hf.labeling.label_settings and gdino_hf.detection.prompt_passes, which take a second to import.
_SHARD_SIZE, _NMS, _THRESHOLD = 200, 0.7, 0.3
_BATCH_ON_CPU, _BATCH_ELSEWHERE = 4, 8
# Pictures that are named one by one on the terminal.
_MOST_NAMED = 10
# Names that users know a format by.
_ALIASES = {"label-studio": "labelstudio"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="file, folder (with its sub-folders and archives), data set (a YOLO, COCO, VOC, ... folder or file, with "
        "a split after a colon or all), glob, .txt file with a path or address a line, tar or Parquet file, address "
        "(s3://, gs://, hf://, https://, ...), or id of a data set on the Hub",
    )
    parser.add_argument(
        "--labels",
        required=True,
        help='what to look for: "cat, remote control", or @FILE with one label per line, with JSON such as {"cat": '
        '["cat", "kitten"]}, or with a saved vocabulary, whose thresholds of single labels come before --threshold',
    )
    parser.add_argument(
        "--negative", metavar="LABELS", help="labels that compete for boxes but are left out, written as for --labels"
    )
    parser.add_argument(
        "--out",
        type=results_place,
        required=True,
        metavar="DIR",
        help="folder of results, or an address that fsspec can write, such as s3://bucket/labels",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=(*FORMAT_NAMES, *_ALIASES),
        metavar="NAME",
        default=[],
        help=f"also write these formats into DIR at the end: {', '.join(FORMAT_NAMES)}",
    )
    parser.add_argument(
        "--drop-empty", action="store_true", help="leave pictures in which nothing was found out of the formats"
    )
    parser.add_argument(
        "--model", default="nano", help="Hub id, folder, or nano, the built-in model (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=_THRESHOLD,
        help="score that a box must exceed, 0..1, unless the vocabulary has one for its label (default: %(default)s)",
    )
    add_nms(parser, _NMS)
    add_tiles(parser)
    add_masks(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="most pictures of like sizes in a forward pass (default: "
        f"{_BATCH_ON_CPU} small ones of one size on a CPU, and {_BATCH_ELSEWHERE} elsewhere)",
    )
    add_dtype(parser)
    _add_engine(parser)
    add_split(parser)
    _add_hub(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes, which share the cores (default: 1); with --ray the most shards at a time (default: as many as "
        "the cluster has room for)",
    )
    add_ray(parser)
    parser.add_argument(
        "--readers",
        type=positive,
        default=2,
        metavar="N",
        help="threads of each process that read pictures beside the model (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=positive,
        default=_SHARD_SIZE,
        metavar="N",
        help="pictures in a shard; a process that is killed loses the work on one (default: %(default)s)",
    )


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--push-to-hub",
        metavar="USER/NAME",
        help="at the end, make a data set with the pictures and their boxes in DIR/hub and upload it",
    )
    parser.add_argument("--private", action="store_true", help="make the data set on the Hub private")


def run(args: argparse.Namespace) -> int:
    """Label the pictures and return the exit status: 0, or 1 if a picture could not be used.

    Raises:
        UsageError: The sources, the labels, the model, the device or the folder cannot be used.
        OutputError: The results cannot be written any more, or worker processes cannot go on.
    """
    args.caption = None
    query = read_query(args)
    check_split(args)
    check_masks(args, args.format)
    _check_repository(args)
    try:
        import filelock  # noqa: F401
        import fsspec  # noqa: F401
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f'labelling needs {error.name}; pip install "gdino-hf[label]"') from error
    from transformers.utils import logging

    from gdino_hf.labeling.label_run import output_error

    logging.disable_progress_bar()
    try:
        summary = _label(args, query)
    except KeyboardInterrupt:
        print("stopped; the shards so far are written, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(reason(error)) from error
    except OSError as error:
        raise OutputError(output_error(error, args.out)) from error
    if summary.finished:
        print("\n".join(_report(summary)))
        if args.split is not None:
            write_split_folders(args)
        if args.push_to_hub is not None:
            _push(args)
    return 1 if summary.failed else 0


def _label(args: argparse.Namespace, query: Query) -> Any:
    import torch

    from gdino_hf.labeling.label_progress import LabelProgress
    from gdino_hf.labeling.label_run import label_pictures
    from gdino_hf.labeling.label_settings import LabelJob
    from gdino_hf.labeling.ranks import Ranks

    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    job = LabelJob(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch or (_BATCH_ON_CPU if on_cpu else _BATCH_ELSEWHERE),
        pad=args.batch is not None or not on_cpu,
        tiles=args.tiles,
        readers=args.readers,
        shard_size=args.shard,
        segmenter=args.masks,
        tighten=args.tighten,
        options={"threshold": args.threshold, "nms_threshold": args.nms},
        **({"overlap": args.overlap} if args.tiles is not None else {}),
    )
    ranks, cluster = Ranks.of_environment(), read_cluster(args)
    return label_pictures(
        args.sources,
        query.vocabulary(),
        args.out,
        job=job,
        formats=[_ALIASES.get(name, name) for name in args.format],
        keep_empty=not args.drop_empty,
        workers=1 if cluster is not None else args.workers or 1,
        ranks=ranks,
        cluster=cluster,
        progress=LabelProgress(sys.stderr if ranks.rank == 0 else None),
    )


def _check_repository(args: argparse.Namespace) -> None:
    """Refuse the id of a data set that the Hub would refuse after all the work."""
    if args.push_to_hub is None:
        if args.private:
            raise UsageError("--private is for --push-to-hub; give both")
        return
    if isinstance(args.out, str):
        raise UsageError("--push-to-hub makes the data set in --out, which must be a folder and no address")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(args.push_to_hub)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub: {reason(error)}") from error


def _push(args: argparse.Namespace) -> None:
    """Make the data set of a finished run and upload it."""
    from gdino_hf.labeling.hub_set import push_hub_set, write_hub_set
    from gdino_hf.labeling.label_store import LabelStore

    try:
        made = write_hub_set(LabelStore(args.out), keep_empty=not args.drop_empty)
    except ImportError as error:
        raise UsageError(f"--push-to-hub: {reason(error)}") from error
    except OSError as error:
        raise OutputError(f"--push-to-hub: the data set cannot be written ({reason(error, name_file=True)})") from error
    if args.masks is not None:
        print(
            "gdino label: the data set on the Hub has boxes alone; masks are in the shards and formats", file=sys.stderr
        )
    for source, why in list(made.left_out.items())[:_MOST_NAMED]:
        print(f"gdino label: {printable(source)} is not in the data set: {printable(why)}", file=sys.stderr)
    print(f"data set: {printable(made.folder)}, {made.pictures:,} pictures, {len(made.left_out):,} left out")
    # The client raises exceptions of several types: for the network, for rights, for a missing token.
    try:
        address = push_hub_set(made, args.push_to_hub, args.private)
    except Exception as error:
        raise OutputError(
            f"{args.push_to_hub} cannot be uploaded ({reason(error)}); the data set is in {printable(made.folder)}, "
            "and the same command tries again"
        ) from error
    print(f"uploaded: {address}")


def _report(summary: Any) -> list[str]:
    """Return the lines that tell what was done and where it is."""
    pictures = f"{summary.pictures:,} picture{'s' * (summary.pictures != 1)}"
    lines = [f"{summary.boxes:,} box{'es' * (summary.boxes != 1)} in {pictures}, in {printable(summary.folder)}"]
    if summary.failed:
        lines.append(f"{summary.failed:,} could not be used; errors.parquet says why")
    lines += [f"{name}: {printable(path)}" for name, path in summary.formats.items()]
    if summary.pictures_folder is not None:
        lines.append(f"these files name pictures by their paths inside {printable(summary.pictures_folder)}")
    return lines
