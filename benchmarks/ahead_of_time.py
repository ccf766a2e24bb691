"""Cases that are compiled for accelerators that are not there, each in a process of its own.

Compilers read their options once per process, and some end the process when they fail.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      function: what is compiled; jitted or not.
      inputs: its arguments as a tuple of trees of `jax.ShapeDtypeStruct`.
      flops: useful floating-point operations, for the share of the peak.
      tables: contents of scalar-prefetch operands that are not constants of the program, {operand index: array}.
    """

    function: object
    inputs: tuple
    flops: int | None = None
    tables: dict = dataclasses.field(default_factory=dict)


def argument(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def build(request: dict) -> Case:
    """Calls the function `request["case"]`, "module:function", with `request["arguments"]`."""
    module, _, function = request["case"].rpartition(":")
    return getattr(importlib.import_module(module), function)(**request["arguments"])


def run(module: str, request: dict, environment: dict, timeout: float) -> tuple[dict, str]:
    """Runs `python -m module REQUEST RESULT`, which writes JSON to the file RESULT.

    Args:
      module: a compiler.
      request: JSON; names the case and, under "target", what it is compiled for.
      environment: more variables.
      timeout: seconds.

    Returns:
      The result, and what was printed.

    Raises:
      RuntimeError: with the end of the compiler's message, when it fails.
    """
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",  # leave an attached accelerator alone
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        **environment,
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", module, json.dumps(request), str(result)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            what = f"{request['case']} for {request['target']}"
            raise RuntimeError(f"{what} took more than {timeout:.0f} s to compile") from None
        if done.returncode:
            message = [line for line in done.stderr.splitlines() if line.strip() and line[:2] not in ("I0", "W0", "E0")]
            raise RuntimeError("\n".join(message)[-4000:])
        return json.loads(result.read_text()), done.stdout
