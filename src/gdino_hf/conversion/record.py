"""What a conversion did with every key: told to the user, and kept beside the model for the way back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..error_text import reason
from .checkpoint import Checkpoint
from .conversion_error import ConversionError
from .plan import Plan

RECORD = "conversion.json"
"""The report beside a model; the way back reads it."""
KEPT = "conversion.safetensors"
"""The source's tensors that the model has no place for."""


@dataclass
class Report:
    """One conversion.

    Attributes:
        source: What was read.
        target: What was written.
        origin: Layout of the source.
        destination: Layout of the target; "gdino" is ours.
        plan: What became of every key.
        wrapper: Entry of the source's pickle that held the tensors.
        prefix: What stood before every key.
        keys: The source's keys that come back, in order, prefix and all.
        others: Further entries of the source's pickle, which are left behind.
        peer_config: config.json of a transformers source.
        assumed: What no tensor shows.
        notes: Results besides the weights: tokenizer, image processor, hash of the source.
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
        """What the user should know."""
        return self.plan.warnings

    def as_dict(self) -> dict[str, Any]:
        """All of it, for json."""
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
            "dropped": {**self.plan.dropped, **dict.fromkeys(self.others, "training state, not a weight")},
            "keys": self.keys,
            "config": self.peer_config,
        }

    def write(self, path: Path) -> None:
        """Write the whole report as json."""
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def lines(self, every_key: bool = False) -> list[str]:
        """The report for people.

        Args:
            every_key: Name every key; otherwise keys of one fate are counted, and the first is named.
        """
        content = self.as_dict()
        rules = Counter(entry["rule"] for entry in content["mapped"].values())
        counts = ", ".join(f"{count} {rule}" for rule, count in rules.most_common())
        lines = [f"{self.source}: {self.origin} -> {self.destination}, {self.target}"]
        lines.append(f"mapped: {sum(rules.values())} tensors ({counts})")
        if every_key:
            lines += [f"  {key} <- {', '.join(e['from'])} ({e['rule']})" for key, e in content["mapped"].items()]
        derived = {key: f"follows from other tensors ({entry['rule']})" for key, entry in content["derived"].items()}
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
    """What the way back needs of an earlier conversion.

    Attributes:
        wrapper: Entry of the pickle that held the tensors.
        prefix: What stood before every key.
        keys: The keys without prefix, in order, with the dtype of those that follow from others.
        kept: Tensors that lie beside the model, by key without prefix.
        full_keys: The keys as they stood in the file.
        config: config.json of a transformers source.
    """

    wrapper: str | None
    prefix: str
    keys: dict[str, torch.dtype | None]
    kept: Checkpoint | None
    full_keys: dict[str, str]
    config: dict[str, Any] | None


def read_record(folder: Path, layout: str) -> Record | None:
    """The record of a model that came from a layout.

    Args:
        folder: The model's folder.
        layout: The layout to go back to.

    Returns:
        The record; None if the model never was in that layout.

    Raises:
        ConversionError: It is damaged.
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
        full_keys = {key.removeprefix(prefix): key for key in content["keys"]}
        kept = Checkpoint(folder / KEPT) if content["kept"] else None
        if kept is not None:
            kept.add_safetensors(folder / KEPT)
        return Record(
            content["wrapper"], prefix, {k: dtypes.get(k) for k in full_keys}, kept, full_keys, content["config"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is damaged ({reason(error)}); delete it to go back without what it recorded."
        ) from error
