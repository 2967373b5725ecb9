"""Time training steps against transformers' own model, and measure peak memory with gradient checkpointing.

    python tests/benchmarks/bench_training.py [--size 480 640] [--batch 2] [--repeats 5] [--json FILE]

Both load the same random weights of Grounding DINO-T and train on one batch of random pixels with boxes. A step is
forward, loss, backward, gradient clipping and AdamW. Each model has a process of its own, as in a real training, and
their steps alternate, so that other work on the machine affects both. The ratio is that of CPU seconds, user and
system together, which other processes disturb less than the clock. This package's model trains as in GDinoTrainer:
`prepare_for_training` and `kept_memory`; --plain leaves both out.

To compare equal work, transformers' auxiliary losses are on and denoising queries, which only this package has, are off
(--denoising turns them on). `--small` uses a smaller model for machines with little memory.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from gdino_hf import GDinoForObjectDetection
from gdino_hf.training.kept_memory import kept_memory
from gdino_hf.training.prepare import prepare_for_training

PROMPT = [101, 4937, 1012, 6556, 2491, 1012, 102]  # "cat. remote control."
BOXES_PER_IMAGE = 8


def peer_config(small):
    """Configuration of Grounding DINO-T, or of a model with about a quarter of its size."""
    backbone = SwinConfig(
        embed_dim=48 if small else 96,
        depths=[2, 2, 2, 2] if small else [2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage2", "stage3", "stage4"],
    )
    layers = {"encoder_layers": 2, "decoder_layers": 2} if small else {}
    return GroundingDinoConfig(backbone_config=backbone, auxiliary_loss=True, **layers)


def save_weights(folder, small):
    """Save random weights, all of which affect the outputs."""
    torch.manual_seed(0)
    peer = GroundingDinoForObjectDetection(peer_config(small))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    peer.save_pretrained(folder)


def load(which, folder, denoising):
    """Load the model of transformers or of this package in training mode."""
    if which == "transformers":
        return GroundingDinoForObjectDetection.from_pretrained(folder).train()
    model = GDinoForObjectDetection.from_pretrained(folder)
    model.config.auxiliary_loss = True
    model.config.num_denoising_queries = denoising
    return model.train()


def make_batch(batch, height, width):
    """Inputs and labels in the form that both models take."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([PROMPT]).repeat(batch, 1)
    labels = []
    for _ in range(batch):
        centre = 0.2 + 0.6 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)
        side = 0.05 + 0.3 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)
        classes = torch.randint(0, 2, (BOXES_PER_IMAGE,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centre, side], dim=1)})
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": labels,
    }


def make_step(model, batch):
    """Return a function that runs a whole training step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step():
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Contender:
    """A model that trains in a process of its own, one step at a time.

    Args:
        args: Arguments of the command.
        folder: Folder of the weights.
        which: "transformers" or "gdino_hf".
        checkpointing: Whether to use gradient checkpointing.
    """

    def __init__(self, args, folder, which, checkpointing=False):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_contend, args=(other, args, folder, which, checkpointing), daemon=True)
        self.process.start()

    def step(self):
        """Run a step and return its CPU and wall seconds, and the resident memory in GB: peak and before the steps."""
        self.pipe.send("step")
        return self.pipe.recv()

    def end(self):
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def _contend(pipe, args, folder, which, checkpointing):
    torch.set_num_threads(args.threads)
    model = load(which, folder, args.denoising)
    if checkpointing:
        model.gradient_checkpointing_enable()
    fast = which == "gdino_hf" and not args.plain
    if fast:
        prepare_for_training(model)
    step = make_step(model, make_batch(args.batch, *args.size))
    loaded = _resident("VmRSS")
    # Resets the peak that /proc reports, so that loading does not count; getrusage would include the parent process.
    Path("/proc/self/clear_refs").write_text("5")
    with kept_memory() if fast else nullcontext():
        while pipe.recv() is not None:
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            pipe.send({**seconds, "peak": _resident("VmHWM"), "loaded": loaded})


def alternate(repeats, contenders):
    """Let the models take steps in turn after a first one each; return all but the first, by name."""
    for contender in contenders.values():
        contender.step()
    rounds = [{name: contender.step() for name, contender in contenders.items()} for _ in range(repeats)]
    return {name: [step[name] for step in rounds] for name in contenders}


def _resident(field):
    """Read a memory field of /proc for this process, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--denoising", type=int, default=0, help="number of denoising queries of this package's model (default: 0)"
    )
    parser.add_argument("--small", action="store_true", help="use a model of about a quarter of the size")
    parser.add_argument("--plain", action="store_true", help="train this package's model without preparation")
    parser.add_argument("--json", help="write the report to this file")
    args = parser.parse_args()
    report = {"size": list(args.size), "batch": args.batch, "threads": args.threads, "small": args.small}
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, args.small)
        contenders = {which: Contender(args, folder, which) for which in ("transformers", "gdino_hf")}
        steps = alternate(args.repeats, contenders)
        for contender in contenders.values():
            contender.end()
        saving = Contender(args, folder, "gdino_hf", checkpointing=True)
        steps["gdino_hf, gradient checkpointing"] = alternate(1, {"": saving})[""]
        saving.end()
    for name, values in steps.items():
        figures = {key: statistics.median(step[key] for step in values) for key in ("cpu", "wall", "loaded")}
        report[name] = {**figures, "peak": max(step["peak"] for step in values)}
    # Disturbances last longer than a step, so neighbouring steps are compared.
    ratios = [
        theirs["cpu"] / ours["cpu"] for theirs, ours in zip(steps["transformers"], steps["gdino_hf"], strict=True)
    ]
    report["ratio"] = statistics.median(ratios)
    for name in steps:
        values = report[name]
        print(
            f"{name:34} {values['cpu']:7.2f} CPU seconds a step, {values['wall']:7.2f} by the clock; "
            f"{values['peak']:5.2f} GB at most, {values['loaded']:.2f} GB before the first step"
        )
    print(f"gdino_hf makes {report['ratio']:.2f} times the steps (from {min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
