"""Build, check and time everything that needs a GPU, and write results/<device>.json.

    python kernels/msda/benchmarks/run_gpu.py [--repeats 20] [--skip-models]

It needs torch with CUDA, Triton, nvcc and the kernels package. Missing parts are skipped and named in the results.
"""

import argparse
import json
import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def prepare_hub_kernel(folder: Path | None) -> str | None:
    """Point GDINO_MSDA_HUB at a built CUDA kernel, building it if none is given; return why not, or None on success."""
    try:
        if folder is None:
            sys.path.insert(0, str(HERE.parent))
            from build_local import build

            architecture = "".join(map(str, torch.cuda.get_device_capability()))
            folder = build("cuda", [architecture], HERE.parent / "build")
        os.environ["GDINO_MSDA_HUB"] = str(folder)
        from gdino_hf.model import msda_hub

        return None if msda_hub.load() is not None else "the built kernel does not load: see the log"
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]


def environment() -> dict[str, Any]:
    """Describe the device and the versions of the software."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    for package in ("triton", "transformers"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "versions": versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def measure_operators(
    device: str, backends: list[str], bandwidth: float, repeats: int, missing: dict[str, str]
) -> tuple[dict, dict]:
    """Return errors and times of every backend, shape and dtype; unavailable peers are added to `missing`."""
    from operators import SHAPES, check, community_kernel, time_shape

    try:
        community = community_kernel()
    except Exception as error:  # no network, no build for this PyTorch, no kernels package
        community, missing["kernels-community"] = None, f"{type(error).__name__}: {error}".splitlines()[0]

    checks: dict[str, Any] = {}
    for name in backends:
        for kind in ("plain", "fused") if name == "triton" else ("plain",):
            for dtype in DTYPES:
                key = f"{name} {kind} {str(dtype).removeprefix('torch.')}"
                checks[key] = check(name, kind, SHAPES["900 queries 800x1333"], dtype, device)
                print(key, checks[key])
    times = {}
    for shape_name, shape in SHAPES.items():
        times[shape_name] = [
            row for dtype in DTYPES for row in time_shape(shape, dtype, device, backends, bandwidth, repeats, community)
        ]
        for row in times[shape_name]:
            print(shape_name, row)
    return checks, times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs per median (default: %(default)s)")
    parser.add_argument("--kernel", type=Path, help="folder of a built CUDA variant to use instead of building one")
    parser.add_argument("--skip-models", action="store_true", help="time the operator only")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder for the results (default: %(default)s)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This PyTorch finds no GPU, so nothing is measured: run it on a machine with CUDA.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(HERE))
    from measure import copy_bandwidth

    from gdino_hf.model import msda_triton

    device, missing, backends = "cuda", {}, []
    if msda_triton.load() is not None:
        backends.append("triton")
    else:
        missing["triton"] = "Triton does not load: see the log"
    reason = prepare_hub_kernel(args.kernel)
    if reason is None:
        backends.append("hub")
    else:
        missing["hub"] = reason
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        "environment": environment(),
        "copy bandwidth GB/s": round(bandwidth / 1e9, 1),
        "missing": missing,
    }
    report["errors against float64"], report["operator"] = measure_operators(
        device, backends, bandwidth, args.repeats, missing
    )
    if not args.skip_models:
        from models import published_shape, time_models

        report["model"] = []
        for dtype in (torch.float16, torch.bfloat16):
            rows = time_models(published_shape(), dtype, device, backends)
            report["model"] += rows
            for row in rows:
                print(row)
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", report["environment"]["device"].lower()).strip("-")
    target = args.out / f"{name}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
