"""Seeded mutations of a model folder: of its configuration, tokenizer, processor, weights and shard index."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = "[" * 100_000
VALUES: list[Any] = [
    None, True, "", "x", "10", -1, 0, 1, 3, 10**6, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf,
    [], [0], [-1], ["a"], [[[]]], [1] * 50, {}, {"a": 1}, {"model_type": "x"}, "../../etc/passwd",
]  # fmt: skip
TEXTS = ["", "{", "null", "3", '"x"', "[]", "{}", "\0", "\ufeff{}", "{'a': 1}", "NaN", DEEP, '{"a":' * 100_000]


class RunsACommand:
    """A pickle of this class would create a file when it is loaded with code enabled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch gdino-fuzz-pickle-ran",)


def mutate(folder: Path, seed: int) -> str:
    """Change one thing in a model folder.

    Args:
        folder: Folder with config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
            processor_config.json.
        seed: Seed of the change.

    Returns:
        What was changed.
    """
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    return f"{seed} {kind.__name__[1:]}: {kind(folder, rng)}"


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in nested JSON."""
    places = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return places + [place for key, item in items if len(path) < 6 for place in _places(item, (*path, key))]


def _change(content: Any, rng: random.Random, within: tuple[str, ...] = ()) -> str:
    """Remove or replace one value of nested JSON."""
    places = [p for p in _places(content) if not within or p[0] in within]
    # Vocabularies have thousands of entries: draw the depth first, so that the few fields above them get their share.
    depth = rng.choice(sorted({len(place) for place in places}))
    place = rng.choice([place for place in places if len(place) == depth])
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    name = ".".join(map(str, place))
    if rng.random() < 0.2:
        del holder[place[-1]]
        return f"{name} removed"
    holder[place[-1]] = value = rng.choice(VALUES)
    return f"{name} = {str(value)[:40]}"


def _edit(path: Path, rng: random.Random, within: tuple[str, ...] = ()) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    what = _change(content, rng, within)
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{path.name} {what}"


def _config(folder: Path, rng: random.Random) -> str:
    return _edit(folder / "config.json", rng)


def _size(folder: Path, rng: random.Random) -> str:
    """Set one of the sizes to a number that is too large, too small, or not the weights'."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = ("layers", "dim", "size", "num_", "depths", "n_points")
    sizes = [place for place in _places(content) if any(word in f"{place[0]}{place[-1]}" for word in words)]
    place = rng.choice(sizes)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value = rng.choice([10**9, 10**12, 2**31, 5000, 300, 7, 0, -3])
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{'.'.join(map(str, place))} = {value}"


def _tokenizer(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    if rng.random() < 0.2:
        (folder / name).unlink()
        return f"{name} removed"
    return _edit(folder / name, rng)


def _processor(folder: Path, rng: random.Random) -> str:
    path = folder / "processor_config.json"
    if rng.random() < 0.3:
        # As earlier releases of transformers write it.
        content = json.loads(path.read_text(encoding="utf-8"))["image_processor"]
        path.unlink()
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    if rng.random() < 0.3:
        content = json.loads(path.read_text(encoding="utf-8"))
        field = rng.choice(["image_std", "image_mean", "rescale_factor", "size"])
        value = rng.choice(
            [0, [0, 0, 0], [0.2, 0.0, 0.2], [math.nan] * 3, [1.0], -1, [math.inf] * 3, {"shortest_edge": 0}]
        )
        content.get("image_processor", content)[field] = value
        path.write_text(json.dumps(content), encoding="utf-8")
        return f"{path.name} {field} = {value}"
    return _edit(path, rng)


def _text(folder: Path, rng: random.Random) -> str:
    """Replace a whole text file, or damage its bytes."""
    path = folder / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"])
    data = path.read_bytes()
    how = rng.choice(["text", "cut", "flip", "utf-16"])
    if how == "text":
        data = rng.choice(TEXTS).encode()
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "utf-16":
        data = data.decode().encode("utf-16")
    else:
        changed = bytearray(data)
        for _ in range(5):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    path.write_bytes(data)
    return f"{path.name} {how} {data[:20]!r}"


def _weights(folder: Path, rng: random.Random) -> str:
    path = folder / WEIGHTS
    how = rng.choice(["cut", "flip the header", "length", "nan", "missing", "extra", "shape", "dtype", "empty", "few"])
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "length":
        path.write_bytes(struct.pack("<Q", rng.choice([0, 1, 2**40, 2**63, 7])) + data[8:])
    elif how == "flip the header":
        changed = bytearray(data)
        for _ in range(8):
            changed[rng.randrange(8, 4000)] = rng.randrange(256)
        path.write_bytes(bytes(changed))
    else:
        state = load_file(path)
        key = rng.choice(sorted(state))
        tensor = state[key].clone()
        if how == "nan":
            tensor.view(-1)[0] = rng.choice([math.nan, math.inf, -math.inf])
            state[key] = tensor
        elif how == "missing":
            del state[key]
        elif how == "extra":
            state["model.encoder.gate.weight"] = tensor
        elif how == "shape":
            state[key] = torch.zeros(*tensor.shape, 2)
        elif how == "dtype":
            state[key] = tensor.to(rng.choice([torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]))
        else:
            state = {name: state[name] for name in sorted(state)[:3]}
        save_file(state, path, {"format": "pt"})
        return f"{how} {key}"
    return how


def _index(folder: Path, rng: random.Random) -> str:
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    keys = sorted(load_file(folder / "shard.safetensors"))
    whole = dict.fromkeys(keys, "shard.safetensors")
    files: list[Any] = [
        None,
        3,
        "",
        ".",
        "gone.safetensors",
        "config.json",
        "../x.safetensors",
        str(folder.parent / "x"),
    ]
    maps: list[Any] = [None, [], {}, 3, "shard.safetensors", {"a": 3}, {keys[0]: "shard.safetensors"}]
    weight_map = rng.choice([*maps, *({**whole, keys[0]: file} for file in files)])
    text = rng.choice(TEXTS) if rng.random() < 0.3 else json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / INDEX).write_text(text, encoding="utf-8")
    return f"{text[:80]}..."


def _pickle(folder: Path, rng: random.Random) -> str:
    """Replace the weights by a pickle of many kinds."""
    state: Any = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    how = rng.choice(["text", "code", "cut", "integers", "nested", "list", "scalars", "whole", "legacy code"])
    if how == "text":
        path.write_text("a text file, not a checkpoint\n")
    elif how == "legacy code":
        path.write_bytes(pickle.dumps({"a": RunsACommand()}, protocol=2))
    else:
        contents: dict[str, Any] = {
            "code": {**state, "x": RunsACommand()},
            "integers": dict(enumerate(state.values())),
            "nested": {"model": state},
            "list": list(state.values()),
            "scalars": {**state, "step": 3},
        }
        torch.save(contents.get(how, state), path)
        if how == "cut":
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return how


KINDS = (_config, _config, _config, _size, _tokenizer, _processor, _text, _weights, _weights, _index, _pickle)
"""The mutations in turn; those of what is damaged most often come more often."""
