"""Time transformers' own detectors with and without `gdino_hf.use_fast_attention`, alternating, and print a table.

    python tests/benchmarks/bench_fast_attention.py [--threads 2] [--repeats 5] [--only deformable]

Models have random weights and their published shapes and input sizes. The column "difference" is the largest difference
over all outputs. "largest" is the largest output, for comparison: Grounding DINO's raw logits reach 50, where float32
itself is accurate to 4e-6.
"""

import argparse
import copy
import statistics
import time

import torch
import transformers

import gdino_hf


def grounding_dino():
    backbone = transformers.SwinConfig(window_size=7, out_features=["stage2", "stage3", "stage4"])
    config = transformers.GroundingDinoConfig(backbone_config=backbone)
    ids = torch.tensor([[101, 4937, 1012, 6556, 2491, 1012, 102]])
    return transformers.GroundingDinoForObjectDetection(config), {"size": (800, 1066), "input_ids": ids}


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        use_timm_backbone=False,
        backbone=None,
    )
    return transformers.DeformableDetrForObjectDetection(config), {"size": (800, 1066)}


def rt_detr(kind="RTDetr"):
    config = getattr(transformers, f"{kind}Config")()
    return getattr(transformers, f"{kind}ForObjectDetection")(config), {"size": (640, 640)}


def mask2former():
    backbone = transformers.SwinConfig(window_size=7, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(backbone_config=backbone)
    return transformers.Mask2FormerForUniversalSegmentation(config), {"size": (800, 1066)}


MODELS = {
    "Grounding DINO-T": grounding_dino,
    "Deformable DETR R50": deformable_detr,
    "RT-DETR R50": rt_detr,
    "RT-DETRv2 R50": lambda: rt_detr("RTDetrV2"),
    "Mask2Former Swin-T": mask2former,
}


def largest_difference(ours, theirs):
    """Return the largest difference over the outputs that both have, and the largest output."""
    worst = largest = 0.0
    for name in ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits"):
        if theirs.get(name) is not None:
            finite = theirs[name].isfinite()
            worst = max(worst, (ours[name][finite] - theirs[name][finite]).abs().max().item())
            largest = max(largest, theirs[name][finite].abs().max().item())
    return worst, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="run only models whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, medians of {args.repeats}")
    print(f"{'model':24}{'size':>12}{'stock s':>10}{'ours s':>10}{'wall':>8}{'CPU':>8}{'difference':>13}{'largest':>9}")
    for name, make in MODELS.items():
        if args.only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        stock, inputs = make()
        size = inputs.pop("size")
        inputs["pixel_values"] = torch.randn(1, 3, *size)
        stock = stock.eval()
        sides = {"stock": stock, "ours": gdino_hf.use_fast_attention(copy.deepcopy(stock))}
        wall, cpu = {key: [] for key in sides}, {key: [] for key in sides}
        with torch.inference_mode():
            outputs = {key: model(**inputs) for key, model in sides.items()}
            for _ in range(args.repeats):
                for key, model in sides.items():
                    start, start_cpu = time.perf_counter(), time.process_time()
                    model(**inputs)
                    wall[key].append(time.perf_counter() - start)
                    cpu[key].append(time.process_time() - start_cpu)
        seconds = {key: statistics.median(values) for key, values in wall.items()}
        work = {key: statistics.median(values) for key, values in cpu.items()}
        difference, largest = largest_difference(outputs["ours"], outputs["stock"])
        print(
            f"{name:24}{size[0]:>7}x{size[1]:<4}{seconds['stock']:10.3f}{seconds['ours']:10.3f}"
            f"{seconds['stock'] / seconds['ours']:7.2f}x{work['stock'] / work['ours']:7.2f}x"
            f"{difference:13.1e}{largest:9.1f}"
        )


if __name__ == "__main__":
    main()
