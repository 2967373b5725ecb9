"""Row blocks on a queue: every block once, whatever the threads, and no setting of the caller's changed."""

import multiprocessing
import os
import threading
import time

import pytest
import torch

from gdino_hf.inference import workers
from gdino_hf.inference.workers import RowBlocks, even_rows, one_thread, only_blocks, run_blocks, run_rows

needs_workers = pytest.mark.skipif(not workers.can_split(), reason="threads of one thread cannot be set here")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("blocks", [0, 1, 2, 7, 100])
def test_every_block_is_computed_once(blocks):
    calls = []
    run_blocks(calls.append, blocks)
    assert sorted(calls) == list(range(blocks))


def test_rows_of_several_sets_are_covered_once():
    first, second = torch.zeros(2, 10), torch.zeros(3, 5)

    def add(tensor):
        def block(image, rows):
            assert rows.stop - rows.start <= 4
            tensor[image, rows] += 1

        return block

    run_rows(RowBlocks(add(first), 2, 10, 4), RowBlocks(add(second), 3, 5, 4), RowBlocks(add(first), 0, 3, 4))
    assert torch.equal(first, torch.ones(2, 10))
    assert torch.equal(second, torch.ones(3, 5))


@needs_workers
def test_helpers_take_part_with_one_thread_each_and_the_callers_modes():
    seen = {}
    together = threading.Barrier(3, timeout=30)

    def block(number):
        together.wait()
        modes = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        seen[threading.get_ident()] = modes

    with torch.inference_mode():
        run_blocks(block, 3)
    assert list(seen.values()) == [(1, True, False)] * 3
    assert len(seen) == 3
    seen.clear()
    run_blocks(block, 3)
    assert list(seen.values()) == [(1, False, True)] * 3


@needs_workers
def test_no_thread_but_those_inside_is_changed():
    with one_thread():
        assert torch.get_num_threads() == 1
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3], "a thread that was started meanwhile got another number"
    assert torch.get_num_threads() == 3


@needs_workers
def test_only_blocks_are_split():
    with only_blocks():
        assert torch.get_num_threads() == 1
        together = threading.Barrier(3, timeout=30)
        run_blocks(lambda _: together.wait(), 3)
        with only_blocks():
            run_blocks(lambda _: together.wait(), 3)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_a_block_within_a_block_runs_where_it_is():
    def outer(number):
        idents = set()
        run_blocks(lambda _: idents.add(threading.get_ident()), 4)
        assert idents == {threading.get_ident()} or not workers.can_split()

    run_blocks(outer, 6)


def test_an_error_reaches_the_caller_and_the_next_call_works():
    def block(number):
        raise KeyError(number)

    with pytest.raises(KeyError):
        run_blocks(block, 50)
    assert torch.get_num_threads() == 3
    calls = []
    run_blocks(calls.append, 5)
    assert sorted(calls) == [0, 1, 2, 3, 4]


def test_blocks_are_equal_and_their_number_is_even():
    for rows in (1, 95, 96, 97, 100, 900, 2125, 17821):
        size = even_rows(rows, 96)
        blocks = -(-rows // size)
        assert size <= 96
        assert blocks == 1 or blocks % 2 == 0
        assert blocks <= -(-rows // 96) + 1
    assert [even_rows(rows, 96) for rows in (0, 96, 100, 200)] == [1, 96, 50, 50]


def test_a_helper_that_never_comes_is_not_waited_for(monkeypatch):
    """On a busy machine the system may not run a helper before the caller has computed everything."""
    monkeypatch.setattr(workers._helpers, "offer", lambda job, helpers: None)
    calls = []
    run_blocks(calls.append, 9)
    assert calls == list(range(9))


@needs_workers
def test_callers_that_share_the_helpers_all_finish():
    totals = torch.zeros(8)

    def caller(index):
        for _ in range(20):
            total = torch.zeros(6)

            def block(number, total=total):
                time.sleep(1e-4)
                total[number] = number

            run_blocks(block, 6)
            totals[index] += total.sum()

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert totals.tolist() == [20 * 15] * 8


def _in_child(connection):
    calls = []
    run_blocks(calls.append, 6)
    x = torch.ones(400, 400)  # large enough for several threads
    connection.send((sorted(calls), (x @ x).add_(1).sum().item()))


@needs_workers
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes_and_does_not_hang():
    x = torch.ones(400, 400)
    (x @ x).add_(1)
    run_blocks(lambda _: time.sleep(0.001), 8)
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_in_child, args=(theirs,))
    process.start()
    assert mine.poll(30), "the forked process hangs"
    assert mine.recv() == ([0, 1, 2, 3, 4, 5], 401.0 * 400 * 400)
    process.join(30)
    assert process.exitcode == 0
