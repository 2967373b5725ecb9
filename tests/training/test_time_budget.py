"""The time budget of a training, over several runs."""

import pytest

from gdino_hf.training import time_budget
from gdino_hf.training.time_budget import TimeBudget


def test_time_of_earlier_runs_counts_and_time_between_runs_does_not(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])
    budget = TimeBudget(minutes=10)
    budget.start()
    now[0] += 150
    budget.tick()
    assert budget.fraction == pytest.approx(0.25)
    budget.save(tmp_path)
    now[0] += 1000
    again = TimeBudget(minutes=10)
    again.load(tmp_path)
    assert again.fraction == pytest.approx(0.25)
    again.start()
    now[0] += 1000
    again.tick()
    assert again.fraction == 1.0
