"""Adapters of low rank: they change what they say they change, are trained alone, and disappear on export."""

import functools
import tempfile

import families_oracle as O
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sharding_test import Tiny, one_device, quick_compiles

from treerl import attention
from treerl.models import families, weights
from treerl.models.policy import make_policy
from treerl.models.transformer import INPUTS, LORA, Model

TOKENS = jnp.asarray(O.TOKENS)


def logits(model, params):
    position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    module = model.merge(params)
    hidden, _ = module(TOKENS, position, attention.causal(jnp.full((2,), TOKENS.shape[1])))
    return module.logits(hidden)


def disturbed(params, seed=0):
    """Both factors of every adapter random, so that each changes something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@functools.cache
def loaded(name, rank=3, alpha=6.0):
    """(model with adapters, its parameters: published ones and adapters at their start, the plain parameters)."""
    with tempfile.TemporaryDirectory() as folder:
        O.write(folder, name)
        model = Model(families.from_folder(folder, lora_rank=rank, lora_alpha=alpha))
        plain = weights.load(folder, model.plain)
    return model, model.adapt(plain, jax.random.key(1)), plain


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])
def test_adapters_change_nothing_at_first_and_then_what_folding_says(name):
    model, params, plain = loaded(name)
    before = logits(model.plain, plain)
    np.testing.assert_array_equal(logits(model, params), before)
    trained, frozen = model.split(params)
    params = model.join(disturbed(trained), frozen)
    after, folded = logits(model, params), model.fold(params)
    assert jax.tree.structure(folded) == jax.tree.structure(plain)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(logits(model.plain, folded), after, atol=2e-5, rtol=1e-5)


def test_the_change_is_alpha_over_rank_times_the_product_of_the_factors():
    model, params, plain = loaded("qwen2")
    params = model.join(disturbed(model.split(params)[0]), model.split(params)[1])
    folded = model.fold(params)
    for name, inputs in INPUTS.items():
        adapter = jax.tree.map(np.asarray, params["blocks"][name + LORA])
        for layer in range(model.config.layers):
            first = adapter["first"][layer].reshape(-1, 3)
            want = 6.0 / 3 * first @ adapter["second"][layer].reshape(3, -1)
            got = np.asarray(folded["blocks"][name][layer] - plain["blocks"][name][layer])
            np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
            assert np.prod(plain["blocks"][name][layer].shape[:inputs]) == want.shape[0]


def test_split_takes_the_adapters_and_nothing_else():
    model, params, plain = loaded("qwen2")
    trained, frozen = model.split(params)
    assert sorted(trained["blocks"]) == sorted(name + LORA for name in INPUTS) and list(trained) == ["blocks"]
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)
    assert jax.tree.structure(model.join(trained, frozen)) == jax.tree.structure(params)
    assert model.plain.split(plain) == (plain, {})


def test_adapters_stay_in_float32():
    model = Model(families_config(param_dtype="bfloat16"))
    params = model.init(jax.random.key(0))
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    trained, frozen = model.split(params)
    assert dtypes(trained) == {"float32"} and dtypes(frozen) == {"bfloat16"}
    assert dtypes(model.fold(params)) == {"bfloat16"}


def families_config(**others):
    with tempfile.TemporaryDirectory() as folder:
        O.write(folder, "llama3")
        return families.from_folder(folder, lora_rank=2, **others)


# --- the step -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """The tiny step with adapters, a KL to the reference policy and AdamW, and two steps of it."""
    with quick_compiles():
        t = Tiny(one_device(), kl=0.1, model=dict(lora_rank=2, lora_alpha=8.0), optimizer=optax.adamw(0.05))
        start = t.state()
        one, first = t.step(jax.tree.map(jnp.copy, start), t.prompts(), t.knobs)
        two, second = t.step(jax.tree.map(jnp.copy, one), t.prompts(), t.knobs)
    return t, start, (one, first), (two, second)


@pytest.mark.slow
def test_a_step_trains_the_adapters_alone(tiny):
    t, start, (one, _), (two, _) = tiny
    for before, after in ((start, one), (one, two)):
        old, new = (t.fns.model.split(state.params) for state in (before, after))
        jax.tree.map(np.testing.assert_array_equal, new[1], old[1])
        assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(new[0]), jax.tree.leaves(old[0])) if before is one)
    moments = [x.shape for x in jax.tree.leaves(two.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(t.fns.model.split(two.params)[0])])


@pytest.mark.slow
def test_the_reference_is_the_model_without_its_adapters_change(tiny):
    t, start, (one, first), (two, second) = tiny
    assert jax.tree.structure(start.reference) == jax.tree.structure(t.fns.model.split(start.params)[0])
    jax.tree.map(np.testing.assert_array_equal, two.reference, start.reference)
    assert abs(float(first["kl"])) < 1e-6 < float(second["kl"])


@pytest.mark.slow
def test_the_sampler_draws_with_the_adapters(tiny):
    """Log-probs of the sampler against the learner's, after an update that changed the policy."""
    _, _, _, (_, second) = tiny
    assert 0 < float(second["logp_drift_max"]) < 1e-4 and float(second["kl"]) > 1e-4


