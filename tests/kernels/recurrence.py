"""The definition of both attention ops, token by token in NumPy float64, and what their tests share.

`attention` is the top of the ladder of tests: it keeps the list of past keys and, when token t arrives, multiplies
every one of them by H_t = I - beta_t w_t w_t^T and adds log_forget_t to its decay. There is no algorithm in it, so it
can be checked by eye; every implementation is compared with it or with something that was.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest

# Relative L2 error allowed, per dtype of the inputs; lse is float32 for all of them. `exact` is for two routes that
# differ in rounding only, `float16_kernel` for published outputs of a kernel that stores intermediates in float16.
TOLERANCE = {
    "float64": {"definition": 1e-12, "lse": 5e-7, "output": 1e-11, "gradient": 1e-11, "difference": 1e-7},
    "float32": {"output": 1e-5, "gradient": 5e-5, "lse": 1e-5, "exact": 1e-6, "float16_kernel": 3e-4},
    "bfloat16": {"output": 5e-3, "gradient": 1e-2, "correlated": 5e-2, "bound": 1e-3},
}
NEGLIGIBLE = 1e-6  # an array whose norm is below this is compared absolutely
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ops"  # inputs, outputs and gradients of public code
IMPLEMENTATIONS = ("reference", "xla")  # in any precision
# The kernels in interpret mode take a minute to compile; test_tpu.py has those cases that always run.
WITH_KERNELS = (*IMPLEMENTATIONS, pytest.param("tpu", marks=pytest.mark.slow))

# Two rows: packed documents that straddle 64-token blocks with padding at both ends; one and a tail of padding.
DOCUMENTS = np.stack([
    np.repeat([0, 1, 2, 3, 0], [5, 1, 66, 66, 12]),
    np.repeat([7, 0], [66, 84]),
]).astype(np.int32)  # fmt: skip

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def attention(
    q, k, v, w=None, beta=None, log_forget=None, *, scale=None, gate_scale=1.0, window=None, segment_ids=None
):
    """Softmax over s_tj = scale q_t H_t ... H_{j+1} k_j + gate_scale (log_forget_{j+1} + ... + log_forget_t), j <= t.

    Args:
      q: [B, T, N, H]; the last T of the S positions.
      k, v: [B, S, K, H] and [B, S, K, Hv].
      w, beta: [B, S, K, H] and [B, S, K], or None for H_t = I.
      log_forget: [B, S, N] or None.
      window: keys a query sees, itself included, or None.
      segment_ids: [B, S] contiguous documents, 0 is padding, or None.

    Returns:
      o [B, T, N, Hv] and lse [B, N, T], float64.
    """
    (batch, queries, heads, head_dim), (length, kv_heads) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    o = np.zeros((batch, queries, heads, v.shape[-1]))
    lse = np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // kv_heads)
            start = 0  # first token of the document that t belongs to
            keys, decay = np.zeros((0, head_dim)), np.zeros(0)  # of tokens start ... t, as token t sees them
            for t in range(length):
                if segment_ids is not None and (t == 0 or segment_ids[b, t] != segment_ids[b, t - 1]):
                    start, keys, decay = t, np.zeros((0, head_dim)), np.zeros(0)
                if w is not None:
                    householder = np.eye(head_dim) - beta[b, t, kv] * np.outer(w[b, t, kv], w[b, t, kv])
                    keys = keys @ householder
                if log_forget is not None:
                    decay = decay + log_forget[b, t, n]
                keys, decay = np.vstack([keys, k[b, t, kv]]), np.append(decay, 0.0)
                query = t - (length - queries)
                if query < 0 or (segment_ids is not None and segment_ids[b, t] == 0):
                    continue
                seen = slice(0 if window is None else max(0, t + 1 - start - window), None)
                logits = scale * keys[seen] @ q[b, query, n] + gate_scale * decay[seen]
                weights = np.exp(logits - logits.max())
                o[b, query, n] = weights @ v[b, start : t + 1, kv][seen] / weights.sum()
                lse[b, n, query] = logits.max() + np.log(weights.sum())
    return o, lse


def unit(x):
    """Scale to unit norm along the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_inputs(
    seed, length, *, batch=1, heads=4, kv_heads=2, head_dim=16, v_head_dim=None, queries=None, path=True, gate=0.3
):
    """Float64 inputs as a dict of the op's array arguments; log_forget ~ U(-2 gate, 0), left out when gate is None."""
    rng = np.random.default_rng(seed)
    inputs = {
        "q": rng.standard_normal((batch, queries or length, heads, head_dim)),
        "k": rng.standard_normal((batch, length, kv_heads, head_dim)),
        "v": rng.standard_normal((batch, length, kv_heads, v_head_dim or head_dim)),
    }
    if path:
        inputs["w"] = unit(rng.standard_normal((batch, length, kv_heads, head_dim)))
        inputs["beta"] = rng.uniform(0, 2, (batch, length, kv_heads))
    if gate is not None:
        inputs["log_forget"] = -rng.uniform(0, 2 * gate, (batch, length, heads))
    return inputs


