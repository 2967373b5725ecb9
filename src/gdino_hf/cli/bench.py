"""Time a model stage by stage, alone or against transformers' Grounding DINO; write one JSON file."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.whole_files import write_whole_text

from .errors import UsageError
from .inputs import read_labels
from .model_options import add_dtype, load_detector
from .numbers import positive

HELP = "time a model stage by stage, alone or against transformers"
STAGES = ("image features", "text features", "encoder", "decoder", "selection and heads", "post-processing")
_EXPORTED_STAGES = ("text features", "image and prompt", "post-processing")
_SHAPE, _SHAPE_SIZE = "random", (800, 1066)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument(
        "--model",
        default="nano",
        help="Hub id, folder, nano, or random: Grounding DINO-T with random weights (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the network's input in pixels (default: the model's own; 800 1066 for random)",
    )
    parser.add_argument("--batch", type=positive, default=1, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--labels", default="cat, remote control", help="labels, written as for gdino detect (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--repeats", type=positive, default=5, help="number of runs, of which the median is reported (default: 5)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="skip optimize_for_inference(), which is otherwise called on a CPU"
    )
    parser.add_argument(
        "--against",
        choices=("transformers",),
        help="also time this implementation in float32, alternating with ours in one process",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the report (default: none)")


def run(args: argparse.Namespace) -> int:
    """Time the model and print the report; return 0.

    The JSON has the settings; "stages" and "total", each with "milliseconds" (median) and "images_per_second"; and with
    --against also "against": seconds of all sides, "ratio", and differences of logits and boxes.

    Raises:
        UsageError: The model, the device, a label or --against cannot be used, or the report cannot be written.
    """
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    labels = read_labels(args.labels)
    with _folder(args.model) as where:
        if args.against:
            _check_peer(where)
        bench = _Bench(args, labels, where)
        report = bench.report()
        print(_table(report))
        if args.against:
            report["against"] = bench.compare(args.repeats)
            print(_ratios(report["against"]))
    if args.json:
        try:
            write_whole_text(args.json, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--json {args.json} cannot be written ({reason(error)}); choose another file") from error
    return 0


@contextmanager
def _folder(model: str) -> Iterator[str]:
    """Yield the id or folder of the model to load; random weights live in a temporary folder."""
    if model != _SHAPE:
        yield model
        return
    from gdino_hf import NANO, GDinoProcessor

    with tempfile.TemporaryDirectory() as folder:
        _random_model().save_pretrained(folder)
        # gdino-nano has BERT's vocabulary, as Grounding DINO does.
        GDinoProcessor.from_pretrained(NANO).save_pretrained(folder)
        yield folder


def _random_model() -> Any:
    """Make transformers' Grounding DINO-T with random weights, none of them zero, so that errors cannot hide."""
    import torch
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    backbone = SwinConfig(window_size=7, out_features=["stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


class _Bench:
    """A loaded model with its inputs."""

    def __init__(self, args: argparse.Namespace, labels: list[str], where: str) -> None:
        import torch

        self.args = args
        ours = load_detector(where, labels, device=args.device, dtype=args.dtype, optimize=not args.plain)
        self.where, self.model, self.processor, self.device = where, ours.model, ours.processor, ours.device
        self.optimized = ours.optimized
        # A folder that `gdino export` wrote: its graphs are one stage each, computed by another runtime.
        self.exported = getattr(self.model, "folder", None)
        size = args.size or (_SHAPE_SIZE if args.model == _SHAPE else self._own_size())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(args.batch, 3, *size, generator=generator)
        self.text = self.processor(text=[labels] * args.batch)
        if any(len(prompt.chunks) > 1 for prompt in self.text.prompts):
            raise UsageError("--labels need more than one prompt; give fewer labels to time one forward")
        self.inputs = {
            "pixel_values": pixels.to(self.device),
            **{name: self.text[name].to(self.device) for name in ("input_ids", "attention_mask")},
        }
        self.size = list(size)

    def _own_size(self) -> tuple[int, int]:
        size = self.processor.image_processor.size
        short = size.get("shortest_edge") or size.get("height")
        return short, min(size.get("longest_edge") or size.get("width"), short * 4 // 3)

    def report(self) -> dict[str, Any]:
        """Return the settings and the median time of every stage."""
        import torch

        runs = [self._run_once() for _ in range(self.args.repeats + 1)][1:]
        names = _EXPORTED_STAGES if self.exported else STAGES
        stages = {name: statistics.median(run[name] for run in runs) for name in names}
        # The median of whole runs: a prompt that optimize_for_inference has cached costs nothing from the second run.
        total = statistics.median(sum(run.values()) for run in runs)
        return {
            "model": self.args.model,
            "device": _describe(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": self.args.dtype,
            "size": self.size,
            "batch": self.args.batch,
            "tokens": self.inputs["input_ids"].shape[1],
            "optimized": self.optimized,
            "deformable_attention": self.exported.format if self.exported else self._backend(),
            "repeats": self.args.repeats,
            "stages": {name: self._figures(seconds) for name, seconds in stages.items()},
            "total": self._figures(total),
        }

    def _backend(self) -> str:
        """Return the backend of deformable attention: c, triton, hub or torch."""
        import torch

        from gdino_hf.model.msda_backends import backend_for

        config = self.model.config
        if config.disable_custom_kernels:
            return "torch"
        heads = config.encoder_attention_heads
        value = torch.empty(1, 1, heads, config.d_model // heads, dtype=self.model.dtype, device=self.device)
        locations = torch.empty(1, 1, heads, config.num_feature_levels, config.encoder_n_points, 2, device=self.device)
        return backend_for(value, locations)

    def _figures(self, seconds: float) -> dict[str, float]:
        return {"milliseconds": 1e3 * seconds, "images_per_second": self.args.batch / max(seconds, 1e-9)}

    def _run_once(self) -> dict[str, float]:
        """Return the seconds of each stage of one run."""
        import torch

        clock = _Clock(self.device)
        if self.exported:
            return self._run_exported(clock)
        core = self.model.model
        hooks = []
        for name in ("encoder", "decoder"):
            part = getattr(core, name)
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: clock.start(name)))
            hooks.append(part.register_forward_hook(lambda *_, name=name: clock.stop(name)))
        try:
            with torch.inference_mode():
                clock.start("image features")
                images = self.model.get_image_features(self.inputs["pixel_values"])
                clock.stop("image features")
                clock.start("text features")
                texts = self.model.get_text_features(self.inputs["input_ids"], self.inputs["attention_mask"])
                clock.stop("text features")
                clock.start("forward")
                outputs = self.model(image_features=images, text_features=texts)
                clock.stop("forward")
                self._post_process(clock, outputs)
        finally:
            for hook in hooks:
                hook.remove()
        seconds = clock.seconds
        seconds["selection and heads"] = seconds.pop("forward") - seconds["encoder"] - seconds["decoder"]
        return seconds

    def _run_exported(self, clock: _Clock) -> dict[str, float]:
        """Return the seconds of each stage of one run of an exported model."""
        tokens, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        images = self.model.get_image_features(self.inputs["pixel_values"])
        clock.start("text features")
        texts = self.model.get_text_features(tokens, mask)
        clock.stop("text features")
        texts.input_ids, texts.attention_mask = tokens, mask
        clock.start("image and prompt")
        outputs = self.model(image_features=images, text_features=texts)
        clock.stop("image and prompt")
        self._post_process(clock, outputs)
        return clock.seconds

    def _post_process(self, clock: _Clock, outputs: Any) -> None:
        clock.start("post-processing")
        self.processor.post_process_grounded_object_detection(
            outputs, self.text, threshold=0.3, target_sizes=[tuple(self.size)] * self.args.batch
        )
        clock.stop("post-processing")

    def compare(self, repeats: int) -> dict[str, Any]:
        """Time both models alternately and measure how far their outputs differ."""
        import torch

        peer = _peer(self.where).to(self.device).eval()
        mine = _Side(self.device, self.model, self.inputs)
        sides = {"transformers float32": _Side(self.device, peer, self.inputs)}
        if self.args.dtype in ("bfloat16", "float16"):
            dtype = getattr(torch, self.args.dtype)
            autocast = torch.autocast(self.device.type, dtype)
            sides[f"transformers {self.args.dtype} autocast"] = _Side(self.device, peer, self.inputs, autocast)
        sides[f"gdino_hf {self.args.dtype}"] = mine
        theirs, ours = next(iter(sides.values()))(), mine()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()
        for _ in range(repeats):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        fastest = medians[f"gdino_hf {self.args.dtype}"]
        return {
            "seconds": medians,
            "ratio": {name: value / fastest for name, value in medians.items()},
            **_apart(ours, theirs, self.size),
        }


class _Side:
    """One model's forward pass, including the work it starts on the device."""

    def __init__(self, device: Any, model: Any, inputs: dict, context: AbstractContextManager | None = None) -> None:
        self.device, self.model, self.inputs, self.context = device, model, inputs, context or nullcontext()

    def __call__(self) -> Any:
        import torch

        with torch.inference_mode(), self.context:
            outputs = self.model(**self.inputs)
        _wait(self.device)
        return outputs


class _Clock:
    """Named stopwatches that wait for the device before they are read."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def start(self, name: str) -> None:
        _wait(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) - time.perf_counter()

    def stop(self, name: str) -> None:
        _wait(self.device)
        self.seconds[name] += time.perf_counter()


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_peer(where: str) -> None:
    """Refuse a checkpoint that transformers cannot run before spending minutes on timing ours."""
    from transformers import AutoConfig

    from gdino_hf import GDinoConfig

    try:
        kind = GDinoConfig.model_type if where == "nano" else AutoConfig.from_pretrained(where).model_type
    except (OSError, ValueError):
        return  # loading the model will report what is wrong
    if kind not in ("grounding-dino", "mm-grounding-dino"):
        raise UsageError(
            f"--against transformers needs a checkpoint that transformers reads, not one of type {kind}; give one of "
            f"Grounding DINO, or --model {_SHAPE}"
        )


def _peer(where: str) -> Any:
    from transformers import AutoModelForZeroShotObjectDetection

    return AutoModelForZeroShotObjectDetection.from_pretrained(where)


def _apart(ours: Any, theirs: Any, size: list[int]) -> dict[str, float]:
    """Measure differences over queries that both models rank equally; rounding swaps queries of nearly equal score."""
    import torch

    same = (ours.init_reference_points.float() - theirs.init_reference_points.float()).abs().amax(-1) < 1e-3
    finite = torch.isfinite(theirs.logits) & same[..., None]
    height, width = size
    boxes = (ours.pred_boxes.float() - theirs.pred_boxes.float()).abs()
    pixels = boxes * torch.tensor([width, height, width, height], device=boxes.device)
    vision = ours.encoder_last_hidden_state_vision.float() - theirs.encoder_last_hidden_state_vision.float()
    return {
        "same_queries": same.float().mean().item(),
        "largest_feature_difference": vision.abs().max().item(),
        "median_logit_difference": (ours.logits[finite].float() - theirs.logits[finite].float()).abs().median().item(),
        "median_box_difference": boxes[same].median().item(),
        "boxes_within_a_pixel": (pixels[same].amax(-1) <= 1).float().mean().item(),
    }


def _describe(device: Any) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def _table(report: dict[str, Any]) -> str:
    rows = [*report["stages"].items(), ("total", report["total"])]
    height, width = report["size"]
    head = (
        f"{report['model']}, {report['device']}, {report['dtype']}, {height}x{width}, batch {report['batch']}, "
        f"{report['tokens']} tokens, {report['threads']} threads, deformable attention in "
        f"{report['deformable_attention']}, medians of {report['repeats']}"
    )
    lines = [f"{name:22}{x['milliseconds']:12.1f} ms{x['images_per_second']:12.2f} images/s" for name, x in rows]
    return "\n".join([head, *lines])


def _ratios(against: dict[str, Any]) -> str:
    lines = [
        f"{name:34}{seconds:9.3f} s   {against['ratio'][name]:6.2f} times ours"
        for name, seconds in against["seconds"].items()
    ]
    rest = [f"{name.replace('_', ' ')}: {value:.3g}" for name, value in against.items() if isinstance(value, float)]
    return "\n".join(["", *lines, *rest])
