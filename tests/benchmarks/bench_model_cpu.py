"""Time the whole forward, and forward with backward, against transformers on a CPU.

    python tests/benchmarks/bench_model_cpu.py [--size 800 1066] [--dtype bfloat16|int8] [--optimize] [--train]

Both load the same random weights of Grounding DINO-T's shape, and their runs alternate in one process. Besides medians
of wall time, the process's CPU time is printed, which other work on the machine distorts less. `--busy N` makes such
work: N endless loops run beside both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from gdino_hf import GDinoForObjectDetection

# The loop ends with this process, also if it is killed.
BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
PROMPT = [101, 4937, 1012, 6556, 2491, 1012, 102]  # "cat. remote control."


def tiny_swin_config():
    """Grounding DINO-T: Swin-T, BERT base, six layers each."""
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        image_size=224,
        out_features=["stage2", "stage3", "stage4"],
    )
    return GroundingDinoConfig(backbone_config=backbone)


def make_models(folder, dtype):
    """Models of transformers and of this package with the same random weights, all of which affect the outputs."""
    torch.manual_seed(0)
    peer = GroundingDinoForObjectDetection(tiny_swin_config()).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
        for layer in peer.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.1)
            layer.fusion_layer.text_param.fill_(0.1)
    peer.save_pretrained(folder)
    ours = GDinoForObjectDetection.from_pretrained(folder, dtype=dtype).eval()
    return peer, ours


def make_inputs(batch, height, width):
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([PROMPT]).repeat(batch, 1)
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def alternate(repeats, **functions):
    """Run the functions in alternation after a warm-up.

    Returns:
        Medians of their wall and CPU seconds, and what each returned in the warm-up.
    """
    wall = {name: [] for name in functions}
    cpu = {name: [] for name in functions}
    returned = {name: function() for name, function in functions.items()}
    for _ in range(repeats):
        for name, function in functions.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            function()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    seconds = {
        name: {"wall": statistics.median(wall[name]), "best": min(wall[name]), "cpu": statistics.median(cpu[name])}
        for name in functions
    }
    return seconds, returned


def compare_outputs(ours, theirs, height, width):
    """Return the largest difference of logits and boxes, and the fraction of boxes that differ by at most a pixel."""
    finite = torch.isfinite(theirs.logits)
    pixels = torch.tensor([width, height, width, height])
    boxes = (ours.pred_boxes.float() - theirs.pred_boxes.float()).abs()
    return {
        "logits": (ours.logits[finite].float() - theirs.logits[finite].float()).abs().max().item(),
        "boxes": boxes.max().item(),
        "within_a_pixel": ((boxes * pixels).amax(-1) <= 1).float().mean().item(),
    }


def bench_forward(args, peer, ours):
    inputs = make_inputs(args.batch, *args.size)
    autocast = torch.autocast("cpu", torch.bfloat16)

    def peer_float32():
        with torch.inference_mode():
            return peer(**inputs)

    def peer_autocast():
        with torch.inference_mode(), autocast:
            return peer(**inputs)

    def ours_run():
        with torch.inference_mode():
            return ours(**inputs)

    functions = {"transformers float32": peer_float32, f"gdino_hf {args.dtype}": ours_run}
    if args.dtype == "bfloat16":
        functions["transformers bfloat16 autocast"] = peer_autocast
    seconds, outputs = alternate(args.repeats, **functions)
    ours, theirs = outputs[f"gdino_hf {args.dtype}"], outputs["transformers float32"]
    return {"difference": compare_outputs(ours, theirs, *args.size), "seconds": seconds}


def bench_training(args, peer, ours):
    """Time forward and backward of a simple function of the outputs, since the models' own losses differ by design."""
    inputs = make_inputs(args.batch, *args.size)

    def step(model):
        def run():
            outputs = model(**inputs)
            finite = torch.isfinite(outputs.logits)
            (outputs.logits[finite].square().mean() + outputs.pred_boxes.sum()).backward()
            model.zero_grad(set_to_none=True)

        return run

    seconds, _ = alternate(args.repeats, **{"transformers float32": step(peer), "gdino_hf float32": step(ours)})
    return {"seconds": seconds}


def peak_memory(args, folder, which):
    """Measure the peak resident memory of a training step in GB, in a separate process."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_memory, args=(args, folder, which, queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def _measure_memory(args, folder, which, queue):
    torch.set_num_threads(args.threads)
    model_class = GroundingDinoForObjectDetection if which == "transformers float32" else GDinoForObjectDetection
    model = model_class.from_pretrained(folder).eval()
    inputs = make_inputs(args.batch, *args.size)
    for _ in range(2):
        outputs = model(**inputs)
        finite = torch.isfinite(outputs.logits)
        (outputs.logits[finite].square().mean() + outputs.pred_boxes.sum()).backward()
        model.zero_grad(set_to_none=True)
    # getrusage would report the peak of the parent process if that is higher.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    queue.put(int(line.split()[1]) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--optimize", action="store_true", help="call optimize_for_inference() before timing")
    parser.add_argument(
        "--train", action="store_true", help="time forward and backward (default size 480x640, batch 2)"
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="endless Python loops to run beside")
    parser.add_argument("--json", help="write the report to this file")
    args = parser.parse_args()
    args.size = args.size or ((480, 640) if args.train else (800, 1066))
    args.batch = args.batch or (2 if args.train else 1)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        int8 = args.dtype == "int8"
        peer, ours = make_models(folder, "float32" if int8 else args.dtype)
        if args.optimize or int8:
            ours.optimize_for_inference(int8=True if int8 else None)
        with ExitStack() as loops:
            for _ in range(args.busy):
                process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP])
                loops.callback(process.wait)
                loops.callback(process.kill)
            report = (bench_training if args.train else bench_forward)(args, peer, ours)
        if args.train:
            report["peak_gigabytes"] = {name: peak_memory(args, folder, name) for name in report["seconds"]}
    arguments = {
        "size": args.size,
        "batch": args.batch,
        "threads": args.threads,
        "repeats": args.repeats,
        "busy": args.busy,
    }
    report = {**arguments, **report}
    baseline = report["seconds"]["transformers float32"]
    beside = f", beside {args.busy} busy processes" if args.busy else ""
    print(
        f"{args.size[0]}x{args.size[1]}, batch {args.batch}, {args.threads} threads, medians of {args.repeats}{beside}"
    )
    for name, seconds in report["seconds"].items():
        print(
            f"{name:32} wall {seconds['wall']:7.3f} s ({baseline['wall'] / seconds['wall']:5.2f}x)   best "
            f"{seconds['best']:7.3f} s   cpu {seconds['cpu']:7.3f} s ({baseline['cpu'] / seconds['cpu']:5.2f}x)"
        )
    for name in ("difference", "peak_gigabytes"):
        if name in report:
            print(name, {key: f"{value:.3g}" for key, value in report[name].items()})
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
