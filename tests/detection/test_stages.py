"""Stages keep order and bounds, raise where the error belongs, and end without a hang when they are left early."""

import threading
import time

import pytest

from gdino_hf.detection import stages
from gdino_hf.detection.stages import in_background, in_batches, in_order

# Nothing here waits for this long unless it hangs.
TIMEOUT = 30.0


def stage_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gdino_hf-stage")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(stage_threads())
    yield
    for thread in set(stage_threads()) - before:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a thread of a stage is left"


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (1, 5), (4, 1), (4, 3), (4, 50)])
def test_results_come_in_the_order_of_the_items(threads, ahead):
    def slower_at_first(number):
        time.sleep(0.002 * (number % 3 == 0))
        return number * number

    assert list(in_order(slower_at_first, range(40), threads, ahead)) == [number * number for number in range(40)]


def test_nothing_gives_nothing():
    assert list(in_order(str, [])) == []
    assert list(in_batches(str, [], 3)) == []


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 3), (5, 2)])
def test_no_more_than_ahead_are_in_flight(threads, ahead):
    pulled = []

    def source():
        for number in range(12):
            pulled.append(number)
            yield number

    for taken, _ in enumerate(in_order(lambda number: number, source(), threads, ahead), start=1):
        # The one at hand was yielded; those behind it are in flight.
        assert len(pulled) <= taken + ahead


def test_nothing_is_pulled_before_the_first_result_is_asked_for():
    pulled = []
    results = in_order(str, (pulled.append(number) or number for number in range(3)))
    assert pulled == []
    assert next(results) == "0"
    results.close()


def test_threads_work_side_by_side():
    together = threading.Barrier(3, timeout=TIMEOUT)
    assert list(in_order(lambda number: together.wait() >= 0, range(6), threads=3, ahead=3)) == [True] * 6


def test_a_result_does_not_wait_for_a_source_that_blocks():
    go_on = threading.Event()

    def source():
        yield "first"
        assert go_on.wait(TIMEOUT)
        yield "second"

    results = in_order(str.upper, source(), ahead=4)
    assert next(results) == "FIRST"
    go_on.set()
    assert list(results) == ["SECOND"]


def test_a_result_does_not_wait_for_a_later_item_that_blocks_in_a_stage_before():
    go_on = threading.Event()

    def read(name):
        assert name != "pipe" or go_on.wait(TIMEOUT)
        return name

    results = in_order(str.upper, in_order(read, ["file", "pipe", "last"], threads=2, ahead=3), ahead=3)
    assert next(results) == "FILE"
    go_on.set()
    assert list(results) == ["PIPE", "LAST"]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_function_comes_after_all_earlier_results(threads):
    def fail_at_five(number):
        if number == 5:
            raise KeyError(number)
        return number

    results, found = in_order(fail_at_five, range(100), threads, ahead=8), []
    with pytest.raises(KeyError, match="5"):
        found.extend(iter(results.__next__, None))
    assert found == [0, 1, 2, 3, 4]
    assert list(results) == []


@pytest.mark.parametrize("error", [OSError("torn cable"), KeyboardInterrupt()])
def test_an_error_of_the_source_comes_after_all_earlier_results(error):
    def source():
        yield from range(3)
        raise error

    results, found = in_order(lambda number: number, source(), threads=2, ahead=9), []
    with pytest.raises(type(error)):
        found.extend(iter(results.__next__, None))
    assert found == [0, 1, 2]


def test_leaving_early_ends_threads_and_source():
    closed = threading.Event()

    def source():
        try:
            yield from range(1000)
        finally:
            closed.set()

    for number in in_order(lambda number: number, source(), threads=3, ahead=4):
        if number == 2:
            break
    assert closed.wait(TIMEOUT)


def test_leaving_one_stage_leaves_those_before_it():
    started = []
    first = in_order(lambda number: started.append(number) or number, range(1000), threads=2, ahead=2)
    second = in_order(str, first, threads=2, ahead=2)
    assert next(second) == "0"
    second.close()
    assert list(first) == []
    assert len(started) < 10


