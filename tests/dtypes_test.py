"""What is stored in fewer bits: the pool of keys and values, and the optimizer's moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paths_oracle
import pytest
import sharding_test
from ml_collections import ConfigDict
from sharding_test import Tiny, one_device, quick_compiles

from treerl import attention, step as S
from treerl.config import default
from treerl.models.policy import make_policy
from treerl.models.transformer import Model, TransformerConfig
from treerl.optimizer import in_float32, make_optimizer

# --- the pool ------------------------------------------------------------------------------------

MODEL = Model(TransformerConfig(vocab=14, layers=2, width=24, heads=4, kv_heads=2, head_dim=8, hidden=32))
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 11, 8], [3, 1, 4, 1, 5, 9, 2, 6, 7, 12, 0, 13]], np.int32)


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def rounding_policy(*args, **sizes):
    """The policy of a float32 pool that rounds every key and value before it is stored."""
    plain, wrap = attention.dense, lambda attend: lambda q, k, v, *more: attend(q, rounded(k), rounded(v), *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "dense", lambda *given: wrap(plain(*given)))
        policy = make_policy(*args, **sizes)

    def prefill(token, length):
        *head, caches = policy.prefill(token, length)
        return *head, [tuple(map(rounded, cache)) for cache in caches]

    return policy._replace(prefill=prefill)


@pytest.fixture(scope="module")
def stepped():
    """Policy -> logits of two rollouts by prefill and steps through the pool."""
    params = MODEL.init(jax.random.key(0))
    policies = {dtype: functools.partial(make_policy, pool_dtype=dtype) for dtype in (None, "float32", "bfloat16")}
    found = {}
    for name, policy in dict(policies, rounding=rounding_policy).items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths_oracle, "make_policy", policy)
            found[name] = np.asarray(paths_oracle.stepped(MODEL, params, TOKENS, 5, 3))
    return found


def test_a_pool_in_bfloat16_rounds_keys_and_values_and_nothing_else(stepped):
    change = np.abs(stepped["bfloat16"] - stepped[None]).max()
    assert 1e-4 < change < 0.05
    np.testing.assert_allclose(stepped["bfloat16"], stepped["rounding"], atol=1e-3 * change, rtol=0)


def test_a_pool_in_the_dtype_of_the_activations_changes_nothing(stepped):
    np.testing.assert_array_equal(stepped["float32"], stepped[None])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_the_caches_dtype(dtype):
    stored = dtype or "float32"
    policy = make_policy(MODEL, MODEL.init(jax.random.key(0)), slots=2, rows=4, pool_dtype=dtype)
    cache = policy.prefill(jnp.asarray(TOKENS[:, :3]), jnp.array([3, 2]))
    path = jnp.zeros((2, 2, 4), jnp.int32).at[:, :, 1:].set(-1)
    token, row, write = jnp.ones((2, 2), jnp.int32), jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2), bool)
    _, after = policy.decode(cache, token, row, path, write, 4)
    moved = policy.gather(after, path[:, :1])
    for _, last, _, caches in (cache, after, moved):
        assert len(caches) == 2 and {str(x.dtype) for layer in caches for x in layer} == {stored}
        assert last.dtype == jnp.float32
    assert np.any(after[3][0][2] != 0)  # something was written


def test_weights_of_rollouts_in_eight_bits_reach_the_sampler(monkeypatch):
    config, asked = sharding_test.tiny_config(), []
    config.sampler.weight_dtype = "int8"
    monkeypatch.setattr(sharding_test, "tiny_config", lambda **_: config)
    tiny = Tiny(one_device())
    monkeypatch.setattr(S, "make_policy", lambda *_, weight_dtype, **__: asked.append(weight_dtype) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)
    assert asked == ["int8"]


@pytest.mark.slow
def test_the_config_reaches_the_sampler(monkeypatch):
    """Log-probs of the sampler drift from the learner's as far as rounding explains."""
    make, drift = sharding_test.tiny_config, {}
    for dtype in ("", "bfloat16"):

        def changed(dtype=dtype, **changes):
            config = make(**changes)
            config.sampler.pool_dtype = dtype
            return config

        monkeypatch.setattr(sharding_test, "tiny_config", changed)
        with quick_compiles():
            tiny = Tiny(one_device())
            drift[dtype] = float(tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)[1]["logp_drift_max"])
    assert drift[""] < 1e-5 < 1e-4 < drift["bfloat16"] < 0.02


