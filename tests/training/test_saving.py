"""Checkpoints by time, and the log of JSON lines."""

import json
from types import SimpleNamespace

from gdino_hf.training import saving
from gdino_hf.training.progress import JsonLog
from gdino_hf.training.saving import SaveEvery


def test_a_checkpoint_is_due_when_enough_time_has_passed_since_the_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    callback, state = SaveEvery(seconds=240), SimpleNamespace(global_step=1)

    def is_due():
        control = SimpleNamespace(should_save=False)
        callback.on_step_end(None, state, control)
        return control.should_save

    callback.on_train_begin(None, state, None)
    now[0] += 200
    assert not is_due()
    now[0] += 50
    assert is_due()
    callback.on_save(None, state, None)
    now[0] += 200
    assert not is_due()


def test_everything_logged_is_a_line_of_json(tmp_path):
    for step in (1, 2):
        # A resumed training makes a new callback, which continues the file.
        log = JsonLog(tmp_path / "log.jsonl")
        log.on_log(None, SimpleNamespace(global_step=step, is_world_process_zero=True), None, logs={"loss": 0.5})
    log.on_log(None, SimpleNamespace(global_step=3, is_world_process_zero=False), None, logs={"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]


def test_a_resumed_training_logs_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    history = [{"loss": 0.5, "step": 1}, {"loss": 0.4, "step": 2}]
    # A run killed in the middle of a line, after the checkpoint at step 2.
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    log = JsonLog(path)
    log.on_train_begin(None, SimpleNamespace(global_step=2, is_world_process_zero=True, log_history=history), None)
    log.on_log(None, SimpleNamespace(global_step=3, is_world_process_zero=True), None, logs={"loss": 0.3})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.4), (3, 0.3)]
    log.on_train_begin(None, SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[]), None)
    assert path.read_text() == ""
