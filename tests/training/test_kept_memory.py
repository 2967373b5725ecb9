"""Claims about kept_memory: repeated work finds its pages again, and afterwards the system gets them back."""

import resource

import pytest
import torch

from gdino_hf.training import kept_memory as module
from gdino_hf.training.kept_memory import kept_memory

SIZE = 48 * 2**20  # above glibc's largest threshold, so PyTorch would map and unmap it every time
PAGES = SIZE // resource.getpagesize()

pytestmark = pytest.mark.skipif(module._glibc() is None, reason="no glibc here")


def faults():
    """Count the pages that the system hands out for a tensor that is written once and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def settle():
    """Allocate often enough for glibc to find a place that fits each time."""
    for _ in range(12):
        faults()


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])


def test_a_repeated_allocation_finds_its_pages():
    faults()
    outside = faults()
    if outside < PAGES // 2:
        pytest.skip("the system hands out larger pages by itself")
    with kept_memory():
        settle()
        before = resident()
        assert [faults() < PAGES // 100 for _ in range(5)] == [True] * 5
        assert resident() < before + PAGES // 100
    assert faults() > PAGES // 2


def test_the_pages_are_given_back_at_the_end_even_after_an_error():
    module._glibc().malloc_trim(0)  # earlier tests of this process may have left free pages behind
    before = resident()
    inside = []

    def fail():
        faults()
        inside.append(resident())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), kept_memory():
        fail()
    assert inside[0] > before + PAGES // 2
    assert resident() < before + PAGES // 2


def test_an_inner_block_does_not_end_the_outer_one():
    with kept_memory():
        with kept_memory():
            settle()
        assert faults() < PAGES // 100
    assert module._users == 0


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(module, "_glibc", lambda: None)
    with kept_memory():
        assert module._users == 0
