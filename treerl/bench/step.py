"""The whole training step, from prompts to updated parameters, the part spent sampling, and every estimator on its trees.

Random weights give no thresholds that mean anything, so the lookahead rule's are open (every
token a candidate, none pruned, see `bench.sampler`): a tree fills its slots in two steps and
every line runs to the last row. The rest is the default config: depth-wise advantages, Adam.
Parameters and moments are float32 whatever the activations are.
"""
import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from treerl import sharding
from treerl import step as S
from treerl.advantages import ESTIMATORS
from treerl.bench import estimators, measure, synthetic
from treerl.checkpoint import abstract
from treerl.models.presets import PRESETS


def defaults() -> dict:
    """Sizes for this machine."""
    if measure.on_accelerator():
        return dict(
            preset="qwen2.5-1.5b", dtype="bfloat16", prompts=16, slots=8, prompt=256, rows=512, segment=32,
            lengths=(), windows=(20, 30, 50), bin_tokens=2048, bins_per_step=8, vocab_chunk=1024,
            remat="products", repeats=3,
        )  # fmt: skip
    return dict(
        preset="tiny", dtype="float32", prompts=32, slots=8, prompt=20, rows=20, segment=4,
        lengths=(), windows=(4, 6), bin_tokens=128, bins_per_step=8, vocab_chunk=1024,
        remat="none", repeats=7,
    )  # fmt: skip


def make_config(sizes: dict):
    """The default config at these sizes, with open thresholds."""
    config = synthetic.config(sizes)
    config.sampler.update(segment=sizes["segment"], lengths=tuple(sizes["lengths"]))
    config.branching.update(tau_abs=0.0, tau_rel=2.0)
    config.pruning.update(windows=tuple(sizes["windows"]), tau_ed=0.0)
    config.learner.update(bin_tokens=sizes["bin_tokens"], bins_per_step=sizes["bins_per_step"])
    return config


class Built(NamedTuple):
    """A config's step on a mesh, of random weights."""

    fns: S.Fns
    step: Callable  # jitted, of (state, prompts, knobs); the state is donated
    arguments: Callable  # () -> (state, prompts, knobs), on the mesh
    shapes: tuple  # of them, without making any


def build(config, vocab: int, mesh) -> Built:
    """The training step of a config over random prompts that fill their width."""
    task = synthetic.task(vocab)
    fns = S.make_fns(config, task, mesh)
    shardings, trees, whole = S.state_shardings(fns), sharding.trees(mesh), sharding.replicated(mesh)
    init = jax.jit(functools.partial(S.init_state, fns), static_argnums=0, out_shardings=shardings)
    step = jax.jit(
        functools.partial(S.train_step, fns),
        in_shardings=(shardings, trees, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    knobs = S.make_knobs(config, task)
    prompts = synthetic.prompts(vocab, config.sampler.prompts, config.sampler.prompt_length)
    state = abstract(jax.eval_shape(lambda: S.init_state(fns, 0)), shardings)
    return Built(
        fns, step, lambda: (init(0), sharding.place(prompts, trees), sharding.place(knobs, whole)),
        (state, sharding.shapes(prompts, trees), sharding.shapes(knobs, whole)),
    )  # fmt: skip


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    config = make_config(sizes)
    fns, step, arguments, _ = build(config, PRESETS[sizes["preset"]]["vocab"], sharding.make_mesh(**config.mesh))
    state, prompts, knobs = arguments()
    row = functools.partial(measure.row, "step", shapes=sizes)

    with measure.persistent_cache():
        cold = measure.compiled(step, state, prompts, knobs).compile_seconds
        jax.clear_caches()
        step = measure.compiled(step, state, prompts, knobs)
    yield row("compile", cold, "s")
    yield row("compile_from_cache", step.compile_seconds, "s", versus="compile", ratio=step.compile_seconds / cold)
    yield row("peak_memory", step.peak_bytes, "bytes")

    def rollout(params, prompts, key, number, knobs):
        tree, *_ = S.rollout(fns, params, prompts, jax.random.wrap_key_data(key), number, knobs)
        return tree, S.grade(fns, tree, prompts).reward

    sampling = measure.compiled(rollout, state.params, prompts, state.key, state.step, knobs)
    metrics = {}

    def run_step():
        nonlocal state, metrics
        state, metrics = step.run(state, prompts, knobs)
        return metrics

    def run_sampling():
        return sampling.run(state.params, prompts, state.key, state.step, knobs)

    times = measure.alternate(dict(step=run_step, sampling=run_sampling), sizes["repeats"])
    graded = run_sampling()
    credits = {name: measure.compiled(estimators.credit_of(name), *graded).run for name in ESTIMATORS}
    credit_times = measure.alternate({k: functools.partial(run, *graded) for k, run in credits.items()}, sizes["repeats"])
    seconds, metrics = times["step"].median, jax.device_get(metrics)
    if not jnp.isfinite(metrics["loss"]):
        raise ValueError(f"step suite: the loss is {metrics['loss']}.")
    yield row("step", seconds, "s")
    yield row("tokens", metrics["sampled_tokens"] / seconds, "tokens/s")
    share = times["sampling"].over(times["step"])
    yield row("sampling", times["sampling"].median, "s", versus="step", ratio=share)
    for name, time in credit_times.items():
        yield row(f"advantage.{name}", time.median, "s", versus="step", ratio=time.median / seconds)
    yield row("unique_tokens", metrics["unique_tokens"], "of flattened answer tokens")
    yield row("bins", metrics["bins"], "bins")
