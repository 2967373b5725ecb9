"""What a conversion will write, decided before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .conversion_error import ConversionError
from .key_map import Bindings, KeyMap, Row
from .rules import FILLS

Shapes = Mapping[str, tuple[int, ...]]
DTypes = Mapping[str, torch.dtype]
Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Step:
    """One tensor to write.

    Attributes:
        key: Its key.
        sources: Keys of the tensors it is made of; empty if it is filled in.
        rule: Name of the rule that makes it.
        shape: Its shape.
        dtype: Its storage dtype.
        make: Makes it, given a reader of the source.
    """

    key: str
    sources: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[Reader], Tensor]

    def build(self, read: Reader) -> Tensor:
        """Make the tensor, and be certain that it is what was planned."""
        tensor = self.make(read)
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(
                f"{self.key} was planned as {self.shape} {self.dtype}, but is {tuple(tensor.shape)} {tensor.dtype}; "
                "the key table is at fault."
            )
        return tensor


@dataclass
class Plan:
    """All tensors to write, and what becomes of the others.

    Attributes:
        steps: Tensors to write, in order.
        derived: Their tensors that follow from others, by key: the rule, and the dtype they are stored in.
        kept: Their tensors that ours has no place for, by key: why; they go beside the model.
        dropped: Tensors that are gone for good, by key: why.
        filled: Our tensors that the source lacks, by key: with what and why.
        warnings: What the user should know.
    """

    steps: list[Step] = field(default_factory=list)
    derived: dict[str, tuple[str, torch.dtype]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def shapes_in_ours(key_map: KeyMap, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes by our key, as far as a source's tensors can be carried over at all."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        match = key_map.row_of(key)
        if match is None:
            continue
        row, bindings = match
        try:
            parts = row.carry(_sketch(shape))
        except (ValueError, RuntimeError):
            continue
        found.update(zip(row.our_keys(bindings), (tuple(part.shape) for part in parts), strict=False))
    return found


def plan_to_ours(
    key_map: KeyMap, shapes: Shapes, dtypes: DTypes, expected: Shapes, read: Reader, where: object
) -> Plan:
    """Plan the way from another layout to ours.

    Args:
        key_map: Their table for the configuration.
        shapes: Shapes of their tensors, prefixes taken off.
        dtypes: Their dtypes.
        expected: Shapes of ours, all that the configuration has.
        read: Reads one of their tensors.
        where: The file, for messages.

    Returns:
        The plan; its steps are in the order of `expected`.

    Raises:
        ConversionError: A key is missing, unknown, or of another shape than the configuration has.
    """
    plan = Plan()
    steps: dict[str, Step] = {}
    checks: list[tuple[str, Row, list[str]]] = []
    for key in shapes:
        match = key_map.row_of(key)
        if match is None:
            raise ConversionError(_unknown(key, where))
        row, bindings = match
        if row.aside:
            (plan.kept if row.name == "keep" else plan.dropped)[key] = row.reason
            continue
        ours = row.our_keys(bindings)
        if not ours or any(name not in expected for name in ours):
            raise ConversionError(_unknown(key, where))
        _check_shape(row, key, shapes[key], [expected[name] for name in ours], where)
        if row.derived:
            checks.append((key, row, ours))
            continue
        for part, name in enumerate(ours):
            steps[name] = Step(name, (key,), row.name, expected[name], dtypes[key], _carrier(row, key, part))
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    for name, shape in expected.items():
        if name not in steps:
            steps[name] = _fill(key_map, name, shape, usual, plan, where)
    plan.steps = [steps[name] for name in expected]
    for key, row, ours in checks:
        _check_derived(row, key, [steps[name] for name in ours], read, plan)
    if odd := [key for key, _, _ in checks if key in plan.kept]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        plan.warnings.append(f"{odd[0]}{more}: {plan.kept[odd[0]]}; what was stored is kept for the way back only")
    return plan


def plan_from_ours(
    key_map: KeyMap, shapes: Shapes, dtypes: DTypes, recorded: Mapping[str, torch.dtype | None] | None, layout: str
) -> Plan:
    """Plan the way from ours to another layout.

    Args:
        key_map: Their table for the configuration.
        shapes: Shapes of our tensors, all that the configuration has.
        dtypes: Their dtypes.
        recorded: Keys that the source of these weights had in that layout, in order, with the dtype of those that
            follow from others; None if the weights never were in it.
        layout: Its name, for messages.

    Returns:
        The plan, without the tensors that were kept beside the model.

    Raises:
        ConversionError: One of our tensors has no place there.
    """
    plan = Plan()
    origins: dict[str, tuple[Row, Bindings]] = {}
    for name in shapes:
        rows = key_map.rows_of_ours(name)
        if not rows or (rows[0][0].derived and not _tied(name, rows)):
            raise ConversionError(
                f"{name} has no place in the {layout} layout, which cannot express this configuration; keep the "
                "model as it is."
            )
        if rows[0][0].theirs is None:
            plan.dropped[name] = rows[0][0].reason
        for row, bindings in rows:
            for key in row.their_keys(bindings):
                if key not in origins and _goes_back(row, key, recorded):
                    origins[key] = (row, bindings)
    steps: dict[str, Step] = {}
    for key, (row, bindings) in origins.items():
        ours = tuple(row.our_keys(bindings))
        made = row.rule.to_theirs([_sketch(shapes[name], dtypes[name]) for name in ours])
        dtype = (recorded or {}).get(key) or made.dtype
        steps[key] = Step(key, ours, row.name, tuple(made.shape), dtype, _maker(row, ours, dtype))
        if row.derived:
            plan.derived[key] = (row.name, dtype)
    order = [key for key in recorded or () if key in steps]
    plan.steps = [steps[key] for key in dict.fromkeys([*order, *steps])]
    return plan


def _tied(name: str, rows: list[tuple[Row, Bindings]]) -> bool:
    """Whether one of our tensors only lives on as copies of it under other names."""
    return all(row.derived and row.name.endswith("copy") for row, _ in rows)


def _goes_back(row: Row, key: str, recorded: Mapping[str, torch.dtype | None] | None) -> bool:
    if recorded is None:
        return not (row.derived and row.optional)
    return key in recorded or not (row.derived or row.optional)


def _sketch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without contents, on which a rule shows what shape it gives."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _carrier(row: Row, key: str, part: int) -> Callable[[Reader], Tensor]:
    return lambda read: row.carry(read(key))[part]


def _maker(row: Row, ours: tuple[str, ...], dtype: torch.dtype) -> Callable[[Reader], Tensor]:
    return lambda read: row.rule.to_theirs([read(name) for name in ours]).to(dtype)


def _fill(key_map: KeyMap, name: str, shape: tuple[int, ...], dtype: torch.dtype, plan: Plan, where: object) -> Step:
    row = key_map.fill_of(name)
    if row is None:
        carriers = [key for row, found in key_map.rows_of_ours(name)[:1] for key in row.their_keys(found)]
        raise ConversionError(
            f"{where} lacks {carriers[0] if carriers else name}; fetch the whole checkpoint again, or give one whose "
            "layout has it."
        )
    fill = FILLS[row.name]
    plan.filled[name] = f"{row.name}: {row.reason}"
    return Step(name, (), row.name, shape, dtype, lambda read: fill(shape, dtype=dtype))


def _check_shape(row: Row, key: str, shape: tuple[int, ...], ours: list[tuple[int, ...]], where: object) -> None:
    wanted = tuple(row.rule.to_theirs([_sketch(size) for size in ours]).shape)
    if shape != wanted:
        raise ConversionError(
            f"{key} of {where} has the shape {shape}, but {wanted} goes with the other tensors; fetch the checkpoint "
            "again, or give one that is whole."
        )


def _check_derived(row: Row, key: str, steps: list[Step], read: Reader, plan: Plan) -> None:
    """A tensor that follows from others is not carried over if it does follow."""
    stored = read(key)
    made = row.rule.to_theirs([step.make(read) for step in steps])
    if torch.equal(made.to(stored.dtype), stored):
        plan.derived[key] = (row.name, stored.dtype)
        return
    plan.kept[key] = f"not what the rule {row.name!r} makes of the model's own tensors, which are used instead"


def _unknown(key: str, where: object) -> str:
    return (
        f"{where} holds {key}, which is no tensor of a model of its sizes; take it out of the file, or give the "
        "checkpoint as it was published."
    )
