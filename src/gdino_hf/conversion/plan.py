"""Plan what a conversion writes, before anything is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdino_hf.model.weight_files import dtype_name, is_finite

from .conversion_error import ConversionError
from .key_map import Bindings, KeyMap, Row
from .rules import FILLS

Shapes = Mapping[str, tuple[int, ...]]
DTypes = Mapping[str, torch.dtype]
Reader = Callable[[str], Tensor]
# Tables of integers that models store end otherwise.
_WEIGHT = re.compile(r"(weight|bias|_embed|_embedding|_embeddings|_param|log_temperature)$")


@dataclass(frozen=True)
class Step:
    """One tensor to write.

    Attributes:
        key: Key to write it under.
        sources: Keys of the tensors it is computed from; empty if it is filled with a constant.
        rule: Name of the rule that computes it.
        shape: Shape to write.
        dtype: Dtype to write.
        make: Computes the tensor, given a function that reads tensors of the source.
    """

    key: str
    sources: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[Reader], Tensor]

    def build(self, read: Reader) -> Tensor:
        """Compute the tensor, and check its numbers and the planned shape and dtype."""
        tensor = self.make(read)
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(
                f"{self.key} was planned as {self.shape} {self.dtype}, but is {tuple(tensor.shape)} {tensor.dtype}; "
                "its line in the key table is wrong."
            )
        is_wide = tensor.is_floating_point() and tensor.itemsize > 1
        if not is_wide and self.sources and self.rule != "keep" and _WEIGHT.search(self.key):
            raise ConversionError(
                f"{' and '.join(self.sources)} is stored as {dtype_name(tensor)}, so the weights are quantized, "
                "which is not converted; take a checkpoint in float32, float16 or bfloat16."
            )
        if is_wide and not is_finite(tensor):
            raise ConversionError(
                f"{' and '.join(self.sources) or self.key} holds NaN or infinity; fetch the checkpoint again, or "
                "take one from before the training diverged."
            )
        return tensor


@dataclass
class Plan:
    """All tensors to write, and what happens to the others.

    Attributes:
        steps: The tensors to write, in order.
        derived: Their tensors that can be computed from ours: key -> (rule, dtype they are stored in).
        kept: Their tensors without a counterpart here, which are stored beside the model: key -> reason.
        dropped: Tensors that are not written at all: key -> reason.
        filled: Our tensors that the source lacks: key -> filling and reason.
        warnings: Sentences for the user.
    """

    steps: list[Step] = field(default_factory=list)
    derived: dict[str, tuple[str, torch.dtype]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def shapes_in_ours(key_map: KeyMap, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a source's tensors under our keys, without tensors that no rule can convert."""
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


def reader_in_ours(key_map: KeyMap, read: Reader) -> Reader:
    """Return a function that reads a source's tensor by our key, for tensors that one of theirs holds alone."""

    def read_in_ours(key: str) -> Tensor:
        row, bindings = key_map.rows_of_ours(key)[0]
        return row.carry(read(row.their_keys(bindings)[0]))[0]

    return read_in_ours


def plan_to_ours(
    key_map: KeyMap, shapes: Shapes, dtypes: DTypes, expected: Shapes, read: Reader, where: object
) -> Plan:
    """Plan a conversion from another layout to ours.

    Args:
        key_map: Key table of the other layout, for the configuration.
        shapes: Shapes of their tensors by key, without wrapper prefix.
        dtypes: Dtypes of their tensors.
        expected: Shapes of all tensors that our model of this configuration stores.
        read: Reads one of their tensors.
        where: File or folder of the checkpoint, for messages.

    Returns:
        The plan, with its steps in the order of `expected`.

    Raises:
        ConversionError: A tensor is missing or unknown, or its shape does not fit the configuration.
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
        plan.warnings.append(f"{odd[0]}{more}: {plan.kept[odd[0]]}; the stored values are kept for the way back only")
    return plan


def plan_from_ours(
    key_map: KeyMap, shapes: Shapes, dtypes: DTypes, recorded: Mapping[str, torch.dtype | None] | None, layout: str
) -> Plan:
    """Plan a conversion from our layout to another.

    Args:
        key_map: Key table of the other layout, for the configuration.
        shapes: Shapes of all tensors that our model of this configuration stores.
        dtypes: Dtypes of our tensors.
        recorded: Keys of the checkpoint that our weights came from, in order, each with its dtype if it is derived from
            other tensors, else None. None instead of a mapping if the weights did not come from this layout.
        layout: Name of the other layout, for messages.

    Returns:
        The plan, without the tensors that were stored beside the model.

    Raises:
        ConversionError: The other layout has no place for one of our tensors.
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
    """Whether our tensor is a tied head, which the other layout stores only as copies under other names."""
    return all(row.derived and row.name.endswith("copy") for row, _ in rows)


def _goes_back(row: Row, key: str, recorded: Mapping[str, torch.dtype | None] | None) -> bool:
    """Whether to write a tensor of the other layout: always if it carries values, else only if the source had it."""
    if recorded is None:
        return not (row.derived and row.optional)
    return key in recorded or not (row.derived or row.optional)


def _sketch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without data (meta device), to infer the shape that a rule produces."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _carrier(row: Row, key: str, part: int) -> Callable[[Reader], Tensor]:
    return lambda read: row.carry(read(key))[part]


def _maker(row: Row, ours: tuple[str, ...], dtype: torch.dtype) -> Callable[[Reader], Tensor]:
    return lambda read: row.rule.to_theirs([read(name) for name in ours]).to(dtype)


def _fill(key_map: KeyMap, name: str, shape: tuple[int, ...], dtype: torch.dtype, plan: Plan, where: object) -> Step:
    """Plan a fill value for a tensor that the source lacks; refuse the source if no line of the table gives one."""
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
            f"{key} of {where} has the shape {shape}, but {wanted} fits the other tensors; fetch the checkpoint "
            "again, or give one that is complete."
        )


def _check_derived(row: Row, key: str, steps: list[Step], read: Reader, plan: Plan) -> None:
    """Drop the other layout's derived tensor if it equals what its rule computes; otherwise keep it, with a warning."""
    stored = read(key)
    made = row.rule.to_theirs([step.make(read) for step in steps])
    if torch.equal(made.to(stored.dtype), stored):
        plan.derived[key] = (row.name, stored.dtype)
        return
    plan.kept[key] = (
        f"differs from what the rule {row.name!r} computes from the model's own tensors, which are used instead"
    )


def _unknown(key: str, where: object) -> str:
    return (
        f"{where} holds {key}, which is not a tensor of a model of this size; take it out of the file, or give the "
        "checkpoint as it was published."
    )
