"""Claims about denoising queries: their attention, how far boxes move, and which labels they get."""

import pytest
import torch

from gdino_hf.model.box_ops import cxcywh_to_xyxy
from gdino_hf.model.denoising import jitter_boxes, make_denoising_queries
from gdino_hf.model.targets import prepare_targets

PHRASES = torch.tensor([[-1, 0, 0, -1, 1, -1, -1], [-1, 0, -1, -1, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
TEXT = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(9))


def make(counts=(3, 1), seed=0, **changes):
    labels = [
        {"class_labels": torch.arange(n) % (2 - i), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(n, 1)}
        for i, n in enumerate(counts)
    ]
    options = {"num_denoising_queries": 6, "label_noise": 0.5, "box_noise": 1.0, "num_queries": 5, **changes}
    targets = prepare_targets(labels, PHRASES, MASK)
    generator = torch.Generator().manual_seed(seed)
    return targets, make_denoising_queries(targets, PHRASES, TEXT, generator=generator, **options)


def test_number_of_groups_follows_num_denoising_queries():
    assert make()[1].num_groups == 2
    assert make()[1].num_queries == 12
    assert make(num_denoising_queries=1)[1].num_groups == 1


def test_nothing_to_denoise_gives_none():
    assert make(counts=(0, 0))[1] is None
    assert make(num_denoising_queries=0)[1] is None


def test_attention_keeps_groups_apart_and_hides_the_answers():
    _, queries = make()
    mask = queries.attention_mask
    assert mask.shape == (2, 1, 17, 17)
    assert not mask[:, :, 12:, :12].any()
    assert mask[:, :, 12:, 12:].all()
    assert not mask[:, :, :6, 6:12].any()
    assert not mask[:, :, 6:12, :6].any()
    assert mask[0, 0, :6, :6].all()
    # The second image has one box, so only the first positive and the first negative slot of a group are visible.
    assert mask[1, 0, 0, :6].tolist() == [True, False, False, True, False, False]
    assert mask.any(dim=-1).all()


def test_positives_point_at_their_boxes():
    targets, queries = make()
    assert len(queries.target_index) == 2 * targets.num_boxes
    assert torch.equal(targets.batch_index[queries.target_index], queries.batch_index)
    assert queries.real[queries.batch_index, queries.query_index].all()
    assert ((queries.query_index % 6) < 3).all()
    assert queries.real.sum().item() == 2 * 2 * targets.num_boxes


def test_negatives_move_further_than_positives():
    boxes, scale = torch.tensor([[0.5, 0.5, 0.2, 0.3]]).repeat(2000, 1), 0.4
    negative = torch.arange(2000) % 2 == 1
    noisy = jitter_boxes(boxes, negative, scale, torch.Generator().manual_seed(1))
    share = (cxcywh_to_xyxy(noisy) - cxcywh_to_xyxy(boxes)).abs() / boxes[:, 2:].repeat(1, 2)
    # Float32 rounding of a coordinate, divided by a side of 0.2.
    assert share[~negative].max() <= 0.5 * scale + 1e-5
    assert share[negative].min() >= 0.5 * scale - 1e-5
    assert share[negative].max() <= scale + 1e-5


def test_reference_points_stay_in_the_image():
    points = make(box_noise=5.0)[1].reference_points
    assert points.dtype == torch.float32
    assert ((points >= 0) & (points <= 1)).all()


def test_content_is_a_label_of_the_images_prompt():
    _, queries = make(label_noise=2.0, num_denoising_queries=60)
    allowed = [torch.stack((TEXT[0, 1:3].mean(0), TEXT[0, 4])), TEXT[1, 1:2]]
    for image, labels in enumerate(allowed):
        near = (queries.content[image][queries.real[image]][:, None] - labels).abs().amax(dim=-1)
        assert near.min(dim=1).values.max() < 1e-5
        assert set(near.argmin(dim=1).tolist()) == set(range(len(labels)))


def test_without_label_noise_content_is_the_boxs_label():
    targets, queries = make(label_noise=0.0)
    weights = targets.positive_maps[queries.target_index].float()
    expected = (weights / weights.sum(-1, keepdim=True))[:, None] @ TEXT[queries.batch_index]
    assert torch.allclose(queries.content[queries.batch_index, queries.query_index], expected[:, 0], atol=1e-6)


def test_label_embedding_replaces_the_text_and_gets_a_gradient():
    table = torch.nn.Embedding(3, 8)
    _, queries = make(label_noise=0.0, label_embedding=table)
    assert torch.equal(queries.content[0, 1], table.weight[1])
    queries.content.sum().backward()
    assert table.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("field", ["content", "reference_points"])
def test_a_seed_decides_the_noise(field):
    first, again, other = (getattr(make(seed=s)[1], field) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_compiles_without_a_break():
    targets, _ = make()
    options = {"num_denoising_queries": 6, "label_noise": 0.0, "box_noise": 0.0, "num_queries": 5}

    def content(text):
        queries = make_denoising_queries(targets, PHRASES, text, **options)
        return queries.content, queries.attention_mask

    torch._dynamo.reset()
    compiled = torch.compile(content, backend="eager", fullgraph=True)(TEXT)
    assert all(torch.equal(a, b) for a, b in zip(compiled, content(TEXT), strict=True))
    torch._dynamo.reset()
