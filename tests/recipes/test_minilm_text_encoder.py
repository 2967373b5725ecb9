"""Conversion of the MiniLM encoder: an ONNX file written byte by byte becomes the encoder it was written from."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from gdino_hf.recipes.minilm_text_encoder import convert, main
from gdino_hf.recipes.onnx_file import read_onnx

ROOT = "model.0.auto_model."
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog", "##s", "red"]


def varint(number):
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number, value):
    """Write one field of a protocol buffer: an integer, a float (32 bits), text or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, values, raw=True):
    values = np.asarray(values, dtype=np.float32)
    dims = b"".join(field(1, side) for side in values.shape)
    data = field(9, values.tobytes()) if raw else field(4, values.tobytes())
    return dims + field(2, 1) + data + field(8, name)


def node(kind, name, inputs, outputs, attributes=b""):
    names = b"".join(field(1, each) for each in inputs) + b"".join(field(2, each) for each in outputs)
    return names + field(3, name) + field(4, kind) + attributes


def write_onnx(path, encoder):
    """Write a BERT encoder as PyTorch's exporter does: matrices transposed, under numbers."""
    nodes, tensors = [], []
    for key, value in encoder.state_dict().items():
        if value.ndim == 2 and "embeddings" not in key:
            number, module = f"onnx::MatMul_{len(tensors)}", key.removesuffix(".weight").replace("encoder.layer.", "")
            path_in_graph = "/model.0/auto_model/encoder/layer." + module.replace(".", "/")
            nodes.append(node("MatMul", f"{path_in_graph}/MatMul", ["x", number], ["y"]))
            tensors.append(tensor(number, value.numpy().T))
        else:
            tensors.append(tensor(ROOT + key, value.numpy(), raw=value.ndim > 1))
    width = encoder.config.hidden_size // encoder.config.num_attention_heads
    root = field(5, field(1, "value") + field(5, tensor("", np.float32(width**0.5))))
    nodes.append(node("Constant", "/Constant", [], ["root"], root))
    nodes.append(node("Div", "/model.0/auto_model/encoder/layer.0/attention/self/Div", ["scores", "root"], ["y"]))
    epsilon = field(5, field(1, "axis") + field(3, 1)) + field(5, field(1, "epsilon") + field(2, 1e-12))
    nodes.append(node("LayerNormalization", "/norm", ["x", "w", "b"], ["y"], epsilon))
    graph = b"".join(field(1, each) for each in nodes) + b"".join(field(5, each) for each in tensors)
    path.write_bytes(field(1, 8) + field(2, "pytorch") + field(7, graph))
    return path


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def test_every_weight_comes_back(encoder, tmp_path):
    found = convert(write_onnx(tmp_path / "model.onnx", encoder))
    state = encoder.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())
    for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
        assert getattr(found.config, name) == getattr(encoder.config, name)
    assert found.config.layer_norm_eps == 1e-12
    tokens = torch.tensor([[2, 6, 5, 3], [2, 7, 8, 3]])
    with torch.no_grad():
        assert torch.equal(found(tokens).last_hidden_state, encoder(tokens).last_hidden_state)


def test_the_command_writes_encoder_and_tokenizer(encoder, vocabulary, tmp_path, capsys):
    source = write_onnx(tmp_path / "model.onnx", encoder)
    assert main([str(source), str(vocabulary), str(tmp_path / "out")]) == 0
    assert f"{sum(p.numel() for p in encoder.parameters()):,} parameters" in capsys.readouterr().out
    loaded = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    assert torch.equal(loaded.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Red cats.").input_ids
    assert [WORDS[number] for number in ids] == ["[CLS]", "red", "cat", "##s", ".", "[SEP]"]


def test_another_vocabulary_is_refused(encoder, vocabulary, tmp_path):
    vocabulary.write_text("\n".join([*WORDS, "hat"]))
    source = write_onnx(tmp_path / "model.onnx", encoder)
    with pytest.raises(ValueError, match="has 11 entries, but the encoder has 10"):
        main([str(source), str(vocabulary), str(tmp_path / "out")])


def test_a_tensor_of_no_parameter_is_refused(encoder, tmp_path):
    path = write_onnx(tmp_path / "model.onnx", encoder)
    extra = field(7, field(5, tensor("other.weight", np.ones((2, 2)))))
    path.write_bytes(extra)
    with pytest.raises(ValueError, match=r"other\.weight.*belong to no parameter"):
        convert(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_is_refused(share, encoder, tmp_path):
    path = write_onnx(tmp_path / "model.onnx", encoder)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="is not an ONNX file"):
        read_onnx(path)


def test_text_and_tensors_stored_elsewhere_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("a text file\n")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        read_onnx(path)
    path.write_bytes(field(7, field(5, field(1, 4) + field(2, 1) + field(8, "outside"))))
    with pytest.raises(ValueError, match="'outside' is not stored inside the file"):
        read_onnx(path)
    path.write_bytes(field(7, field(5, field(1, 1) + field(2, 16) + field(8, "bfloat") + field(9, b"\0\0"))))
    with pytest.raises(ValueError, match="dtype 16 of ONNX"):
        read_onnx(path)
