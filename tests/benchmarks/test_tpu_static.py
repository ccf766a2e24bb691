"""The static TPU counter: parsing and running a schedule, reading HLO, the table, and one real compilation.

`tiny_schedule.txt` and `tiny_utilization.txt` are the compiler's schedule (v5e) of a kernel on the grid (2, 3) that
clears its output block where j == 0 and adds the input block picked by table[j] where table[j] > 0; vector instructions
and most comments are removed.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tpu_hlo, tpu_static, tpu_table
from benchmarks.tpu_chips import CHIPS, chip_of, full_topology
from benchmarks.tpu_count import analyze, count_dump
from benchmarks.tpu_scalar import Block, Machine, Program
from benchmarks.tpu_schedule import Schedule

HERE = Path(__file__).parent
TABLE = [2, 0, 1]


@pytest.fixture(scope="module")
def tiny():
    return Schedule.read(HERE / "tiny_schedule.txt", HERE / "tiny_utilization.txt")


def runs_of(execution, start, end):
    """Executions of bundles [start, end) by spans that cover them."""
    return sum(runs for (first, last), runs in execution.spans.items() if first <= start and end <= last)


def test_schedule_runs_each_region_as_often_as_the_grid_says(tiny):
    execution = tiny.execute(CHIPS["v5e"], operands={0: TABLE})
    assert tiny.num_bundles == 134 and execution.cycles == 827
    assert execution.cycles == sum((end - start) * runs for (start, end), runs in execution.spans.items())
    assert not execution.unknown_branches
    assert runs_of(execution, 15, 61) == 6 + 2  # grid steps and the two that fill and drain the pipeline
    assert runs_of(execution, 75, 77) == 2  # j == 0
    assert runs_of(execution, 90, 97) == 4  # table[j] > 0
    # Six input blocks, two output blocks and the table, whose smallest copy is 512 bytes.
    assert execution.hbm_bytes == (6 + 2) * 8 * 128 * 4 + 512
    assert execution.timeline > execution.cycles


def test_schedule_reports_what_it_does_not_know(tiny):
    executed, skipped = (tiny.execute(CHIPS["v5e"], skip_unknown=skip) for skip in (False, True))
    assert sum(executed.unknown_branches.values()) > 0
    assert runs_of(executed, 90, 97) == 6 and runs_of(skipped, 90, 97) == 0


def test_span_table_is_the_whole_execution(tiny):
    execution = tiny.execute(CHIPS["v5e"], operands={0: TABLE})
    rows = tiny.span_table(execution)
    assert sum(row["cycles"] for row in rows) == execution.cycles
    assert rows[0]["remark"] == "loop_body"


def test_vmem_is_that_of_two_buffers_per_block(tiny):
    assert tiny.vmem == 2 * 2 * 8 * 128 * 4
    assert tiny.spills == tiny.fills == 0


def test_equal_kernels_share_a_schedule_but_not_their_tables(tmp_path):
    for stage, source in (
        ("66-post-bundle-packing-post-ra", "tiny_schedule.txt"),
        ("68-pre-delay_hlo-static-per-bundle-utilization", "tiny_utilization.txt"),
    ):
        (tmp_path / f"179-tiny.1-{stage}.txt").write_text((HERE / source).read_text())
    (tmp_path / "179-TLP-00-deduplication-map.txt").write_text(
        "key:<start>\nordinal:0\nequivalent_hlos[size=0]:\n"
        "key:tiny.1\nordinal:1\nequivalent_hlos[size=2]:\n  tiny.1\n  tiny.2\n"
    )
    call = 'f32[16,128] custom-call(%t{0}, %x), custom_call_target="tpu_custom_call"'
    hlo = "\n".join(
        ["ENTRY %main (x: f32[16,384]) -> f32[16,128] {", "  %x = f32[16,384] parameter(0)"]
        + ["  %t1 = s32[3]{0:T(128)} constant({2, 0, 1})", "  %t2 = s32[3]{0:T(128)} constant({2, 1, 1})"]
        + [f"  %tiny.1 = {call.format(1)}", f"  ROOT %tiny.2 = {call.format(2)}", "}"]
    )
    compiled = {"hlo": hlo, "temp_bytes": 0, "flops": 1000, "tables": {}}
    count = count_dump(tmp_path, "v5e", compiled)
    assert [kernel.name for kernel in count.kernels] == ["tiny.1", "tiny.2"]
    assert count.kernels[0].cycles == 827 < count.kernels[1].cycles
    text = tpu_static.format_count(count, regions=True)
    assert "loop_body" in text and "unknown" not in text
    (tmp_path / "179-TLP-00-deduplication-map.txt").unlink()
    with pytest.raises(RuntimeError, match="tiny.2"):
        count_dump(tmp_path, "v5e", compiled)


def run(*lines, memory=None, skip_unknown=False, latency=100.0):
    """Machine after a straight block (10 bundles), a loop block (bundles 10-15) and an end (up to 20)."""
    blocks = [Block(0, list(lines[0]), 10), Block(1, list(lines[1]), 15), Block(2, list(lines[2]), 20)]
    machine = Machine(dict(memory or {}), bytes_per_cycle=32.0, latency=latency, skip_unknown=skip_unknown)
    machine.run(Program(blocks, {"7": 1 << 40}, 20))
    return machine


def test_machine_loops_and_stores():
    before = ["%s1_s0 = smov.u32 0", "%s9_s9 = vector_thing %v1"]
    loop = [
        "%s2_s0 = sphi %s1_s0, %s3_s0",
        "%5 = sst [smem:[#allocation7 + %s2_s0]] 1",
        "%s3_s0 = sadd.s32 3, %s2_s0",
        "%p4_p0 = scmp.lt.s32.totalorder %s3_s0, 10",
        "%6 = sbr.rel (%p4_p0) target bundleno = 10 (0xa), region = 1",
    ]
    machine = run(before, loop, [])
    assert machine.spans == {(0, 15): 1, (10, 15): 3, (15, 20): 1} and machine.cycles == 35
    assert machine.memory == {(1 << 40) + i: 1 for i in (0, 3, 6, 9)}
    assert machine.forgotten == {}  # nothing depends on the vector's scalar


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("sadd.s32 2147483647, 1", -(2**31)),
        ("sshrl.u32 4294967295, 28", 15),
        ("sshra.s32 4294967288, 2", -2),
        ("smul.u32 65536, 65537", 65536),
        ("scmp.lt.u32.totalorder 4294967295, 1", False),
        ("scmp.lt.s32.totalorder 4294967295, 1", True),
        ("scalar_select predicate=0, on_true=5, on_false=6", 6),
        ("srem.s32 4294967289, 4", -3),
    ],
)
def test_machine_wraps_at_32_bits(operation, expected):
    machine = run([f"%s1_s0 = {operation}", "%2 = sst [smem:[#allocation7]] %s1_s0"], [], [])
    assert machine.memory == {1 << 40: expected}


def test_machine_guards_copies_and_waits_for_them():
    copy = "dma.hbm_to_vmem (%p1_p0), hbm=0, size_in_granules=64, vmem=0, dst_syncflagno=[#allocation7]"
    lines = [f"%2 = {copy}", "%3 = dma.done.wait (%p1_p0), [#allocation7], 64"]
    issued = run(["%p1_p0 = pmov 1", *lines], [], [])
    assert issued.copied == {"hbm_to_vmem": 2048} and issued.now == 64 + 100 + 20
    assert run(["%p1_p0 = pmov 0", *lines], [], []).copied == {}
    unknown = run(["%p1_p0 = sld [smem:[#allocation7]]", *lines], [], [])
    assert unknown.copied == {"hbm_to_vmem": 2048} and unknown.unknown == {0: 2}


def test_machine_refuses_what_it_cannot_parse():
    with pytest.raises(ValueError, match="branch"):
        run(["%1 = sbr.ind %s3"], [], [])
    with pytest.raises(ValueError, match="copy"):
        run(["%1 = dma.hbm_to_vmem %s1, 64"], [], [])


HLO = """HloModule example

