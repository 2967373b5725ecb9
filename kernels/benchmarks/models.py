"""Whole models and training steps, of this package and of transformers, with random weights of the same shapes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from measure import Rows, alternate, in_one_line
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from gdino_hf import GDinoConfig, GDinoForObjectDetection

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BOXES_PER_IMAGE = 8
# Largest difference of the boxes of replayed and eager runs, in shares of the image; rounding decides ties of queries.
TOLERANCE = 1e-3


def configurations(shape: str) -> tuple[Any, Any]:
    """Configurations of this package's model and of transformers'.

    Args:
        shape: "T" or "B" for the published shapes, or "tiny" for a model of a few layers.
    """
    if shape in ("T", "B"):
        ours = GDinoConfig.preset("tiny" if shape == "T" else "base")
        return ours, GroundingDinoConfig(backbone_config=copy.deepcopy(ours.backbone_config), auxiliary_loss=True)
    from transformers import BertConfig

    parts: dict[str, Any] = {
        "backbone_config": SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
        ),
        "text_config": BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 10,
        "auxiliary_loss": True,
    }
    return GDinoConfig(**copy.deepcopy(parts)), GroundingDinoConfig(**copy.deepcopy(parts))


def make_batch(batch: int, size: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Random images with the prompt "[CLS] cat . remote control . [SEP]" of seven tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[101, 4937, 1012, 6556, 2491, 1012, 102]]).expand(batch, -1).contiguous()
    inputs = {
        "pixel_values": torch.randn(batch, 3, *size, generator=generator).to(dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def ours(shape: str, dtype: torch.dtype, device: str, optimize: bool = False) -> Any:
    """This package's model in evaluation mode; equal weights for equal shapes."""
    torch.manual_seed(0)
    model = GDinoForObjectDetection(configurations(shape)[0]).eval().to(device, dtype)
    return model.optimize_for_inference() if optimize else model


def theirs(shape: str, dtype: torch.dtype, device: str, hub: bool = False) -> Any:
    """transformers' model in evaluation mode, with the Hub's kernel if asked for.

    Raises:
        RuntimeError: The kernel is not in use after loading it.
    """
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(configurations(shape)[1]).eval().to(device, dtype)
    if hub:
        sampler = next(x for x in model.modules() if type(x).__name__ == "MultiScaleDeformableAttention")
        before = getattr(sampler.forward, "__func__", sampler.forward)
        model.set_use_kernels(True)
        if getattr(sampler.forward, "__func__", sampler.forward) is before:
            raise RuntimeError("transformers did not replace the operator by its Hub kernel")
    return model


def forward(model: Any, inputs: dict[str, torch.Tensor], autocast: torch.dtype | None = None) -> Callable[[], Any]:
    """Return a function that runs a forward pass."""
    device = inputs["pixel_values"].device.type

    def run() -> Any:
        with torch.inference_mode(), torch.autocast(device, autocast, enabled=autocast is not None):
            return model(**inputs)

    return run


def variants(shape: str, device: str) -> dict[str, Callable[[], tuple[Any, torch.dtype, Any]]]:
    """Functions that make each model to time, with the dtype of its inputs and that of autocast, by name."""
    half, single = torch.bfloat16, torch.float32
    makers: dict[str, Callable[[], tuple[Any, torch.dtype, Any]]] = {
        "transformers float32": lambda: (theirs(shape, single, device), single, None),
        "transformers bfloat16": lambda: (theirs(shape, half, device), half, None),
        "transformers bfloat16 autocast": lambda: (theirs(shape, single, device), single, half),
        "transformers + Hub kernel float32": lambda: (theirs(shape, single, device, hub=True), single, None),
        "transformers + Hub kernel bfloat16": lambda: (theirs(shape, half, device, hub=True), half, None),
        "gdino_hf float32": lambda: (ours(shape, single, device), single, None),
        "gdino_hf bfloat16": lambda: (ours(shape, half, device), half, None),
        "gdino_hf optimized float32": lambda: (ours(shape, single, device, optimize=True), single, None),
    }
    for name, dtype in HALVES.items():
        makers[f"gdino_hf optimized {name}"] = lambda dtype=dtype: (ours(shape, dtype, device, True), dtype, None)
    return makers


