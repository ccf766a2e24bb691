"""Wall time divided into phases over launches, and the slowest host."""

import json
import time

import pytest

from path_jax.training.goodput import PHASES, Goodput
from path_jax.training.step_times import StepTimes, slowest_process


def write_metrics(workdir, count):
    text = "".join(json.dumps({"step": step, "step_seconds": 0.5}) + "\n" for step in range(1, count + 1))
    (workdir / "metrics.jsonl").write_text(text)


def test_phases_add_up_to_the_wall_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("path_jax.training.goodput.time.perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds

    goodput = Goodput(tmp_path, 90.0)
    goodput.starts(0, tmp_path / "metrics.jsonl")
    goodput.enter("compile")
    with goodput.phase("data"):
        wait(1)
    wait(5)
    goodput.enter("steps")
    wait(20)
    with pytest.raises(KeyError), goodput.phase("checkpoint"):
        wait(3)
        raise KeyError
    wait(1)
    summary = goodput.summary()
    expected = dict(initialisation=10, compile=5, data=1, steps=21, checkpoint=3, evaluation=0)
    assert {name: summary[f"seconds_{name}"] for name in PHASES} == expected
    assert summary["launches"] == 1 and summary["goodput"] == pytest.approx(21 / 40)


def test_steps_done_again_are_counted_over_launches(tmp_path):
    first = Goodput(tmp_path, time.perf_counter())
    first.starts(0, tmp_path / "metrics.jsonl")
    first.enter("steps")
    time.sleep(0.05)
    write_metrics(tmp_path, 13)
    first.at(13, write=True)  # killed here; step 10 was saved
    second = Goodput(tmp_path, time.perf_counter(), processes=2)
    second.starts(10, tmp_path / "metrics.jsonl")
    second.enter("steps")
    time.sleep(0.05)
    second.at(20, write=True)
    summary = second.summary()
    assert (summary["launches"], summary["redone_steps"], summary["seconds_redone"]) == (2, 3, 1.5)
    assert summary["seconds_steps"] >= 0.1 and summary["goodput"] == 0  # more was redone than these steps took
    launches = json.loads((tmp_path / "goodput.json").read_text())
    assert [(x["first_step"], x["last_step"], x["processes"]) for x in launches] == [(0, 13, 1), (10, 20, 2)]


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, 2]"])
def test_a_file_that_is_not_ours_is_no_reason_to_stop(tmp_path, content):
    (tmp_path / "goodput.json").write_text(content)
    goodput = Goodput(tmp_path, time.perf_counter())
    goodput.starts(0, tmp_path / "metrics.jsonl")
    goodput.at(1, write=True)
    assert goodput.summary()["launches"] == 1


def test_other_processes_write_nothing(tmp_path):
    goodput = Goodput(None, time.perf_counter())
    goodput.starts(0, tmp_path / "metrics.jsonl")
    goodput.at(1, write=True)
    assert not list(tmp_path.iterdir())


def test_the_slowest_host(tmp_path):
    assert slowest_process(tmp_path, 2) is None
    for process, busy in ((0, 0.1), (1, 0.3)):
        times = StepTimes(tmp_path, process, window=2)
        for step in range(1, 6):
            times.add(step, busy, busy / 2)
        times.write(5)
    assert slowest_process(tmp_path, 3) is None  # the third has not written yet
    slowest = slowest_process(tmp_path, 2)
    assert slowest["process"] == 1 and slowest["busy_seconds"] == pytest.approx(0.3)
    assert slowest["data_seconds"] == pytest.approx(0.15)
    records = [json.loads(line) for line in (tmp_path / "steps-1.jsonl").read_text().splitlines()]
    assert [(x["step"], x["steps"]) for x in records] == [(2, 2), (4, 2), (5, 1)]
