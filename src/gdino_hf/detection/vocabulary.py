"""Vocabulary: what to look for, with aliases, templates, thresholds, colours, and text features that can be kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..model.text_prompt import Prompt, build_prompt, parse_labels, shorten
from ..torch_extra import missing_module, remedy
from ..whole_files import whole_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Labels = str | Sequence[str] | Mapping[str, str | Sequence[str] | None]
"""Labels as a list, as text that `split_labels` splits, or as a mapping from each label to its text or aliases."""

_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_FORMAT = "gdino-vocabulary-1"


@dataclass(frozen=True)
class Entry:
    """One label.

    Attributes:
        label: The caller's own text, which results carry.
        texts: What prompts hold for it: the label itself, a template around it, or aliases.
        threshold: Score that its detections must exceed, 0..1; None for the threshold of the call.
        color: "#rrggbb" to draw it in; None for the colour that its text always gets.
    """

    label: str
    texts: tuple[str, ...]
    threshold: float | None = None
    color: str | None = None


@dataclass(frozen=True)
class EncodedTexts:
    """Text features of a vocabulary's prompts.

    Attributes:
        fingerprint: Identifies the text encoder that computed them.
        features: Tokens of a prompt -> (T, D) features of these tokens.
        narrower: Fingerprints that the same text encoder has after loading in narrower dtypes.
    """

    fingerprint: str
    features: Mapping[tuple[int, ...], Tensor]
    narrower: tuple[str, ...] = ()


class Vocabulary:
    """The labels to look for.

    Equal labels are one label. Prompts hold the labels in alphabetical order, so results depend neither on the order in
    which labels are given nor on duplicates; results index labels in the order given.

    Args:
        labels: Labels as a list or text; or a mapping from each label to the text that prompts hold for it, or to a
            list of such texts (aliases). In a mapping, None stands for the label itself.
        negative: Labels that compete for boxes but are left out of results, in the same forms.
        template: Text with one "{}" for the label, such as "a photo of a {}", for labels that have no text of their
            own.
        combine: How a label's score follows from those of its aliases: "best" or "mean".
        thresholds: Scores that detections of single labels must exceed, by label, 0..1.
        colors: Colours of single labels, "#rrggbb" by label.
        labels_per_prompt: Largest number of labels that share a prompt; None for as many as fit.

    Raises:
        TypeError: A label is not a string.
        ValueError: There is no label, or a template, threshold or colour cannot be used or names an unknown label.
    """

    def __init__(
        self,
        labels: Labels,
        *,
        negative: Labels = (),
        template: str | None = None,
        combine: Literal["best", "mean"] = "best",
        thresholds: Mapping[str, float] | None = None,
        colors: Mapping[str, str] | None = None,
        labels_per_prompt: int | None = None,
    ) -> None:
        if template is not None and template.count("{}") != 1:
            raise ValueError(f"The template {shorten(template)} must have one {{}}, the place of the label.")
        if combine not in ("best", "mean"):
            raise ValueError(f"combine must be 'best' or 'mean', got {combine!r}.")
        if labels_per_prompt is not None and labels_per_prompt < 1:
            raise ValueError(f"labels_per_prompt is {labels_per_prompt}; give at least 1, or None for as many as fit.")
        self.entries = _entries(labels, template)
        self.negative_entries = _entries(negative, template) if len(negative) > 0 else ()
        self.combine: Literal["best", "mean"] = combine
        self.labels_per_prompt = labels_per_prompt
        self.encoded: EncodedTexts | None = None
        both = sorted({entry.label for entry in self.entries} & {entry.label for entry in self.negative_entries})
        if both:
            raise ValueError(f"{shorten(both[0])} is a label and a negative label; leave it in one of them.")
        if thresholds:
            self.entries = self.with_thresholds(thresholds).entries
        if colors:
            self.entries = self._with("color", {label: _color(value) for label, value in colors.items()})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that results may carry, each once, in the order given."""
        return tuple(entry.label for entry in self.entries)

    @property
    def negative_labels(self) -> tuple[str, ...]:
        """The labels that compete for boxes but are left out of results."""
        return tuple(entry.label for entry in self.negative_entries)

    @property
    def colors(self) -> dict[str, str]:
        """The labels that have a colour of their own."""
        return {entry.label: entry.color for entry in self.entries if entry.color is not None}

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} labels: {', '.join(map(shorten, self.labels[:5]))}{', ...' * (len(self) > 5)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.settings() == other.settings()

    __hash__ = None  # type: ignore[assignment]

    def thresholds(self, default: float) -> Tensor:
        """Return the threshold of each label.

        Args:
            default: Threshold of labels without one of their own.

        Returns:
            (N,) float32 thresholds.
        """
        import torch

        return torch.tensor(self.threshold_values(default))

    def threshold_values(self, default: float) -> list[float]:
        """Return what `thresholds` returns, as numbers."""
        return [default if entry.threshold is None else entry.threshold for entry in self.entries]

    def with_thresholds(self, thresholds: Mapping[str, float]) -> Vocabulary:
        """Return a copy in which some labels have thresholds of their own, as `fit_thresholds` finds them.

        Args:
            thresholds: Scores that detections must exceed, 0..1, by label.

        Raises:
            ValueError: A label is unknown, or a threshold is outside 0..1.
        """
        for label, value in thresholds.items():
            if not 0 <= value <= 1:
                raise ValueError(f"The threshold of {shorten(label)} is {value}; give a number within 0..1.")
        copy = self._copy()
        copy.entries = self._with("threshold", {label: float(value) for label, value in thresholds.items()})
        return copy

    def prompt(self, tokenizer: Any, max_text_len: int) -> Prompt:
        """Arrange the labels in prompts; see `build_prompt`, which decides which of them share one.

        Args:
            tokenizer: Tokenizer of the model's text encoder.
            max_text_len: Largest number of tokens in one prompt.

        Returns:
            The prompt, whose `label_indices` are indices into `labels` and, after those, into `negative_labels`.

        Raises:
            ValueError: A text cannot be used, see `build_prompt`.
        """
        order = sorted(range(len(self.entries)), key=lambda index: self.entries[index].label)
        negatives = sorted(self.negative_entries, key=lambda entry: entry.label)
        sorted_entries = [*(self.entries[index] for index in order), *negatives]
        prompt = build_prompt(
            [entry.label for entry in sorted_entries[: len(order)]],
            tokenizer,
            max_text_len,
            [entry.label for entry in negatives],
            texts=[sorted(entry.texts) for entry in sorted_entries],
            labels_per_prompt=self.labels_per_prompt,
        )
        place = {entry.label: index for index, entry in enumerate(self.negative_entries, start=len(order))}
        order += [place[entry.label] for entry in negatives]
        chunks = tuple(
            replace(chunk, label_indices=tuple(order[index] for index in chunk.label_indices))
            for chunk in prompt.chunks
        )
        return replace(prompt, labels=(*self.labels, *self.negative_labels), chunks=chunks)

    def to(self, device: str | torch.device) -> Vocabulary:
        """Return a copy whose text features are on a device."""
        copy = self._copy()
        if self.encoded is not None:
            moved = {tokens: x.to(device) for tokens, x in self.encoded.features.items()}
            copy.encoded = replace(self.encoded, features=moved)
        return copy

    def settings(self) -> dict[str, Any]:
        """Return everything but the text features, in the types that JSON has."""

        def listed(entries: Iterable[Entry]) -> list[dict[str, Any]]:
            return [{**vars(entry), "texts": list(entry.texts)} for entry in entries]

        return {
            "labels": listed(self.entries),
            "negative_labels": listed(self.negative_entries),
            "combine": self.combine,
            "labels_per_prompt": self.labels_per_prompt,
        }

    def save(self, path: str | Path) -> None:
        """Write the vocabulary and its text features, if it has any, to a safetensors file.

        Args:
            path: The file, which is written whole or not at all.

        Raises:
            ImportError: A package of the extra torch is not installed.
            OSError: The file cannot be written.
        """
        _need_torch("Vocabulary.save")
        import torch
        from safetensors.torch import save

        settings = {"format": _FORMAT, **self.settings()}
        tensors = {"nothing": torch.zeros(0)}
        if self.encoded is not None:
            prompts = list(self.encoded.features.items())
            settings |= {"fingerprint": self.encoded.fingerprint, "narrower": list(self.encoded.narrower)}
            settings |= {"prompts": [list(tokens) for tokens, _ in prompts]}
            tensors |= {f"prompt{place}": x.detach().cpu().contiguous() for place, (_, x) in enumerate(prompts)}
        content = save(tensors, {"vocabulary": json.dumps(settings, ensure_ascii=False)})
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary that `save` wrote.

        Args:
            path: The file.

        Returns:
            The vocabulary with the text features that it was saved with. A detector whose model computes other features
            refuses it.

        Raises:
            ImportError: A package of the extra torch is not installed.
            OSError: The file cannot be read.
            ValueError: It is not such a file, or is damaged.
        """
        _need_torch("Vocabulary.load")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                settings = json.loads((file.metadata() or {})["vocabulary"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if settings["format"] != _FORMAT:
                raise ValueError(f"its format is {shorten(settings['format'])}, not {_FORMAT}")
            found = cls._of_settings(settings)
            if "fingerprint" in settings:
                features = {
                    tuple(map(int, tokens)): tensors[f"prompt{place}"]
                    for place, tokens in enumerate(settings["prompts"])
                }
                if any(x.ndim != 2 or len(x) != len(tokens) for tokens, x in features.items()):
                    raise ValueError("its text features do not fit its prompts")
                narrower = tuple(map(str, settings.get("narrower", ())))
                found.encoded = EncodedTexts(str(settings["fingerprint"]), features, narrower)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            why = str(error).rstrip(".")
            raise ValueError(
                f"{path} is not a saved vocabulary ({why}); save it again with Vocabulary.save."
            ) from error
        return found

    @classmethod
    def _of_settings(cls, settings: Mapping[str, Any]) -> Vocabulary:
        texts, negative = (
            {entry["label"]: entry["texts"] for entry in settings[name]} for name in ("labels", "negative_labels")
        )
        given = {
            name: {entry["label"]: entry[name] for entry in settings["labels"] if entry[name] is not None}
            for name in ("threshold", "color")
        }
        return cls(
            texts,
            negative=negative,
            combine=settings["combine"],
            thresholds=given["threshold"],
            colors=given["color"],
            labels_per_prompt=settings["labels_per_prompt"],
        )

    def _copy(self) -> Vocabulary:
        copy = object.__new__(Vocabulary)
        copy.__dict__.update(self.__dict__)
        return copy

    def _with(self, name: str, values: Mapping[str, Any]) -> tuple[Entry, ...]:
        unknown = [label for label in values if label not in self.labels]
        if unknown:
            raise ValueError(f"{shorten(unknown[0])} has a {name} but is not a label; the labels are given first.")
        return tuple(
            replace(entry, **{name: values[entry.label]}) if entry.label in values else entry for entry in self.entries
        )


def _entries(labels: Labels, template: str | None) -> tuple[Entry, ...]:
    """Return the labels with their texts, each label once."""
    if isinstance(labels, Mapping):
        names = parse_labels(list(labels))
        given = [(name, _texts(name, value, template)) for name, value in zip(names, labels.values(), strict=True)]
    else:
        given = [(label, _texts(label, None, template)) for label in parse_labels(labels)]
    merged: dict[str, tuple[str, ...]] = {}
    for label, texts in given:
        merged[label] = tuple(dict.fromkeys([*merged.get(label, ()), *texts]))
    return tuple(Entry(label, texts) for label, texts in merged.items())


def _texts(label: str, value: str | Sequence[str] | None, template: str | None) -> tuple[str, ...]:
    """Return what prompts hold for a label."""
    if value is None:
        return (label if template is None else template.replace("{}", label),)
    texts = parse_labels([value] if isinstance(value, str) else list(value))
    return tuple(dict.fromkeys(texts))


def _color(value: str) -> str:
    if not isinstance(value, str) or not _COLOR.fullmatch(value):
        raise ValueError(f"The colour {shorten(value)} is not of the form #rrggbb; write for instance #ff8800.")
    return value.lower()


def _need_torch(what: str) -> None:
    """Raise an ImportError if the runtime without torch is asked for text features in a file."""
    module = missing_module()
    if module is not None:
        raise ImportError(remedy(what, module))