def time_models(
    rows: Rows, shape: str, device: str, batches: tuple[int, ...], size: tuple[int, int], repeats: int
) -> None:
    """Add a row with the times of every variant for each batch size, and one that compares replayed and eager runs."""
    rows.add(f"{shape}, replayed against eager", 10, lambda: compare(shape, device, size))
    models: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, make in variants(shape, device).items():
        try:
            models[name] = make()
        except Exception as error:  # no kernels package, no network, no half precision
            errors[name] = in_one_line(error)

    def times(batch: int) -> dict[str, Any]:
        functions = {
            name: forward(model, make_batch(batch, size, dtype, device), autocast)
            for name, (model, dtype, autocast) in models.items()
        }
        # A graph is recorded in the third call.
        found = alternate(functions, device, repeats, warm_up=4, seconds=max(rows.left() / 2, 1))
        return {"milliseconds": {**found, **errors}}

    for batch in batches:
        rows.add(f"{shape}, {size[0]}x{size[1]}, batch {batch}", 10, lambda batch=batch: times(batch))


def compare(shape: str, device: str, size: tuple[int, int]) -> dict[str, Any]:
    """Compare an optimized model with the eager one on two images, after enough calls to replay.

    Raises:
        RuntimeError: The boxes differ by more than rounding explains.
    """
    eager, optimized = ours(shape, torch.float32, device), ours(shape, torch.float32, device, optimize=True)
    inputs = make_batch(1, size, torch.float32, device)
    for _ in range(4):
        found, expected = forward(optimized, inputs)(), forward(eager, inputs)()
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    found, expected = forward(optimized, inputs)(), forward(eager, inputs)()
    # An untrained model's boxes depend little on the image, so its features are compared as well.
    distance = (found.pred_boxes - expected.pred_boxes).abs().max().item()
    name = "encoder_last_hidden_state_vision"
    features = ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
    stages = optimized.model.fast_stages
    row = {"boxes": distance, "features": features, "graphs": 0 if stages is None else len(stages.cache)}
    if not max(distance, features) < TOLERANCE:
        raise RuntimeError(f"replayed and eager runs differ: {row}")
    if device == "cuda" and row["graphs"] == 0:
        raise RuntimeError("no CUDA graph was recorded: the log says why")
    return row


def time_compiled(rows: Rows, shape: str, device: str, size: tuple[int, int], repeats: int, backend: str) -> None:
    """Add a row for each compiled model, one after the other, because compiling takes most of the time."""
    makers = variants(shape, device)
    names = ["gdino_hf float32", "transformers bfloat16", "gdino_hf bfloat16", "transformers float32"]
    for name in names[:1] if shape == "tiny" else names:

        def times(name: str = name) -> dict[str, Any]:
            model, dtype, autocast = makers[name]()
            torch.compiler.reset()
            compiled = forward(torch.compile(model, backend=backend), make_batch(1, size, dtype, device), autocast)
            return {"milliseconds": {name: alternate({name: compiled}, device, repeats)[name]}}

        rows.add(f"{shape}, {size[0]}x{size[1]}, batch 1, compiled: {name}", 1 if shape == "tiny" else 60, times)


def training_step(model: Any, batch: dict[str, Any], autocast: bool) -> Callable[[], float]:
    """Return a function that runs forward, loss, backward, clipping and AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    device = batch["pixel_values"].device.type

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def time_training(rows: Rows, shape: str, device: str, size: tuple[int, int], repeats: int) -> None:
    """Add rows for a training step on two images, in float32 and under bfloat16 autocast."""
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = make_batch(2, size, torch.float32, device)
    batch["labels"] = []
    for _ in range(2):
        centre = 0.2 + 0.6 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)
        side = 0.05 + 0.3 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)
        classes = torch.randint(0, 2, (BOXES_PER_IMAGE,), generator=generator)
        boxes = torch.cat([centre, side], dim=1)
        batch["labels"].append({"class_labels": classes.to(device), "boxes": boxes.to(device)})

    def times(autocast: bool) -> dict[str, Any]:
        models = {"transformers": theirs(shape, torch.float32, device), "gdino_hf": ours(shape, torch.float32, device)}
        # Denoising queries and auxiliary losses as in transformers, so that both do equal work.
        models["gdino_hf"].config.auxiliary_loss = True
        models["gdino_hf"].config.num_denoising_queries = 0
        steps = {name: training_step(model.train(), batch, autocast) for name, model in models.items()}
        return {"milliseconds": alternate(steps, device, repeats, warm_up=2, seconds=max(rows.left() / 2, 1))}

    for name, autocast in (("float32", False), ("bfloat16 autocast", True)):
        rows.add(f"training step {shape}, {size[0]}x{size[1]}, batch 2, {name}", 10, lambda on=autocast: times(on))
