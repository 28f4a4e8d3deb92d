"""Meshes and shardings: loud on mistakes; the numbers of a step depend neither on devices nor bins.

Run as a program it takes the step on simulated devices, see `test_devices_do_not_change_the_step`.
"""

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from treerl import attention, prompts as P, sharding, step as S
from treerl.config import default
from treerl.tasks import Encoded, Task
from treerl.tokenizers import CharTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
MESHES = {"data=4, fsdp=2": dict(data=4, fsdp=2), "data=2, fsdp=2, tensor=2": dict(data=2, fsdp=2, tensor=2)}

SURVIVAL = dict(pruning=dict(rule="arrol_group", detection=4, warmup_steps=0), branching=dict(rule="stochastic"))
ACROSS = dict(SURVIVAL, pruning=dict(SURVIVAL["pruning"], rule="arrol", options=dict(least=1, lam=2.0)))  # compares the trees of a batch

RULES = dict(survivors=SURVIVAL, across=ACROSS)
KERNELS = {  # attention of the sampler in its kernel: cut by the program, or whole on each device
    "kernel, cut": ("data=2, fsdp=2, tensor=2", lambda head_dim, mesh: attention.sharded(attention.fused, mesh)),
    "kernel": ("data=4, fsdp=2", lambda *_: attention.fused),
}

# --- a step small enough to compile in seconds ------------------------------------------------


def tiny_task() -> Task:
    """Examples are (letters, letter); an answer is worth its share of that letter and later ones."""
    tokenizer = CharTokenizer("abcdefghij")

    def encode(example):
        letters, letter = example
        return Encoded(
            prompt=tokenizer.encode(letters),
            answer=tokenizer.encode(letter) + [tokenizer.eos_id],
            data={"letter": np.int32(tokenizer.encode(letter)[0])},
        )

    def grade(tokens, length, data):
        inside = jnp.arange(tokens.shape[0]) < length
        return jnp.sum((tokens >= data["letter"]) & inside) / jnp.maximum(length, 1).astype(jnp.float32)

    rng = np.random.default_rng(0)
    word = lambda: "".join(rng.choice(list("abcdefghij"), rng.integers(1, 5)))
    examples = [(word(), str(rng.choice(list("defgh")))) for _ in range(16)]
    return Task(tokenizer=tokenizer, train=examples, heldout=examples, encode=encode, grade=grade)


def tiny_config(pruning=(), branching=(), model=(), advantage="branch_depthwise", **learner):
    config = default()
    config.model.update(dict(dict(layers=1, width=16, heads=4, kv_heads=2, head_dim=4, hidden=16), **dict(model)))
    config.sampler.update(dict(prompts=8, slots=4, prompt_length=4, answer_length=8, segment=4))
    config.branching.update(dict(tau_abs=0.02, tau_rel=0.9, fill_after=3))  # forks in a random policy
    config.branching.update(dict(branching))
    config.advantage.name = advantage
    config.pruning.update(dict(dict(windows=(2, 4), tau_ed=0.6), **dict(pruning)))
    config.learner.update(dict(dict(bin_tokens=12, bins_per_step=1), **learner))
    return config


def one_device() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)


class Tiny:
    """The tiny step, jitted for a mesh as `experiment.Experiment` does.

    The optimizer is momentum without decay or clipping, so that its state after the first step is
    the gradient. (Adam's first update is nearly the gradient's sign, which rounding can turn.)
    """

    def __init__(self, mesh: Mesh, task=None, optimizer=None, **changes):
        config, self.task = tiny_config(**changes), task or tiny_task()
        self.fns = S.make_fns(config, self.task, mesh, optimizer=optimizer or optax.sgd(0.1, momentum=0.9))
        self.trees, self.whole = sharding.trees(mesh), sharding.replicated(mesh)
        self.shardings = S.state_shardings(self.fns)
        self.knobs = jax.device_put(S.make_knobs(config, self.task), self.whole)
        self.step = jax.jit(
            functools.partial(S.train_step, self.fns),
            in_shardings=(self.shardings, self.trees, self.whole),
            out_shardings=(self.shardings, self.whole),
            donate_argnums=0,
        )
        self.width = config.sampler.prompt_length

    def state(self, seed=0):
        state = S.init_state(self.fns, seed)
        if state.quality is not None:  # of random scores, and chances that differ from score to score
            rng = np.random.default_rng(seed)
            params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), state.quality["params"])
            table = jax.tree.map(lambda x: rng.uniform(0, 9, x.shape).astype(np.float32), state.quality["table"])
            state = state.replace(quality=dict(state.quality, params=params, table=table))
        return jax.device_put(state, self.shardings)

    def prompts(self, start=1):
        """Eight prompts, one a simulated device. (From 1 on, the first has not the most bins.)"""
        index = np.arange(start, start + 8)
        return sharding.place(P.encode(self.task, [self.task.train[i] for i in index], index, self.width), self.trees)


