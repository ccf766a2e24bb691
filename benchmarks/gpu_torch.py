"""Measures cells of `gpu_speed` in PyTorch: its own attention and flash-linear-attention's Triton kernels."""

import functools
import json
import sys

import torch

from benchmarks.gpu_worker import NUM_HEADS, TOKENS, answer, measure, say


def inputs(cell: dict) -> dict:
    """As those of `gpu_jax`."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (max(1, TOKENS // cell["length"]), cell["length"], NUM_HEADS, cell["head_dim"])
    normal = lambda: torch.randn(shape, generator=generator, device="cuda")
    uniform = lambda most: most * torch.rand(shape[:3], generator=generator, device="cuda")
    values = {name: normal().bfloat16() for name in ("q", "k", "v", "dout")}
    return values | {
        "w": torch.nn.functional.normalize(normal(), dim=-1),
        "beta": uniform(2),
        "log_forget": -uniform(0.01),
    }


def operation(cell: dict):
    """The function, and the names of the inputs it takes."""
    if cell["by"] == "sdpa":

        def causal(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return causal, ("q", "k", "v")
    if cell["op"] == "fox":
        from fla.ops.forgetting_attn.parallel import parallel_forgetting_attn

        return parallel_forgetting_attn, ("q", "k", "v", "log_forget")
    from fla.ops.path_attn.parallel import parallel_path_attn

    names = ("q", "k", "v", "w", "beta") + (("log_forget",) if cell["op"] == "path_fox" else ())
    return lambda *arguments: parallel_path_attn(*arguments)[0], names


def time_cell(cell: dict) -> dict:
    """Time and memory of both directions."""
    function, names = operation(cell)
    values = inputs(cell)
    arguments, dout = [values[name] for name in names], values["dout"]
    del values

    def forward():
        with torch.no_grad():
            return function(*arguments)

    def both():
        leaves = [x.detach().requires_grad_() for x in arguments]
        return torch.autograd.grad(function(*leaves), leaves, dout)

    result = {}
    for direction, run in (("forward", forward), ("both", both)):
        result[direction] = measure(run, lambda out: torch.cuda.synchronize())
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        result[direction]["bytes"] = torch.cuda.max_memory_allocated() - held
    return result


def main():
    """Introduces itself, then answers cell after cell."""
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for package in ("triton", "fla"):
        try:
            versions[package] = __import__(package).__version__
        except Exception as error:  # its cells will say so too
            versions[package] = f"{type(error).__name__}: {error}"[:200]
    say({"machine": {"gpu": torch.cuda.get_device_name(), "platform": f"CUDA {torch.version.cuda}"} | versions})
    for cell in json.load(sys.stdin):
        answer(functools.partial(time_cell, cell))


if __name__ == "__main__":
    main()
