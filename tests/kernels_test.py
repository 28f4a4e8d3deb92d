"""The kernels that decode on a GPU, interpreted, against what they stand for in XLA; and that all kernels compile for one.

Attention has a file of its own, `attention_test`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import attention, nucleus
from treerl.kernels import bins, pool, products, vocabulary
from treerl.models.policy import make_policy
from treerl.models.transformer import Model, RMSNorm, TransformerConfig

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
FAMILIES = {
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tied=False),
    "gemma": dict(norm_plus_one=True, post_norms=True, activation="gelu_tanh", embed_scale=True, query_scalar=20.0),
}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, wanted, dtype="float32"):
    """Norm of the difference over the norm."""
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= TOLERANCE[dtype] * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [False, True])
def test_a_sum_and_its_norm(dtype, offset):
    config = TransformerConfig(vocab=8, layers=1, width=24, heads=2, kv_heads=1, head_dim=4, hidden=8, norm_plus_one=offset)
    norm = RMSNorm(24, config)
    norm.scale[...] = normal(0, 24)
    x, parts = normal(1, 2, 3, 24, dtype=dtype), normal(2, 5, 2, 3, 24)
    total, h = products.add_norm(x, parts, norm.scale[...].astype(dtype), norm.eps, offset)
    norm.scale[...] = norm.scale[...].astype(dtype).astype(jnp.float32)
    wanted = x + parts.sum(0).astype(dtype)
    assert total.dtype == h.dtype == x.dtype
    assert_close(total, wanted, dtype)
    assert_close(h, norm(wanted), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner, outer, plan", [(256, 192, (64, 1)), (768, 128, (32, 4)), (1280, 64, (64, 5))])
def test_parts_of_a_product(dtype, inner, outer, plan):
    x, w = normal(0, 16, inner, dtype=dtype), normal(1, inner, outer, dtype=dtype)
    got = products.product(x, w, plan)
    assert got.dtype == jnp.float32 and got.shape == (plan[1], 16, outer)
    assert_close(got.sum(0), np.asarray(x, np.float64) @ np.asarray(w, np.float64), dtype)


def test_products_that_do_not_fit_are_left_to_xla():
    half = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    assert products.product_plan(half(128, 1536), 1536) == (64, 4) and products.product_plan(half(128, 8960), 1536) == (64, 5)
    assert products.product_plan(half(64, 4096), 24576) == (64, 1)
    assert products.product_plan(half(17, 1536), 1536) is None and products.product_plan(half(256, 1536), 1536) is None
    assert products.product_plan(jnp.zeros((128, 1536)), 1536) is None and products.product_plan(half(128, 100), 1152) is None
    assert products.fits(half(16, 64), 128) and products.narrow_fits(128, 1536, 17920)
    assert not products.narrow_fits(256, 1536, 17920) and not products.narrow_fits(128, 896, 100)
    assert not products.fits(half(24, 64), 128) and not products.fits(half(16, 64), 100)


def test_products_in_eight_bits():
    """The kernel adds nothing to what rounding does."""
    x, w = normal(0, 16, 256), normal(1, 2, 128, 256)
    (q, step), (table, steps) = products.quantize(x), products.quantize(w)
    assert q.dtype == table.dtype == jnp.int8 and int(jnp.abs(q).max()) == 127
    assert float(jnp.abs(q * step[:, None] - x).max()) <= 0.5001 * float(step.max())
    a, b = ((q * step[:, None]) @ (t * s[:, None]).T for t, s in zip(table, steps))
    assert_close(products.narrow_product((q, step), (table, steps), jnp.float32, lambda a, b: a * b), a * b)
    parts, scale = normal(2, 3, 16, 256), normal(3, 256)
    (total, h), (same, (rounded, step)) = (products.add_norm(x, parts, scale, 1e-6, False, narrow=n) for n in (False, True))
    np.testing.assert_array_equal(total, same)
    np.testing.assert_allclose(step, products.quantize(h)[1], rtol=1e-6)
    assert np.abs(np.asarray(rounded, int) - np.asarray(products.quantize(h)[0], int)).max() <= 1  # halves may go either way


def test_a_gpu_without_room_is_left_to_xla(monkeypatch, caplog):
    class Device:
        compute_capability = "8.6"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with caplog.at_level("INFO"):
        assert products.product_plan(jnp.zeros((128, 1536), jnp.bfloat16), 1536) is None
    assert "compute capability 8.6 lacks room" in caplog.text
    assert not products.fits(jnp.zeros((16, 64), jnp.bfloat16), 128) and not products.narrow_fits(128, 1536, 17920)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gated_product(dtype):
    x, w = normal(0, 32, 64, dtype=dtype), normal(1, 64, 2, 256, dtype=dtype) / 8
    gate, up = (jnp.dot(x, w[:, i], precision="highest") for i in range(2))
    assert_close(products.gated(x, w, jax.nn.silu), jax.nn.silu(gate) * up, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, temperature, top_p, candidates", [(5000, 1.0, 1.0, 3), (5000, 0.7, 0.9, 2), (1500, 1.3, 1.0, 0), (37, 1.0, 0.5, 5)]
)
def test_one_pass_over_logits_tells_what_several_do(size, temperature, top_p, candidates):
    logits = 3 * normal(size, 2, 4, size)
    logits = logits.at[0, :2, 5:9].set(-jnp.inf).at[1, 3, 3:].set(-jnp.inf)  # fewer tokens than candidates
    given = logits, jnp.float32(temperature), jnp.float32(top_p), jax.random.uniform(jax.random.key(0), (2, 4)), candidates
    (got, *named), (wanted, *names) = nucleus.survey(*given, fused=True), nucleus.survey(*given)
    assert np.sum(np.asarray(got.token != wanted.token)) <= 1  # a draw at the edge of two tokens may round either way
    same = np.asarray(got.token == wanted.token)
    np.testing.assert_allclose(np.asarray(got.logp)[same], np.asarray(wanted.logp)[same], atol=2e-6)
    for field in ("top", "norm", "entropy"):
        np.testing.assert_allclose(getattr(got, field), getattr(wanted, field), atol=2e-5)
    np.testing.assert_array_equal(named[0], names[0])
    np.testing.assert_allclose(named[1], names[1], atol=2e-6)


def decoded(model, params, slots=4, rows=4, **options):
    """Logits of steps through the pool, line 1 on its neighbour's path in the last row but one."""
    policy = make_policy(model, params, slots=slots, rows=rows, **options)
    cache = policy.prefill(jnp.arange(20).reshape(2, 10), jnp.array([10, 7]))
    own, path, found = jnp.arange(slots), jnp.full((2, slots, rows), -1), []
    decode = jax.jit(policy.decode, static_argnums=5)
    for i in range(-1, rows - 1):
        if i >= 0:
            path = path.at[:, :, i].set(own if i < rows - 2 else jnp.array([0, 0, 2, 3]))
        write = jnp.broadcast_to(path[0, :, max(i, 0)] == own, (2, slots)) & (i >= 0)
        logits, cache = decode(cache, jnp.broadcast_to(own + i, (2, slots)), jnp.full((2, slots), i), path, write, rows)
        found.append(logits)
    return jnp.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [("qwen2", "bfloat16"), ("qwen3", "float32"), ("gemma", "float32")])
