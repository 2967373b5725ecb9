"""Two processes train like one."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from gdino_hf.cli import main
from rank_processes import as_a_launcher_does, free_address

# Summing two halves of a batch rounds differently from summing the whole, and group normalization over a single
# position amplifies that: changing pixels by 1e-7 changes these gradients by 2e-4. A wrong mean is off by a tenth.
ROUNDING = 1e-3
# AdamW divides by the root of squared gradients, so rounding matters where gradients are nearly zero.
CURVE_ROUNDING = 1e-4

WORKER = textwrap.dedent(
    """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from gdino_hf import GDinoForObjectDetection

    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    case = torch.load(folder + "/case.pt", weights_only=True)
    model = GDinoForObjectDetection.from_pretrained(folder).train()
    wrapped = DistributedDataParallel(model)
    mine = {name: value[rank, None] for name, value in case["inputs"].items()}
    loss = wrapped(**mine, labels=[case["labels"][rank]]).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": total / 2, "gradients": gradients}, folder + "/result.pt")
    dist.destroy_process_group()
    """
)


def test_two_processes_give_the_single_process_loss_and_gradients(tiny_model, tiny_tokenizer, tmp_path, fresh_python):
    model = copy.deepcopy(tiny_model)
    # Turn off everything random, which would differ between the processes.
    model.config.num_denoising_queries = 0
    model.config.text_config.hidden_dropout_prob = model.config.text_config.attention_probs_dropout_prob = 0.0
    model.config.backbone_config.drop_path_rate = 0.0
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    text = tiny_tokenizer(["cat. remote control.", "dog. hat. cup."], padding=True, return_tensors="pt")
    case = {
        "inputs": {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator), **text},
        # With unequal numbers of boxes, a mean of the processes' means would be wrong.
        "labels": [
            {"class_labels": torch.tensor([1, 0, 1]), "boxes": 0.3 + 0.2 * torch.rand(3, 4, generator=generator)},
            {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])},
        ],
    }
    torch.save(case, tmp_path / "case.pt")
    address = free_address()
    workers = [fresh_python.start(WORKER, tmp_path, rank, environment=address) for rank in range(2)]
    for done in [worker.wait() for worker in workers]:
        assert done.returncode == 0, done.stderr[-2000:]

    single = type(model).from_pretrained(tmp_path).train()
    loss = single(**case["inputs"], labels=case["labels"]).loss
    loss.backward()
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=0)
    expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
    assert expected.keys() == result["gradients"].keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            result["gradients"][name] / scale,
            gradient / scale,
            rtol=0,
            atol=ROUNDING,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def logged(folder, name):
    with (folder / "log.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line[name]]


def launch(fresh_python, options):
    # Without a GPU, --multi_gpu starts several processes, and --use_cpu makes them communicate through gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "-m", "gdino_hf", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "more"),
    [
        (as_a_launcher_does, []),
        (as_a_launcher_does, ["--streaming", "--lora-rank", "2"]),
        pytest.param(launch, [], marks=pytest.mark.soak),
    ],
    ids=["rows", "stream and adapters", "rows, accelerate launch"],
)
def test_two_processes_under_accelerate_give_the_single_process_curve(
    options, start, more, drawn, tmp_path, one_thread, fresh_python
):
    # With 10 images in batches of 4, the third step of an epoch has only two images.
    content = json.loads((drawn / "train.json").read_text())
    content["images"] = content["images"][:10]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] < 10]
    (drawn / "train.json").write_text(json.dumps(content))
    options = [*options, *more]
    # With random weights, the slightest rounding would select other queries.
    options = [*options, "--model", "nano", "--image-size", "64", "--learning-rate", "1e-4", "--max_steps", "4"]
    options += ["--eval_strategy", "steps", "--eval_steps", "2", "--ema_decay", "0.9"]
    # Denoising noise and dropout would differ between processes; frozen groups stay in eval mode.
    options += ["--denoising-queries", "0", "--freeze", "text", "backbone", "--seed", "3"]
    assert main([*options, "--name", "one", "--batch-size", "4"]) == 0
    start(fresh_python, [*options, "--name", "two", "--batch-size", "2"])
    one, two = (tmp_path / "runs" / "train" / name for name in ("one", "two"))
    assert sorted(path.name for path in one.parent.iterdir()) == ["one", "two"]
    for name in ("loss", "loss_ce", "loss_giou_enc"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=CURVE_ROUNDING), name
    assert len(logged(two, "eval_AP50")) == 2
