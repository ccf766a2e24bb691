"""Attention of decode steps to pages: the Mosaic GPU kernel in interpret mode, against `pages` in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import TOLERANCE, enable_x64, random_inputs, relative_error
from kernels.test_decode import Decoder, cut, make_cache
from kernels.test_gpu import needs_gpu, needs_interpreter

from benchmarks.gpu_compile import GPUS, abstract_mesh
from pallas_kernels import dispatch, extend, init_cache, interpret
from pallas_kernels.blockwise import pages
from pallas_kernels.blockwise.gpu import decode, mosaic, self_test, triton

CASES = {  # arguments of `problem`, options of `attend_pages`
    "path_fox": (dict(), {}),
    "path_fox, 24 tokens": (dict(groups=4, width=24), dict(gate_scale=-0.5)),
    "fox, window": (dict(path=False), dict(window=300)),
}
SLOW_CASES = {
    "path, 24 tokens": (dict(gate=False, groups=1, width=24), {}),
    "path_fox, wide, parts of pages": (dict(groups=4, superchunk=1024, dims=(128, 128), num_pages=2), {}),
    "path_fox, head dims": (dict(dims=(64, 128), heads=2, superchunk=192), {}),
    "fox, two tiles of ten": (dict(path=False, groups=20), {}),
    "fox, 24 tokens, window": (dict(path=False, groups=2, width=24, superchunk=64), dict(window=100)),
    "fox, row that sees nothing": (dict(path=False, groups=2, width=3), dict(window=60)),
}
MANY_TOKENS = {"fox, 70 tokens": (dict(path=False, width=70), dict(window=200))}


def parameters(cases, **marks):
    return [pytest.param(*case, id=name, **marks) for name, case in cases.items()]


def problem(
    path=True, gate=True, width=1, groups=2, superchunk=128, num_pages=3, heads=1, dims=(64, 64), dtype="float16"
):
    """Arguments of `attend_pages` for two rows; the first does not need its last page, nor the second a middle one."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    pool = 2 * num_pages + 1
    q = normal(2, heads, groups, width, dims[0]) * dims[0] ** -0.5
    k, v = (jnp.asarray(normal(pool, heads, superchunk, n), dtype) for n in dims)
    products = np.linalg.qr(normal(pool, heads, dims[0], dims[0]))[0] if path else None
    gates = inside = None
    if gate:
        gates = np.cumsum(-0.05 * rng.random((pool, heads, groups, superchunk), np.float32), axis=-1)
        inside = np.cumsum(-0.05 * rng.random((2, heads, groups, width), np.float32), axis=-1)
    position = np.arange(width, dtype=np.int32) + np.array([[3], [superchunk - width]], np.int32)
    table = rng.permutation(pool)[:-1].reshape(2, num_pages).astype(np.int32)
    needed = np.ones((2, heads, num_pages), bool)
    needed[0, :, -1] = needed[1, 0, num_pages // 2] = False
    arguments = q, k, v, products, gates, inside, position, table, needed
    return [None if x is None else jnp.asarray(x) for x in arguments]


def in_float64(arguments, **options):
    with enable_x64(True):
        wide = [x if x is None or x.dtype.kind in "ib" else np.asarray(x, np.float64) for x in arguments]
        return jax.tree.map(np.asarray, pages.attend_pages(*map(_asarray, wide), **options))


def _asarray(x):
    return None if x is None else jnp.asarray(np.asarray(x))


def assert_accurate(attend_pages, arguments, **options):
    """At most 1.25 times as far off as `pages`, and pages that no head needs are not read."""
    options = dict(gate_scale=1.0, window=None) | options
    desired = in_float64(arguments, **options)
    peer = pages.attend_pages(*arguments, **options)
    q, k, v, *others, table, needed = arguments
    is_read = np.zeros(len(k), bool)
    is_read[np.asarray(table)[np.asarray(needed).any(1)]] = True
    k, v = (jnp.where(is_read[:, None, None, None], x, jnp.nan) for x in (k, v))
    out, lse = attend_pages(q, k, v, *others, table, needed, **options)
    sees = np.isfinite(desired[1])
    np.testing.assert_array_equal(np.isfinite(lse), sees)
    assert not np.asarray(out)[~sees].any()
    error = lambda lse: np.abs(np.where(sees, lse, 0) - np.where(sees, desired[1], 0)).max()
    assert error(lse) <= 1.25 * error(peer[1]) + 1e-6
    exact = TOLERANCE["float32"]["exact"]
    assert relative_error(out, desired[0]) <= 1.25 * relative_error(peer[0], desired[0]) + exact


@needs_interpreter
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape, options", parameters(CASES) + parameters(SLOW_CASES | MANY_TOKENS, marks=pytest.mark.slow)
)
def test_mosaic(shape, options, dtype):
    attend_pages = functools.partial(mosaic.attend_pages, interpret=True)
    assert_accurate(attend_pages, problem(**shape, dtype=dtype), **options)


@needs_interpreter
@pytest.mark.slow
def test_pieces_that_fit_into_memory(monkeypatch):
    monkeypatch.setattr(decode, "_MOST_BYTES", 4 * 64 * 3 * 2 * 2 * 4)  # of 4 tokens
    assert_accurate(functools.partial(mosaic.attend_pages, interpret=True), problem(width=9), window=300)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("shape, options", parameters({**CASES, "parts": (dict(superchunk=512, groups=3), {})}))
