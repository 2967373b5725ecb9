"""Random weights of a small EfficientNet-Lite, named as in its packages."""

import torch


def add_convolution(weights, name, norm, shape):
    weights[f"{name}.weight"] = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
    weights[f"{norm}.weight"], weights[f"{norm}.bias"] = torch.rand(shape[0]) + 0.5, torch.randn(shape[0])
    weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"] = torch.randn(shape[0]), torch.rand(shape[0]) + 0.5


# (outputs, expansion, kernel) of each block; the second of a stage has a shortcut.
BLOCKS = [(4, 1, 3), (6, 2, 3), (6, 2, 3), (8, 2, 5), (10, 2, 3), (12, 2, 5), (14, 2, 5), (16, 2, 3)]
STARTS = {0: 1, 1: 2, 3: 2, 4: 2, 5: 1, 6: 2, 7: 1}


def small_weights(classes=5):
    """Weights named as in the packages, of a small network with seven stages."""
    torch.manual_seed(0)
    weights, inputs = {}, 8
    add_convolution(weights, "_conv_stem", "_bn0", (8, 3, 3, 3))
    for place, (outputs, expansion, kernel) in enumerate(BLOCKS):
        prefix, middle = f"_blocks.{place}.", inputs * expansion
        if expansion > 1:
            add_convolution(weights, f"{prefix}_expand_conv", f"{prefix}_bn0", (middle, inputs, 1, 1))
        add_convolution(weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1", (middle, 1, kernel, kernel))
        add_convolution(weights, f"{prefix}_project_conv", f"{prefix}_bn2", (outputs, middle, 1, 1))
        inputs = outputs
    add_convolution(weights, "_conv_head", "_bn1", (20, inputs, 1, 1))
    weights["_fc.weight"], weights["_fc.bias"] = torch.randn(classes, 20), torch.randn(classes)
    return weights
