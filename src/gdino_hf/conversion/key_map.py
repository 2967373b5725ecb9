"""Parse and apply key tables, which map tensor names between layouts; keys/original.txt explains the notation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from torch import Tensor

from .layouts import Layout
from .rules import ASIDE, FILLS, RULES, Rule

QKV = ("query", "key", "value")
_PLACEHOLDER = re.compile(r"\{(?P<name>\w+)(?P<kind>[+:])(?P<detail>\w+)\}|\{(?P<plain>=?\w+)\}|\*")
_REST = "rest"

Facts = Mapping[str, int]
Bindings = dict[str, str | int]


class Pattern:
    """One column of a table line, which matches keys and generates them.

    Args:
        text: A key with placeholders.
        facts: Numbers of the configuration that the placeholders refer to.
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
        """Return a placeholder as a format field, and as a regular expression."""
        if found[0] == "*":
            return f"{{{_REST}}}", f"(?P<{_REST}>.+)"
        plain = found["plain"]
        if plain == "qkv":
            return "{qkv}", f"(?P<qkv>{'|'.join(QKV)})"
        if plain is not None and plain.startswith("="):
            number = str(_fact(plain[1:], facts))
            return number, number
        name = plain or found["name"]
        if found["kind"] == "+":
            self.offsets[name] = int(found["detail"]) if found["detail"].isdigit() else _fact(found["detail"], facts)
        elif found["kind"] == ":":
            self.bounds[name] = _fact(found["detail"], facts)
        return f"{{{name}}}", rf"(?P<{name}>\d+)"

    def match(self, key: str) -> Bindings | None:
        """Return the values of the placeholders in a key, or None if the key does not match."""
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
        """Generate the keys for given placeholder values: several for {qkv} and for an index in this column only."""
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
    """One line of a key table.

    Attributes:
        theirs: Pattern of the other layout's keys; None if that layout has no such tensor.
        ours: Pattern of our keys; None if we have no such tensor.
        name: Name of the rule.
        optional: Whether their tensor is written only if the source of the weights had it.
        reason: Explanation for the report.
    """

    theirs: Pattern | None
    ours: Pattern | None
    name: str
    optional: bool
    reason: str

    @property
    def rule(self) -> Rule:
        """The rule that `name` refers to; lines with "keep" or "drop" have none."""
        return RULES[self.name]

    def their_keys(self, bindings: Bindings) -> list[str]:
        """Return the other layout's keys for given placeholder values; empty if it has no such tensor."""
        return list(self.theirs.keys(bindings)) if self.theirs is not None else []

    def our_keys(self, bindings: Bindings) -> list[str]:
        """Return our keys for given placeholder values; empty if we have no such tensor."""
        return list(self.ours.keys(bindings)) if self.ours is not None else []

    def carry(self, theirs: Tensor) -> list[Tensor]:
        """Compute our tensors from the other layout's; empty if that one is derived from ours or has no counterpart."""
        if self.aside or self.rule.to_ours is None:
            return []
        return self.rule.to_ours(theirs)

    @property
    def aside(self) -> bool:
        """Whether the tensor has no counterpart on the other side."""
        return self.name in ASIDE

    @property
    def derived(self) -> bool:
        """Whether the other layout's tensor can be computed from ours."""
        return not self.aside and self.rule.derived


class KeyMap:
    """The lines of a layout's key table that hold for one configuration.

    Args:
        layout: The layout.
        facts: Numbers of the configuration, from `facts_of_source` or `facts_of_config`.

    Raises:
        ValueError: A line of the table is malformed.
    """

    def __init__(self, layout: Layout, facts: Facts) -> None:
        self.rows = list(_parse(layout.table, facts))

    def row_of(self, key: str) -> tuple[Row, Bindings] | None:
        """Return the line that matches a key of the other layout, with the values of its placeholders, or None."""
        for row in self.rows:
            if row.theirs is not None and (bindings := row.theirs.match(key)) is not None:
                return row, bindings
        return None

    def rows_of_ours(self, key: str) -> list[tuple[Row, Bindings]]:
        """Return the lines for one of our keys: first the one that carries its values, then those derived from it."""
        matches = [(row, found) for row in self.rows if row.ours and (found := row.ours.match(key)) is not None]
        carriers = [match for match in matches if not match[0].derived]
        return [*carriers[:1], *(match for match in matches if match[0].derived)]

    def fill_of(self, key: str) -> Row | None:
        """Return the line that gives the fill value of one of our tensors for sources without it, or None."""
        return next((row for row in self.fills if row.ours and row.ours.match(key) is not None), None)

    @cached_property
    def fills(self) -> list[Row]:
        """The lines whose rule fills a tensor."""
        return [row for row in self.rows if row.name in FILLS]


def _fact(name: str, facts: Facts) -> int:
    """Look up a number of the configuration that a table names."""
    if name not in facts:
        raise ValueError(f"The key table asks for {name!r}; the facts of a configuration are {', '.join(facts)}.")
    return facts[name]


def _parse(text: str, facts: Facts) -> Iterator[Row]:
    """Yield the lines that hold for a configuration, with every @name of a "let" line replaced."""
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
            counts = bool(_fact(condition.removeprefix("not "), facts)) != condition.startswith("not ")
        elif counts:
            yield _row(line, number, facts)


def _row(line: str, number: int, facts: Facts) -> Row:
    """Parse one line of the form `theirs | ours | rule: reason`."""
    columns = [column.strip() for column in line.split("|")]
    if len(columns) not in (2, 3):
        raise ValueError(f"Line {number} has {len(columns)} columns, not theirs | ours | rule: {line!r}.")
    theirs, ours = (None if column == "-" else Pattern(column, facts) for column in columns[:2])
    rule, _, reason = (columns[2] if len(columns) == 3 else "rename").partition(":")
    name = rule.rstrip("?").strip()
    if name not in RULES and name not in ASIDE:
        raise ValueError(f"Line {number} names the rule {name!r}; the rules are {', '.join([*RULES, *ASIDE])}.")
    return Row(theirs, ours, name, rule.endswith("?"), reason.strip())
