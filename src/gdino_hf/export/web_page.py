"""A static web page around an ONNX file: drop a photograph, type words, see boxes, with nothing sent anywhere.

The page's own sources are in page/. ONNX Runtime and the tokenizer come from npm, see npm_files.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..detection.detection_options import THRESHOLD
from ..detection.loading import load_pair
from ..model.text_prompt import shorten, special_token_ids, split_labels
from ..whole_files import whole_folder
from .exporting import export
from .half_weights import halve_weights
from .npm_files import NpmPackage, npm_files, pinned_packages

SOURCES = Path(__file__).with_name("page")
LABELS = ("cat", "person", "cup")
FACTS = "page_facts.json"
# Some static hosts take no file of more than 25 MiB.
_PART_BYTES = 20 * 2**20
# protobuf cannot write more.
_MOST_BYTES = 2**31 - 1
_MOST_PIXELS = 64_000_000
# Overlap limit of a model whose processor has none.
_OVERLAP = 0.5
_RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
    "webgpu": ("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi"),
}
_FED = {"pixel_values", "pixel_mask", "input_ids", "attention_mask", "token_type_ids"}


def export_web(
    model: Any,
    out: str | Path,
    *,
    npm_folder: str | Path | None = None,
    tell: Callable[[str], Any] | None = None,
    **beginning: Any,
) -> dict[str, int]:
    """Export a model as ONNX and write the page around it.

    Args:
        model: "nano", Hub id or folder.
        out: Folder as for `write_web_page`.
        npm_folder: Folder as for `write_web_page`.
        tell: Function that is called with a line of progress before each step.
        **beginning: What the page begins with: `labels`, `threshold` and `overlap` of `write_web_page`.

    Returns:
        Size in bytes of each file, by its path in the folder.

    Raises:
        ValueError: The model cannot be exported, or `write_web_page` refuses it.
        OSError: The folder cannot be written.
    """
    tell = tell or (lambda line: None)
    loaded, processor = load_pair(str(model))
    # Tracing takes a minute, so what can be refused is refused before.
    _label_text(beginning.get("labels", LABELS))
    _check(processor, Path(out), npm_folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(loaded, Path(scratch) / "onnx", processor=processor, tell=tell)
        tell("writing the page")
        return write_web_page(
            folder / "model.onnx", processor, out, name=shown_name(model), npm_folder=npm_folder, **beginning
        )


def shown_name(model: str | Path) -> str:
    """Return what a page calls a model: a Hub id as it is, and the last part of a path, which is nobody's business."""
    if str(model) == "nano":
        return "gdino-nano"
    return Path(model).resolve().name if Path(model).exists() else str(model)


