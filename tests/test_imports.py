"""The layout's import table, enforced on the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each part may import of ours, besides itself. A key covers the modules below it; the longest key wins.
ALLOWED = {
    "pallas_kernels": [],
    "path_jax.metrics": [],
    "path_jax.report": [],
    "path_jax.parallel": ["pallas_kernels"],
    "path_jax.nn": ["path_jax.parallel.sharding"],
    "path_jax.mixers": ["path_jax.nn", "path_jax.parallel", "pallas_kernels"],
    "path_jax.models": ["path_jax.mixers", "path_jax.nn", "path_jax.parallel"],
    "path_jax.data": [],
    "path_jax.data.__main__": ["path_jax"],
    "path_jax.checkpoints": ["path_jax.models", "path_jax.parallel"],
    "path_jax.checkpoints.__main__": ["path_jax"],
    "path_jax.training": [f"path_jax.{p}" for p in ("models", "data", "parallel", "checkpoints", "metrics", "nn.taps")],
    "path_jax.evaluation": [
        f"path_jax.{p}" for p in ("models", "data", "parallel", "checkpoints", "metrics", "nn.taps")
    ],
    "path_jax.evaluation.lm_eval": ["path_jax"],
    "path_jax.evaluation.longbench": ["path_jax"],
    "path_jax.evaluation.run_report": ["path_jax"],
    "path_jax.evaluation.eval_report": ["path_jax"],
    "path_jax.interpretability": [f"path_jax.{p}" for p in ("models", "data", "checkpoints", "metrics", "nn.taps")],
    "path_jax.interpretability.__main__": ["path_jax"],
    "path_jax.interpretability.saturation_command": ["path_jax"],
    "path_jax.interpretability.exit_command": ["path_jax"],
    "path_jax.interpretability.exit_report": ["path_jax.interpretability", "path_jax.report"],
    "path_jax.interpretability.saturation_report": ["path_jax.interpretability", "path_jax.report"],
    "path_jax.interpretability.recall_report": ["path_jax.interpretability", "path_jax.report"],
    "path_jax.planning": [f"path_jax.{p}" for p in ("models", "data", "parallel", "checkpoints", "training")],
    "path_jax.planning.flops": ["path_jax.models", "pallas_kernels.dispatch"],
    "path_jax.plan": ["path_jax"],
    "path_jax.command_flags": [],
    "path_jax.nnx": [],
    "path_jax.generate": ["path_jax"],
    "path_jax.run": ["path_jax"],
    "path_jax.sweep": ["path_jax"],
    "configs": ["configs"],
    "configs.continued": ["configs", "path_jax.checkpoints"],  # its model is a checkpoint's
    "benchmarks": [],
    "benchmarks.conversion": ["path_jax.report"],
    "benchmarks.cases": ["benchmarks", "pallas_kernels"],
    "benchmarks.gpu_tune": ["benchmarks", "pallas_kernels"],
    "benchmarks.gpu_jax": ["benchmarks", "pallas_kernels", "path_jax", "configs"],
    "benchmarks.gpu_table": ["benchmarks", "path_jax.report"],
    "benchmarks.task_results": ["benchmarks", "path_jax.evaluation.task_accuracy", "path_jax.report"],
    "benchmarks.recall_results": ["benchmarks", "path_jax.report"],
    "benchmarks.saturation_results": ["benchmarks", "path_jax.report"],
    "benchmarks.exit_results": ["benchmarks", "path_jax.report"],
    "benchmarks.tpu_hlo": ["path_jax.planning.hlo"],
    "benchmarks.plan_results": ["benchmarks", "path_jax.report"],
    "benchmarks.tpu_tune": ["benchmarks", "pallas_kernels"],
    "pallas_kernels.benchmark": [
        "pallas_kernels",
        "benchmarks.gpu_speed",
        "benchmarks.gpu_tune",
        "benchmarks.tpu_tune",
    ],
    "train": ["path_jax"],
    "eval": ["path_jax"],
}
# Third-party packages that only the named parts may import.
CONFINED = {
    "matplotlib": ["path_jax.report"],
    "tensorflow_datasets": ["path_jax.data.text"],
    "tensorboardX": ["path_jax.training.progress"],
    "sklearn": [
        f"path_jax.interpretability.{x}" for x in ("probes", "transitions", "exit_rules", "exit_calibration", "digits")
    ],
    "safetensors": ["path_jax.checkpoints.shards"],
    "tokenizers": ["path_jax.data.tokenizer"],
    "array_record": ["path_jax.data.prepared", "path_jax.data.shard_writer"],
    "lm_eval": ["path_jax.evaluation.lm_eval"],
    "gguf": ["path_jax.checkpoints.gguf"],
    "flax": ["path_jax"],
    "orbax": ["path_jax.checkpoints"],
    "optax": ["path_jax.training", "path_jax.interpretability.digits"],
    "triton": [f"pallas_kernels.blockwise.gpu.{name}" for name in ("triton_kernels", "decode_triton")],
    "jax_triton": ["pallas_kernels.blockwise.gpu.triton_call"],
}
SOURCES = sorted(
    path
    for pattern in ("pallas_kernels/**/*.py", "path_jax/**/*.py", "configs/*.py", "benchmarks/*.py", "*.py")
    for path in ROOT.glob(pattern)
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """Modules a file imports, at any depth, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_allowed_imports(path):
    module = module_name(path)
    if module == "path_jax":
        return
    part = max((key for key in ALLOWED if is_within(module, key)), key=len)
    for imported in imports(path):
        if imported.split(".")[0] in ("pallas_kernels", "path_jax", "configs", "benchmarks"):
            assert any(is_within(imported, allowed) for allowed in [part, *ALLOWED[part]]), (
                f"{module} imports {imported}"
            )
        for package, homes in CONFINED.items():
            if is_within(imported, package):
                assert any(is_within(module, home) for home in homes), f"{module} imports {imported}"


def test_flax_nnx_has_one_importer():
    importers = [module_name(path) for path in SOURCES if any(is_within(name, "flax.nnx") for name in imports(path))]
    assert importers == ["path_jax.nnx"]


def test_configs_load_without_jax_and_kernels_without_the_rest():
    program = (
        "import sys, configs.lm_path, configs.lm_baselines\n"
        "configs.lm_path.get_config('size=760m')\n"
        "assert 'jax' not in sys.modules\n"
        "import pallas_kernels\n"
        "assert not {'path_jax', 'flax', 'optax', 'matplotlib'} & set(sys.modules)\n"
        "import path_jax\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import path_jax.checkpoints, path_jax.data, path_jax.interpretability\n"
        "assert not {'safetensors', 'tokenizers', 'gguf', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
