"""Environments: their steps a second in a batch, and what the advantages of turns cost in a training step.

The first is of the environment alone, on this device and, where that is an accelerator, on the host's CPU too (all the
cores that XLA takes; NPROC=1 for one). The second is a whole step in household, of random weights that earn nothing but penalties
for invalid actions, so that all trees are trained on: estimators run on the step's own trees.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from treerl import environments, step as S
from treerl.bench import estimators, measure
from treerl.config import default
from treerl.experiment import Experiment

PURE = ("household", "shop")


def defaults() -> dict:
    """Sizes for this machine."""
    model = dict(layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384)
    if not measure.on_accelerator():
        model = dict(layers=2, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256)
    return dict(batch=1024, prompts=16, slots=8, rows=256, horizon=30, model=model, repeats=5)


def plays(name: str, batch: int, device) -> tuple[object, int]:
    """A program that carries out whole scripted episodes in a batch, on a device, and its number of environment steps."""
    env = environments.make(name, train_size=min(batch, 2048))
    rows = np.arange(batch) % environments.count(env.tasks["train"])
    with jax.default_device(device):
        tasks = jax.tree.map(lambda x: jnp.asarray(x[rows]), env.tasks["train"])
        token, own, _ = jax.jit(jax.vmap(environments.demonstration(env)))(jax.random.split(jax.random.key(0), batch), tasks)
        actions = np.zeros((batch, env.horizon, env.action), np.int32)
        for i, (words, mine) in enumerate(zip(np.asarray(token), np.asarray(own))):
            ends = np.flatnonzero(mine & (words == env.tokenizer.eos_id))
            for turn, end in enumerate(ends):
                start = end
                while start and mine[start - 1] and words[start - 1] != env.tokenizer.eos_id:
                    start -= 1
                actions[i, turn, : end + 1 - start] = words[start : end + 1]

        def episode(task, actions):
            state, _ = env.reset(jax.random.key(0), task)
            go = lambda state, action: (lambda state, *out: (state, out))(*env.step(state, action))
            state, (observation, reward, _) = jax.lax.scan(go, state, actions)
            return env.state_id(state), observation, jnp.sum(reward)

        given = jax.device_put((tasks, actions), device)
        run = measure.compiled(jax.vmap(episode), *given).run
    return functools.partial(run, *given), batch * env.horizon


def make_config(sizes: dict):
    """Household at these sizes."""
    config = default()
    config.task.update(name="household", train_size=256, heldout_size=32)
    config.environment.update(horizon=sizes["horizon"], invalid_penalty=0.1)  # random weights win nothing: credit from this
    config.sampler.update(prompts=sizes["prompts"], slots=sizes["slots"], prompt_length=6, answer_length=sizes["rows"], segment=8)
    config.branching.rule, config.pruning.rule, config.advantage.name = "stochastic", "none", "hgpo"
    config.model.update(sizes["model"])
    config.learner.update(bin_tokens=512, bins_per_step=32)
    config.evaluation.update(examples=32, batch=32)
    config.samples_every = 0
    return config


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    row = functools.partial(measure.row, "environments", shapes=sizes)
    for name in PURE:
        for where, device in {"": jax.devices()[0], "_cpu": jax.devices("cpu")[0]}.items():
            if where and not measure.on_accelerator():
                continue
            run, steps = plays(name, sizes["batch"], device)
            time = measure.alternate({name: run}, sizes["repeats"])[name].median
            yield row(f"{name}{where}", steps / time, "steps/s")

    experiment = Experiment(make_config(sizes))
    fns, knobs = experiment.fns, experiment.knobs
    state = experiment.init(0)
    prompts = experiment.prompts(*experiment.stream().examples(0, sizes["prompts"]))
    sampled = experiment._sample_half(state, prompts, knobs)
    reward = S.shape_reward(fns, sampled.tree, S.grade(fns, sampled.tree, prompts).reward)
    names = ("grpo", "gigpo", "hgpo")
    credits = {name: measure.compiled(estimators.credit_of(name), sampled.tree, reward).run for name in names}
    experiment.compile_step()

    def whole():
        nonlocal state
        state, values = experiment.train_step(state, prompts, knobs)
        return values

    programs = {name: functools.partial(run, sampled.tree, reward) for name, run in credits.items()} | dict(step=whole)
    times = measure.alternate(programs, sizes["repeats"])
    yield row("step", times["step"].median, "s")
    for name in names:
        yield row(f"advantage.{name}", times[name].median, "s", versus="step", ratio=times[name].over(times["step"]))
