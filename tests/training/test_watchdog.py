"""A hang is found, written down and ended; slow phases that are no hang are left alone."""

import subprocess
import sys
import time
from pathlib import Path

from path_jax.training.watchdog import HangWatchdog

ROOT = Path(__file__).parents[2]
HANGING = """
import sys, threading, time
from pathlib import Path
from path_jax.parallel import cluster
from path_jax.training.watchdog import HangWatchdog

def wait_for_the_other_host():
    time.sleep(60)

with HangWatchdog(Path(sys.argv[1]), 3, 0.4, cluster.fail) as watchdog:
    watchdog.step_ended(17)
    wait_for_the_other_host()
"""


def test_hang_ends_the_process_with_its_stacks(tmp_path):
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and time.monotonic() - begin < 50
    assert "wait_for_the_other_host" in (tmp_path / "hang-3.txt").read_text()
    assert "wait_for_the_other_host" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "no step ended for" in last and "the last was step 17" in last and "hang-3.txt" in last


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_steps_and_pauses_are_no_hang(tmp_path, capfd):
    reasons = []
    with HangWatchdog(tmp_path, 0, 0.6, reasons.append) as watchdog:
        time.sleep(0.9)  # the first step may take longer
        for step in range(4):
            watchdog.step_ended(step)
            time.sleep(0.2)
        with watchdog.paused():
            time.sleep(0.9)
        assert not reasons and not (tmp_path / "hang-0.txt").exists()
        assert wait_for(lambda: reasons)
        assert "the last was step 3" in reasons[0]
        time.sleep(0.5)
        assert len(reasons) == 1  # once, until steps end again
        watchdog.step_ended(4)
        assert wait_for(lambda: len(reasons) == 2)


def test_only_reports(tmp_path, capfd):
    with HangWatchdog(tmp_path, 0, 0.1, None):
        assert wait_for(lambda: (tmp_path / "hang-0.txt").exists())
        time.sleep(0.3)
    assert "the first step has not ended" in capfd.readouterr().err


def test_zero_turns_it_off(tmp_path):
    with HangWatchdog(tmp_path, 0, 0, None):
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())
