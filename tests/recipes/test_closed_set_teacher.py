"""The closed-set teacher of gdino-nano's encoder, on small generated heads and features."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gdino_hf.recipes.closed_set_teacher import (
    DETECTOR_FILE,
    ClosedSetHead,
    dense_loss,
    same_weights,
    start_from_classifier,
)


def test_head_computes_scores_and_boxes_of_each_cell():
    # One class and three distances per side. Channel 0 is the class logit; channel 1 selects distance 1 on every side.
    weight = torch.zeros(1 + 4 * 3, 2)
    weight[0, 0] = 1.0
    weight[[2, 5, 8, 11], 1] = 100.0
    head = ClosedSetHead([(weight, torch.zeros(len(weight)))], num_classes=1)
    maps = torch.zeros(1, 5, 2, 4)  # three channels of the pyramid before the two of the head
    maps[0, 3, 1, 2] = 2.0
    maps[0, 4] = 1.0
    scores, boxes = head([maps])
    assert scores.shape == (1, 8, 1)
    cell = 1 * 4 + 2
    assert scores[0, cell, 0].item() == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert scores[0, 0, 0].item() == pytest.approx(0.5)
    # Centre (2.5, 1.5) in a map of 4 x 2 cells, one cell to every side, clipped at the lower edge.
    torch.testing.assert_close(boxes[0, cell], torch.tensor([2.5 / 4, 1.25 / 2, 2 / 4, 1.5 / 2]))


def test_head_is_read_from_the_backbone_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="head-features"):
        ClosedSetHead.from_pretrained(tmp_path)
    layers = {f"p{level}": (torch.randn(6, 4), torch.randn(6)) for level in (3, 4)}
    tensors = {
        f"{level}.{name}": x for level, pair in layers.items() for name, x in zip(("weight", "bias"), pair, strict=True)
    }
    save_file(tensors, tmp_path / DETECTOR_FILE, {"num_classes": "2"})
    head = ClosedSetHead.from_pretrained(tmp_path)
    assert (head.num_classes, head.num_levels) == (2, 2)
    for level, pair in enumerate(layers.values()):
        assert all(torch.equal(a, b) for a, b in zip(head.layer(level), pair, strict=True))
    assert not list(head.parameters())


def dense_case():
    """Two images, four cells of which three have a teacher, and five tokens: [CLS], labels, [SEP] and padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(2, 4, 8, generator=generator),
        "boxes": 0.3 + 0.4 * torch.rand(2, 4, 4, generator=generator),
        "teacher_scores": torch.rand(2, 3, 5, generator=generator),
        "teacher_boxes": 0.3 + 0.4 * torch.rand(2, 3, 4, generator=generator),
        "phrase_classes": torch.tensor([[4, 1, -1], [2, -1, 0]]),
        "phrase_ids": torch.tensor([[-1, 0, 1, -1, -1], [-1, 0, 1, 2, -1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    }


def test_dense_loss_equals_its_formula():
    from gdino_hf.model.box_ops import cxcywh_to_xyxy, generalized_box_iou

    case = dense_case()
    ce = bbox = giou = total = 0.0
    for image in range(2):
        for cell in range(3):
            best = 0.0
            for token in range(5):
                phrase = case["phrase_ids"][image, token].item()
                name = case["phrase_classes"][image, phrase].item() if phrase >= 0 else None
                if not case["attention_mask"][image, token] or name == -1:
                    continue
                wanted = 0.0 if name is None else case["teacher_scores"][image, cell, name].item()
                best = max(best, wanted)
                p = case["logits"][image, cell, token].sigmoid().item()
                ce -= (wanted - p) ** 2 * (wanted * math.log(p) + (1 - wanted) * math.log(1 - p))
            total += best
            if best > 0.05:
                a, b = case["boxes"][image, cell], case["teacher_boxes"][image, cell]
                bbox += best * (a - b).abs().sum().item()
                giou += best * (1 - generalized_box_iou(cxcywh_to_xyxy(a)[None], cxcywh_to_xyxy(b)[None]).item())
    loss = dense_loss(**case)
    for got, expected in ((loss.ce, ce), (loss.bbox, bbox), (loss.giou, giou)):
        assert got.item() == pytest.approx(expected / total, rel=1e-5)


def test_dense_loss_ignores_other_tokens_and_cells():
    case = dense_case()
    case["logits"][:, :, 5:] = -torch.inf  # outside every prompt
    case["logits"].requires_grad_(True)
    case["boxes"].requires_grad_(True)
    loss = dense_loss(**case)
    (loss.ce + loss.bbox + loss.giou).backward()
    gradient = case["logits"].grad
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 3] == 0).all()  # the cell without a teacher
    assert (case["boxes"].grad[:, 3] == 0).all()
    assert (gradient[0, :, 4] == 0).all()  # padding
    assert (gradient[1, :, 2] == 0).all()  # the label the teacher does not know
    assert (gradient[:, :3, 0] != 0).all()  # [CLS] is trained towards a score of 0