# --- moments -------------------------------------------------------------------------------------


def optimizer(**changes) -> tuple[optax.GradientTransformation, ConfigDict]:
    config = default().optimizer
    config.update(dict(dict(schedule="constant", warmup_steps=0, learning_rate=0.01), **changes))
    return make_optimizer(config, 100), config


def moments(state) -> optax.ScaleByAdamState:
    [found] = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)) if hasattr(x, "nu")]
    return found


def params(dtype):
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.asarray(rng.normal(size=5), dtype)}


def run(chain, dtype, count, gradient=None):
    """Parameters and state after some updates with other gradients each, compiled."""
    p = params(dtype)
    state = chain.init(p)

    @jax.jit
    def update(p, state, i):
        wave = lambda x: jnp.sin(jnp.arange(x.size, dtype=jnp.float32) * (1 + i)).reshape(x.shape).astype(dtype)
        grads = jax.tree.map((lambda x: jnp.full_like(x, gradient)) if gradient else wave, p)
        updates, state = chain.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    for i in range(count):
        p, state = update(p, state, i)
    return p, state


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_dtypes_of_the_moments(stored, moment):
    """From the start and after updates; the step's shardings and shapes are those of these."""
    chain, _ = optimizer(moment_dtype=moment)
    for state in (chain.init(params(stored)), run(chain, stored, 3)[1]):
        found = moments(state)
        assert {str(x.dtype) for x in jax.tree.leaves(found.mu)} == {moment}
        assert {str(x.dtype) for x in jax.tree.leaves(found.nu)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(run(chain, stored, 1)[0])} == {stored}


def test_the_mean_of_squares_does_not_stall_for_bfloat16_parameters():
    """With b2 = 0.99 a mean in bfloat16 stops where its steps fall below half of 1/128 of it."""
    chain, config = optimizer(b2=0.99, clip_norm=1e9)
    gradient, count = 0.5, 400
    _, state = run(chain, "bfloat16", count, gradient)
    wanted = gradient**2 * (1 - config.b2**count)
    for nu in jax.tree.leaves(moments(state).nu):
        np.testing.assert_allclose(nu, wanted, rtol=1e-3)
    _, state = run(optax.adamw(0.01, b2=0.99), "bfloat16", count, gradient)
    assert all(np.all(np.asarray(nu, np.float32) < 0.9 * wanted) for nu in jax.tree.leaves(moments(state).nu))  # the reason


def test_float32_parameters_get_what_optax_gives():
    chain, config = optimizer(weight_decay=0.1)
    plain = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adamw(0.01, b1=config.b1, b2=config.b2, weight_decay=0.1))
    (one, state), (other, wanted) = run(chain, "float32", 5), run(plain, "float32", 5)
    jax.tree.map(np.testing.assert_array_equal, (one, moments(state)), (other, moments(wanted)))
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(params("float32"))))


def test_updates_of_bfloat16_parameters_are_added_before_they_are_rounded():
    """Parameters and gradients as float32 numbers give the same update."""
    chain = in_float32(optax.adamw(0.3, weight_decay=0.1))
    small = params("bfloat16")
    grads = jax.tree.map(lambda x: jnp.cos(x), small)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (small, grads))
    updates, _ = chain.update(grads, chain.init(small), small)
    wanted, _ = optax.adamw(0.3, weight_decay=0.1).update(wide[1], optax.adamw(0.3).init(wide[0]), wide[0])
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    after = optax.apply_updates(small, updates)
    jax.tree.map(lambda a, p, u: np.testing.assert_array_equal(a, (p + u).astype(jnp.bfloat16)), after, wide[0], wanted)


@pytest.mark.slow
def test_a_step_with_small_moments_and_weights():
    with quick_compiles():
        chain, _ = optimizer(moment_dtype="bfloat16")
        tiny = Tiny(one_device(), optimizer=chain, model=dict(param_dtype="bfloat16"))
        start = jax.device_get(tiny.state())
        state, metrics = tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(state) == dtypes(jax.eval_shape(lambda: S.init_state(tiny.fns, 0)))
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"} and not metrics["skipped"]
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(state.params)))
