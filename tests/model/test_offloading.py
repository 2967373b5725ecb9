"""Claims about models whose weights are elsewhere: offloaded by accelerate, spread over devices, or replicas."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from gdino_hf import GDinoForObjectDetection
from random_models import make_random_model

# The layers of the fusion are called instead of folded, which changes the order of sums.
ROUNDING = 1e-4
FIELDS = ("logits", "pred_boxes")
LABELS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]


@pytest.fixture
def config(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.encoder_layers = 1
    return config


@pytest.fixture
def inputs(tiny_tokenizer):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, **tiny_tokenizer("cat. dog.", return_tensors="pt")}


def assert_same(found, wanted):
    for name in FIELDS:
        finite = wanted[name].isfinite()
        assert torch.equal(found[name].isfinite(), finite), name
        torch.testing.assert_close(found[name][finite], wanted[name][finite], rtol=0, atol=ROUNDING, msg=name)


def blocks(model):
    """The modules between which a device map may split the model, down to single layers."""
    names = []
    for name, module in model.named_children():
        if name == "model":
            for inner, part in module.named_children():
                deeper = [f"model.{inner}.{x}" for x, _ in part.named_children()]
                names += deeper if inner in ("encoder", "decoder", "backbone") and deeper else [f"model.{inner}"]
        else:
            names.append(name)
    expanded = []
    for name in names:
        module = model.get_submodule(name)
        expanded += [f"{name}.{x}" for x, _ in module.named_children()] if name.endswith(".layers") else [name]
    return [name for name in expanded if any(True for _ in model.get_submodule(name).parameters())]


def device_map(model, names, offloaded):
    rest = {name: "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    return {**{f"model.{name}": "cpu" for name in rest}, **{x: "disk" if x in offloaded else "cpu" for x in names}}


@pytest.mark.parametrize(
    ("changes", "step"), [({}, 1), ({"class_head": "cosine", "fusion_type": "gated"}, 3), ({"two_stage": False}, 3)]
)
def test_disk_offload_at_every_split_changes_nothing(config, inputs, tmp_path, changes, step):
    """At every split of one model, and at some of those whose other parts are the same."""
    for name, value in {**changes, "decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}.items():
        setattr(config, name, value)
    reference = make_random_model(config)
    names = blocks(reference)
    assert len(names) > 10
    with torch.no_grad():
        wanted = reference(**inputs)
        for index, name in [*enumerate(names)][::step]:
            model = copy.deepcopy(reference)
            offloaded = {*names[: index + 1]} if index % 2 else {name}
            dispatch_model(
                model, device_map(model, names, offloaded), offload_dir=tmp_path / str(index), force_hooks=True
            )
            assert all(parameter.device.type == "meta" for parameter in model.get_submodule(name).parameters())
            assert_same(model(**inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_all_weights_may_be_offloaded_layer_by_layer(config, inputs, tmp_path, offload, dtype):
    reference = make_random_model(config).to(dtype)
    model = copy.deepcopy(reference)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    with torch.no_grad():
        found, wanted = model(**inputs, output_attentions=True), reference(**inputs)
        assert found.pred_boxes.dtype == torch.float32
        if dtype == torch.float32:
            assert_same(found, wanted)
        images = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        again = model(image_features=images, text_features=text)
        assert torch.equal(again.pred_boxes, model(**inputs).pred_boxes)


def test_saved_folders_load_with_a_device_map(config, inputs, tmp_path):
    reference = make_random_model(config)
    reference.save_pretrained(tmp_path / "model")
    names = blocks(reference)
    with torch.no_grad():
        wanted = reference(**inputs)
        for offloaded in (names, names[::2], ["bbox_embed", "class_embed"]):
            model = GDinoForObjectDetection.from_pretrained(
                tmp_path / "model",
                device_map=device_map(reference, names, offloaded),
                offload_folder=tmp_path / f"offload{len(offloaded)}",
            )
            assert_same(model(**inputs), wanted)


def test_every_layer_that_holds_weights_is_called(config, inputs):
    """A weight that is read past its layer's call would be missing under ZeRO-3, offloading or pruning."""
    model, called = make_random_model(config), set()
    core = model.model
    # Parameters that a module reads in its own forward belong to that module's call.
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    model(**inputs)
    holders = {name for name, x in model.named_modules() if next(x.parameters(recurse=False), None) is not None}
    unused = {name.rpartition(".")[0] for name in core.unused_parameters}
    left = {name for name in holders - called if name.removeprefix("model.") not in unused}
    assert not left


