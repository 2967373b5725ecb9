"""The simulation of docs/scale.md: its figures are those of the page, and it agrees with what can be computed."""

import math
import re
from dataclasses import replace

import pytest

from example_scripts import ROOT, load_example


@pytest.fixture(scope="module")
def scale():
    """The script as a module."""
    return load_example("simulate_scale")


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_table_of_the_page_is_what_the_simulation_prints(scale, page):
    assert "\n".join(scale.table()) in page


def test_the_money_of_the_page_is_that_of_the_simulation(scale, page):
    prices = (0.02, 0.0004, 0.005)
    assert f"costs {scale.simulate(scale.MILLION).money(*prices):.2f}, " in page.replace("\n", " ")
    assert f"a billion {100 * scale.simulate(scale.PART).money(*prices):,.0f}." in page.replace("\n", " ")


def test_products_of_the_page_are_right(scale, page):
    """What 10^6 and 10^9 pictures take follows from the cost of one."""
    seconds = scale.Plan(1, 1).seconds
    assert f"{seconds} s on one core | {1e6 * seconds / 3600:.1f} core-hours | {1e9 * seconds / 3600:,.0f}" in page
    for rate in re.findall(r"\| ([\d,]+) pictures/s \|.*? h \|", page):
        assert f"{1e9 / int(rate.replace(',', '')) / 3600:.1f} h |" in page


@pytest.mark.parametrize("ranks", [False, True], ids=["queue", "ranks"])
@pytest.mark.parametrize("workers", [1, 7])
def test_without_losses_the_hours_are_those_of_the_work(scale, ranks, workers):
    plan = scale.Plan(70_000, workers, shard=100, ranks=ranks, spread=0, lost_each_hour=0, slow_share=0, failed_reads=0)
    made = scale.simulate(plan)
    assert made.hours == pytest.approx((plan.start + 700 / workers * (100 * plan.seconds + plan.write)) / 3600)
    assert (made.lost, made.redone, made.reads, made.writes, made.lists) == (0, 0, 140_000, 700, 70)


def test_half_a_shard_is_lost_with_a_worker(scale):
    plan = scale.Plan(2_000_000, 20, shard=1000, lost_each_hour=2, slow_share=0, spread=0)
    made = scale.simulate(plan)
    assert made.lost > 100
    half = made.lost * 500 * plan.seconds / 3600
    assert made.redone * made.paid == pytest.approx(half, rel=0.2)
    # Each loss has its shard read again.
    assert made.reads / plan.requests - plan.pictures == pytest.approx(1000 * made.lost, rel=0.1)


def test_slow_workers_and_losses_delay_ranks_more_than_a_queue(scale):
    plan = scale.Plan(1_000_000, 64)
    queue, ranks = (scale.simulate(replace(plan, ranks=kind)).hours for kind in (False, True))
    assert queue * 1.5 < ranks


def test_ranks_that_are_lost_faster_than_a_shard_is_done_never_end(scale):
    plan = scale.Plan(1_000_000, 1000, shard=5000, ranks=True)
    assert math.isinf(scale.simulate(plan).hours)


def test_equal_seeds_give_equal_outcomes(scale):
    plan = scale.Plan(200_000, 8, lost_each_hour=1)
    assert scale.simulate(plan, 3) == scale.simulate(plan, 3) != scale.simulate(plan, 4)
