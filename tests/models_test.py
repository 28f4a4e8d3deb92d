"""The transformer against a plain NumPy forward of the Llama / Qwen family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import attention
from treerl.models import policy as module
from treerl.models.policy import make_policy
from treerl.models.presets import PRESETS
from treerl.models.transformer import Block, Llama3Scaling, Model, TransformerConfig, frequencies

TINY = TransformerConfig(vocab=11, layers=3, width=12, heads=6, kv_heads=2, head_dim=4, hidden=20, rope_theta=500.0, norm_eps=1e-3)


def forward(config, params, tokens):
    """Logits [T, V] of one row, position by position and head by head, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale

    def rope(x, position):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * config.rope_theta ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    x = [p["embedding"][t] for t in tokens]
    for layer in range(config.layers):
        w = jax.tree.map(lambda a: a[layer], p["blocks"])
        queries, keys, values = [], [], []
        for position, row in enumerate(x):
            h = norm(row, w["attention_norm"]["scale"])
            group = [np.einsum("d,drk->rk", h, w["qkv"][:, g]) for g in range(config.kv_heads)]
            if config.qkv_bias:
                group = [one + bias for one, bias in zip(group, w["qkv_bias"])]
            q, k, v = np.concatenate([g[:-2] for g in group]), [g[-2] for g in group], [g[-1] for g in group]
            if config.qk_norm:
                q = np.array([norm(head, w["q_norm"]["scale"]) for head in q])
                k = np.array([norm(head, w["k_norm"]["scale"]) for head in k])
            queries.append([rope(head, position) for head in q])
            keys.append([rope(head, position) for head in k])
            values.append(v)
        for position in range(len(x)):
            heads = []
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                scores = [queries[position][head] @ keys[j][group] / config.head_dim**0.5 for j in range(position + 1)]
                weight = np.exp(scores - np.max(scores))
                heads.append(sum(a * values[j][group] for j, a in enumerate(weight / weight.sum())))
            x[position] = x[position] + np.einsum("hk,hkd->d", np.array(heads), w["out"])
        for position in range(len(x)):
            h = norm(x[position], w["mlp_norm"]["scale"])
            gate, up = h @ w["gate_up"][:, 0], h @ w["gate_up"][:, 1]
            x[position] = x[position] + (gate / (1 + np.exp(-gate)) * up) @ w["down"]
    table = p["embedding"] if config.tied else p["unembedding"]
    return np.array([table @ norm(row, p["final_norm"]["scale"]) for row in x])


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_forward_equals_numpy(changes):
    model = Model(dataclasses.replace(TINY, **changes))
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.ndim), p.shape), params)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 7))
    length = np.array([7, 5])

    @jax.jit
    def run(params, remat="none"):
        module = model.merge(params)
        position = jnp.broadcast_to(jnp.arange(7), tokens.shape)
        hidden, _ = module(tokens, position, attention.causal(jnp.asarray(length)), remat=remat)
        return module.logits(hidden)

    got = run(params)
    for row, size in enumerate(length):
        want = forward(model.config, params, tokens[row, :size])
        np.testing.assert_allclose(got[row, :size], want, rtol=1e-4, atol=1e-4)


