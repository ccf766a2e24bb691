"""The page of plans says what the plans' files say."""

import json

import pytest

from benchmarks import plan_results

_MODEL = dict(mixer="path_fox", num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, vocab_size=100)
_PLAN = dict(
    arguments=["--config=configs/lm_path.py:size=760m", "--topology=v5e:2x2", "--config.mesh.tensor=2"],
    model=_MODEL | dict(remat="full", dtype="bfloat16"), topology="v5e:2x2",
    mesh=dict(data=1, fsdp=2, sequence=1, tensor=2), batch_size=8, sequence_length=128, num_parameters=10**6, fits=True,
    peak_bytes=3 * 2**30, memory_bytes=16 * 2**30, compile_seconds=12.4, step_seconds=0.5, bound="hbm",
    tokens_per_second=2048.0, seconds=dict(compute=0.25, hbm=0.5, network=0.125),
    flops=dict(model=1.5e12, program=2e12), collectives=[dict(kind="all-gather", axes="fsdp", count=6, sent_bytes=5e6)],
    layer_collectives=[dict(kind="all-reduce", axes="tensor", count=10, sent_bytes=0.0)],
)  # fmt: skip


def test_page(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_PLAN))
    output = tmp_path / "plans.md"
    plan_results.main([str(path), "--title=Plans", f"--output={output}"])
    text = output.read_text()
    name = "lm_path.py:size=760m mesh.tensor=2"
    row = lambda *cells: "| " + " | ".join((name, *cells)) + " |"
    assert row("v5e:2x2", "fsdp 2, tensor 2", "8 x 128", "3.00 of 16.00", "yes", "12") in text
    assert row("1.5e+12", "+23917.5%", "2e+12", "0.250", "0.500", "0.125", "hbm", "2,048") in text
    assert row("all-gather", "fsdp", "6", "0.005") in text


def test_bytes_by_hand():
    expected = plan_results.by_hand(_PLAN)
    mlp, mixer = 3 * 64 * 256, 4 * 64 * 64 + 32 * 128 + 2 * 64 * 4
    # bfloat16, two layers, half on each tensor shard, half of that gathered from the other fsdp shard
    assert expected["kernels gathered over fsdp"] == pytest.approx(2 * 2 / 2 / 2 * (2 * mlp + 3 * mixer))
    assert expected["gradients scattered over fsdp"] == pytest.approx(2 * 2 / 2 / 2 * (mlp + mixer))
    assert expected["activations summed over tensor"] == 5 * 2 * (8 * 128 // 2) * 64 * 2


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        plan_results.main([str(tmp_path / "none.json"), "--title=Plans", f"--output={tmp_path / 'plans.md'}"])
    assert ended.value.code == 1 and "none.json" in capsys.readouterr().err
