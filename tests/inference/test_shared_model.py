"""One optimized model in threads, processes, forks and copies: equal results, and nobody hangs."""

import copy
import inspect
import json
import multiprocessing
import os
import sys
import threading

import pytest
import torch

from gdino_hf.inference.int8_linear import has_int8

TIMEOUT = 60
ARITHMETIC = [
    (torch.float32, None),
    (torch.bfloat16, False),
    pytest.param((torch.float32, True), marks=pytest.mark.skipif(not has_int8(), reason="no VNNI")),
]
# Another number of threads may sum in another order.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# The module has another name, and the function too, from Python 3.13 on.
INTERPRETERS, RUN = ("_interpreters", "exec") if sys.version_info >= (3, 13) else ("_xxsubinterpreters", "run_string")


@pytest.fixture(params=ARITHMETIC, ids=lambda value: str(value))
def optimized(request, tiny_model):
    dtype, int8 = request.param
    return copy.deepcopy(tiny_model).to(dtype).optimize_for_inference(int8=int8)


def inputs_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, 64, 64 + 32 * (seed % 2), generator=generator)
    words = torch.tensor([[2, 50 + seed, 5, 3]])
    return {"pixel_values": pixels.to(model.dtype), "input_ids": words}


def run(model, seed):
    with torch.inference_mode():
        return model(**inputs_of(model, seed)).pred_boxes.float()


def test_eight_threads_get_what_one_gets(optimized):
    expected = [run(optimized, seed) for seed in range(8)]
    found, start = {}, threading.Barrier(8, timeout=TIMEOUT)

    def caller(seed):
        start.wait()
        found[seed] = [run(optimized, seed) for _ in range(3)]

    threads = [threading.Thread(target=caller, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert sorted(found) == list(range(8)), "a thread hangs or failed"
    for seed, outputs in found.items():
        for output in outputs:
            torch.testing.assert_close(output, expected[seed], rtol=0, atol=ROUNDING[optimized.dtype])


def test_a_copy_gives_what_the_model_gives(optimized):
    expected = run(optimized, 1)
    torch.testing.assert_close(run(copy.deepcopy(optimized), 1), expected, rtol=0, atol=ROUNDING[optimized.dtype])


def _in_child(connection, model):
    connection.send(run(model, 1).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_two_forked_processes_give_what_the_model_gives(optimized):
    expected = run(optimized, 1)
    context = multiprocessing.get_context("fork")
    pairs = []
    for _ in range(2):
        mine, theirs = context.Pipe()
        process = context.Process(target=_in_child, args=(theirs, optimized), daemon=True)
        process.start()
        pairs.append((mine, process))
    for mine, process in pairs:
        assert mine.poll(TIMEOUT), "a forked process hangs"
        torch.testing.assert_close(torch.tensor(mine.recv()), expected, rtol=0, atol=ROUNDING[optimized.dtype])
        process.join(TIMEOUT)
        assert process.exitcode == 0


SEPARATE = f"""
import json, sys, torch
from gdino_hf import GDinoForObjectDetection

torch.set_num_threads(2)
model = GDinoForObjectDetection.from_pretrained(sys.argv[1]).optimize_for_inference()
{inspect.getsource(inputs_of)}
{inspect.getsource(run)}
print(json.dumps([run(model, seed).tolist() for seed in (0, 1, 0, 1)]))
"""


def test_two_processes_at_once_give_what_the_model_gives(tiny_model, fresh_python, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    expected = [run(copy.deepcopy(tiny_model).optimize_for_inference(), seed) for seed in (0, 1, 0, 1)]
    processes = [fresh_python.start(SEPARATE, tmp_path) for _ in range(2)]
    for process in processes:
        done = process.wait()
        assert done.returncode == 0, done.stderr
        found = torch.tensor(json.loads(done.stdout))
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=ROUNDING[torch.float32])


SUBINTERPRETER = f"""
import sys, torch
import {INTERPRETERS} as interpreters
from gdino_hf import GDinoForObjectDetection

model = GDinoForObjectDetection.from_pretrained(sys.argv[1]).optimize_for_inference()
{inspect.getsource(inputs_of)}
{inspect.getsource(run)}
before = run(model, 1)
try:
    failure = interpreters.{RUN}(interpreters.create(), "import gdino_hf")
except Exception as error:
    failure = error
print(failure)
print(torch.equal(run(model, 1), before))
"""


def test_a_subinterpreter_is_refused_and_the_model_runs_on(tiny_model, fresh_python, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    done = fresh_python.run(SUBINTERPRETER, tmp_path)
    assert "gdino_hf cannot be imported in a subinterpreter" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