def test_no_module_travels_as_an_argument(config, inputs):
    def inside(value):
        if isinstance(value, (list, tuple)):
            return any(inside(x) for x in value)
        return any(inside(x) for x in value.values()) if isinstance(value, dict) else isinstance(value, nn.Module)

    model = make_random_model(config)
    travelled = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: travelled.append(name) if inside([args, kwargs]) else None,
            with_kwargs=True,
        )
    model.train()(**inputs, labels=LABELS)
    assert not travelled


class Replica:
    """A replica as nn.DataParallel makes it: shallow copies of all modules whose parameters are plain tensors.

    Afterwards the original's weights are taken away, so a module that holds on to an original fails.
    """

    def __init__(self, model):
        modules = list(model.modules())
        copies = {id(module): module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            replica = copies[id(module)]
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else copies[id(child)]
                setattr(replica, name, None if child is None else copies[id(child)])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.detach().clone())
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    replica._buffers[name] = buffer.clone()
        self.model = copies[id(model)]
        model.to("meta")


def test_replicas_of_data_parallel_use_their_own_weights(config, inputs):
    reference = make_random_model(config).train()
    torch.manual_seed(0)
    wanted = reference(**inputs, labels=LABELS)
    replica = Replica(copy.deepcopy(reference)).model
    torch.manual_seed(0)
    found = replica(**inputs, labels=LABELS)
    assert_same(found, wanted)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-4)


def tensors_only(value):
    """Whether DataParallel can gather a value: tensors in tuples, lists and dictionaries."""
    if isinstance(value, dict):
        return all(tensors_only(x) for x in value.values())
    return all(map(tensors_only, value)) if isinstance(value, (list, tuple)) else isinstance(value, torch.Tensor)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_hold_tensors_only_and_the_same_terms_whatever_the_labels(config, inputs, training):
    model = make_random_model(config).train(training)
    none = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    outputs = [model(**inputs, labels=labels, output_hidden_states=True) for labels in (LABELS, none)]
    assert list(outputs[0].loss_dict) == list(outputs[1].loss_dict)
    for output in (*outputs, model.model(**inputs, labels=LABELS, output_attentions=True)):
        assert tensors_only(output)


def test_a_parameter_that_a_map_sends_to_disk_alone_stays_in_memory(config, inputs, tmp_path, caplog):
    reference = make_random_model(config)
    reference.save_pretrained(tmp_path / "model")
    devices = {**device_map(reference, blocks(reference), ["bbox_embed"]), "model.level_embed": "disk"}
    given = dict(devices)
    with torch.no_grad():
        wanted = reference(**inputs)
        model = GDinoForObjectDetection.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
        )
        assert {x.device.type for x in model.bbox_embed.parameters()} == {"meta"}
        assert model.model.level_embed.device.type == "cpu"
        assert_same(model(**inputs), wanted)
    assert devices == given
    assert caplog.text.count("'model.level_embed' on disk without its module") == 1


def test_optimizing_a_model_that_accelerate_moves_is_refused(config, tmp_path):
    model = make_random_model(config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\d+ modules have its hooks, .*without device_map"):
        model.optimize_for_inference()
    assert not model._optimized
    assert not hasattr(make_random_model(config).optimize_for_inference(), "_hf_hook")


def test_labels_that_data_parallel_could_not_split_are_explained(config, inputs):
    two = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    replica = Replica(make_random_model(config).train()).model
    # What a replica gets of a batch of four images: two images, and an entry of each image's boxes.
    with pytest.raises(ValueError, match=r"DataParallel gave a replica 4 entries of labels for 2 images.*torchrun"):
        replica(**two, labels=LABELS * 4)
    assert replica(**two, labels=LABELS * 2).loss.isfinite()
