"""Time the C sampling operator against grid_sample, alternating in one process, and print medians and ratios.

    python tests/benchmarks/bench_msda_cpu.py [--threads 2] [--repeats 7] [--json FILE]

The reference is one grid_sample per level, followed by the weighted sum. Encoder shapes sample a few pixels around each
token on every level; decoder shapes sample at random locations.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from gdino_hf.model import msda_c

SHAPES = {
    "encoder 800x1333": (1, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, None),
    "nano encoder, batch 8": (8, [(40, 40), (20, 20), (10, 10), (5, 5)], 8, 16, 4, None),
    "900 queries 800x1333": (1, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, 900),
    "nano 150 queries, batch 8": (8, [(40, 40), (20, 20), (10, 10), (5, 5)], 8, 16, 4, 150),
}


def reference(value, spatial_shapes, sampling_locations, attention_weights):
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    sampled = []
    for level, tokens in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, width, *spatial_shapes[level])
        grid = (2 * sampling_locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid.to(image.dtype), align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(spatial_shapes) * points)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * weights.to(value.dtype)).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).contiguous()


class Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, sizes, locations, weights):
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes = sizes
        return msda_c.load().forward(value, sizes, locations, weights)

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights = ctx.saved_tensors
        grads = msda_c.load().backward(grad, value, ctx.sizes, locations, weights)
        return grads[0], None, grads[1], grads[2]


def make_inputs(batch, spatial_shapes, heads, width, points, queries, dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, sum(h * w for h, w in spatial_shapes), heads, width, generator=generator).to(dtype)
    sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=torch.float32)
    if queries is None:
        centres = [
            torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in spatial_shapes
        ]
        centres = torch.cat([c.flatten(0, 1) for c in centres])[None, :, None, None, None]
        offsets = 3 * torch.randn(batch, centres.shape[1], heads, len(sizes), points, 2, generator=generator)
        locations = centres + offsets / sizes[:, None]
    else:
        locations = torch.rand(batch, queries, heads, len(sizes), points, 2, generator=generator)
    weights = torch.rand(locations.shape[:-1], generator=generator).flatten(3).softmax(-1).view(locations.shape[:-1])
    return value, locations.contiguous(), weights


def clock(function):
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def bandwidth_limit(value, locations, backward):
    """Milliseconds that moving the data takes without any computation.

    Each sample reads four corners of Dh float32 values from a block of one head's values, which the cache holds at
    least in part. Values, locations, weights and output pass through memory once. The backward pass reads the corners
    again and reads and writes their gradients. The speeds are measured by copies of a head's size and of 256 MB.
    """
    batch, tokens, heads, width = value.shape
    in_cache, in_memory = copy_speed(tokens * width), copy_speed(2**26)
    corners = 4 * locations.numel() // 2 * width * 4
    streams = value.numel() * value.element_size() + locations.numel() * 6
    streams += batch * locations.shape[1] * heads * width * value.element_size()
    return 1e3 * (corners / in_cache + streams / in_memory) * (1 if not backward else 1 + 3)


def copy_speed(numbers):
    """Bytes read and written per second by copies of this many float32 numbers, the best of several runs."""
    source = torch.ones(torch.get_num_threads(), numbers)
    target = torch.empty_like(source)
    repeats = max(1, 2**24 // source.numel())

    def copies():
        for _ in range(repeats):
            target.copy_(source)

    copies()
    return 2 * 4 * source.numel() * repeats / (min(clock(copies) for _ in range(7)) / 1e3)


def measure(repeats, **functions):
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(clock(function))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", choices=("baseline", "avx2", "avx512"), default="avx512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", default="", help="run only shapes whose name contains this")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = msda_c.load()
    if library is None:
        raise SystemExit(
            "The C library is not built: run kernels/msda/cpu/build.sh, or install the package with a C compiler."
        )
    library.limit_isa(args.isa)
    print(f"{library.path}: {library.isa}, {args.threads} threads, medians of {args.repeats}, milliseconds")
    print(f"{'shape':28}{'dtype':10}{'pass':10}{'grid_sample':>12}{'c':>9}{'ratio':>8}{'limit':>9}")
    rows = []
    for name, shape in SHAPES.items():
        if args.only not in name:
            continue
        flat = [size for pair in shape[1] for size in pair]
        for dtype in (getattr(torch, word) for word in args.dtypes.split(",")):
            value, locations, weights = make_inputs(*shape, dtype)
            with torch.no_grad():
                forward = measure(
                    args.repeats,
                    grid_sample=lambda: reference(value, shape[1], locations, weights),
                    c=lambda: library.forward(value, flat, locations, weights),
                )
            inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
            grad = torch.randn_like(library.forward(value, flat, locations, weights))
            both = measure(
                args.repeats,
                grid_sample=lambda: torch.autograd.grad(reference(value, shape[1], *inputs[1:]), inputs, grad),
                c=lambda: torch.autograd.grad(Operator.apply(value, flat, *inputs[1:]), inputs, grad),
            )
            for label, times in (("forward", forward), ("both", both)):
                ratio = times["grid_sample"] / times["c"]
                limit = bandwidth_limit(value, locations, label == "both")
                row = {"shape": name, "dtype": str(dtype)[6:], "pass": label, **times, "ratio": ratio, "limit": limit}
                rows.append(row)
                print(
                    f"{name:28}{str(dtype)[6:]:10}{label:10}{times['grid_sample']:12.2f}{times['c']:9.2f}{ratio:7.1f}x"
                    f"{limit:9.2f}"
                )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"isa": library.isa, "threads": args.threads, "repeats": args.repeats, "rows": rows}, file)


if __name__ == "__main__":
    main()