@pytest.mark.slow
def test_a_change_too_small_for_bfloat16_weights_reaches_the_sampler():
    """Folded into the weights it would be rounded away."""
    model = Model(families_config(dtype="bfloat16", param_dtype="bfloat16"))
    params = model.init(jax.random.key(0))
    trained, frozen = model.split(params)
    small = jax.tree.map(lambda x: x if np.any(x != 0) else jnp.full_like(x, 2e-5), trained)
    folded = model.fold(model.join(small, frozen))
    changed = np.mean([np.mean(np.asarray(folded["blocks"][name] != frozen["blocks"][name])) for name in INPUTS])
    assert changed < 0.2
    policy = lambda trained: decoded(model, model.join(trained, frozen))
    larger = jax.tree.map(lambda x, y: x if x is y else 100 * y, trained, small)
    assert np.abs(policy(larger) - policy(trained)).max() > 0.01


def decoded(model, params):
    """Logits after a prompt, by the sampler's policy."""
    policy = make_policy(model, params, slots=1, rows=2)
    cache = policy.prefill(TOKENS[:1], jnp.array([TOKENS.shape[1]]))
    path, write = jnp.zeros((1, 1, 2), jnp.int32) - 1, jnp.zeros((1, 1), bool)
    return np.asarray(policy.decode(cache, jnp.zeros((1, 1), jnp.int32), path[..., 0], path, write, 2)[0])


def test_adapters_gradients_are_those_of_the_folded_weights(tiny):
    t, _, (one, _), _ = tiny
    model, params = t.fns.model, one.params
    trained, frozen = model.split(params)
    token = jnp.arange(8)[None] % 10
    position = jnp.arange(8)[None]

    def score(model, params):
        hidden, _ = model.merge(params)(token, position, attention.causal(jnp.array([8])))
        return jnp.sum(jnp.sin(hidden))

    own = jax.grad(lambda x: score(model, model.join(x, frozen)))(trained)
    folded = jax.grad(lambda x: score(model.plain, model.fold(model.join(x, frozen))))(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), own, folded)
    assert all(np.any(x != 0) for x in jax.tree.leaves(own))


def test_an_exported_model_has_no_adapters(tmp_path):
    model, params, _ = loaded("qwen3")
    params = model.join(disturbed(model.split(params)[0]), model.split(params)[1])
    weights.save(str(tmp_path / "out"), model.fold(params), model.plain)
    again = Model(families.from_folder(str(tmp_path / "out")))
    np.testing.assert_array_equal(logits(again, weights.load(str(tmp_path / "out"), again)), logits(model.plain, model.fold(params)))
