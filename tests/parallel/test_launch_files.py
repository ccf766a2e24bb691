"""Launch files as far as they can be checked without their platforms: syntax, flags, keys of the configuration."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs import lm_path
from path_jax.parallel.cluster import settings

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "launch").iterdir())
PAGE = ROOT / "docs" / "cluster.md"


def arguments(path: Path) -> list[str]:
    """Everything after a train.py in a file, comments apart, up to the end of its command."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    if path.suffix == ".yaml":
        text = re.sub(r"\n\s*- (?=train\.py|--)", " ", text)
    commands = [line.split("train.py", 1)[1] for line in text.splitlines() if "train.py" in line]
    return [argument for line in commands for argument in re.findall(r"--\S+", line)]


def defined_flags() -> set[str]:
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "train.py").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_and_keys_exist(path):
    found = arguments(path)
    assert any(argument.startswith("--workdir=") for argument in found), found
    config = lm_path.get_config("size=760m,mixer=path_fox")
    for argument in found:
        name = argument.removeprefix("--").split("=")[0]
        if name.startswith("config."):
            section, key = name.split(".")[1:]
            assert key in config[section], argument
        else:
            assert name in defined_flags(), argument
    assert "--config=configs/lm_path.py:size=760m,mixer=path_fox" in found


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".yaml"], ids=lambda path: path.name)
def test_scripts_parse(path):
    bash = shutil.which("bash") or pytest.skip("no bash")
    subprocess.run([bash, "-n", str(path)], check=True)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_parses(path):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(path.read_text())
    if "spec" not in content:
        assert content["num_nodes"] == 2 and "train.py" in content["run"]
        subprocess.run([shutil.which("bash") or pytest.skip("no bash"), "-n", "-c", content["run"]], check=True)
        return
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] == 4
    variables = {item["name"]: item.get("value") for item in container.get("env", [])}
    if variables:  # the last process of the set
        variables["JAX_PROCESS_ID"] = str(spec["completions"] - 1)
        found = settings(environment=variables)
        assert found["num_processes"] == spec["completions"] and found["process_id"] == 3
        name = f"{content['metadata']['name']}-{job['name']}-0-0.{content['metadata']['name']}"
        assert found["coordinator"] == f"{name}:1234"
    else:
        assert settings(environment={"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}) == {}


def test_every_file_is_on_the_page():
    page = PAGE.read_text()
    assert [path.name for path in FILES if f"launch/{path.name}" not in page] == []
    for name in re.findall(r"launch/([\w.]+)", page):
        assert (ROOT / "docs" / "launch" / name).exists(), name
