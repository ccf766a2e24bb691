"""The decode cache: however a sequence is cut into calls, the outputs are those of the whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import cast, enable_x64, random_inputs

from pallas_kernels import PagePool, extend, forgetting_attention, init_cache, interpret, path_attention

KINDS = {  # name: arguments of `random_inputs`, of the op
    "path": (dict(gate=None), {}),
    "path_fox": (dict(gate=0.05), dict(gate_scale=0.5)),
    "fox": (dict(path=False, gate=0.05), dict(scale=0.3)),
    "fox, window": (dict(path=False, gate=0.05), dict(window=130)),
    "attention": (dict(path=False, gate=None), {}),
}
SHAPE = dict(batch=2, heads=4, kv_heads=2, head_dim=16, v_head_dim=24)


def make_cache(inputs, max_length, **options):
    num_heads, num_kv_heads = inputs["q"].shape[2], inputs["k"].shape[2]
    return init_cache(
        inputs["q"].shape[0], max_length, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=inputs["q"].shape[3], v_head_dim=inputs["v"].shape[3],
        path="w" in inputs, forget="log_forget" in inputs, **{"dtype": inputs["v"].dtype, "superchunk": 128} | options,
    )  # fmt: skip


def full(inputs, **options):
    if "w" in inputs:
        return path_attention(**inputs, **options)
    return forgetting_attention(
        log_forget=inputs.get("log_forget"), **{k: v for k, v in inputs.items() if k != "log_forget"}, **options
    )


def cut(inputs, starts, lengths, width):
    """`width` tokens of every row from its start on, the tokens past its length replaced by rubbish."""

    def row(x, start, length):
        x = x[start : start + length]
        return jnp.concatenate([x, jnp.full((width - length, *x.shape[1:]), 7, x.dtype)])

    return {name: jnp.stack([row(*arguments) for arguments in zip(x, starts, lengths)]) for name, x in inputs.items()}


class Decoder:
    """Feeds the rows of `inputs` to a cache piece by piece and keeps the outputs of each row."""

    def __init__(self, inputs, cache, **options):
        self.inputs, self.cache = inputs, cache
        self.starts = np.zeros(len(inputs["q"]), int)
        self.outputs = [[] for _ in self.starts]
        self.extend = jax.jit(
            lambda cache, lengths, x: extend(cache, **x, lengths=lengths, **options), donate_argnums=0
        )

    def feed(self, lengths, width):
        lengths = np.minimum(lengths, self.inputs["q"].shape[1] - self.starts)
        pieces = cut(self.inputs, self.starts, lengths, width)
        out, self.cache = self.extend(self.cache, jnp.asarray(lengths), pieces)
        for row, length in enumerate(lengths):
            self.outputs[row].append(np.asarray(out[row, :length]))
            assert not np.asarray(out[row, length:]).any()
        self.starts = self.starts + lengths

    def output(self, row):
        return np.concatenate(self.outputs[row])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind):
    """Ragged pieces of 0 to 150 tokens and single steps, past two superchunks."""
    shape, options = KINDS[kind]
    inputs = cast(random_inputs(0, 330, **SHAPE, **shape), "float32")
    decoder, rng = Decoder(inputs, make_cache(inputs, 330), **options), np.random.default_rng(1)
    while (decoder.starts < 330).any():
        decoder.feed(rng.integers(0, 151, 2), 150)
        for _ in range(4):
            decoder.feed(rng.integers(0, 2, 2), 1)
    expected = np.asarray(full(inputs, **options))
    for row in range(2):
        np.testing.assert_allclose(decoder.output(row), expected[row], atol=1e-5)
    assert decoder.extend._cache_size() == 2  # one program per width


@pytest.mark.parametrize(
    "kind, width",
    [
        ("fox", 1),
        *(pytest.param(kind, width, marks=pytest.mark.slow) for kind in (*KINDS, "pruned") for width in (1, 24)),
    ],
)
def test_kernel_equals_xla(kind, width):
    """Rows of different lengths, in float32 and, up to the rounding of queries and weights, in bfloat16."""
    shape, options = KINDS.get(kind, (dict(gate=0.057), dict(prune=1e-4)))
    inputs = random_inputs(13, 330, **SHAPE, **shape)
    inputs["q"] *= 0.02 if kind == "pruned" else 1
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
        inputs = cast(inputs, "float32")
        cache = make_cache(inputs, 330, dtype=dtype)
        decoder = Decoder(inputs, cache, implementation="xla", **options)
        decoder.feed([130, 300], 300)
        piece = cut(inputs, decoder.starts, [width, width], width)
        expected, _ = decoder.extend(jax.tree.map(jnp.copy, decoder.cache), jnp.full(2, width), piece)
        with interpret():
            actual, _ = extend(decoder.cache, **piece, implementation="tpu", **options)
        np.testing.assert_allclose(actual, expected, atol=tolerance)


def test_closed_superchunks_never_change():
    inputs = cast(random_inputs(2, 400, **SHAPE, gate=0.05), "float32")
    decoder = Decoder(inputs, make_cache(inputs, 400))
    decoder.feed([130, 260], 300)
    closed = [0, 4, 5]  # row 0 has closed one page of its 4, row 1 two
    pages = lambda cache: [np.asarray(x)[closed] for x in (cache.k, cache.v, cache.gate, cache.products)]
    before = pages(decoder.cache)
    for _ in range(60):
        decoder.feed([1, 1], 1)
    jax.tree.map(np.testing.assert_array_equal, pages(decoder.cache), before)


@pytest.mark.parametrize("kind", ["path_fox", pytest.param("fox", marks=pytest.mark.slow)])
def test_pruned_pages_are_not_read(kind):
    inputs = random_inputs(3, 600, **SHAPE, path=kind != "fox", gate=0.057)
    inputs = cast(inputs | {"q": 0.02 * inputs["q"]}, "float32")
    decoder = Decoder(inputs, make_cache(inputs, 600), prune=1e-4)
    decoder.feed([590, 590], 590)
    cache = decoder.cache
    decoder.cache = cache._replace(k=cache.k.at[0].set(jnp.nan))  # of row 0
    decoder.feed([1, 1], 1)
    expected = np.asarray(full(inputs))
    for row in range(2):
        np.testing.assert_allclose(decoder.output(row), expected[row, :591], atol=2e-4 * np.abs(inputs["v"]).max())


def test_rows_that_outgrow_the_cache_are_nan():
    inputs = cast(random_inputs(4, 200, **SHAPE), "float32")
    cache = make_cache(inputs, 128)
    out, cache = extend(cache, **inputs, lengths=jnp.array([128, 129]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.slow
def test_float64_is_kept():
    with enable_x64(True):
        inputs = cast(random_inputs(5, 70, **SHAPE), "float64")
        out, _ = extend(make_cache(inputs, 70), **inputs)
        np.testing.assert_allclose(out, full(inputs, implementation="reference"), atol=1e-12)


@pytest.mark.parametrize("length", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_full_rows_change_no_page(length):
    """Neither by tokens that do not fit nor by a call that brings them none: other rows may share the page."""
    inputs = cast(random_inputs(14, 128, **SHAPE), "float32")
    _, cache = extend(make_cache(inputs, 128), **inputs)
    pieces = jax.tree.map(lambda x: x[:, :5], inputs)
    out, after = extend(cache, **pieces, lengths=jnp.full(2, length))
    assert np.isnan(out).all() if length else not np.asarray(out).any()
    for name in ("k", "v", "key_norm", "gate", "products"):
        np.testing.assert_array_equal(getattr(after, name), getattr(cache, name), name)


@pytest.mark.parametrize("path", [True, False])
def test_a_step_copies_no_more_than_a_page(path):
    inputs = cast(random_inputs(6, 1, heads=2, kv_heads=2, head_dim=32, path=path), "float32")
    cache = make_cache(inputs, 2560, superchunk=256)
    compiled = jax.jit(lambda cache, x: extend(cache, **x), donate_argnums=0).lower(cache, inputs).compile()
    copies = re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", compiled.as_text())
    sizes = [int(np.prod([int(size) for size in dims.split(",") if size])) for dims in copies]
    assert max(sizes, default=0) <= cache.k[0].size
    held = sum(x.nbytes for x in (cache.k, cache.v))
    assert compiled.memory_analysis().alias_size_in_bytes >= held > compiled.memory_analysis().temp_size_in_bytes


def test_bytes_of_a_step():
    """At T = 32768, H = 128, bfloat16: at most 1.35 times the keys and values alone."""
    length, head_dim, superchunk = 32768, 128, 1024
    cache = jax.eval_shape(lambda: init_cache(1, length, num_kv_heads=1, num_heads=1, head_dim=head_dim, forget=True))
    assert cache.superchunk == superchunk and cache.k.dtype == jnp.bfloat16
    bytes_of = lambda x: x.size * x.dtype.itemsize
    open_half = (bytes_of(cache.open.block_k) + bytes_of(cache.open.block_products)) / 2  # half full on average
    block = sum(bytes_of(x) for x in (cache.open.k, cache.open.w, cache.open.beta))
    read = sum(bytes_of(x) for x in (cache.k, cache.v, cache.gate, cache.products)) + open_half + block
    assert read <= 1.35 * (bytes_of(cache.k) + bytes_of(cache.v))


@pytest.mark.slow
@pytest.mark.parametrize("low", [0.0, 1.9])
def test_errors_do_not_pile_up(low):
    """Logits of the last of 4096 single steps in bfloat16, up to a constant: values are one-hot, outputs weights."""
    length, head_dim = 4096, 64
    inputs = random_inputs(7, length, heads=1, kv_heads=1, head_dim=head_dim, gate=None)
    inputs["beta"] = np.random.default_rng(8).uniform(low, 2, inputs["beta"].shape)
    inputs = {name: jnp.asarray(x, "bfloat16" if name in "qkv" else "float32") for name, x in inputs.items()}
    cache = make_cache(inputs, length, superchunk=1024)

    def step(cache, x):
        return extend(cache, **jax.tree.map(lambda x: x[:, None], x))[1], None

    steps = jax.tree.map(lambda x: jnp.moveaxis(x[:, :-1], 1, 0), inputs)
    cache, _ = jax.jit(lambda cache, x: jax.lax.scan(step, cache, x))(cache, steps)
    one_hot = jnp.eye(length)  # float32, so that weights are not rounded
    cache = cache._replace(v=one_hot.reshape(4, 1, 1024, length))
    last = jax.tree.map(lambda x: x[:, -1:].astype("float32"), inputs)
    out, _ = extend(cache, **last | {"v": one_hot[None, -1:, None]})
    with enable_x64(True):
        inputs = cast(inputs | {"v": one_hot[None, :, None]}, "float64")
        expected = np.asarray(path_attention(**inputs, implementation="xla"))[0, -1, 0]
    logits, expected = (x - x.mean() for x in (np.log(np.asarray(out, np.float64)[0, 0, 0]), np.log(expected)))
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    print(error)
    assert error <= 3e-3


def test_forks_share_full_pages():
    inputs = cast(random_inputs(9, 300, **SHAPE, gate=0.05), "float32")
    other = cast(random_inputs(10, 300, **SHAPE, gate=0.05), "float32")
    shared = jax.tree.map(lambda x, y: jnp.stack([x[0], jnp.concatenate([x[0, :270], y[0, 270:]])]), inputs, other)
    cache = make_cache(inputs, 384, num_pages=5)
    pool = PagePool(cache)
    cache = pool.reserve(cache, [300, 0])
    decoder = Decoder(shared, cache)
    decoder.feed([270, 0], 270)
    assert pool.num_used == 3
    before = jax.tree.map(lambda x: np.asarray(x[0]), decoder.cache.open)
    pages = np.asarray(decoder.cache.k[:3]), np.asarray(decoder.cache.v[:3])
    decoder.cache = pool.reserve(pool.fork(decoder.cache, 0, 1), [30, 30])
    assert pool.num_used == 4 and pool.num_free == 1
    decoder.starts[1] = 270
    decoder.feed([0, 30], 30)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: np.asarray(x[0]), decoder.cache.open), before)
    np.testing.assert_array_equal(decoder.cache.k[:3], pages[0])
    np.testing.assert_array_equal(decoder.cache.v[:3], pages[1])
    decoder.feed([30, 0], 30)
    expected = np.asarray(full(shared))
    np.testing.assert_allclose(decoder.output(0), expected[0], atol=1e-5)
    np.testing.assert_allclose(decoder.output(1), expected[1, 270:], atol=1e-5)

    cache = pool.release(decoder.cache, 0)
    assert pool.num_used == 3
    cache = pool.fork(cache, 1, 0, length=256)  # a prefix of whole pages, for another request
    assert pool.num_used == 3
    decoder.cache, decoder.starts[0] = pool.reserve(cache, [44, 0]), 256
    decoder.outputs[0] = [expected[0, :256]]
    decoder.feed([44, 0], 44)
    np.testing.assert_allclose(decoder.output(0), expected[0], atol=1e-5)


def test_pool_says_what_is_wrong():
    inputs = cast(random_inputs(11, 8, **SHAPE), "float32")
    with pytest.raises(ValueError, match="own their pages"):
        PagePool(make_cache(inputs, 256))
    cache = make_cache(inputs, 256, num_pages=3)
    pool = PagePool(cache)
    out, _ = extend(cache, **inputs)
    assert np.isnan(out).all()  # no page was reserved
    with pytest.raises(ValueError, match="4 pages are needed and 3 of 3"):
        pool.reserve(cache, 256)
    with pytest.raises(ValueError, match="outgrow 256"):
        pool.reserve(cache, [257, 0])
    assert pool.num_used == 0
    cache = pool.reserve(cache, 8)
    _, cache = extend(cache, **inputs)
    with pytest.raises(ValueError, match="not empty"):
        pool.fork(cache, 0, 1)
    with pytest.raises(ValueError, match="length=100"):
        pool.fork(pool.release(cache, 1), 0, 1, length=100)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"w": None, "beta": None}, {}, "w is missing"),
        ({"log_forget": None}, {}, "log_forget is missing"),
        ({}, {"lengths": jnp.array([1, 9])}, r"lengths \[1, 9\]"),
        ({"v": jnp.zeros((2, 8, 2, 5))}, {}, "do not fit a cache"),
    ],
)
def test_wrong_calls(changes, options, message):
    inputs = cast(random_inputs(12, 8, **SHAPE), "float32")
    with pytest.raises(ValueError, match=message):
        extend(make_cache(inputs, 128), **inputs | changes, **options)


@pytest.mark.parametrize("sizes", [dict(max_length=0), dict(num_heads=3), dict(superchunk=100), dict(batch=0)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError):
        init_cache(**dict(batch=1, max_length=8, num_heads=2, num_kv_heads=2, head_dim=4) | sizes)