%fused (p: f32[16,128]) -> f32[16,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %add = f32[16,128]{1,0:T(8,128)} add(%p, %p)
}

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0:T(8,128)} parameter(0)
  %table = s32[3]{0:T(128)} constant({2, 0, -1})
  %start = (s32[3]{0:T(128)S(1)}, s32[3]{0:T(128)}, u32[]{:S(2)}) copy-start(%table)
  %staged = s32[3]{0:T(128)S(1)} copy-done(%start)
  %fusion = f32[16,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused
  %near = bf16[16,1]{1,0:T(8,128)(2,1)S(1)} convert(%fusion)
  ROOT %attention.1 = f32[16,128]{1,0:T(8,128)} custom-call(%staged, %fusion), custom_call_target="tpu_custom_call"
}
"""


def test_hlo_kernels_and_their_tables():
    (kernel,) = tpu_hlo.kernels(HLO)
    assert kernel == tpu_hlo.Kernel("attention.1", {0: [2, 0, -1]})


def test_hlo_traffic_counts_hbm_only():
    traffic = tpu_hlo.outside_traffic(HLO)
    assert traffic.outside == 2 * 16 * 128 * 4 + 16 * 128 * 4  # fusion, and convert's operand
    assert traffic.staged == 512  # the padded table
    assert traffic.suspicious == []
    assert tpu_hlo.outside_traffic(HLO.replace(" add(", " dot(")).suspicious == ["dot"]


def test_hlo_kernel_in_a_loop_is_refused():
    loop = HLO.replace("ENTRY %main", "%body").replace("HloModule example", "%w = f32[] while(%x), body=%body")
    with pytest.raises(ValueError, match="inside a loop"):
        tpu_hlo.kernels(loop)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ("f32[16,128]{1,0:T(8,128)}", 8192),
        ("f32[16,1]{1,0:T(8,128)}", 8192),
        ("f32[16,1]{0,1:T(1,128)}", 512),
        ("bf16[3,8,100]{2,1,0:T(8,128)(2,1)}", 3 * 8 * 128 * 2),
        ("f32[]{:T(128)}", 4),
        ("(f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, token[])", 4096),
    ],
)
def test_bytes_of_tiled_arrays(array, expected):
    assert tpu_hlo.type_bytes(array) == expected


def test_pack_words():
    assert tpu_hlo.pack_words(np.array([1, 2, 3, 4, -1], np.int8), None) == [0x04030201, 0xFF]
    words = np.array(tpu_hlo.pack_words(np.arange(8 * 256).reshape(8, 256).astype(np.int32), (8, 128)))
    assert words[:128].tolist() == list(range(128)) and words[8 * 128] == 128  # tile after tile
    narrow = np.zeros((8, 128), np.int8)
    narrow[:4, 3] = 1, 2, 3, 4
    assert tpu_hlo.pack_words(narrow, (8, 128))[3] == 0x04030201  # four rows to a word


def test_chips():
    clocks = {name: chip.clock / 1e9 for name, chip in CHIPS.items()}
    assert clocks == pytest.approx({"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.755}, rel=0.01)
    assert full_topology("v5p") == "v5p:2x2x1" and full_topology("v5e:4x4") == "v5e:4x4"
    with pytest.raises(ValueError, match="v9"):
        chip_of("v9:1x1")


def record(cost, cores=(1,)):
    """Record of one kernel."""
    kernel = {"name": "kernel.1", "cycles": cost, "cost": cost, "timeline": cost, "hbm_cycles": 1, "vmem": 1 << 20}
    kernel |= {"core_cycles": [cost * share for share in cores], "unknown": 0}
    return {"kernels": [kernel], "temp_bytes": 0, "outside": 0.0, "suspicious": []}


def cell_of(op, blocks=(), **changes):
    values = {"chip": "v5p", "length": 8192, "head_dim": 128, "kv_heads": 8, "direction": "backward"} | changes
    return tpu_table.Cell(op=op, blocks=blocks, **values)


def test_table_compares_with_the_best_splash_and_keeps_failures():
    results = {
        cell_of("splash", (1024, 1024, 512)): record(4_000_000, cores=(1, 0)),
        cell_of("splash", (1024, 2048, 512)): record(5_000_000),
        cell_of("path"): record(3_000_000) | {"outside_default": 0.5, "sources": "old", "suspicious": ["dot"]},
        cell_of("fox"): {"failure": "ValueError: no"},
    }
    text = tpu_table.markdown(results)
    (path,) = (line for line in text.splitlines() if "path (older kernels)" in line)
    assert "| 0.75 (1.50) |" in path and "0.00 (0.50) with dot" in path
    assert "5.000" not in text and "* fox backward v5p T8192 H128 kv8: ValueError: no" in text


def test_counts_age_with_the_kernels_they_used():
    fox, path = (tpu_table.kernel_sources(cell_of(op)) for op in ("fox", "path"))
    forward = tpu_table.kernel_sources(cell_of("path", direction="forward"))
    assert len({fox, path, forward}) == 3
    assert tpu_table.kernel_sources(cell_of("path_fox", head_dim=64)) == path


def test_table_skips_blocks_that_lost_without_grouped_heads():
    best, lost = cell_of("splash", (1024, 1024, 512)), cell_of("splash", (1024, 2048, 512))
    results = {best: record(4), lost: record(5)}
    assert not tpu_table.is_superfluous(best, results) and not tpu_table.is_superfluous(lost, results)
    assert tpu_table.is_superfluous(cell_of("splash", lost.blocks, kv_heads=2), results)
    assert not tpu_table.is_superfluous(cell_of("splash", best.blocks, kv_heads=2), results)
    assert not tpu_table.is_superfluous(cell_of("path", kv_heads=2), results)


def test_table_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_table, "versions", lambda: "jax 0")
    counted = []

    def count_cell(cell):
        counted.append(cell.name)
        return {"failure": "ValueError: no"} if cell.op == "fox" else record(10)

    monkeypatch.setattr(tpu_table, "count_cell", count_cell)
    command = ["table", "--output", str(tmp_path / "t.md"), "--chips", "v6e", "--only", "^(fox|flash) .* T8192 H64 kv8"]
    tpu_static.main(command)
    assert counted == [f"{op} {way} v6e T8192 H64 kv8{blocks}" for op, blocks in (("flash", " 1024"), ("fox", ""))
                       for way in ("forward", "backward")]  # fmt: skip
    tpu_static.main(command)
    assert len(counted) == 4
    tpu_static.main([*command, "--retry"])
    assert counted[4:] == counted[2:4]
    tpu_static.main([*command, "--recount"])
    assert len(counted) == 6
    monkeypatch.setattr(tpu_table, "is_old", lambda cell, record: cell.op == "flash" and cell.direction == "forward")
    tpu_static.main([*command, "--recount"])
    assert counted[6:] == counted[:1]
    assert (tmp_path / "t.md").read_text().count("| flash") == 2


def test_table_names_are_unique():
    names = [cell.name for cell in tpu_table.all_cells(list(CHIPS))]
    assert len(set(names)) == len(names)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_matmul_takes_the_cycles_that_the_matrix_units_need(chip):
    size = 1024
    count = analyze("benchmarks.cases:matmul", chip, {"m": size, "k": size, "n": size})
    (kernel,) = count.kernels
    bound = 2 * size**3 / CHIPS[chip].flops_per_cycle
    assert bound <= kernel.cycles <= 1.25 * bound  # filling the matrix units and the pipeline, twice
    assert kernel.hbm_bytes == 3 * size * size * 2  # every array crosses once
    assert not kernel.unknown_branches
    assert count.share_of_peak() == pytest.approx(bound / kernel.cycles)
    assert count.traffic.outside == 0


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
def test_splash_visits_half_of_the_blocks():
    count = analyze("benchmarks.cases:splash", "v5e", {"T": 2048, "block_q": 512, "block_kv": 512})
    (kernel,) = count.kernels
    assert not kernel.unknown_branches
    assert 8 * 10 in [span["runs"] for span in kernel.spans]  # 8 heads, 4 * 5 / 2 blocks, known from the mask's table
