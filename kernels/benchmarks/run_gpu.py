"""Check and time everything on a GPU within a time budget, and write <device>.json and <device>.md.

    python kernels/benchmarks/run_gpu.py [--seconds 480] [--parts checks operator ...] [--out FOLDER]
    python kernels/benchmarks/run_gpu.py --device cpu --tiny      # the whole script with small shapes, without a GPU

Parts, in this order: `checks` compares output and gradients of every backend of deformable attention with float64 in
each dtype; `operator` times them; `models` times Grounding DINO T and B; `training` times a training step; `compiled`
times compiled models. Each part runs in a process of its own, so that one which crashes or hangs does not stop the
others. What is skipped or fails is written with its reason.

It needs torch with CUDA and transformers. The project's CUDA kernel is built if there is nvcc, or taken from --kernel.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Seconds that must be left to begin a part, and the most that it may take.
PARTS = {"checks": (15, 70), "operator": (15, 60), "models": (30, 160), "training": (20, 70), "compiled": (60, 240)}
# batch, levels, heads, channels per head, points, queries
TINY = 1, [(6, 8), (3, 4)], 2, 16, 2, None
_TIDYING = 4


def environment(device: str) -> dict[str, Any]:
    """Describe the device and the versions of the software."""
    versions: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "transformers", "accelerate", "kernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    described = {"device": platform.processor() or platform.machine(), "versions": versions}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            driver = None
        described |= {
            "device": properties.name,
            "driver": driver,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    precision = torch.get_float32_matmul_precision()
    return {**described, "float32 products": precision, "date": datetime.now(timezone.utc).date().isoformat()}


def prepare_hub_kernel(folder: Path | None) -> str | None:
    """Point GDINO_MSDA_HUB at a built CUDA kernel, building it if none is given; return why not, or None on success."""
    try:
        if folder is None:
            if shutil.which("nvcc") is None:
                return "there is no nvcc to build it, and --kernel names no built one"
            sys.path.insert(0, str(HERE.parent / "msda"))
            from build_local import build

            architecture = "".join(map(str, torch.cuda.get_device_capability()))
            folder = build("cuda", [architecture], HERE.parent / "msda" / "build")
        os.environ["GDINO_MSDA_HUB"] = str(folder)
        from gdino_hf.model import msda_hub

        return None if msda_hub.load() is not None else "the built kernel does not load: see the log"
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process; its rows go to args.rows."""
    sys.path.insert(0, str(HERE))
    import models
    import operators
    from measure import Rows, copy_bandwidth

    device, rows = args.device, Rows(args.rows, args.part, args.seconds - _TIDYING)
    size = (96, 128) if args.tiny else (800, 1066)
    shapes = ["tiny"] if args.tiny else ["T", "B"]
    if args.part in ("checks", "operator"):
        backends = ["c"] if device == "cpu" else ["triton"]
        reason = "it needs a GPU" if device == "cpu" else prepare_hub_kernel(args.kernel)
        if reason is None:
            backends.append("hub")
        elif args.part == "checks":
            rows.add("hub kernel of this project", 0, lambda: {"skipped": reason})
    if args.part == "checks":
        shape = TINY if args.tiny else operators.SHAPES["900 queries 800x1333"]
        for name in ["torch", *backends]:
            for kind in ("plain", "fused"):
                for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
                    label = f"{name} {kind} {str(dtype).removeprefix('torch.')}"

                    def check(name: str = name, kind: str = kind, dtype: torch.dtype = dtype) -> dict[str, Any]:
                        return {"errors": operators.check(name, kind, shape, dtype, device)}

                    rows.add(label, 1, check)
    elif args.part == "operator":
        bandwidth = copy_bandwidth(device, 2**20 if args.tiny else 2**30)
        community = None
        try:
            community = operators.community_kernel() if device == "cuda" else None
        except Exception as error:  # no network, no build for this PyTorch, no kernels package
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.add("kernels-community", 0, lambda: {"skipped": reason})
        for name, shape in {"tiny": TINY}.items() if args.tiny else operators.SHAPES.items():
            for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
                for backward in (False, True):

                    def measure(
                        shape: tuple = shape, dtype: torch.dtype = dtype, backward: bool = backward
                    ) -> dict[str, Any]:
                        return operators.time_shape(
                            shape, dtype, device, backends, bandwidth, args.repeats, community, backward
                        )

                    passes = "forward and backward" if backward else "forward"
                    rows.add(f"{name}, {str(dtype).removeprefix('torch.')}, {passes}", 1, measure)
        rows.add("copy", 0, lambda: {"gigabytes per second": round(bandwidth / 1e9, 1)})
    elif args.part == "models":
        for shape in shapes:
            models.time_models(rows, shape, device, (1, 2) if args.tiny else (1, 8), size, args.repeats)
    elif args.part == "training":
        models.time_training(rows, shapes[0], device, size if args.tiny else (480, 640), args.repeats)
    else:
        models.time_compiled(rows, shapes[0], device, size, args.repeats, "eager" if args.tiny else "inductor")


def start_part(part: str, args: argparse.Namespace, seconds: float, file: Path) -> list[dict[str, Any]]:
    """Run a part in a process of its own and return its rows."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--rows", str(file)]
    command += ["--seconds", str(seconds), "--device", args.device, "--repeats", str(args.repeats)]
    command += ["--tiny"] * args.tiny + (["--kernel", str(args.kernel)] if args.kernel else [])
    ended = None
    try:
        code = subprocess.run(command, timeout=seconds).returncode
        ended = f"the process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return rows + ([{"part": part, "name": "the rest of this part", "failed": ended}] if ended else [])


def as_markdown(report: dict[str, Any]) -> str:
    """Write the report as a page of tables."""
    about = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"# {about['device']}", "", f"{about['date']}; driver {about.get('driver')}; {versions}", ""]
    lines += [f"{report['seconds']:.0f} s in all. Times are medians in milliseconds of alternating runs.", ""]
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        lines += [f"## {part}", "", "| what | result |", "|---|---|"]
        for row in report["rows"]:
            if row["part"] != part:
                continue
            results = [f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row]
            for name, value in row.get("milliseconds", {}).items():
                results.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
            results += [f"{name} {value:.1e}" for name, value in row.get("errors", {}).items()]
            others = ("graphs", "boxes", "features", "copy limit", "gigabytes per second")
            results += [f"{name} {row[name]:.3g}" for name in others if name in row]
            lines.append(f"| {row['name']} | {'<br>'.join(results).replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="time for everything (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs per median (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the script")
    parser.add_argument("--kernel", type=Path, help="folder of a built CUDA variant to use instead of building one")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for results (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("This PyTorch finds no GPU, so nothing is measured: run it on a machine with CUDA.", file=sys.stderr)
        return 2
    if args.part:
        run_part(args)
        return 0
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": environment(args.device), "seconds": 0.0, "rows": []}
    name = re.sub(r"[^a-z0-9]+", "-", report["environment"]["device"].lower()).strip("-") + ("-tiny" * args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            needs, most = (0, args.seconds) if args.tiny else PARTS[part]
            left = args.seconds - (time.monotonic() - start) - _TIDYING
            if left < max(needs, 1):
                report["rows"].append({"part": part, "name": "all", "skipped": f"{max(left, 0):.0f} s are left"})
            else:
                report["rows"] += start_part(part, args, min(most, left), Path(folder) / part)
            report["seconds"] = round(time.monotonic() - start, 1)
            # Written after every part, so that an interrupted run leaves what it has.
            (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (args.out / f"{name}.md").write_text(as_markdown(report), encoding="utf-8")
    print(args.out / f"{name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
