"""Plans a training run on machines that need not be there.

    python -m path_jax.plan --config=configs/lm_path.py:size=760m --topology=v5e:16x16 [--config.mesh.tensor=2 ...]

Compiles the training step for the topology (v5e:16x16, v5p:8x8x8, v6e:16x16, h100:HOSTSxGPUS, cpu:DEVICES) on this CPU
and prints, for one device: memory by kind, collectives, FLOPs, the least time of a step, and the largest global batch
that fits. No data is read. TPUs need libtpu, `pip install path-jax[tpu]`. For GPUs the step is partitioned over as many
fake CPU devices, and memory and traffic are the CPU compiler's.

Ends with status 0 when the step fits, 1 when it does not, naming the largest buffers.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from path_jax.command_flags import flags_parser
from path_jax.models.decoder_lm import count_parameters
from path_jax.planning.collectives import find_collectives
from path_jax.planning.compilation import OutOfMemory, compile_step, describe
from path_jax.planning.estimate import step_time
from path_jax.planning.flops import attention_flops, product_flops
from path_jax.planning.memory import largest_arrays, largest_buffers, memory_by_kind
from path_jax.planning.search import largest_batch
from path_jax.planning.topology import parse_topology
from path_jax.planning.traffic import hbm_bytes

_GIB = 2**30
_IN_LAYERS = re.compile(r"DecoderLM\)+/while|/layers")  # operations of the scan over layers, or of a layer
_SHOWN = ("mixer", "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "vocab_size", "remat", "dtype")


def plan(
    config: Mapping[str, Any], topology_name: str, *, memory_gib: float = 0, search: bool = True, say=print
) -> dict:
    """What `--json` prints; JSON types only.

    Args:
      config: resolved; topology_name: see the module; memory_gib: of a device, 0 for the chip's; search: also finds the
        largest batch, with up to three more compilations; say: gets lines on the progress.

    Raises:
      ValueError: for a configuration or topology that cannot work.
    """
    topology = parse_topology(topology_name)
    memory = int(memory_gib * _GIB) or topology.memory
    experiment = describe(config, topology)
    batch_size, length = experiment.data.batch_size, experiment.data.sequence_length
    mesh = dict(experiment.mesh.shape)
    programs, failures = {}, {}

    def peak(size: int) -> int:
        say(f"compiling a batch of {size} x {length} tokens for {topology.name} ...")
        start = time.perf_counter()
        try:
            programs[size] = compile_step(experiment, topology, size)
            used = programs[size].peak_bytes
        except OutOfMemory as error:
            failures[size] = error
            used = max(error.peak_bytes, memory + 1)
        say(f"... {time.perf_counter() - start:.0f} s: {used / _GIB:.2f} GiB of {memory / _GIB:.2f} GiB")
        return used

    used = peak(batch_size)
    result = {
        "model": {x: getattr(experiment.model.config, x) for x in _SHOWN},
        "topology": topology.name,
        "num_devices": topology.num_devices,
        "mesh": mesh,
        "batch_size": batch_size,
        "sequence_length": length,
        "num_parameters": count_parameters(experiment.model.config),
        "fits": batch_size in programs and used <= memory,
        "peak_bytes": used,
        "memory_bytes": memory,
        "notes": [],
    }
    if batch_size in programs:
        result |= _analysis(experiment, topology, programs[batch_size])
    if not result["fits"]:
        if batch_size in programs:
            found = largest_buffers(programs[batch_size])
        else:
            found = largest_arrays(failures[batch_size].jaxpr.jaxpr, topology.num_devices)
        result["buffers"] = [dataclasses.asdict(buffer) for buffer in found]
    if topology.kind == "h100":
        result["notes"].append(
            "partitioned over fake CPU devices: memory and HBM traffic are the CPU compiler's estimate, without "
            "attention kernels and with less fusion"
        )
    if search:
        unit = mesh["data"] * mesh["fsdp"] * experiment.train.accumulate
        result["largest_batch"] = dataclasses.asdict(largest_batch(peak, unit, batch_size, used, memory))
    return result


def _analysis(experiment, topology, program) -> dict:
    """Memory, collectives, FLOPs and times of a compiled step."""
    config, data = experiment.model.config, experiment.data
    tokens = data.batch_size * data.sequence_length
    collectives, num_unknown_loops = find_collectives(program.hlo, dict(experiment.mesh.shape))
    attention = attention_flops(config, data.batch_size, data.sequence_length, experiment.mesh.shape["sequence"])
    products = product_flops(program.jaxpr.jaxpr, topology.num_devices)
    if config.implementation is not None:
        attention = 0.0  # a named implementation's products, where it has any, are among the program's
    traffic = hbm_bytes(program.hlo)
    times = step_time(topology, experiment.mesh, flops=products + attention, hbm_bytes=traffic, collectives=collectives)
    per_token = config.train_flops_per_token(count_parameters(config), data.sequence_length)
    result = {
        "compile_seconds": program.seconds,
        "memory": memory_by_kind(program),
        "collectives": _totals(collectives),
        "layer_collectives": _totals([x for x in collectives if _IN_LAYERS.search(x.source)]),
        "largest_collectives": [
            dataclasses.asdict(x) | {"sent_bytes": x.sent_bytes}
            for x in sorted(collectives, key=lambda x: -x.sent_bytes)[:12]
        ],
        "flops": {"model": per_token * tokens, "program": products + attention, "attention": attention},
        "hbm_traffic_bytes": traffic,
        "step_seconds": times and times.overlapped,
        "step_seconds_in_turn": times and times.in_turn,
        "seconds": times and dataclasses.asdict(times),
        "bound": times and times.bound,
        "notes": [],
    }
    if times:
        result["tokens_per_second"] = tokens / times.overlapped
    if num_unknown_loops:
        result["notes"].append(f"{num_unknown_loops} loops with collectives of unknown length are counted as one trip")
    return result


def _totals(collectives) -> list[dict]:
    """By kind and mesh axes, what sends most first; those of a single device are left out."""
    rows = {}
    for x in collectives:
        if x.axes:
            row = rows.setdefault(
                (x.kind, x.axes), dict(kind=x.kind, axes=x.axes, count=0, payload_bytes=0, sent_bytes=0.0)
            )
            row["count"] += x.count
            row["payload_bytes"] += x.count * x.payload_bytes
            row["sent_bytes"] += x.sent_bytes
    return sorted(rows.values(), key=lambda row: -row["sent_bytes"])


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for people."""
    size = lambda value: f"{value / _GIB:.3f}"
    mesh = " x ".join(f"{axis} {count}" for axis, count in result["mesh"].items() if count > 1) or "one device"
    head = Table("", "", title=f"{result['topology']}: {mesh}", show_header=False)
    head.add_row("global batch", f"{result['batch_size']} x {result['sequence_length']} tokens")
    head.add_row("parameters", f"{result['num_parameters'] / 1e6:.1f} million")
    fits = "fits" if result["fits"] else "DOES NOT FIT"
    head.add_row("peak of a device", f"{size(result['peak_bytes'])} of {size(result['memory_bytes'])} GiB: {fits}")
    found = [head]
    if "memory" in result:
        memory = Table("memory of a device", "GiB")
        for kind, value in result["memory"].items():
            memory.add_row(kind, size(value))
        flops, seconds = result["flops"], result["seconds"]
        head.add_row("FLOPs of a step", f"model {flops['model']:.3e}, program {flops['program']:.3e}")
        if seconds:
            parts = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
            head.add_row(
                "time of a step", f"at least {result['step_seconds']:.3g} s, bound by {result['bound']} ({parts})"
            )
        sent = Table("collective", "mesh axes", "runs", "GiB of arrays", "GiB sent by a device")
        for row in result["collectives"]:
            sent.add_row(
                row["kind"], row["axes"], str(row["count"]), size(row["payload_bytes"]), size(row["sent_bytes"])
            )
        found += [memory, sent]
    if "largest_batch" in result:
        batch = result["largest_batch"]
        head.add_row("largest global batch", f"{batch['batch_size']} rows ({size(batch['peak_bytes'])} GiB)")
    if "buffers" in result:
        buffers = Table("GiB", "array", "made by", title="largest buffers")
        for buffer in result["buffers"]:
            buffers.add_row(size(buffer["bytes"]), buffer["shape"], buffer["source"])
        found.append(buffers)
    for note in result["notes"]:
        head.add_row("note", note)
    return found


def main(argv):
    """Prints the plan. Bad input ends in one line and status 1."""
    if len(argv) > 1:
        sys.exit(f"plan: unexpected arguments {argv[1:]}; settings are given as --config.section.key=value")
    logging.set_verbosity(logging.ERROR)
    values = flags.FLAGS
    try:
        result = plan(
            values.config.to_dict(), values.topology, memory_gib=values.memory_gib, search=values.search,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        sys.exit(f"plan: {' '.join(str(error).split())}")
    if values.json:
        print(json.dumps(result | {"arguments": [x for x in sys.argv[1:] if x not in ("--json", "--nosearch")]}))
    else:
        for table in tables(result):
            Console().print(table)
    sys.exit(0 if result["fits"] else 1)


def run():
    """The command."""
    config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/lm_path.py:size=760m")
    flags.DEFINE_string("topology", None, "machine, e.g. v5e:16x16, v5p:8x8x8, v6e:16x16, h100:8x8 or cpu:8")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_bool("search", True, "find the largest batch that fits, by up to three more compilations")
    flags.DEFINE_float("memory_gib", 0, "memory of one device, where it is not the chip's", lower_bound=0)
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=flags_parser("plan"))


if __name__ == "__main__":
    run()