def random_cotangents(seed, inputs):
    """(do, dlse) for the inputs; dlse holds float32 numbers because lse is float32 whatever the inputs are."""
    rng = np.random.default_rng(seed)
    batch, queries, heads, _ = inputs["q"].shape
    do = rng.standard_normal((batch, queries, heads, inputs["v"].shape[-1]))
    return do, rng.standard_normal((batch, heads, queries)).astype(np.float32)


def segment_ids_of(boundaries):
    """[1, T] segment ids 1 ... 1 2 ... 2 ... of one packed row from the boundaries [0, a, b, ..., T]."""
    lengths = np.diff(boundaries)
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def cast(tree, dtype):
    """Every array of the tree as a JAX array of that dtype."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x, dtype), tree)


def with_implementation(implementation, **options):
    """Keyword arguments of an op as the hashable `options` of `run`."""
    return (("implementation", implementation), *options.items())


# The tests compile many small programs once each, so the compiler's back end may be quick (same HLO passes).
_jit = functools.partial(
    jax.jit, static_argnames=("op", "options"), compiler_options={"xla_backend_optimization_level": 0}
)


@_jit
def run(op, inputs, segment_ids=None, options=()):
    """(o, lse) of the op; options is a tuple of (keyword, value) pairs. Compiled once per way of passing arguments."""
    return op(**inputs, segment_ids=segment_ids, return_lse=True, **dict(options))


@_jit
def run_with_gradients(op, inputs, cotangents, segment_ids=None, options=()):
    """(o, lse) of the op and the gradient of every input for the cotangents (do, dlse)."""

    def call(inputs):
        return op(**inputs, segment_ids=segment_ids, return_lse=True, **dict(options))

    outputs, pullback = jax.vjp(call, inputs)
    return outputs, pullback(jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, outputs))[0]


def relative_error(actual, desired):
    """L2 norm of the difference over the L2 norm of the desired array, in float64."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


