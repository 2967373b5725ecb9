"""Several processes with ranks: each labels its shards, rank 0 finishes, and the bytes are those of one process."""

import pytest

from gdino_hf.labeling.ranks import Ranks
from label_command import HANGS, arguments, digests, label_all, label_apart, make_pictures, rows, run_label
from rank_processes import accelerate_launch, as_a_launcher_does


@pytest.fixture
def folder(tmp_path):
    """Twenty-four pictures, six shards."""
    return make_pictures(tmp_path / "photos", 24)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (0,)], ids=["all", "one missing", "rank 0 alone"])
def test_ranks_give_the_bytes_of_one_process(label_model, folder, tmp_path, context, present):
    """Rank 0 does the shards of ranks that do not run."""
    label_apart(context, label_model, folder, tmp_path / "whole")
    processes = [
        context.Process(target=label_all, args=(label_model, folder, tmp_path / "out", Ranks(rank, 3)))
        for rank in present
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=HANGS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(present)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_rank_that_is_late_ends_quietly(label_model, folder, tmp_path):
    label_all(label_model, folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    summary = label_all(label_model, folder, tmp_path / "out", Ranks(1, 2))
    assert not summary.finished
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "1"), ("0", "-1")])
def test_ranks_that_make_no_sense_are_refused(label_model, folder, tmp_path, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    status, _, said = run_label(label_model, tmp_path / "out", folder)
    assert status == 2
    assert f"RANK is {rank!r} and WORLD_SIZE is {world!r}" in said


@pytest.mark.slow
@pytest.mark.parametrize("launch", [as_a_launcher_does, pytest.param(accelerate_launch, marks=pytest.mark.soak)])
def test_processes_of_a_launcher_share_the_shards(label_model, folder, tmp_path, fresh_python, launch):
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    printed = launch(fresh_python, arguments(label_model, out, folder))
    assert printed.count("24 pictures") == 1
    run_label(label_model, tmp_path / "whole", folder)
    assert digests(out) == digests(tmp_path / "whole")
    assert len(rows(out)) == 24