def test_shapes_axes_and_parameters_agree():
    for changes in ({}, {"tied": False, "qk_norm": True, "qkv_bias": True}):
        model = Model(dataclasses.replace(TINY, **changes))
        shapes = jax.tree.map(lambda x: x.shape, model.shapes())
        assert shapes == jax.tree.map(lambda x: x.shape, model.init(jax.random.key(0)))
        names = jax.tree.leaves(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
        sizes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
        assert all(len(size) - len(name) in (0, 1) for name, size in zip(names, sizes, strict=True))


def test_llama3_scaling_slows_long_wavelengths_alone():
    """Llama 3.1's own numbers, by the three cases of `_compute_llama3_parameters` in transformers."""
    theta, size, scaling = 500_000.0, 128, Llama3Scaling(8.0, 1.0, 4.0, 8192)
    got, cases = np.asarray(frequencies(size, theta, scaling)), set()
    for i in range(size // 2):
        plain = theta ** (-i / (size // 2))
        length = 2 * np.pi / plain
        smooth = (8192 / length - 1) / (4 - 1)
        case = "short" if length < 8192 / 4 else "long" if length > 8192 else "between"
        want = {"short": plain, "long": plain / 8, "between": (1 - smooth) * plain / 8 + smooth * plain}[case]
        assert got[i] == pytest.approx(want, rel=1e-5), i
        cases.add(case)
    assert len(cases) == 3


@pytest.mark.slow
def test_remat_changes_no_gradient():
    model = Model(TINY)
    params, token = model.init(jax.random.key(1)), jnp.arange(6)[None] % 11

    def loss(params, remat):
        module = model.merge(params)
        hidden, _ = module(token, jnp.arange(6)[None], attention.causal(jnp.array([6])), remat=remat)
        return jnp.sum(module.logits(hidden) ** 2)

    grad, stored = jax.jit(jax.grad(loss), static_argnums=1), {}
    for remat in ("none", "products", "layers"):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, grad(params, "none"), grad(params, remat))
        _, pull = jax.vjp(functools.partial(loss, remat=remat), params)
        stored[remat] = sum(x.size for x in jax.tree.leaves(pull))
    assert stored["layers"] < stored["products"] < stored["none"]


def test_gradients_of_logits_are_products_in_the_model_s_dtype():
    """And the rounded gradient is the exact one of rounded logits."""
    model = Model(dataclasses.replace(TINY, dtype="bfloat16"))
    params = model.init(jax.random.key(1))
    hidden = jax.random.normal(jax.random.key(2), (5, TINY.width), jnp.bfloat16)
    loss = lambda hidden: jnp.sum(jnp.sin(model.merge(params).logits(hidden)))
    products = [e for e in jax.make_jaxpr(jax.grad(loss))(hidden).eqns if e.primitive.name == "dot_general"]
    assert products and all(x.aval.dtype == jnp.bfloat16 for e in products for x in e.invars)
    table = params["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(lambda h: jnp.sum(jnp.sin(h @ table.T)))(hidden.astype(jnp.float32))
    found = jax.grad(loss)(hidden).astype(jnp.float32)
    assert jnp.linalg.norm(found - exact) < 1e-2 * jnp.linalg.norm(exact)


def test_presets_have_the_published_sizes():
    billions = {"qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen3-8b": 8.19}
    for name, size in billions.items():
        shapes = jax.tree.leaves(Model(TransformerConfig(**PRESETS[name])).shapes())
        assert sum(np.prod(x.shape) for x in shapes) / 1e9 == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 4}, "model.heads=6 is not a multiple of model.kv_heads=4"),
        ({"head_dim": 5}, "model.head_dim=5 is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("part", [5, 12, 20])
def test_heads_are_decoded_in_parts_and_those_that_do_not_run_are_left_out(monkeypatch, part):
    """24 heads, 24 to none of them running: the same logits and the same pool as all at once."""
    params, rng, slots, rows = Model(TINY).init(jax.random.key(0)), np.random.default_rng(0), 8, 4
    policy = make_policy(Model(TINY), params, slots=slots, rows=rows)
    own, length = np.arange(slots), jnp.array([3, 5, 1])
    start = policy.prefill(jnp.asarray(rng.integers(0, 11, (3, 5))), length)
    path, token = np.full((3, slots, rows), -1), jnp.asarray(rng.integers(0, 11, (3, slots)))
    plain, some, computed = start, start, []

    def counted(self, x, attended, after=Block.after):
        jax.debug.callback(lambda: computed.append(x.shape[1]))
        return after(self, x, attended)

    for row, share in enumerate((1, 0.6, 0.2, 0)):
        path[:, :, row] = own
        runs = jnp.asarray(rng.random((3, slots)) < share)
        given = token, jnp.where(runs, row, -1), jnp.asarray(path), runs, rows
        wanted, plain = policy.decode(plain, *given)
        with monkeypatch.context() as patch:
            patch.setattr(module, "PART", part)
            patch.setattr(Block, "after", counted)
            computed.clear()
            got, some = policy.decode(some, *given)
            jax.effects_barrier()
        assert sum(computed) == TINY.layers * part * -(-int(runs.sum()) // part)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), some, plain)