def assert_close(actual, desired, tolerance, name="array"):
    """Relative L2 error within tolerance; -inf at the same places; negligible arrays are compared absolutely."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape, f"{name}: shape {actual.shape}, expected {desired.shape}"
    finite = ~np.isneginf(desired)
    np.testing.assert_array_equal(~np.isneginf(actual), finite, err_msg=f"{name}: -inf at other places")
    actual, desired = actual[finite], desired[finite]
    assert np.isfinite(actual).all(), f"{name}: {np.sum(~np.isfinite(actual))} values are not finite"
    if np.linalg.norm(desired) < NEGLIGIBLE:
        error, tolerance = np.max(np.abs(actual - desired), initial=0.0), min(tolerance, NEGLIGIBLE)
    else:
        error = relative_error(actual, desired)
    assert error <= tolerance, f"{name}: error {error:.2e} exceeds {tolerance:.0e}"


def assert_all_close(actual, desired, dtype):
    """Compares two results of `run_with_gradients`."""
    ((o, lse), gradients), ((desired_o, desired_lse), desired_gradients) = actual, desired
    assert_close(o, desired_o, TOLERANCE[dtype]["output"], "o")
    assert_close(lse, desired_lse, TOLERANCE[dtype]["lse"], "lse")
    assert gradients.keys() == desired_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, desired_gradients[name], TOLERANCE[dtype]["gradient"], f"d{name}")


def assert_slope(op, inputs, directions, cotangents, options):
    """One directional derivative of <do, o> in float64 against a central difference."""
    with enable_x64(True):
        inputs, directions, do = cast((inputs, directions, cotangents[0]), "float64")
        # lse is float32, too coarse to be differenced.
        cotangents = do, jax.numpy.zeros_like(cotangents[1])

        def loss(step):
            moved = jax.tree.map(lambda x, d: x + step * d, inputs, directions)
            return np.vdot(do, run_with_gradients(op, moved, cotangents, None, options)[0][0])

        _, gradients = run_with_gradients(op, inputs, cotangents, None, options)
        derivative = sum(np.vdot(gradients[name], directions[name]) for name in inputs)
        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(derivative, difference, rtol=TOLERANCE["float64"]["difference"])


def assert_causal(op, inputs, others, options):
    """Replacing every input from position t on leaves the bits of all earlier outputs alone."""

    def replace_from(t):
        return jax.tree.map(lambda x, other: x.at[:, t:].set(other[:, t:]), inputs, others)

    o, lse = run(op, inputs, None, options)
    for t in (1, 63, 64, 65, 100, 128, 199):
        changed_o, changed_lse = run(op, replace_from(t), None, options)
        np.testing.assert_array_equal(changed_o[:, :t], o[:, :t], err_msg=f"o before position {t}")
        np.testing.assert_array_equal(changed_lse[..., :t], lse[..., :t], err_msg=f"lse before position {t}")
        assert not np.array_equal(changed_o[:, t], o[:, t])


def assert_prune_keeps_its_bound(op, inputs, cotangents, segment_ids, options, prune, bound):
    """The mass dropped per row, hence the change of o and lse, is within the bound; gradients follow.

    In float64, where a dropped mass shows however small it is: something must have been dropped.
    """
    with enable_x64(True):
        inputs = cast(inputs, "float64")
        (o, lse), gradients = run_with_gradients(op, inputs, cotangents, segment_ids, options)
        (pruned_o, pruned_lse), pruned = run_with_gradients(
            op, inputs, cotangents, segment_ids, (*options, ("prune", prune))
        )
        change = np.max(np.abs(pruned_o - o))
        assert 0 < change <= 2 * bound * np.max(np.abs(inputs["v"]))
        assert np.max(np.where(lse > pruned_lse, lse - pruned_lse, 0)) <= -np.log1p(-bound) + 1e-5
        assert np.max(np.where(lse < pruned_lse, pruned_lse - lse, 0)) <= 1e-5
        for name, gradient in pruned.items():
            assert_close(gradient, gradients[name], 10 * bound, f"d{name}")


def assert_documents_are_separate(op, inputs, cotangents, segment_ids, options):
    """Outputs and gradients of packed float32 rows equal those of each document alone, and padding is inert."""
    do, dlse = cotangents
    packed = run_with_gradients(op, inputs, cotangents, segment_ids, options)
    assert_padding_is_inert(packed, segment_ids)
    apart = jax.tree.map(np.zeros_like, packed)
    (o, lse), gradients = apart
    lse[:] = -np.inf
    for row, segment in [(r, s) for r, ids in enumerate(segment_ids) for s in np.unique(ids) if s > 0]:
        where = np.flatnonzero(segment_ids[row] == segment)
        here = (slice(row, row + 1), slice(where[0], where[-1] + 1))
        here_lse = (here[0], slice(None), here[1])
        document = {name: x[here] for name, x in inputs.items()}
        (o[here], lse[here_lse]), document_gradients = run_with_gradients(
            op, document, (do[here], dlse[here_lse]), None, options
        )
        for name, gradient in document_gradients.items():
            gradients[name][here] = gradient
    assert_all_close(packed, apart, "float32")


def assert_padding_is_inert(result, segment_ids):
    """Padding has output 0, lse -inf and gradient 0, all exact, whatever the cotangents there."""
    (o, lse), gradients = result
    padding = segment_ids == 0
    assert not np.any(np.asarray(o)[padding])
    assert np.all(np.isneginf(np.moveaxis(np.asarray(lse), 1, -1)[padding]))
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), f"d{name} is not finite"
        largest = np.max(np.abs(np.asarray(gradient)[padding]))
        assert largest == 0, f"d{name} at padding is {largest:.1e}"