def test_mosaic_without_races(shape, options):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    attend_pages = functools.partial(mosaic.attend_pages, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert_accurate(attend_pages, problem(**shape), **options)
    assert not get_races().races_found


LONG_CASES = {
    "path_fox, long": (dict(groups=8, superchunk=1024, dims=(128, 128), num_pages=30, heads=2), {}),
    "fox, long": (dict(path=False, groups=1, superchunk=1024, num_pages=30, heads=8), dict(window=20000)),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("module", [mosaic, triton], ids=["gpu", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape, options", parameters(CASES | SLOW_CASES | MANY_TOKENS | LONG_CASES))
def test_on_the_gpu(shape, options, dtype, module):
    """On the device itself; run with JAX_PLATFORMS=cuda,cpu."""
    arguments = problem(**shape, dtype=dtype)
    if reason := module.refuses_pages(*arguments[1:3]):
        pytest.skip(reason)
    attend_pages = lambda *arguments, **options: jax.jit(functools.partial(module.attend_pages, **options))(*arguments)
    assert_accurate(attend_pages, arguments, **options)


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_is_trusted():
    assert self_test.decode_failure("gpu") is None


@needs_interpreter
@pytest.mark.parametrize(
    "kind, width",
    [
        ("fox", 1),
        *(pytest.param(kind, width, marks=pytest.mark.slow) for kind in ("path_fox", "pruned") for width in (1, 24)),
    ],
)
def test_extend(kind, width):
    """Rows of different lengths."""
    options = dict(prune=1e-4) if kind == "pruned" else {}
    inputs = random_inputs(13, 330, batch=2, heads=4, kv_heads=2, head_dim=64, gate=0.057, path=kind != "fox")
    inputs["q"] *= 0.02 if kind == "pruned" else 1
    inputs = {name: jnp.asarray(x, "float32") for name, x in inputs.items()}
    decoder = Decoder(inputs, make_cache(inputs, 330, dtype="float16"), implementation="xla", **options)
    decoder.feed([130, 300], 300)
    piece = cut(inputs, decoder.starts, [width, width], width)
    expected, _ = decoder.extend(jax.tree.map(jnp.copy, decoder.cache), jnp.full(2, width), piece)
    with interpret():
        actual, _ = extend(decoder.cache, **piece, implementation="gpu", **options)
    np.testing.assert_allclose(actual, expected, atol=2e-3)


def test_parts_divide_pages():
    for num_blocks in (1, 2, 3, 16):
        for num_pages in (1, 10, 100, 1000):
            parts = decode._num_parts(num_blocks, num_pages)
            assert num_blocks % parts == 0 and (num_blocks // parts >= 2 or num_blocks == 1 or num_blocks == 3)
    assert decode._num_parts(16, 264) == 1 and decode._num_parts(16, 1) == 8


def pools(head_dim=64, v_head_dim=64, dtype="bfloat16"):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    return array(3, 1, 128, head_dim), array(3, 1, 128, v_head_dim)


@needs_interpreter
def test_what_the_kernels_refuse():
    assert mosaic.refuses_pages(*pools()) is None and mosaic.refuses_pages(*pools(128, 64, "float16")) is None
    assert "64 or 128" in mosaic.refuses_pages(*pools(96, 64))
    assert "float16" in mosaic.refuses_pages(*pools(dtype="float32"))
    assert "at most 128" in triton.refuses_pages(*pools(192))
    with pytest.raises(NotImplementedError, match="gpu: .* 64 or 128"):
        dispatch.check_pages("gpu", *pools(32))
    with pytest.raises(ValueError, match="choose from gpu, tpu, triton, xla"):
        dispatch.check_pages("cuda", *pools())
    cache = init_cache(1, 256, num_kv_heads=1, num_heads=1, head_dim=64, path=False, superchunk=128)
    x = jnp.ones((1, 1, 1, 64))
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        extend(cache, x, x, x, implementation="gpu")


@needs_interpreter
def test_only_hopper_gets_the_kernel():
    arguments = jax.eval_shape(lambda: problem(dtype="bfloat16"))
    attend = lambda *arguments: dispatch.attend_pages(None, *arguments, gate_scale=1.0, window=None, interpret=False)
    for gpu in (None, *GPUS.values()):
        with jax.sharding.use_abstract_mesh(abstract_mesh(gpu) if gpu else jax.sharding.get_abstract_mesh()):
            text = str(jax.make_jaxpr(attend)(*arguments))
        assert ("implementation=gpu" in text) == (gpu is GPUS["h100"])


def test_self_test_finds_wrong_kernels():
    accepts = lambda k, v: None
    assert self_test.decode_disagreement(accepts, pages.attend_pages) is None

    def wrong(*arguments, **options):
        out, lse = pages.attend_pages(*arguments, **options)
        return out.at[1, 0, 1, 2].multiply(1.5), lse

    assert "output" in self_test.decode_disagreement(accepts, wrong)
    ungated = lambda *arguments, **options: pages.attend_pages(*arguments, **options | dict(gate_scale=0.5))
    assert "differs" in self_test.decode_disagreement(accepts, ungated)
    assert self_test.decode_failure("gpu") is None  # no GPU to ask
