"""README.md of an exported folder: what is in it, how large it is, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..detection.graph_sessions import TORCH_FREE

_VARIANTS = {
    "whole": "one graph from pixels and tokens to boxes",
    "split": "one graph for the text, encoded once for any number of images, and one for the image",
    "baked": "one graph for a fixed vocabulary, without a text encoder",
}
_MOST_LABELS = 20


def card(content: Mapping[str, Any]) -> str:
    """Return the card of a folder.

    Args:
        content: What gdino_export.json holds.
    """
    runtime = content["runtime"]
    opset = f", operators of version {content['opset']}" if content["opset"] else ""
    lines = [
        "# Grounding DINO, exported",
        "",
        f"- Format: {content['format']}{opset}, {content['precision']}",
        f"- Variant: {content['variant']}, {_VARIANTS[content['variant']]}",
        f"- Runs on: {runtime['name']} {runtime['least_version']} or later",
        f"- Written by: gdino-hf {content['gdino_hf_version']}",
    ]
    if content["labels"]:
        names = content["labels"]["names"]
        more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
        lines.append(f"- Labels: {', '.join(names[:_MOST_LABELS])}{more}")
    lines += ["", "| file | bytes |", "|---|---|"]
    lines += [f"| {entry['name']} | {entry['bytes']:,} |" for entry in content["files"].values()]
    for role, ports in content["graphs"].items():
        lines += ["", f"## Graph `{role}`", "", "| name | direction | dtype | shape |", "|---|---|---|---|"]
        for direction, key in (("in", "inputs"), ("out", "outputs")):
            lines += [
                f"| {name} | {direction} | {port['dtype']} | {', '.join(map(str, port['shape']))} |"
                for name, port in ports[key].items()
            ]
    if content["figures"]:
        lines += ["", "## Figures", ""]
        lines += [f"- {name}: {value}" for name, value in content["figures"].items()]
    labels = "" if content["labels"] else ', ["cat", "remote control"]'
    package = "gdino_hf.runtime" if content["format"] in TORCH_FREE else "gdino_hf"
    lines += [
        "",
        "## Use",
        "",
        "`gdino_export.json` has the sizes, means and token ids that a program of your own needs. With gdino-hf"
        + (", without PyTorch:" if package == "gdino_hf.runtime" else ":"),
        "",
        "```python",
        f"from {package} import Detector",
        "",
        f'found = Detector("path/of/this/folder")("photograph.jpg"{labels})',
        "```",
        "",
    ]
    return "\n".join(lines)
