"""What the workers of `gpu_speed` share, whatever framework they measure."""

import json
import math
import statistics
import time

TOKENS, NUM_HEADS = 16384, 16  # tokens per batch, where a sequence is not longer; query heads = key heads
SAMPLES, SAMPLE_SECONDS = 20, 5e-3


def measure(function, wait) -> dict:
    """Median time of a call, from 20 samples of at least 5 ms each, which queue up on the device.

    Args:
      function: of nothing; returns what `wait` waits for.
    """
    for _ in range(3):
        wait(function())
    start = time.perf_counter()
    wait(function())
    calls = max(1, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(calls):
            out = function()
        wait(out)
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return {"ms": statistics.median(samples), "samples": [round(sample, 4) for sample in samples]}


def say(line: dict) -> None:
    """One line of JSON."""
    print(json.dumps(line), flush=True)


def answer(function) -> None:
    """Says what the function returns, or why it failed."""
    try:
        say(function())
    except Exception as error:  # of whatever compiler, driver or missing package: it is the cell's result
        say({"failure": f"{type(error).__name__}: {error}"[:500]})
