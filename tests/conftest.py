"""Eight fake CPU devices, one cache of compiled programs and run-time shape checks, for the whole suite."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the suite's time. Neither the LLVM level nor older code for fusions, which compiles in half the
# time, changes HLO; the scripts' own tests run without them.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
# Programs are compiled once for all processes: those of the suite, and the scripts that tests start again and again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="path-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["pallas_kernels"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which Linux allows a process 65,530; beyond, compilation crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
