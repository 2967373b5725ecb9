"""Evaluation over several data sets, with their average, as for ODinW (Li et al. 2022, arXiv:2204.08790)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.printable import printable
from ..model.text_prompt import name_key

_KEYS = ("name", "annotations", "images", "prompts", "labels")


@dataclass(frozen=True)
class TableEntry:
    """One data set of a table.

    Attributes:
        name: Name of the data set.
        annotations: Its annotation file.
        images: Folder of its images; None for the reader's default.
        prompts: Text to use in the prompt, by label; labels without an entry are used as they are.
        labels: Labels to evaluate; None for all.
    """

    name: str
    annotations: Path
    images: Path | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    labels: list[str] | None = None

    def prompts_of(self, labels: Sequence[str]) -> list[str]:
        """Return the text to use in the prompt for each label.

        Args:
            labels: Labels of the data set.

        Raises:
            ValueError: There is a prompt for a label that the data set does not have.
        """
        prompts = {name_key(label): prompt for label, prompt in self.prompts.items()}
        unknown = prompts.keys() - {name_key(label) for label in labels}
        if unknown:
            raise ValueError(f"there is a prompt for {min(unknown)!r}, which is not one of its labels; remove it")
        return [prompts.get(name_key(label), label) for label in labels]


def read_table(path: str | Path) -> list[TableEntry]:
    """Read a list of data sets from a YAML file.

    Args:
        path: YAML file with a list of {"name", "annotations"} and optionally "images" (a folder), "prompts" ({label:
            text to use in the prompt}) and "labels" (labels to evaluate). Paths are relative to the file.

    Returns:
        The data sets.

    Raises:
        ValueError: The file cannot be read, or an entry is malformed; the message names the entry.
    """
    import yaml

    if not Path(path).exists():
        raise ValueError(f"{printable(path)} cannot be read as YAML: it does not exist.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as YAML ({printable(' '.join(str(error).split()))})."
        ) from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{printable(path)} must hold a list of data sets, each with name and annotations.")
    entries = [_entry(item, number, Path(path)) for number, item in enumerate(content, start=1)]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{printable(path)} has two data sets named {twice[0]!r}; give them different names.")
    return entries


def average_row(rows: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, float]:
    """Average each metric over the data sets, each with equal weight.

    Args:
        rows: Metrics of each data set.
        metrics: Names of the metrics to average. A value of -1, which stands for no ground truth, is ignored.

    Returns:
        The means; -1 for a metric that no data set has.
    """
    columns = {name: [row[name] for row in rows if row[name] >= 0] for name in metrics}
    return {name: sum(values) / len(values) if values else -1.0 for name, values in columns.items()}


def _entry(item: Any, number: int, path: Path) -> TableEntry:
    where = f"Data set {number} of {printable(path)}"
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} is {item!r}; give name and annotations.")
    unknown = sorted(map(str, item.keys() - set(_KEYS)))
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(_KEYS)}.")
    for key in ("name", "annotations"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise ValueError(f"{where} has no {key}; give one as text.")
    name, prompts, labels = item["name"].strip(), item.get("prompts") or {}, item.get("labels")
    if Path(name).name != name or not name.strip("."):
        raise ValueError(f"{where} is named {name!r}, which cannot be the name of a folder; leave out slashes.")
    if not isinstance(prompts, Mapping) or not all(isinstance(value, str) for value in prompts.values()):
        raise ValueError(f"{where} has prompts that are not a mapping of labels to text; write label: text.")
    if labels is not None and (not isinstance(labels, list) or not labels):
        raise ValueError(f"{where} has labels {labels!r}; give a list of names.")
    images = item.get("images")
    return TableEntry(
        name=name,
        annotations=path.parent / Path(item["annotations"]).expanduser(),
        images=None if images is None else path.parent / Path(str(images)).expanduser(),
        prompts={str(label): prompt for label, prompt in prompts.items()},
        labels=None if labels is None else [str(label) for label in labels],
    )
