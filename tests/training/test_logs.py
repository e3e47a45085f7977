"""What is logged, and how a log goes on."""

import json
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter  # noqa: F401  (its format is read below)

from terminator_jax.training.logs import Logs
from terminator_jax.training.meter import Meter, weighted_means

MEANS = {"loss": 1.5, "accuracy": 0.25, "images_per_second": 100.0}
SCORES = {"loss": 1.0, "accuracy": 0.5, "count": 10.0}


def make(workdir, step=0, **options):
    return Logs(workdir, step=step, total=20, steps_per_epoch=10, **options)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_lines_and_what_is_printed(tmp_path, capsys):
    with make(tmp_path) as logs:
        logs.info("hello")
        logs.log_train(5, MEANS)
        logs.log_train(10, MEANS)
        logs.log_eval(10, SCORES, MEANS)
    assert lines(tmp_path) == [
        {"kind": "train", "step": 5, "epoch": 1, **MEANS},
        {"kind": "train", "step": 10, "epoch": 1, **MEANS},
        {"kind": "eval", "step": 10, "epoch": 1, **SCORES},
    ]
    line = "epoch 1/2  train loss 1.5000  eval loss 1.0000  eval accuracy 0.5000  100 images/s\n"
    assert capsys.readouterr().out == f"hello\n{line}"


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    with make(tmp_path) as logs:
        for step in (2, 4, 6):
            logs.log_train(step, MEANS)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    with make(tmp_path, step=4) as logs:
        logs.log_train(6, MEANS)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert [path.name for path in tmp_path.glob("log*")] == ["log.jsonl"]


def test_other_processes_write_nothing(tmp_path, capsys):
    with make(tmp_path, enabled=False) as logs:
        logs.info("hello")
        logs.step()
        logs.log_train(5, MEANS)
        logs.log_eval(10, SCORES, MEANS)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with make(tmp_path, shown=("loss", "accuracy", "no metric of training")) as logs:
        for step in range(1, 11):
            logs.step()
            logs.log_train(step, MEANS)
        logs.log_eval(10, SCORES, MEANS)
    out = capsys.readouterr().out
    last = out.split("\r")[-1]
    assert "epoch 1: " in last and "10/20" in last and " left" in last
    assert "loss 1.5000  accuracy 0.2500  100 images/s" in last
    assert "epoch 1/2  train loss" in out


def test_tensorboard_events(tmp_path):
    with make(tmp_path) as logs:
        logs.log_train(5, MEANS)
        logs.log_eval(10, SCORES, MEANS)
    [path] = tmp_path.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), {}
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert found["train/loss", 5] == 1.5
    assert found["eval/accuracy", 10] == 0.5


def test_meter_means_and_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter(batch_size=10)
    meter.add({"loss": 9.0})  # compiles: counts for the mean, not for the speed
    now[0] = 50.0
    meter.reset_timer()
    meter.add({"loss": 3.0})
    now[0] = 52.0
    assert meter.read() == {"loss": 6.0, "images_per_second": 5.0}
    meter.add({"loss": 0.0})
    now[0] = 53.0
    assert meter.read() == {"loss": 0.0, "images_per_second": 10.0}
    epoch = meter.read_epoch()
    assert epoch == {"loss": pytest.approx(4.0), "images_per_second": pytest.approx(20 / 3)}


def test_skipped_steps_are_left_out_of_the_means():
    meter = Meter(batch_size=10)
    for loss, skipped in ((np.nan, 1), (4.0, 0), (np.nan, 1)):
        meter.add({"loss": loss, "skipped": skipped})
        meter.read()
    assert meter.read_epoch()["loss"] == 4.0
    meter.add({"loss": np.nan, "skipped": 1})
    assert np.isnan(meter.read()["loss"]) and np.isnan(meter.read_epoch()["loss"])


def test_weighted_means():
    sums = [{"count": 3, "loss": 6.0}, {"count": 1, "loss": 2.0}]
    assert weighted_means(iter(sums)) == {"loss": 2.0, "count": 4.0}
