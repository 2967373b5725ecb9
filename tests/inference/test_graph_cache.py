"""Claims about recordings: when one is made, when it is replayed, and what makes the cache compute instead."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from gdino_hf.inference.graph_cache import GraphCache
from gdino_hf.inference.watched_modules import WatchedModules
from rerun_recorder import RerunRecorder


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)).eval().requires_grad_(False)


def make_cache(**options):
    return GraphCache(RerunRecorder(), **options)


def run(cache, layer, x, settings=()):
    def compute(inputs):
        return {"y": layer(inputs["x"])}

    return cache.run("layer", compute, {"x": x}, layer.modules, settings)["y"]


def rows(number, seed=1):
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))


def test_the_third_call_with_the_same_shapes_is_recorded_and_later_ones_replayed(layer):
    cache = make_cache()
    for call in range(6):
        x = rows(5, seed=call)
        assert torch.equal(run(cache, layer, x), layer(x))
        assert len(cache) == (1 if call >= 2 else 0)
    assert cache.recorder.recorded == [{"x": (5, 3)}]
    assert cache.recorder.replays == 4


def test_results_belong_to_the_caller(layer):
    """A replay writes to fixed addresses, so without a copy an earlier result would change."""
    cache = make_cache(eager_calls=0)
    first = run(cache, layer, rows(5, seed=1))
    kept = first.clone()
    run(cache, layer, rows(5, seed=2))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(run(cache, layer, rows(5, seed=1)), kept)


def test_shapes_dtypes_and_settings_are_told_apart(layer):
    cache = make_cache(eager_calls=0)
    run(cache, layer, rows(5))
    run(cache, layer, rows(6))
    run(cache, layer, rows(6), settings=("triton",))
    wide = copy.deepcopy(layer).double()
    assert run(cache, wide, rows(6).double()).dtype == torch.float64
    assert len(cache) == 4


def test_beyond_the_limit_calls_run_eagerly_and_that_is_said_once(layer, caplog):
    cache = make_cache(most=2, eager_calls=0)
    for number in (1, 2, 3, 4, 1, 2, 3):
        x = rows(number)
        assert torch.equal(run(cache, layer, x), layer(x))
    assert len(cache) == 2
    assert cache.recorder.replays == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "All 2 recordings of this model are in use" in caplog.text


def test_seldom_shapes_are_forgotten_one_by_one(layer):
    """A stream of pictures of ever new sizes must not let the memory grow."""
    cache = make_cache()
    for number in range(1, 1101):
        run(cache, layer, torch.zeros(number, 3))
    assert len(cache._calls) == 1000
    assert len(cache) == 0


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhen capturing"), OSError("")])
def test_a_failed_recording_is_one_line_and_everything_runs_eagerly(layer, caplog, error):
    cache = make_cache(eager_calls=1)
    for _ in range(3):
        run(cache, layer, rows(2))
    assert len(cache) == 1
    cache.recorder.error = error
    replays = cache.recorder.replays
    for number in (7, 7, 7, 8, 8, 2):
        x = rows(number)
        assert torch.equal(run(cache, layer, x), layer(x))
    assert len(cache) == 0
    assert cache.recorder.replays == replays
    assert len(caplog.records) == 1
    assert f"one operation at a time: {type(error).__name__}: {str(error).partition(chr(10))[0]}" in caplog.text


def test_weights_changed_in_place_are_read_by_the_replay(layer):
    cache = make_cache(eager_calls=0)
    x = rows(5)
    before = run(cache, layer, x)
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items() if value.ndim}, strict=False)
    after = run(cache, layer, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, layer(x))
    assert len(cache.recorder.recorded) == 1


def move(layer):
    layer[0].weight.data = layer[0].weight.data + 1


def replace_parameter(layer):
    layer[0].bias = nn.Parameter(torch.ones(4), requires_grad=False)


def replace_module(layer):
    layer[1] = nn.Sigmoid()


def replace_buffer(layer):
    layer[2].running_mean = torch.ones(4)


@pytest.mark.parametrize("change", [move, replace_parameter, replace_module, replace_buffer])
def test_weights_that_lie_elsewhere_are_recorded_anew(layer, change):
    cache = make_cache(eager_calls=1)
    x = rows(5)
    before = [run(cache, layer, x) for _ in range(3)][-1]
    change(layer)
    for _ in range(4):
        assert torch.equal(run(cache, layer, x), layer(x))
    assert not torch.equal(layer(x), before)
    assert len(cache) == 1
    assert len(cache.recorder.recorded) == 2


@pytest.mark.parametrize("early", [True, False], ids=["before the recording", "after it"])
def test_hooks_run_in_every_call(layer, early):
    cache = make_cache(eager_calls=0)
    calls = []
    if not early:
        run(cache, layer, rows(5))
    handle = layer[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        run(cache, layer, rows(5))
    assert len(calls) == 3
    handle.remove()
    replays = cache.recorder.replays
    run(cache, layer, rows(5))
    assert len(calls) == 3
    assert cache.recorder.replays == replays + 1


def test_a_replaced_forward_counts_as_intercepted(layer):
    """accelerate's offloading replaces the method on the module itself."""
    watched = WatchedModules(layer.modules())
    assert not watched.intercepted()
    layer[0].forward = lambda x: x
    assert watched.intercepted()


def test_other_ways_to_run_are_left_alone(layer):
    """Gradients, autocast, another device, a subclass and someone else's recording."""
    cache = make_cache(eager_calls=0)
    leaf = rows(5).requires_grad_()
    assert torch.autograd.grad(run(cache, layer, leaf).sum(), leaf)[0].shape == leaf.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(cache, layer, rows(5)), layer(rows(5)))
    run(cache, layer, nn.Parameter(rows(5), requires_grad=False))
    cache.recorder.recording = True
    run(cache, layer, rows(5))
    assert len(cache) == 0
    cache.recorder.recording = False
    run(cache, layer, rows(5))
    assert len(cache) == 1
    assert run(cache, copy.deepcopy(layer).to("meta"), rows(5).to("meta")).device.type == "meta"
    assert len(cache) == 0, "the recordings of a model that has left the device hold its memory"


def test_inference_mode_and_no_grad_share_a_recording(layer):
    cache = make_cache(eager_calls=0)
    x = rows(5)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(cache, layer, x), layer(x))
    assert len(cache.recorder.recorded) == 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_start_without_recordings(layer, again):
    cache = make_cache(most=3, eager_calls=0)
    run(cache, layer, rows(5))
    other = again(cache)
    assert (len(cache), len(other), other.most, other.eager_calls) == (1, 0, 3, 0)
    assert torch.equal(run(other, layer, rows(5)), layer(rows(5)))


def test_threads_share_a_cache(layer):
    cache, wrong = make_cache(most=3), []

    def work(seed):
        for call in range(30):
            x = rows(1 + call % 5, seed=seed)
            if not torch.equal(run(cache, layer, x), layer(x)):
                wrong.append((seed, call))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) == len(cache.recorder.recorded) == 3
