"""Claims about the loss: each term equals its formula, and a batch equals its images taken one by one."""

import os

import pytest
import torch

from gdino_hf.model.losses import LossWeights, contrastive_loss, detection_losses, phrase_bank, sigmoid_focal_loss
from gdino_hf.model.targets import prepare_targets

PHRASES = torch.tensor([[-1, 0, 0, -1, 1, -1, -1], [-1, 0, -1, -1, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
# Sums of a few hundred float32 terms near 1.
ROUNDING = 1e-5


def make_weights(**changes):
    values = {
        "class_cost": 2.0,
        "bbox_cost": 5.0,
        "giou_cost": 2.0,
        "class_loss_coefficient": 1.0,
        "bbox_loss_coefficient": 5.0,
        "giou_loss_coefficient": 2.0,
        "contrastive_loss_coefficient": 0.0,
        "contrastive_temperature": 0.07,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "auxiliary_loss": True,
    }
    return LossWeights(**{**values, **changes})


def make_labels(counts, generator):
    return [
        {"class_labels": torch.arange(n) % (2 - image), "boxes": 0.3 + 0.3 * torch.rand(n, 4, generator=generator)}
        for image, n in enumerate(counts)
    ]


def make_predictions(generator, layers=3, queries=6, width=16):
    raw = torch.randn(layers, 2, queries, width, generator=generator).requires_grad_()
    real = torch.nn.functional.pad(MASK, (0, width - 7)) > 0
    boxes = (0.2 + 0.5 * torch.rand(layers, 2, queries, 4, generator=generator)).requires_grad_()
    return raw, raw.masked_fill(~real[:, None], -torch.inf), boxes


def run(labels, logits, boxes, rows=slice(None), weights=None, **changes):
    targets = prepare_targets(labels, PHRASES[rows], MASK[rows])
    return detection_losses(
        weights or make_weights(**changes),
        targets,
        phrase_ids=PHRASES[rows],
        attention_mask=MASK[rows],
        decoder_logits=logits,
        decoder_boxes=boxes,
        encoder_logits=logits[0],
        encoder_boxes=boxes[0],
    )


def test_focal_equals_its_formula_and_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9, dtype=torch.float64, generator=generator).requires_grad_()
    t = torch.rand(4, 9, generator=generator) < 0.3
    mask = torch.ones(4, 9, dtype=torch.bool)
    p = x.sigmoid()
    p_t, alpha_t = torch.where(t, p, 1 - p), torch.where(t, 0.25, 0.75)
    assert torch.allclose(sigmoid_focal_loss(x, t, mask), -alpha_t * (1 - p_t) ** 2 * p_t.log(), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, t, mask), (x,))


def test_minus_infinity_outside_the_mask_gives_no_nan():
    x = torch.tensor([1.0, -torch.inf], requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([True, False]), torch.tensor([True, False]))
    loss.sum().backward()
    assert loss[1] == 0
    assert x.grad[1] == 0
    assert x.grad[0].isfinite()


def test_batch_is_the_box_weighted_mean_of_its_images():
    generator = torch.Generator().manual_seed(1)
    labels, (_, logits, boxes) = make_labels((3, 1), generator), make_predictions(generator)
    _, batch = run(labels, logits, boxes)
    _, one = run(labels[:1], logits[:, :1], boxes[:, :1], slice(0, 1))
    # Taken alone, the second image has a prompt of 4 tokens without padding.
    _, two = run(labels[1:], logits[:, 1:], boxes[:, 1:], slice(1, 2))
    assert batch.keys() == one.keys()
    for name, value in batch.items():
        assert value.item() == pytest.approx((3 * one[name].item() + two[name].item()) / 4, rel=ROUNDING), name


def test_loss_is_the_weighted_sum_and_reaches_everything():
    generator = torch.Generator().manual_seed(2)
    raw, logits, boxes = make_predictions(generator)
    loss, terms = run(make_labels((3, 1), generator), logits, boxes)
    weights = {"ce": 1, "bbox": 5, "giou": 2}
    assert loss.item() == pytest.approx(sum(weights[k.split("_")[1]] * v.item() for k, v in terms.items()), rel=1e-5)
    loss.backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[..., :4] != 0).all()
    assert (boxes.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_images_without_boxes_are_finite_and_differentiable(counts):
    generator = torch.Generator().manual_seed(3)
    raw, logits, boxes = make_predictions(generator)
    loss, _ = run(make_labels(counts, generator), logits, boxes)
    loss.backward()
    assert loss.isfinite()
    assert raw.grad.isfinite().all()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_a_given_positive_map_replaces_the_labels_tokens():
    generator = torch.Generator().manual_seed(4)
    labels = make_labels((1, 0), generator)
    labels[0]["positive_map"] = torch.tensor([[0.0, 0, 0, 0, 1, 0]])
    assert prepare_targets(labels, PHRASES, MASK).positive_maps.tolist() == [[False] * 4 + [True] + [False] * 2]


def test_auxiliary_losses_can_be_switched_off():
    generator = torch.Generator().manual_seed(5)
    labels, (_, logits, boxes) = make_labels((1, 1), generator), make_predictions(generator)
    full, last = run(labels, logits, boxes)[1], run(labels, logits, boxes, auxiliary_loss=False)[1]
    assert set(full) - set(last) == {f"loss_{t}_{i}" for t in ("ce", "bbox", "giou") for i in range(2)}
    assert last["loss_ce"].item() == pytest.approx(full["loss_ce"].item(), rel=ROUNDING)


def test_half_precision_gives_float32_losses():
    generator = torch.Generator().manual_seed(6)
    labels, (_, logits, boxes) = make_labels((2, 1), generator), make_predictions(generator)
    low = logits.bfloat16(), boxes.bfloat16()
    expected, _ = run(labels, low[0].float(), low[1].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = run(labels, *low)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=ROUNDING)


def test_contrastive_equals_its_formula():
    generator = torch.Generator().manual_seed(7)
    regions, phrases = torch.randn(3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    found = contrastive_loss(regions, phrases, torch.tensor([0, 1, 2]), 0.1, same)
    for r, others in enumerate(([1, 3], [0, 2, 3], [1, 3])):
        s = [torch.cosine_similarity(regions[r], phrases[p], dim=0) / 0.1 for p in [r, *others]]
        assert found[r].item() == pytest.approx(-(s[0] - torch.stack(s).logsumexp(0)).item(), rel=1e-4, abs=1e-6)


def test_equal_phrases_have_equal_fingerprints_only():
    ids = torch.tensor([[9, 5, 6, 1, 7, 1, 9], [9, 5, 6, 1, 6, 5, 9]])
    phrases = torch.tensor([[-1, 0, 0, -1, 1, -1, -1], [-1, 0, 0, -1, 1, 1, -1]])
    means, real, prints = phrase_bank(torch.randn(2, 7, 3), phrases, ids)
    assert means.shape == (2, 4, 3)
    assert real.sum().item() == 4
    assert prints[0, 0] == prints[1, 0]
    assert len({prints[0, 0].item(), prints[0, 1].item(), prints[1, 1].item()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]])}, "width or height"),
        ({"boxes": torch.tensor([[5.0, 0.5, 0.1, 0.1]])}, "leaves the image"),
        ({"boxes": torch.tensor([[torch.nan, 0.5, 0.1, 0.1]])}, "not finite"),
        ({"boxes": torch.zeros(1, 5)}, "shape"),
        ({"class_labels": torch.tensor([1])}, r"labels\[1\]\['class_labels'\]\[0\] = 1 is none of the 1 labels"),
        ({"class_labels": torch.tensor([0, 0])}, "one class index per box"),
        ({"class_labels": torch.tensor([0.0])}, "integers"),
    ],
)
def test_bad_labels_are_named(change, message):
    good = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}
    with pytest.raises(ValueError, match=message):
        prepare_targets([good, {**good, **change}], PHRASES, MASK)


