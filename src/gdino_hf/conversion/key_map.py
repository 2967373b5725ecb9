"""The key tables: which tensor of another layout is which of ours. `keys/original.txt` explains the notation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import product

from torch import Tensor

from .rules import ASIDE, FILLS, RULES, Rule

QKV = ("query", "key", "value")
_PLACEHOLDER = re.compile(r"\{(?P<name>\w+)(?P<kind>[+:])(?P<detail>\w+)\}|\{(?P<plain>=?\w+)\}|\*")
_REST = "rest"

Facts = Mapping[str, int]
Bindings = dict[str, str | int]


class Pattern:
    """One side of a line: matches keys and makes them.

    Args:
        text: The key with its placeholders.
        facts: Numbers of the configuration that placeholders refer to.
    """

    def __init__(self, text: str, facts: Facts) -> None:
        self.text = text
        self.offsets: dict[str, int] = {}
        self.bounds: dict[str, int] = {}
        self.template, expression, end = "", "", 0
        for found in _PLACEHOLDER.finditer(text):
            literal = text[end : found.start()]
            template, group = self._placeholder(found, facts)
            self.template += literal + template
            expression += re.escape(literal) + group
            end = found.end()
        self.template += text[end:]
        self._expression = re.compile(expression + re.escape(text[end:]))
        self.fused = "{qkv}" in text

    def _placeholder(self, found: re.Match[str], facts: Facts) -> tuple[str, str]:
        """How a placeholder is written when keys are made, and the expression that matches it."""
        if found[0] == "*":
            return f"{{{_REST}}}", f"(?P<{_REST}>.+)"
        plain = found["plain"]
        if plain == "qkv":
            return "{qkv}", f"(?P<qkv>{'|'.join(QKV)})"
        if plain is not None and plain.startswith("="):
            number = str(facts[plain[1:]])
            return number, number
        name = plain or found["name"]
        if found["kind"] == "+":
            self.offsets[name] = int(found["detail"]) if found["detail"].isdigit() else facts[found["detail"]]
        elif found["kind"] == ":":
            self.bounds[name] = facts[found["detail"]]
        return f"{{{name}}}", rf"(?P<{name}>\d+)"

    def match(self, key: str) -> Bindings | None:
        """What the placeholders stand for in a key, None if it does not fit."""
        found = self._expression.fullmatch(key)
        if found is None:
            return None
        bindings: Bindings = {}
        for name, text in found.groupdict().items():
            if name in (_REST, "qkv"):
                bindings[name] = text
                continue
            index = int(text) - self.offsets.get(name, 0)
            if index < 0 or index >= self.bounds.get(name, index + 1):
                return None
            bindings[name] = index
        return bindings

    def keys(self, bindings: Bindings) -> Iterator[str]:
        """The keys of given placeholders; query, key and value, and every index only this side has, make several."""
        free: dict[str, list[str | int]] = {
            name: list(range(end)) for name, end in self.bounds.items() if name not in bindings
        }
        if self.fused:
            free["qkv"] = list(QKV)
        for values in product(*free.values()):
            every = {**bindings, **dict(zip(free, values, strict=True))}
            shifted = {
                name: value + self.offsets.get(name, 0) if isinstance(value, int) else value
                for name, value in every.items()
            }
            yield self.template.format(**shifted)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        theirs: Keys of the other layout; None if it has none.
        ours: Keys of ours; None if ours has none.
        name: The rule's name.
        optional: Written back only where the source had it.
        reason: Why, in words.
    """

    theirs: Pattern | None
    ours: Pattern | None
    name: str
    optional: bool
    reason: str

    @property
    def rule(self) -> Rule:
        """What happens to the tensor; "keep" and "drop" have none."""
        return RULES[self.name]

    def their_keys(self, bindings: Bindings) -> list[str]:
        """Their keys of given placeholders; none if they have no such tensor."""
        return list(self.theirs.keys(bindings)) if self.theirs is not None else []

    def our_keys(self, bindings: Bindings) -> list[str]:
        """Our keys of given placeholders; none if ours has no such tensor."""
        return list(self.ours.keys(bindings)) if self.ours is not None else []

    def carry(self, theirs: Tensor) -> list[Tensor]:
        """Our tensors out of one of theirs; none if ours has them already or has no place for them."""
        if self.aside or self.rule.to_ours is None:
            return []
        return self.rule.to_ours(theirs)

    @property
    def aside(self) -> bool:
        """Whether the tensor has no place on the other side."""
        return self.name in ASIDE

    @property
    def derived(self) -> bool:
        """Whether their tensor follows from ours."""
        return not self.aside and self.rule.derived


class KeyMap:
    """A layout's table for one configuration.

    Args:
        layout: Name of the table: "original", "mmdet" or "transformers".
        facts: decoder_layers, backbone_levels, and as 0 or 1 what the table's "when" lines ask for.
    """

    def __init__(self, layout: str, facts: Facts) -> None:
        text = resources.files(__package__).joinpath("keys", f"{layout}.txt").read_text(encoding="utf-8")
        self.rows = list(_parse(text, facts))

    def row_of(self, key: str) -> tuple[Row, Bindings] | None:
        """The line for one of their keys, and what its placeholders stand for."""
        for row in self.rows:
            if row.theirs is not None and (bindings := row.theirs.match(key)) is not None:
                return row, bindings
        return None

    def rows_of_ours(self, key: str) -> list[tuple[Row, Bindings]]:
        """The lines for one of our keys: the one that carries it over first, then those that follow from it."""
        matches = [(row, found) for row in self.rows if row.ours and (found := row.ours.match(key)) is not None]
        carriers = [match for match in matches if not match[0].derived]
        return [*carriers[:1], *(match for match in matches if match[0].derived)]

    def fill_of(self, key: str) -> Row | None:
        """The line that says what one of our keys is filled with where the source lacks it."""
        return next((row for row in self.fills if row.ours and row.ours.match(key) is not None), None)

    @cached_property
    def fills(self) -> list[Row]:
        """The lines with a filling."""
        return [row for row in self.rows if row.name in FILLS]


def _parse(text: str, facts: Facts) -> Iterator[Row]:
    aliases: dict[str, str] = {}
    counts = True
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        for alias in sorted(aliases, key=len, reverse=True):
            line = line.replace(alias, aliases[alias])
        if line.startswith("let "):
            alias, meaning = line.removeprefix("let ").split(" = ")
            aliases[alias] = meaning
        elif line == "always":
            counts = True
        elif line.startswith("when "):
            condition = line.removeprefix("when ")
            counts = bool(facts[condition.removeprefix("not ")]) != condition.startswith("not ")
        elif counts:
            yield _row(line, number, facts)


def _row(line: str, number: int, facts: Facts) -> Row:
    columns = [column.strip() for column in line.split("|")]
    if len(columns) not in (2, 3):
        raise ValueError(f"Line {number} has {len(columns)} columns, not theirs | ours | rule: {line!r}.")
    theirs, ours = (None if column == "-" else Pattern(column, facts) for column in columns[:2])
    rule, _, reason = (columns[2] if len(columns) == 3 else "rename").partition(":")
    name = rule.rstrip("?").strip()
    if name not in RULES and name not in ASIDE:
        raise ValueError(f"Line {number} names the rule {name!r}; there are {', '.join([*RULES, *ASIDE])}.")
    return Row(theirs, ours, name, rule.endswith("?"), reason.strip())