def test_leaving_does_not_wait_for_an_item_that_blocks(monkeypatch):
    monkeypatch.setattr(stages, "LEAVING_SECONDS", 0.01)
    go_on = threading.Event()
    results = in_order(lambda number: number == 0 or go_on.wait(TIMEOUT), range(9), threads=2, ahead=3)
    assert next(results) is True
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < TIMEOUT / 3
    go_on.set()


def test_waiting_costs_no_time_of_the_processor():
    go_on = threading.Event()
    threading.Timer(0.5, go_on.set).start()
    begin = time.process_time()
    assert list(in_order(lambda _: go_on.wait(TIMEOUT), range(3), threads=3, ahead=3)) == [True] * 3
    assert time.process_time() - begin < 0.25


def test_batches_hold_all_results_in_order():
    assert list(in_batches(lambda number: number, range(8), 3, threads=2)) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_batch_ends_where_the_next_result_is_not_alike():
    words = ["a", "b", "cc", "dd", "ee", "f"]
    batches = in_batches(str.upper, words, 4, alike=lambda batch, word: not batch or len(batch[0]) == len(word))
    assert list(batches) == [["A", "B"], ["CC", "DD", "EE"], ["F"]]


def test_a_batch_does_not_wait_for_an_item_that_blocks():
    go_on = threading.Event()
    batches = in_batches(lambda number: number < 2 or go_on.wait(TIMEOUT), range(4), 3, ahead=4)
    assert next(batches) == [True, True]
    go_on.set()
    assert [result for batch in batches for result in batch] == [True, True]


def test_an_error_comes_after_the_batch_before_it():
    batches = in_batches(lambda number: 1 // (2 - number), range(4), 3)
    assert next(batches) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_the_background_gets_all_items_in_order_and_beside_the_caller():
    found, go_on = [], threading.Event()

    def record(number):
        assert number != 0 or go_on.wait(TIMEOUT)
        found.append(number)

    with in_background(record, ahead=4) as hand_over:
        for number in range(4):
            hand_over(number)
        assert found == []
        go_on.set()
        for number in range(4, 20):
            hand_over(number)
    assert found == list(range(20))


def test_the_background_is_bounded():
    started, go_on = [], threading.Event()
    handed = []

    def record(number):
        started.append(number)
        assert go_on.wait(TIMEOUT)

    def caller():
        with in_background(record, ahead=2) as hand_over:
            for number in range(9):
                hand_over(number)
                handed.append(number)

    thread = threading.Thread(target=caller)
    thread.start()
    time.sleep(0.1)
    # One is worked on and two wait.
    assert len(handed) <= 3
    go_on.set()
    thread.join(TIMEOUT)
    assert started == list(range(9))


def test_what_was_handed_over_is_finished_when_the_caller_is_interrupted():
    found, go_on = [], threading.Event()

    def record(number):
        assert go_on.wait(TIMEOUT)
        found.append(number)

    def interrupted():
        with in_background(record, ahead=5) as hand_over:
            for number in range(4):
                hand_over(number)
            go_on.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert found == [0, 1, 2, 3]


def test_an_error_in_the_background_reaches_the_caller_and_later_items_are_dropped():
    found = []

    def record(number):
        if number == 2:
            raise OSError(28, "No space left on device")
        found.append(number)

    def fill():
        with in_background(record, ahead=1) as hand_over:
            for number in range(100):
                hand_over(number)
                handed.append(number)

    handed = []
    with pytest.raises(OSError, match="No space left"):
        fill()
    assert found == [0, 1]
    assert len(handed) < 10
    handed.clear()
    with pytest.raises(OSError, match="No space left"), in_background(record) as hand_over:
        hand_over(2)


@pytest.mark.parametrize(
    "make", [lambda: in_order(str, [], 0), lambda: in_order(str, [], 1, 0), lambda: in_batches(str, [], 0)]
)
def test_numbers_below_one_are_refused_at_once(make):
    with pytest.raises(ValueError, match="is 0; give 1 or more"):
        make()
