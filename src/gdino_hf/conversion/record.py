"""The report of a conversion: printed for the user, and stored beside the model so that converting back is exact."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gdino_hf.model.weight_places import check_links

from ..error_text import reason
from .checkpoint import Checkpoint
from .conversion_error import ConversionError
from .layouts import LAYOUTS
from .plan import Plan

RECORD = "conversion.json"
"""File name of the report beside a model, which a conversion back reads."""
KEPT = "conversion.safetensors"
"""File name of the source's tensors that have no counterpart in our model."""


@dataclass
class Report:
    """What one conversion did.

    Attributes:
        source: Path or Hub id that was read.
        target: Path that was written.
        origin: Name of the source's layout.
        destination: Name of the target's layout; "gdino" is ours.
        plan: What happened to every tensor.
        wrapper: Key of the source's dictionary that held the tensors; None if it was a bare state dict.
        prefix: Prefix that wrappers put before every key of the source.
        keys: Keys of the source that a conversion back writes again, in order, prefix included.
        others: Other keys of the source's dictionary, which are not converted.
        peer_config: Contents of config.json, for a source in transformers' layout.
        assumed: Sentences about what no tensor shows.
        notes: Results besides the weights: tokenizer, restored tensors, hashes of the source.
    """

    source: str
    target: str
    origin: str
    destination: str
    plan: Plan
    wrapper: str | None = None
    prefix: str = ""
    keys: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    peer_config: dict[str, Any] | None = None
    assumed: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """Warnings to show the user, one sentence each."""
        return self.plan.warnings

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report as plain values for JSON."""
        return {
            "source": self.source,
            "from": self.origin,
            "to": self.destination,
            "wrapper": self.wrapper,
            "prefix": self.prefix,
            "notes": self.notes,
            "assumed": self.assumed,
            "warnings": self.warnings,
            "mapped": {
                step.key: {"from": list(step.sources), "rule": step.rule} for step in self.plan.steps if step.sources
            },
            "missing": self.plan.filled,
            "derived": {
                key: {"rule": rule, "dtype": str(dtype).removeprefix("torch.")}
                for key, (rule, dtype) in self.plan.derived.items()
            },
            "kept": self.plan.kept,
            "dropped": {**self.plan.dropped, **dict.fromkeys(self.others, "training state, no weights")},
            "keys": self.keys,
            "config": self.peer_config,
        }

    def write(self, path: Path) -> None:
        """Write the whole report as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def lines(self, every_key: bool = False) -> list[str]:
        """Return the report as lines to print.

        Args:
            every_key: Name every key. By default keys with the same reason are counted and the first is named.
        """
        content = self.as_dict()
        rules = Counter(entry["rule"] for entry in content["mapped"].values())
        counts = ", ".join(f"{count} {rule}" for rule, count in rules.most_common())
        lines = [f"{self.source}: {self.origin} -> {self.destination}, {self.target}"]
        lines.append(f"mapped: {sum(rules.values())} tensors ({counts})")
        if every_key:
            lines += [f"  {key} <- {', '.join(e['from'])} ({e['rule']})" for key, e in content["mapped"].items()]
        derived = {key: f"computed from other tensors ({entry['rule']})" for key, entry in content["derived"].items()}
        sections = (
            ("derived", derived if self.destination == "gdino" else {}),
            (f"kept in {KEPT}", content["kept"]),
            ("dropped", content["dropped"]),
            ("missing", {key: f"filled with {why}" for key, why in content["missing"].items()}),
        )
        for title, keys in sections:
            lines += _section(title, keys, every_key)
        lines += [f"assumed: {sentence}" for sentence in self.assumed]
        lines += [f"{name}: {text}" for name, text in self.notes.items()]
        return lines


def _section(title: str, keys: dict[str, str], every_key: bool) -> list[str]:
    """Format one group of keys, given as {key: reason}, as lines."""
    if not keys:
        return [f"{title}: none"]
    if every_key:
        return [f"{title}: {len(keys)}", *(f"  {key}: {why}" for key, why in keys.items())]
    lines = [f"{title}: {len(keys)}"]
    for why in dict.fromkeys(keys.values()):
        same = [key for key, other in keys.items() if other == why]
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        lines.append(f"  {same[0]}{more}: {why}")
    return lines


@dataclass
class Record:
    """What the reverse conversion needs to know about the conversion that made the model.

    Attributes:
        wrapper: Key of the source's dictionary that held the tensors; None if it was a bare state dict.
        prefix: Prefix that wrappers put before every key.
        keys: Keys without prefix, in order, each with its dtype if it is derived from other tensors, else None.
        kept: The tensors stored beside the model, by key without prefix; None if there are none.
        full_keys: Keys as they stood in the file, by key without prefix.
        config: Contents of config.json, for a source in transformers' layout.
    """

    wrapper: str | None
    prefix: str
    keys: dict[str, torch.dtype | None]
    kept: Checkpoint | None
    full_keys: dict[str, str]
    config: dict[str, Any] | None


def read_record(folder: Path, layout: str) -> Record | None:
    """Read the record beside a model that was converted from a layout.

    Args:
        folder: The model's folder.
        layout: Name of the layout to convert back to.

    Returns:
        The record; None if the model was not converted from that layout.

    Raises:
        ConversionError: The record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["from"] != layout or content["to"] != "gdino":
            return None
        prefix = content["prefix"]
        dtypes = {key: getattr(torch, entry["dtype"]) for key, entry in content["derived"].items()}
        full_keys = {LAYOUTS[layout].spelled(key.removeprefix(prefix)): key for key in content["keys"]}
        kept = Checkpoint(folder / KEPT) if content["kept"] else None
        if kept is not None:
            check_links(folder, [KEPT])
            kept.add_safetensors(folder / KEPT)
        return Record(
            content["wrapper"], prefix, {k: dtypes.get(k) for k in full_keys}, kept, full_keys, content["config"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path} is damaged ({reason(error)}); delete it to convert without what it recorded."
        ) from error
