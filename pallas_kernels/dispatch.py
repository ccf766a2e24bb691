"""Chooses the implementation of a call, by asking each for its reason to refuse.

The one place that names implementations and platforms. `reference` is never chosen automatically.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import pages, pairs, reference, xla_operation
from pallas_kernels.blockwise.gpu import devices, mosaic, self_test, triton
from pallas_kernels.blockwise.tpu import decode as tpu_decode
from pallas_kernels.blockwise.tpu import operation as tpu_operation
from pallas_kernels.blockwise.tpu import pairs as tpu_pairs
from pallas_kernels.blockwise.tpu import tuning
from pallas_kernels.call import AttentionCall, Inputs, Options

_OPERATIONS = {"tpu": tpu_operation, "gpu": mosaic, "triton": triton, "xla": xla_operation}
# The same for the attention of decode steps to pages.
_PAGES = {"tpu": tpu_decode, "gpu": mosaic, "triton": triton, "xla": pages}
# The same for the attention of queries to keys that all come before them.
_PAIRS = {"tpu": tpu_pairs, "xla": pairs}
# In traced programs the name of a pair's choice between them; their matrix products are the same.
PAIR_SCOPE = "attention_to_earlier_keys"
# Platform -> implementations preferred on it, best first; `xla` serves everything else.
_AUTOMATIC = {"tpu": ("tpu",), "cuda": ("gpu", "triton")}


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """Per implementation None, or why it cannot serve the call."""
    implementations = {"reference": reference, **_OPERATIONS}
    return {name: module.refuses(call) for name, module in implementations.items()}


def explain(op: Callable, *args, **kwargs) -> dict[str, str | None]:
    """Which implementations accept `op(*args, **kwargs)`.

    Args:
      op: `path_attention` or `forgetting_attention`.
      *args, **kwargs: the arguments of the call; `implementation` is ignored.

    Returns:
      {implementation: None, or the reason it refuses the call, or is never chosen unless named}.

    Raises:
      ValueError: when the call itself is wrong.
    """
    kwargs.pop("implementation", None)
    kwargs.pop("return_lse", None)
    reasons = refusals(op.as_call(*args, **kwargs))
    return {name: reason or _distrusts(name, self_test.failure) for name, reason in reasons.items()}


# Platform -> implementation, `default` for all others; sorted pairs, since it is static under `jax.jit`.
Choice = tuple[tuple[str, str], ...]


def choose(call: AttentionCall, implementation: str | None) -> Choice:
    """Implementation to use in the programs for each platform.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: when the named implementation refuses the call.
    """
    reasons = refusals(call)
    if implementation is None:
        return tuple(sorted(_best(reasons, self_test.failure).items()))
    if implementation not in reasons:
        raise ValueError(f"{implementation=} is unknown; choose from {', '.join(sorted(reasons))} or None")
    if reasons[implementation] is not None:
        raise NotImplementedError(f"{implementation}: {reasons[implementation]}")
    return (("default", implementation),)


def _best(reasons, failure):
    """{platform: the best of the implementations that have no reason to refuse and are trusted}."""
    choice = {"default": "xla"}
    for platform, names in _AUTOMATIC.items():
        accepting = (n for n in names if n in reasons and reasons[n] is None and _distrusts(n, failure) is None)
        if _is_known(platform) and (name := next(accepting, None)):
            choice[platform] = name
    return choice


def _is_known(platform):
    """GPUs differ in what they can run: where none is to be expected, a program for one gets `xla`."""
    return platform != "cuda" or devices.compute_capability() is not None


def _distrusts(name, failure):
    """Why an implementation that accepts the call is used only when named, or None; failure: of `self_test`."""
    return failure(name) if name in _AUTOMATIC["cuda"] else None


def forward(choice: Choice, options: Options, inputs: Inputs):
    """(out, lse, what the backward pass wants kept) of the implementation for the platform that is compiled for."""
    options, functions = _functions(choice, "forward", options)
    if options.keep_versions and len(functions) > 1:
        kept = jax.eval_shape(functions["tpu"], inputs)[2]  # every platform's program has the same results

        def without_keeping(function, inputs):
            return *function(inputs)[:2], jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)

        functions = {
            platform: function if platform == "tpu" else functools.partial(without_keeping, function)
            for platform, function in functions.items()
        }
    return _on_each_platform(functions, inputs)


def backward(choice: Choice, options: Options, *residuals):
    """Cotangents of the inputs."""
    _, functions = _functions(choice, "backward", options)
    return _on_each_platform(functions, *residuals)


def _on_each_platform(functions, *arguments):
    """What the function for the platform that is compiled for makes of the arguments."""
    if len(functions) == 1:
        return functions["default"](*arguments)
    return jax.lax.platform_dependent(*arguments, **functions)


def _functions(choice, direction, options):
    # What the kernels keep would be zeros in a program for another platform: only where that is not to be expected.
    keep = choice == (("default", "tpu"),) or (("tpu", "tpu") in choice and tuning.is_tpu_expected())
    options = dataclasses.replace(options, keep_versions=keep)
    function = lambda name: functools.partial(getattr(_OPERATIONS[name], direction), options)
    return options, {platform: function(name) for platform, name in choice}


def check_pages(implementation: str | None, k, v) -> None:
    """Raises like `choose`, for the attention of decode steps to pools of keys and values [pool, K, S, H]."""
    if implementation is None:
        return
    if implementation not in _PAGES:
        raise ValueError(f"{implementation=} is unknown; choose from {', '.join(sorted(_PAGES))} or None")
    if reason := _PAGES[implementation].refuses_pages(k, v):
        raise NotImplementedError(f"{implementation}: {reason}")


def attend_pages(implementation: str | None, *arguments, **options):
    """`pages.attend_pages` by the named implementation, or by the best for the platform that is compiled for."""
    choice = {"default": implementation or "xla"}
    if implementation is None:
        reasons = {name: module.refuses_pages(*arguments[1:3]) for name, module in _PAGES.items()}
        choice = _best(reasons, self_test.decode_failure)
    functions = {platform: functools.partial(_PAGES[name].attend_pages, **options) for platform, name in choice.items()}
    return _on_each_platform(functions, *arguments)


def forward_pair(implementation: str | None, options: pairs.PairOptions, pair: pairs.Pair):
    """`pairs.forward_pair` by the named implementation where it serves pairs, or by the best for the platform."""
    return _of_pair("forward_pair", implementation, options, pair)


def backward_pair(implementation: str | None, options: pairs.PairOptions, pair: pairs.Pair, *others):
    """`pairs.backward_pair`; see `forward_pair`."""
    return _of_pair("backward_pair", implementation, options, pair, *others)


def _of_pair(function, implementation, options, pair, *others):
    reasons = {name: module.refuses_pair(options, pair) for name, module in _PAIRS.items() if name != "xla"}
    choice = _best(reasons, self_test.failure)
    if implementation is not None:
        choice = {"default": implementation if reasons.get(implementation, "no such") is None else "xla"}
    functions = {
        platform: functools.partial(getattr(_PAIRS[name], function), options) for platform, name in choice.items()
    }
    with jax.named_scope(PAIR_SCOPE):
        return _on_each_platform(functions, pair, *others)