def with_trees():
    """Has the step return its trees and rewards beside its metrics."""
    original = S.describe
    more = lambda tree, reward, stats, right: dict(original(tree, reward, stats, right), tree=tree, graded=reward)
    return mock.patch.object(S, "describe", more)


def numbers(state, metrics) -> dict[str, np.ndarray]:
    """What must not depend on the mesh: trees, rewards, gradient, updated parameters."""
    result = {"params" + jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state.params)}
    result |= {"grad" + jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    result |= {"tree." + name: value for name, value in metrics["tree"].items() if value is not None}
    return {k: np.asarray(v) for k, v in dict(result, graded=metrics["graded"]).items()}


def assert_close(actual: dict, wanted: dict, names: str, tolerance=1e-5):
    """Largest difference within tolerance of the largest value, array by array."""
    compared = [k for k in wanted if k.startswith(names)]
    assert compared
    for name in compared:
        scale = np.abs(wanted[name]).max()
        assert scale > 0, f"{name} is zero: the test would show nothing"
        assert np.abs(actual[name] - wanted[name]).max() <= tolerance * scale, name


@contextlib.contextmanager
def quick_compiles():
    """Lets XLA leave out what costs it time; the numbers differ by rounding only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def first():
    """(the step on one device, the numbers and trees of its first call)."""
    with quick_compiles(), with_trees():
        tiny = Tiny(one_device())
        state, metrics = tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)
        yield tiny, numbers(state, metrics), metrics


# --- the same numbers everywhere ------------------------------------------------------------------


@pytest.mark.slow
def test_the_tiny_step_is_worth_testing(first):
    """Its trees fork, prune and differ; every prompt is its own; no reward is everywhere equal."""
    _, wanted, metrics = first
    assert metrics["forks"] > 0 and metrics["pruned"] > 0 and metrics["trees_trained"] == 1
    assert len(np.unique(wanted["tree.token"], axis=0)) == 8
    assert wanted["graded"].std() > 0.05


def on_eight_devices(file: str, folder) -> subprocess.CompletedProcess:
    """Runs a test file as a program, given a folder, on eight simulated devices."""
    environment = dict(
        os.environ,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    return subprocess.run([sys.executable, file, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_devices_do_not_change_the_step(first, tmp_path):
    _, plain, _ = first
    wanteds = {}
    for name, changes in RULES.items():
        with quick_compiles(), with_trees():
            tiny = Tiny(one_device(), **changes)
            state, metrics = tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)
            wanteds[name] = numbers(state, metrics)
        assert metrics["pruned"] > 0.5 and metrics["quality_loss"] > 0
    run = on_eight_devices(__file__, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    for name in [*MESHES, *RULES, *KERNELS]:
        actual, wanted = np.load(tmp_path / f"{name}.npz"), wanteds.get(name, plain)
        for field in ("tree.token", "tree.parent", "tree.used", "tree.end", "tree.source", "tree.leaf"):
            np.testing.assert_array_equal(actual[field], wanted[field], err_msg=f"{name}: {field}")
        assert_close(actual, wanted, "graded")
        assert_close(actual, wanted, "grad[")
        assert_close(actual, wanted, "params")


def loop_collectives(tiny, depth: int = 1) -> list[str]:
    """Collectives within so many loops of the sampler, one line of compiled text each.

    Trees are independent and weights are gathered before the loop: over data and fsdp there is
    nothing to communicate, but for a rule that compares the trees of a batch; and for no token, the innermost of three.
    """
    state = tiny.state()
    grow = lambda params, prompts, knobs, quality: S.rollout(tiny.fns, params, prompts, jax.random.key(0), 0, knobs, quality=quality)
    jitted = jax.jit(grow, in_shardings=(tiny.shardings.params, tiny.trees, tiny.whole, tiny.whole))
    text = jitted.lower(state.params, tiny.prompts(), tiny.knobs, state.quality).compile().as_text()
    kinds = r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[^(]*\("
    found = [line for line in text.splitlines() if re.search(kinds, line)]
    assert any(" all-gather(" in line for line in found), "the weights' gathers are not seen"
    return [line.strip() for line in found if line.count("while/body") >= depth]


def main(folder: str):
    assert jax.device_count() == 8
    for name, sizes in MESHES.items():
        tiny = Tiny(sharding.make_mesh(**sizes))
        down = tiny.state().params["blocks"]["down"]
        shard = down.addressable_shards[0].data.shape
        assert shard == (1, 16 // sizes.get("tensor", 1), 16 // sizes["fsdp"]), shard  # it is cut indeed
        if "tensor" not in sizes:
            assert not loop_collectives(tiny), loop_collectives(tiny)
        with with_trees():
            result = numbers(*tiny.step(tiny.state(), tiny.prompts(), tiny.knobs))
        np.savez(os.path.join(folder, f"{name}.npz"), **result)
    for name, changes in RULES.items():
        tiny = Tiny(sharding.make_mesh(**MESHES["data=4, fsdp=2"]), **changes)
        found = loop_collectives(tiny, 3 if name == "across" else 1)
        assert not found, found
        assert name != "across" or loop_collectives(tiny), "each device compares its own trees alone"
        with with_trees():
            np.savez(os.path.join(folder, f"{name}.npz"), **numbers(*tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)))
    packed = mock.patch.object(attention, "packed", functools.partial(attention.packed, how="kernel"))
    for name, (sizes, pool) in KERNELS.items():
        with mock.patch.object(attention, "kernel", pool), packed, with_trees():
            tiny = Tiny(sharding.make_mesh(**MESHES[sizes]))
            result = numbers(*tiny.step(tiny.state(), tiny.prompts(), tiny.knobs))
        np.savez(os.path.join(folder, f"{name}.npz"), **result)


@pytest.mark.slow
def test_bins_do_not_change_the_gradient(first):
    """Bins that split trees, one a microbatch, against bins of several trees, all at once."""
    tiny, wanted, metrics = first
    tree, reward = metrics["tree"], metrics["graded"]
    other = Tiny(one_device(), bin_tokens=64, bins_per_step=3)

    @jax.jit
    def learn(state, tree, prompts, reward, knobs):
        credit, weight, *_ = S.estimate(other.fns, state, tree, prompts, reward, knobs)
        cells, denominators = jax.vmap(lambda *one: S.weigh(other.fns, *one, knobs))(tree, credit, weight)
        return S.learn(other.fns, state, tree, prompts, cells, jnp.sum(denominators), knobs)

    state, learned = learn(other.state(), tree, tiny.prompts(), reward, other.knobs)
    actual = numbers(state, dict(tree=tree, graded=reward))
    assert_close(actual, wanted, "grad[")
    assert_close(actual, wanted, "params")
    np.testing.assert_allclose(learned["loss"], metrics["loss"], rtol=1e-5, atol=1e-6)
    assert metrics["bins"] > 8 > learned["bins"]  # 8 trees


# --- compile hygiene ------------------------------------------------------------------------------


@contextlib.contextmanager
def compile_events():
    """Names of the tracings, lowerings and compilations that happen inside."""
    seen, is_on = [], [True]

    def listen(name, *_, **__):
        if is_on[0] and name.startswith("/jax/core/compile/"):
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        is_on[0] = False


def test_compile_events_are_heard():
    """Without this the tests below could pass for a listener that hears nothing."""
    fresh = jax.jit(lambda x: x * 3 + 1)
    with compile_events() as events:
        fresh(np.float32(2))
    assert any("backend_compile" in name for name in events)
    with compile_events() as events:
        fresh(np.float32(5))
    assert events == []


CHANGES = dict(
    temperature=np.float32(0.7), top_p=np.float32(0.9), eos=np.array([5], np.int32),
    tau_abs=np.float32(0.3), tau_rel=np.float32(0.2), tau_ed=np.float32(0.1),
    share=np.array([0.5], np.float32), share_from=np.array([1], np.int32),
    fill_after=np.int32(2), greedy=np.bool_(True),
    clip_low=np.float32(0.1), clip_high=np.float32(0.3), kl=np.float32(0.1), dual_clip=np.float32(3), importance_cap=np.float32(5),
    detection=np.int32(3), kappa=np.float32(0.4), rho=np.float32(0.3), pruning_from=np.int32(7), smoothing=np.float32(2),
    decay=np.float32(0.7), invalid_penalty=np.float32(0.1),  # these once more with a rule that reads them: quality_test
)  # fmt: skip


@pytest.mark.slow
def test_the_second_step_compiles_nothing(first):
    tiny, _, _ = first
    state = tiny.state()
    batches = [tiny.prompts(), tiny.prompts(8)]
    state, _ = tiny.step(state, batches[0], tiny.knobs)
    with compile_events() as events:
        state, _ = tiny.step(state, batches[1], tiny.knobs)
        state, _ = tiny.step(state, batches[0], tiny.knobs)
    assert events == []
    assert int(state.step) == 3 and int(state.position) == 24


@pytest.mark.parametrize("name", CHANGES)
def test_changing_a_number_compiles_nothing(first, name):
    tiny, _, _ = first
    state, prompts = tiny.state(), tiny.prompts()
    knobs = dict(tiny.knobs, **{name: jax.device_put(CHANGES[name], tiny.whole)})
    assert knobs[name].dtype == tiny.knobs[name].dtype and knobs[name].shape == tiny.knobs[name].shape
    assert not np.array_equal(knobs[name], tiny.knobs[name])
    with compile_events() as events:
        tiny.step(state, prompts, knobs)
    assert events == []


def test_every_number_is_in_the_test_above(first):
    assert set(CHANGES) == set(first[0].knobs)


def test_changing_the_seed_compiles_nothing_and_changes_the_trees(first):
    tiny, wanted, _ = first
    state, prompts = tiny.state(), tiny.prompts()
    state = state.replace(key=jax.device_put(np.asarray(state.key) + 1, tiny.whole))
    with compile_events() as events:
        _, metrics = tiny.step(state, prompts, tiny.knobs)
    assert events == []
    assert not np.array_equal(metrics["tree"].token, wanted["tree.token"])


def test_temperature_reaches_the_sampler(first):
    """A number that changes nothing would pass the tests above too."""
    tiny, _, plain = first
    knobs = dict(tiny.knobs, temperature=jax.device_put(np.float32(0.05), tiny.whole))
    _, metrics = tiny.step(tiny.state(), tiny.prompts(), knobs)
    assert metrics["entropy"] < plain["entropy"] / 2


# --- errors -----------------------------------------------------------------------------------------


def test_every_parameter_of_the_model_is_covered(first):
    tiny, _, _ = first
    fns = tiny.fns
    specs = jax.tree.map(lambda s: s.spec, tiny.shardings.params)
    assert jax.tree.structure(specs) == jax.tree.structure(fns.model.shapes())
    cut = [s for s in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) if any(s)]
    assert len(cut) >= 5  # the embedding and the matrices of a block


def test_prompts_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(sharding, "tree_shards", lambda mesh: 3)
    with pytest.raises(ValueError) as error:
        S.make_fns(tiny_config(), tiny_task(), one_device())
    assert str(error.value) == ("sampler.prompts=8 does not divide over mesh.data x mesh.fsdp = 3 shards; make it a multiple.")


if __name__ == "__main__":
    main(sys.argv[1])
