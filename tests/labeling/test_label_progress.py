"""Progress: counts, speed and time left; one line that is rewritten in a terminal, a line now and then in a pipe."""

import io

import pytest

from gdino_hf.labeling.label_progress import LabelProgress, duration
from gdino_hf.labeling.label_workers import Tally


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_counts_and_estimates():
    clock = Clock()
    progress = LabelProgress(clock=clock)
    progress.resume(Tally(400, 50, 1))
    progress.plan(2400, False)
    progress.add(Tally(0))
    assert progress.line() == "400 of 2,400 pictures so far, 50 finds, 1 failures"
    progress.plan(2400, True)
    for _ in range(11):
        clock.now += 2
        progress.add(Tally(20, 10, 1))
    assert progress.done == Tally(620, 160, 12)
    # The first twenty mark the start; the 200 after them took 20 s.
    assert progress.line() == ("620 of 2,400 pictures (25 %), 10.0 images/s, 160 finds, 12 failures, 2 min 58 s left")


def test_work_that_is_lost_is_taken_back():
    progress = LabelProgress()
    progress.add(Tally(7, 3, 1))
    progress.add(-Tally(7, 3, 1))
    assert progress.done == Tally()


def test_a_pipe_gets_a_line_every_ten_seconds():
    clock, stream = Clock(), io.StringIO()
    progress = LabelProgress(stream, clock=clock)
    progress.plan(100, True)
    for _ in range(45):
        clock.now += 1
        progress.add(Tally(1, 0, 0))
    lines = stream.getvalue().splitlines()
    assert [line.partition(" of ")[0] for line in lines] == [f"label: {number}" for number in (10, 20, 30, 40)]
    assert all("\r" not in line for line in lines)


def test_a_terminal_shows_one_line_that_is_overwritten_as_a_whole():
    clock, stream = Clock(), Terminal()
    progress = LabelProgress(stream, clock=clock)
    progress.plan(1000, False)
    clock.now += 1
    progress.add(Tally(999, 0, 0))
    progress.plan(1000, True)
    progress.say("a line that stays")
    progress.finish()
    first, stays, last = stream.getvalue().split("\r")[1:]
    assert len(stays.rstrip("\n")) == len(first)
    assert stays.startswith("label: a line that stays ")
    assert stays.endswith("\n")
    assert last == "label: 999 of 1,000 pictures (99 %), 0 finds, 0 failures\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3000, "50 min"), (7500, "2 h 5 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