def write_web_page(
    onnx_file: str | Path,
    processor: Any,
    out: str | Path,
    *,
    name: str,
    labels: Sequence[str] = LABELS,
    threshold: float = THRESHOLD,
    overlap: float | None = None,
    npm_folder: str | Path | None = None,
) -> dict[str, int]:
    """Write a folder that any static host can serve, from any path, and that works offline once it was loaded.

    Args:
        onnx_file: The whole model, with the inputs and outputs that `GDinoForObjectDetection` has.
        processor: The model's `GDinoProcessor`.
        out: The folder. An earlier page there is replaced; a folder that holds anything else is refused.
        name: The model's name on the page.
        labels: Labels that the page begins with; visitors change them as they like.
        threshold: Score threshold that the page begins with, 0..1.
        overlap: Overlap limit that the page begins with, an IoU in 0..1; None takes the processor's `nms_threshold`, or
            0.5 if it has none.
        npm_folder: Folder with the npm packages, see `npm_files`; None takes the cache or asks npm.

    Returns:
        Size in bytes of each file, by its path in the folder.

    Raises:
        ValueError: The folder holds something else, the model or the processor has what the page cannot do, or the npm
            packages cannot be had.
    """
    out = Path(out)
    text = _label_text(labels)
    image, packages = _check(processor, out, npm_folder)
    if overlap is None:
        overlap = _OVERLAP if processor.nms_threshold is None else processor.nms_threshold
    with whole_folder(out) as folder:
        shutil.copytree(SOURCES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        vendored = _copy_packages(packages, folder / "vendor")
        facts = {
            "name": name,
            "labels": text,
            "post": {"threshold": threshold, "overlap": overlap},
            "image": image,
            "text": text_facts(processor),
            "model": _write_model(Path(onnx_file), folder),
            **_write_tokenizer(processor.tokenizer, folder),
            "runtimes": {provider: _runtime(provider, *files, vendored) for provider, files in _RUNTIMES.items()},
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (folder / "licenses.txt").write_text(_licenses(packages), encoding="utf-8")
        _write_list(folder)
        # Some hosts read such a file; for the others, the service worker adds what matters.
        (folder / "_headers").write_text(_HEADERS, encoding="utf-8")
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}


def _label_text(labels: Sequence[str]) -> str:
    """Return labels as the page's field holds them."""
    text = ", ".join(labels)
    if split_labels(text) != list(labels):
        raise ValueError(f"The labels {shorten(text)} hold commas or periods, which separate labels; leave these out.")
    return text


def _check(processor: Any, out: Path, npm_folder: str | Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the image processor's options and the npm packages, or raise if there can be no page."""
    if out.exists() and not (out / FACTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a page written by this command; give another folder.")
    return _image_facts(processor.image_processor), npm_files(npm_folder)


_HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
  Cross-Origin-Resource-Policy: same-origin
"""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size}


def _image_facts(processor: Any) -> dict[str, Any]:
    """Return the options of an image processor that the page applies."""
    if processor.pad_size is not None:
        raise ValueError(f"The processor pads to {processor.pad_size}, which the page does not; set pad_size to None.")
    rescaled, normalized = processor.do_rescale, processor.do_normalize
    return {
        "size": dict(processor.size) if processor.do_resize else None,
        "resample": int(processor.resample),
        "rescale_factor": float(processor.rescale_factor) if rescaled else 1.0,
        "mean": [float(value) for value in processor.image_mean] if normalized else [0.0] * 3,
        "std": [float(value) for value in processor.image_std] if normalized else [1.0] * 3,
        "most_pixels": _MOST_PIXELS,
    }


def text_facts(processor: Any) -> dict[str, Any]:
    """Return what the page needs to build prompts."""
    separators = special_token_ids(processor.tokenizer)
    start, end, period = separators[:3]
    return {
        "max_tokens": processor.max_text_len,
        "start": start,
        "end": end,
        "period": period,
        "separators": separators,
        "unknown": processor.tokenizer.unk_token_id,
    }


def _write_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (Path(scratch) / name).is_file():
                raise ValueError(
                    f"{type(tokenizer).__name__} writes no {name}, which the page reads; use a fast tokenizer."
                )
            shutil.copyfile(Path(scratch) / name, folder / name)
    names = {"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"}
    return {key: [_entry(folder, folder / name)] for key, name in names.items()}


def _write_model(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Write the model in parts that every host takes, and return them in order."""
    import onnx

    model = onnx.load(str(source))
    unknown = sorted({each.name for each in model.graph.input} - _FED)
    if unknown:
        raise ValueError(f"The model has the input {unknown[0]!r}, which the page does not know; export it whole.")
    halve_weights(model)
    if model.ByteSize() > _MOST_BYTES:
        raise ValueError(f"The model has {model.ByteSize() / 1e9:.1f} GB and a page takes 2.1; export a smaller one.")
    content = model.SerializeToString()
    parts = []
    for number, start in enumerate(range(0, len(content), _PART_BYTES)):
        part = folder / f"model.onnx.{number:03d}"
        part.write_bytes(content[start : start + _PART_BYTES])
        parts.append(_entry(folder, part))
    return parts


def _copy_packages(packages: dict[str, dict[str, Path]], vendor: Path) -> dict[str, Path]:
    vendor.mkdir()
    copied = {}
    for files in packages.values():
        for path in files.values():
            if path.suffix in (".mjs", ".wasm"):
                copied[path.name] = Path(shutil.copyfile(path, vendor / path.name))
    return copied


def _runtime(provider: str, script: str, stem: str, vendored: dict[str, Path]) -> dict[str, Any]:
    wasm = vendored[f"{stem}.wasm"]
    return {
        "provider": provider,
        "script": vendored[script].name,
        "glue": vendored[f"{stem}.mjs"].name,
        "wasm": [_entry(wasm.parents[1], wasm)],
    }


def _write_list(folder: Path) -> None:
    """List the files for the service worker, with a version that changes when any of them does."""
    digest = hashlib.sha256()
    # Hosts take _headers away and may refuse to serve it.
    files = [path for path in _files(folder) if path.name != "_headers"]
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    names = json.dumps([path.relative_to(folder).as_posix() for path in files], indent=1)
    text = f'"use strict";\nself.VERSION = "{digest.hexdigest()[:16]}";\nself.FILES = {names};\n'
    (folder / "files.js").write_text(text, encoding="utf-8")


def _licenses(packages: dict[str, dict[str, Path]]) -> str:
    """Return the licences of what the page holds."""
    pins = pinned_packages()
    lines = [_line(pin) for pin in pins]
    apache = next(path for files in packages.values() for path in files.values() if path.name == "LICENSE")
    return "\n".join(
        [
            "The page itself: gdino-hf, Apache-2.0. The model's licence is in its card.",
            *lines,
            "",
            "ONNX Runtime is under the MIT License:",
            "",
            _MIT,
            "tokenizers.js and gdino-hf are under the Apache License 2.0:",
            "",
            apache.read_text(encoding="utf-8"),
        ]
    )


def _line(pin: NpmPackage) -> str:
    return f"{pin.name} {pin.version}, {pin.license}, {pin.home}"


_MIT = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