def test_decoding_in_kernels(family, dtype, monkeypatch):
    sizes = dict(vocab=50, layers=2, width=64, heads=6, kv_heads=2, head_dim=32, hidden=128)
    model = Model(TransformerConfig(**sizes, dtype=dtype, **FAMILIES[family]))
    params = model.init(jax.random.key(0))
    wanted = decoded(model, params)
    monkeypatch.setattr(attention, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(products, "product_plan", lambda x, outer: (64, x.shape[1] // 64))
    monkeypatch.setattr(products, "fits", lambda x, outer: True)
    assert make_policy(model, params, slots=4, rows=4).kernels
    assert_close(decoded(model, params), wanted, dtype)


@pytest.mark.slow
def test_weights_in_eight_bits(monkeypatch, caplog):
    model = Model(TransformerConfig(vocab=64, layers=2, width=128, heads=4, kv_heads=2, head_dim=32, hidden=128))
    params = model.init(jax.random.key(0))
    wanted = decoded(model, params)
    monkeypatch.setattr(attention, "platform", lambda mesh: "cpu")
    with caplog.at_level("INFO"):
        assert_close(decoded(model, params, weight_dtype="int8"), wanted)  # no GPU
    assert "weight_dtype=int8 needs GPUs" in caplog.text
    monkeypatch.setattr(attention, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(products, "narrow_fits", lambda *sizes: True)
    got = decoded(model, params, weight_dtype="int8")
    assert 0.003 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.03


def of_a_gpu():
    """What newer versions of JAX want to know of the card that a kernel is compiled for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=card))


def test_kernels_compile_for_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    f32, i32, int8 = (functools.partial(jax.ShapeDtypeStruct, dtype=t) for t in (jnp.float32, jnp.int32, jnp.int8))
    cells, prompt = half((4, 2, 40, 512, 128)), half((4, 2, 256, 128))
    heads = half((8, 2048, 12, 128)), half((8, 2048, 2, 128)), half((8, 2048, 2, 128))
    learned = jax.grad(lambda q, k, v, *places: bins.bin_attention(q, k, v, *places).astype(jnp.float32).sum(), (0, 1, 2))
    for function, given in [
        (learned, (*heads, i32((8, 2048)))),
        (learned, (*heads, i32((8, 2048)), i32((8, 2048)), i32(()))),
        (pool.pool_attention, (half((4, 40, 2, 8, 128)), (prompt, prompt, cells, cells), i32((4,)), i32((4, 40, 512)), i32((4, 40)))),
        (functools.partial(vocabulary.survey, candidates=3), (f32((128, 151936)), f32(()), f32((128,)), f32((128,)))),
        (functools.partial(products.product, plan=(64, 5)), (half((128, 8960)), half((8960, 1536)))),
        (functools.partial(products.gated, activation=jax.nn.silu), (half((128, 1536)), half((1536, 2, 8960)))),
        (lambda *x: products.add_norm(*x, 1e-6, False), (half((128, 1536)), f32((5, 128, 1536)), half((1536,)))),
        (lambda *x: products.add_norm(*x, 1e-6, False, narrow=True), (half((128, 1536)), f32((5, 128, 1536)), half((1536,)))),
        (
            lambda *x: products.narrow_product(x[:2], x[2:], jnp.bfloat16, lambda gate, up: jax.nn.silu(gate) * up),
            (int8((128, 1536)), f32((128,)), int8((2, 8960, 1536)), f32((2, 8960))),
        ),
    ]:
        with of_a_gpu():
            text = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text