def test_missing_labels_are_named():
    with pytest.raises(ValueError, match="0 entries for 2 images"):
        prepare_targets([], PHRASES, MASK)
    with pytest.raises(ValueError, match="has no 'boxes'"):
        prepare_targets([{"class_labels": torch.tensor([0])}] * 2, PHRASES, MASK)


class Toy(torch.nn.Module):
    """A linear layer that predicts logits and boxes, for data-parallel training without a detector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.answer = torch.nn.Linear(5, 7 + 4)

    def forward(self, features, rows):
        logits, boxes = self.answer(features).split([7, 4], dim=-1)
        return logits.masked_fill(MASK[rows][:, None] == 0, -torch.inf)[None], boxes.sigmoid()[None]


def toy_step(rank, world_size, counts, folder):
    """Write the loss and gradient of this process's images to a file."""
    generator = torch.Generator().manual_seed(8)
    labels, features = make_labels(counts, generator), torch.randn(2, 6, 5, generator=generator)
    model, rows = Toy(), slice(0, 2)
    if world_size > 1:
        store = f"file://{folder}/meeting-place"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        model, rows = torch.nn.parallel.DistributedDataParallel(model), slice(rank, rank + 1)
    loss, _ = run(labels[rows], *model(features[rows], rows), rows=rows)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save((loss.detach(), gradient), f"{folder}/{world_size}-{rank}.pt")
    if world_size > 1:
        # A process must not exit while the other still communicates with it.
        torch.distributed.barrier()
        # Freeing the group may wait forever: it joins a thread that needs the interpreter's lock (torch 2.13).
        os._exit(0)


def start_toy(rank, world_size, counts, folder):
    torch.set_num_threads(1)
    toy_step(rank, world_size, counts, folder)


@pytest.mark.parametrize("counts", [(3, 1), (1, 0)])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one(counts, tmp_path, fresh_python):
    call = (
        "import importlib.util, pathlib, sys; spec = importlib.util.spec_from_file_location('toy', sys.argv[1]); "
        "toy = importlib.util.module_from_spec(spec); spec.loader.exec_module(toy); "
        f"toy.start_toy(int(sys.argv[3]), 2, {counts!r}, pathlib.Path(sys.argv[2]))"
    )
    workers = [fresh_python.start(call, __file__, tmp_path, rank) for rank in range(2)]
    assert [worker.wait().returncode for worker in workers] == [0, 0]
    toy_step(0, 1, counts, tmp_path)
    loss, gradient = torch.load(tmp_path / "1-0.pt")
    halves = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    assert sum(half[0] for half in halves).item() / 2 == pytest.approx(loss.item(), rel=ROUNDING)
    for half in halves:
        assert torch.allclose(half[1], gradient, rtol=1e-4, atol=ROUNDING)


def test_compiled_loss_breaks_only_at_the_matching_and_agrees():
    generator = torch.Generator().manual_seed(10)
    labels, (_, logits, boxes) = make_labels((3, 2), generator), make_predictions(generator)
    expected, _ = run(labels, logits, boxes)
    weights = make_weights()
    torch._dynamo.reset()
    # A break is listed once for each function that contains it.
    reasons = []

    def eager(graph, examples):
        if graph.compile_subgraph_reason.graph_break:
            reasons.append(graph.compile_subgraph_reason.reason)
        return graph.forward

    found, _ = torch.compile(run, backend=eager)(labels, logits, boxes, weights=weights)
    assert found.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert reasons
    assert all("hungarian_match" in reason for reason in reasons)
    torch._dynamo.reset()
