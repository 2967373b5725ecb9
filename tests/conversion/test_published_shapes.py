"""Published checkpoints by their names and shapes: every tensor is accounted for, and the way back is exact."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from published import LLMDET_EXTRAS, PUBLISHED, SMALL, mmdet, original
from synthetic import untied, values

from gdino_hf import GDinoConfig
from gdino_hf.conversion.architecture import stored_shapes
from gdino_hf.conversion.infer import check_preset, infer_config
from gdino_hf.conversion.key_map import KeyMap
from gdino_hf.conversion.layout_facts import facts_of_config, facts_of_source
from gdino_hf.conversion.layouts import LAYOUTS, find_layout
from gdino_hf.conversion.plan import plan_from_ours, plan_to_ours, reader_in_ours, shapes_in_ours

# The tests check where every number goes, for which two bytes a number suffice. Tensors are views of one pool, so that
# even the largest checkpoint takes no memory.
STORAGE = torch.bfloat16
POOL = torch.randint(0, 256, (5_000_000,), generator=torch.Generator().manual_seed(0)).to(STORAGE)
STRIDES = (131, 17, 5, 1)


SHAPES_BY_CONFIG = {}


def shapes_of(config):
    """Return the stored shapes of a configuration, cached: a model on the meta device takes a second to build."""
    text = config.to_json_string()
    if text not in SHAPES_BY_CONFIG:
        SHAPES_BY_CONFIG[text] = stored_shapes(config)
    return SHAPES_BY_CONFIG[text]


def stored(key, shape):
    if "_i" in key.rpartition(".")[2] and "in_proj" not in key:
        return values(key, shape)
    strides = STRIDES[: max(len(shape) - 1, 0)] + (1,) * min(len(shape), 1)
    return POOL.as_strided(shape, strides, zlib.crc32(untied(key).encode()) % 900_000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_converts_and_comes_back_bit_equal(name):
    layout_name, preset, shapes = PUBLISHED[name]
    layout = LAYOUTS[layout_name]

    def read(key):
        return stored(key, shapes[key])

    dtypes = {key: stored(key, shape).dtype for key, shape in shapes.items()}
    assert find_layout(shapes, name) == (layout, "")
    facts = facts_of_source(layout, shapes, read)
    inferred = KeyMap(layout, facts)
    config, _ = infer_config(shapes_in_ours(inferred, shapes), layout, facts, name, read=reader_in_ours(inferred, read))
    check_preset(config, preset, layout, name)
    expected = shapes_of(config)
    key_map = KeyMap(layout, facts_of_config(config))
    plan = plan_to_ours(key_map, shapes, dtypes, expected, read, name)
    assert not plan.warnings
    assert [step.key for step in plan.steps] == list(expected)
    assert all(key.startswith("model.backbone.conv_encoder.model.swin.layernorm.") for key in plan.filled)

    extras = LLMDET_EXTRAS if name.startswith("LLMDet") else {}
    assert plan.dropped.keys() == extras.keys()
    assert all(plan.dropped.values())
    returning = [key for key in shapes if key not in plan.dropped]
    ours = {step.key: step for step in plan.steps}
    back = plan_from_ours(
        key_map,
        expected,
        {key: step.dtype for key, step in ours.items()},
        {key: plan.derived[key][1] if key in plan.derived else None for key in returning},
        layout_name,
    )
    assert [step.key for step in back.steps] == [key for key in returning if key not in plan.kept]
    for step in back.steps:
        tensor = step.build(lambda key: ours[key].build(read))
        assert tensor.dtype == dtypes[step.key]
        assert torch.equal(tensor, read(step.key)), step.key


@pytest.mark.parametrize("preset", ["tiny", "base", "mm-tiny", "mm-base", "mm-large"])
def test_our_weights_come_back_bit_equal(preset):
    config = GDinoConfig.preset(preset)
    layout = LAYOUTS["mmdet" if preset.startswith("mm") else "original"]
    shapes = shapes_of(config)
    dtypes = dict.fromkeys(shapes, STORAGE)
    unused = [key for key in shapes if ".swin.layernorm." in key]
    key_map = KeyMap(layout, facts_of_config(config))
    there = plan_from_ours(key_map, shapes, dtypes, None, layout.name)
    assert list(there.dropped) == unused
    theirs = {step.key: step for step in there.steps}
    published = next(shapes for name, other, shapes in PUBLISHED.values() if other == preset)
    optional = ("position_ids", "pooler", "label_enc", "label_embedding")
    assert theirs.keys() == {key for key in published if not any(part in key for part in optional)}

    def read(key):
        return theirs[key].build(lambda name: stored(name, shapes[name]))

    back = plan_to_ours(
        key_map,
        {key: step.shape for key, step in theirs.items()},
        {key: step.dtype for key, step in theirs.items()},
        shapes,
        read,
        preset,
    )
    for step in back.steps:
        if step.key not in unused:
            assert torch.equal(step.build(read), stored(step.key, shapes[step.key])), step.key


@pytest.mark.parametrize("layout", ["original", "mmdet"])
def test_every_line_of_a_table_is_needed(layout):
    make = {"original": original, "mmdet": mmdet}[layout]
    shapes = {**make(SMALL), **(LLMDET_EXTRAS if layout == "mmdet" else {})}
    shapes.update(
        {
            "label_enc.weight": (3, 64),
            "class_embed.0.bias": (1,),
            "transformer.decoder.class_embed.0.bias": (1,),
            "transformer.enc_out_class_embed.bias": (1,),
        }
        if layout == "original"
        else {
            "ema_backbone_norm1_weight": (3,),
            "steps": (),
            "img_sep.weight": (1, 896),
            "language_model.language_backbone.body.model.pooler.dense.weight": (64, 64),
        }
    )
    for share in (0, 1):
        facts = {
            "decoder_layers": SMALL.decoder_layers,
            "backbone_levels": len(SMALL.stages),
            "decoder_bbox_embed_share": share,
            "decoder_cls_embed_share": share,
            "two_stage_bbox_embed_share": share,
        }
        key_map = KeyMap(LAYOUTS[layout], facts)
        used = {id(match[0]) for key in shapes if (match := key_map.row_of(key)) is not None}
        idle = [row.theirs.text for row in key_map.rows if row.theirs is not None and id(row) not in used]
        assert not idle