class Projections(torch.nn.Module):
    """The modules that `start_from_classifier` initializes."""

    def __init__(self, width: int, channels: int, hidden: int, levels: int) -> None:
        super().__init__()
        kernels = [1] * (levels - 1) + [3]
        self.input_proj_vision = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(channels, width, kernel, padding=kernel // 2)) for kernel in kernels
        )
        self.text_projection = torch.nn.Linear(hidden, width)
        self.enc_output = torch.nn.Linear(width, width)


@torch.no_grad()
def test_projections_start_with_the_teachers_logits():
    """The coarse level has the fine level's features, rotated: a text token fits both, up to the scale of its class."""
    generator = torch.Generator().manual_seed(0)
    width, hidden, classes = 6, 40, 4
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    stretch = torch.tensor([3.0, 1.0, 0.5, 2.0, 1.5, 0.7])
    fine = stretch[:, None, None] * torch.randn(1, width, 12, 12, generator=generator) + 1.0
    coarse = torch.einsum("ij,bjhw->bihw", turn, fine)
    weight = torch.randn(classes + 4, width, generator=generator)
    head = ClosedSetHead([(weight, torch.zeros(len(weight))), (weight @ turn.T, torch.zeros(len(weight)))], classes)
    pyramid = torch.randn(1, 3, 12, 12, generator=generator)  # further channels before those of the head
    maps = [torch.cat((pyramid, x), dim=1) for x in (fine, coarse)]
    tokens = torch.randn(1, classes + 2, hidden, generator=generator)
    text = SimpleNamespace(phrase_ids=torch.tensor([[-1, *range(classes), -1]]))
    part = Projections(width, width + 3, hidden, levels=3)
    model = SimpleNamespace(model=part, config=SimpleNamespace(d_model=width))
    start_from_classifier(model, head, maps, text, tokens, ridge=1e-8)

    labels = part.text_projection(tokens)[0, 1:-1]
    centered = fine[0].flatten(1) - fine[0].flatten(1).mean(dim=1, keepdim=True)
    wanted = (weight[:classes] - weight[:classes].mean(dim=0)) @ centered
    for level in range(2):
        product = labels @ part.input_proj_vision[level](maps[level])[0].flatten(1)
        # Each class keeps its direction, but all classes get the same scale.
        torch.testing.assert_close(F.cosine_similarity(product, wanted, dim=1), torch.ones(classes), rtol=0, atol=1e-4)
        torch.testing.assert_close(product.std(dim=1), torch.full((classes,), width**0.5), rtol=0.02, atol=0)
    extra = part.input_proj_vision[2](maps[1])
    torch.testing.assert_close(extra, part.input_proj_vision[1](maps[1]))


def test_weights_are_the_same_but_for_rounding_to_float16():
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(3, 4))
    second = torch.nn.Sequential(torch.nn.Linear(3, 4))
    assert not same_weights(first, second)
    second.load_state_dict({name: value.half().float() for name, value in first.state_dict().items()})
    assert same_weights(first, second)
    with torch.no_grad():
        second[0].weight[0, 0] *= 1.01
    assert not same_weights(first, second)
    assert not same_weights(first, torch.nn.Sequential(torch.nn.Linear(3, 5)))
    assert not same_weights(first, torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False)))
