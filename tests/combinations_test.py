"""Estimators, multipliers and objectives chosen by name, inside the jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_test as base
from ml_collections import ConfigDict

from treerl import functions as F, losses, step as S
from treerl.advantages import ESTIMATORS, leaf_estimators


def made(**changes):
    """(fns, knobs, state, prompts) of the tiny step with fields changed, named like advantage__name."""
    config = base.tiny_config()
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    task = base.tiny_task()
    optimizer = None if "optimizer__ess" in changes else optax.sgd(0.1)
    fns = F.make_fns(config, task, base.one_device(), optimizer=optimizer)
    tiny = base.Tiny(base.one_device())
    return fns, F.make_knobs(config, task), S.init_state(fns, 0), tiny.prompts()


def run(fns, knobs, state, prompts, steps=2):
    step = jax.jit(lambda state, prompts, knobs: S.train_step(fns, state, prompts, knobs))
    with base.quick_compiles():
        for _ in range(steps):
            state, metrics = step(state, prompts, knobs)
    del metrics["samples"]  # no numbers
    return state, jax.device_get(metrics)


def moved(before, after) -> float:
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params))
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_is_chosen_by_name(name):
    """Traced with an objective each, in turn; gspo takes those that credit leaves."""
    objectives = sorted(losses.OBJECTIVES) if name in leaf_estimators() else ["cispo", "ppo"]
    objective = objectives[sorted(ESTIMATORS).index(name) % len(objectives)]
    fns, knobs, state, prompts = made(advantage__name=name, learner__objective=objective)
    after, metrics = jax.eval_shape(lambda *args: S.train_step(fns, *args), state, prompts, knobs)
    assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["loss"].shape == ()
    assert [x.shape for x in jax.tree.leaves(after)] == [x.shape for x in jax.tree.leaves(state)]


COMBINATIONS = {
    "off-policy": dict(
        advantage__name="minimum_variance", learner__proximal="learner", learner__importance="truncate",
        learner__forced="importance", learner__aggregation="constant", optimizer__ess="sqrt", sampler__top_p=0.9,
    ),
    "sequences": dict(
        advantage__name="mc_grpo", advantage__multipliers=ConfigDict({"ear": {}, "novelty": {"cap": 0.2}}),
        learner__objective="gspo", learner__aggregation="sequence", learner__overlong_buffer=4,
    ),
    "reference": dict(
        advantage__name="hgpo", advantage__options=ConfigDict({"segment": 2}),
        advantage__multipliers=ConfigDict({"ace": {"alpha": 0.1}, "gdro": {}}),
        pruning__backward="coverage", learner__objective="cispo", learner__kl=0.01, learner__kl_estimate="k2", learner__forced="mask",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMBINATIONS))
def test_combinations_run(name):
    fns, knobs, state, prompts = made(**COMBINATIONS[name])
    before = jax.tree.map(jnp.copy, state)
    after, metrics = run(fns, knobs, state, prompts)
    assert all(np.isfinite(v) for v in metrics.values()) and metrics["skipped"] == 0
    assert moved(before, after) > 1e-5
    if name == "off-policy":
        assert 1 / 32 <= metrics["ess"] < 0.999  # top-p makes the sampler another policy
    if name == "reference":
        assert metrics["kl"] > 0 and np.any(after.memory["gdro"]["seen"]) and moved(before.replace(params=after.reference), before) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule, options", [("width", dict(mode="extreme", ratio=0.5)), ("depth", dict(start=1))])
def test_thinning_trains_on_a_part_of_the_same_trees(rule, options):
    fns, knobs, state, prompts = made(pruning__backward=rule, pruning__backward_options=ConfigDict(options))
    thin, metrics = run(fns, knobs, state, prompts, steps=1)
    whole, wanted = run(fns._replace(thinning=None), knobs, state, prompts, steps=1)
    assert metrics["reward"] == wanted["reward"] and moved(thin, whole) > 1e-6
    assert 0 < metrics["bins"] <= wanted["bins"]


@pytest.mark.slow
def test_an_overlong_buffer_changes_what_is_trained_on_and_not_what_is_reported():
    fns, knobs, state, prompts = made(advantage__name="grpo", learner__overlong_buffer=8)
    plain = fns._replace(overlong=0)
    long, metrics = run(fns, knobs, state, prompts, steps=1)
    short, wanted = run(plain, knobs, state, prompts, steps=1)
    assert metrics["reward"] == wanted["reward"] and moved(long, short) > 1e-6


@pytest.mark.slow
def test_the_learners_own_log_probs_are_the_samplers(params=None):
    """In float32 the proximal policy changes nothing but rounding."""
    fns, knobs, state, prompts = made(advantage__name="grpo")
    want, _ = run(fns, knobs, state, prompts, steps=1)
    got, metrics = run(fns._replace(proximal="learner"), knobs, state, prompts, steps=1)
    assert moved(got, want) < 1e-5 and moved(want, state) > 1e-4 and metrics["logp_drift_max"] < 1e-6
