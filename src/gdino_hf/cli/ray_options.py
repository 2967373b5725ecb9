"""Options of verbs that can work on a Ray cluster."""

from __future__ import annotations

import argparse
from typing import Any

from .errors import UsageError
from .numbers import positive


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a Ray cluster."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on a Ray cluster: auto for the one that this machine is part of, HOST:PORT, or ray://HOST:PORT",
    )
    parser.add_argument("--ray-cpus", type=positive, metavar="N", help="with --ray: cores of each worker (default: 1)")
    parser.add_argument(
        "--ray-gpus",
        type=_gpus,
        metavar="SHARE",
        help="with --ray: GPUs of each worker, such as 0.5 for two workers on each (default: 1 if the cluster has any, "
        "else 0)",
    )


def read_cluster(args: argparse.Namespace) -> Any:
    """Return the cluster that the options name, None without --ray.

    Raises:
        UsageError: An option of a cluster is given without one.
    """
    from gdino_hf.labeling.ray_workers import RayCluster

    if args.ray is not None:
        return RayCluster(args.ray, args.workers, args.ray_cpus or 1, args.ray_gpus)
    for name in ("ray_cpus", "ray_gpus"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --ray; give both")
    return None


def _gpus(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    # Ray shares a GPU between tasks in parts of it, and gives out several as wholes.
    if not 0 <= value <= 64 or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share of a GPU; give 0..1, or a whole number up to 64")
    return value
