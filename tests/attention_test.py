"""Attention over the pool: the kernel and the dense form against a walk along every path."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import attention
from treerl.models.transformer import Model, TransformerConfig

B, G, K, R, D, P, S = 3, 2, 5, 3, 16, 21, 40


def inputs(seed, *, used=S, dtype=jnp.float32):
    """Random queries, cache, prompt lengths and paths; rows from `used` on hold nothing."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    cursor = rng.integers(0, used + 1, (B, K))
    cursor[0, 0], cursor[1, 1] = 0, used  # one line at its prompt, one as long as it can be
    path = np.where(np.arange(S) < cursor[..., None], rng.integers(0, K, (B, K, S)), -1)
    cache = normal(B, G, P, D), normal(B, G, P, D), normal(B, G, K, S, D), normal(B, G, K, S, D)
    return normal(B, G, K, R, D), cache, jnp.asarray([P, 7, 1]), jnp.asarray(path, jnp.int32)


def walk(q, cache, length, path, window=P + S):
    """Softmax over the last `window` tokens of the prompt and the path, one query at a time, in float64."""
    prompt_k, prompt_v, pool_k, pool_v = (np.asarray(x, np.float64) for x in cache)
    q, out = np.asarray(q, np.float64), np.zeros(q.shape)
    for b, g, k, r in np.ndindex(q.shape[:-1]):
        rows = [s for s in range(S) if path[b, k, s] >= 0]
        line = lambda prompt, pool: list(prompt[b, g, : length[b]]) + [pool[b, g, path[b, k, s], s] for s in rows]
        on = lambda prompt, pool: np.array(line(prompt, pool)[-window:])
        score = on(prompt_k, pool_k) @ q[b, g, k, r] / D**0.5
        weight = np.exp(score - score.max())
        out[b, g, k, r] = weight / weight.sum() @ on(prompt_v, pool_v)
    return out


KERNELS = {
    "dense": attention.dense,
    "fused": functools.partial(attention.fused, interpret=True),
    "fused, blocks that do not divide the rows": functools.partial(attention.fused, block=16, interpret=True),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("used", [S, 17])
def test_kernels_equal_a_walk_along_the_path(name, used):
    q, cache, length, path = inputs(used, used=used)
    got = jax.jit(KERNELS[name], static_argnums=4)(q, cache, length, path, used)
    np.testing.assert_allclose(got, walk(q, cache, np.asarray(length), np.asarray(path)), atol=2e-6)


@pytest.mark.parametrize("window", [1, 6, 25, P + S])
def test_a_window_leaves_the_last_positions(window):
    q, cache, length, path = inputs(3)
    row = jnp.sum(path >= 0, axis=-1) - 1
    got = jax.jit(attention.dense, static_argnums=4)(q, cache, length, path, S, row, jnp.int32(window))
    np.testing.assert_allclose(got, walk(q, cache, np.asarray(length), np.asarray(path), window), atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 40])
def test_windows_hide_alike_in_rows_and_in_bins(window):
    """A chain alone in a bin is a row; what lies beyond the window gets exactly no gradient."""
    rng = np.random.default_rng(window)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, n, D)), jnp.float32) for n in (4, 2, 2))
    index = jnp.arange(40)[None]
    row, bin_ = attention.causal(jnp.array([40])), attention.packed(jnp.full((1, 40), 40), index, block=16)
    np.testing.assert_allclose(row(q, k, v, None, window)[0], bin_(q, k, v, None, window)[0], atol=2e-6)
    for attend in (row, bin_):
        reads = jax.jacobian(lambda v: jnp.sum(attend(q, k, v, None, jnp.int32(window))[0], (0, 2, 3)))(v)
        reads = np.any(np.asarray(reads) != 0, axis=(1, 3, 4))  # [query, key]
        behind = np.arange(40)[:, None] - np.arange(40)
        np.testing.assert_array_equal(reads, (behind >= 0) & (behind < window))


@pytest.mark.parametrize("name", KERNELS)
def test_what_no_line_stands_on_is_not_read(name):
    q, cache, length, path = inputs(0)
    run = jax.jit(KERNELS[name], static_argnums=4)
    stands = (np.asarray(path)[:, :, None] == np.arange(K)[:, None]).any(1)  # [B, K, S]
    poison = lambda pool: jnp.where(stands[:, None, ..., None], pool, 1e4)
    past = (np.arange(P) >= np.asarray(length)[:, None])[:, None, :, None]
    other = *(jnp.where(past, 1e4, x) for x in cache[:2]), *map(poison, cache[2:])
    np.testing.assert_array_equal(run(q, cache, length, path, S), run(q, other, length, path, S))


def test_bfloat16_kernel_is_as_close_as_bfloat16_allows():
    q, cache, length, path = inputs(1, dtype=jnp.bfloat16)
    got = attention.fused(q, cache, length, path, S, interpret=True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, walk(q, cache, np.asarray(length), np.asarray(path)), atol=0.03)


def test_the_kernel_is_chosen_on_gpus_alone(monkeypatch):
    assert attention.kernel(64) is attention.dense  # tests run on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.kernel(64) is attention.fused
    assert attention.kernel(24) is attention.dense and attention.kernel(8) is attention.dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_exact_and_others_are_left_alone(dtype):
    model = Model(TransformerConfig(vocab=8, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, hidden=8, dtype=dtype))

    def logits(params):
        module = model.merge(params)
        token = jnp.zeros((1, 4), jnp.int32)
        return module.logits(module(token, token, attention.causal(jnp.array([4])))[0]).sum()

    text = str(jax.make_jaxpr(jax.grad(logits))(model.init(jax.random.key(0))))
    exact = text.count("HIGHEST")
    assert exact == 2 * text.count("dot_general[") > 0 if dtype == "float32" else exact == 0
