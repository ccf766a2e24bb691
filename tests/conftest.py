"""Eight fake CPU devices and run-time shape checks of the kernels, for the whole suite."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the suite's time. The LLVM level changes no HLO; the scripts' own tests run without it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["pallas_kernels"], "beartype.beartype")
