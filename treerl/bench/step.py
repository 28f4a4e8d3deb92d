"""The whole training step, from prompts to updated parameters, the part spent sampling, and every estimator on its trees.

Random weights give no thresholds that mean anything, so the lookahead rule's are open (every
token a candidate, none pruned, see `bench.sampler`): a tree fills its slots in two steps and
every line runs to the last row. The rest is the default config: depth-wise advantages, Adam.
Parameters and moments are float32 whatever the activations are; of shape D adapters are trained.

`sampling` grows the trees of a step, `learner` packs trees of one, with their credit, and updates the same state: two
programs of their own, each timed in turns with the whole step. What share of the step they are is the median over turns of
their sum over the step's time: what the step does beside them is grading, credit and metrics. Two programs are not one:
if the compiler saves work between the halves, or copies results out of each, the share is above what it is inside.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import packing, sharding, step as S, tree as T
from treerl.advantages import ESTIMATORS
from treerl.bench import estimators, measure, shapes, synthetic
from treerl.checkpoint import abstract
from treerl.models.presets import PRESETS

LAYOUT = {  # what goes through the learner at a time
    "A": dict(bin_tokens=4352, bins_per_step=4),
    "B": dict(bin_tokens=10240, bins_per_step=1),
    "C": dict(bin_tokens=4352, bins_per_step=4),
    "D": dict(bin_tokens=2560, bins_per_step=2, **shapes.LORA["D"]),
}
SMALL = dict(
    preset="tiny", dtype="float32", prompts=32, slots=8, prompt=20, rows=20, segment=4, lengths=(), windows=(4, 6),
    bin_tokens=128, bins_per_step=8, vocab_chunk=1024, remat="none",
)  # fmt: skip


def defaults(shape: str | None = None) -> dict:
    """Sizes of a shape (see `shapes`); without one, A on an accelerator and a small one on a CPU."""
    if shape is not None or measure.on_accelerator():
        shape = shape or "A"
        others = dict(segment=32, lengths=(), windows=(20, 30, 50), vocab_chunk=1024, remat="products", repeats=3)
        return shapes.sizes(shape, **others) | LAYOUT[shape]
    return dict(SMALL, repeats=7)


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


def make_halves(built: Built, mesh):
    """The parts of a step that are timed alone: jitted (sampling, credit, learner).

    sampling(state, prompts, knobs) -> Tree. credit(state, tree, prompts, knobs) -> (rewards [B, L], Cells, denominator [],
    tokens that are packed [], prompts included). learner(state, tree, prompts, cells, denominator, knobs) -> (state, metrics),
    the state donated.
    """
    fns, shardings, trees, whole = built.fns, S.state_shardings(built.fns), sharding.trees(mesh), sharding.replicated(mesh)

    def sampling(state, prompts, knobs):
        return S.rollout(fns, state.params, prompts, jax.random.wrap_key_data(state.key), state.step, knobs).tree

    def credit(state, tree, prompts, knobs):
        reward = S.grade(fns, tree, prompts).reward
        found, leaf_weight, *_ = S.estimate(fns, state, tree, prompts, S.shape_reward(fns, tree, reward), knobs, graded=reward)
        cells, denominators = jax.vmap(lambda *tree: S.weigh(fns, *tree, knobs))(tree, found, leaf_weight)
        credited = (cells.positive != 0) | (cells.negative != 0)
        tokens = jax.vmap(lambda tree, used: T.token_count(packing.trim(tree, used))[0])(tree, credited)
        return reward, cells, jnp.sum(denominators), jnp.sum(tokens) + prompts.token.size

    def learner(state, tree, prompts, cells, denominator, knobs):
        return S.learn(fns, state, tree, prompts, cells, denominator, knobs)

    return (
        jax.jit(sampling, in_shardings=(shardings, trees, whole), out_shardings=trees),
        jax.jit(credit, in_shardings=(shardings, trees, trees, whole), out_shardings=(trees, trees, whole, whole)),
        jax.jit(
            learner, in_shardings=(shardings, trees, trees, trees, whole, whole), out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
    )  # fmt: skip


def rows(*, shape=None, **sizes):
    """Yields rows of the suite; `sizes` replace `defaults(shape)`."""
    sizes = {**defaults(shape), **sizes}
    config = make_config(sizes)
    mesh = sharding.make_mesh(**config.mesh)
    built = build(config, PRESETS[sizes["preset"]]["vocab"], mesh)
    fns, step, arguments, _ = built
    state, prompts, knobs = arguments()
    row = functools.partial(measure.row, "step", shapes=sizes)

    with measure.persistent_cache():
        cold = measure.compiled(step, state, prompts, knobs).compile_seconds
        jax.clear_caches()
        step = measure.compiled(step, state, prompts, knobs)
    yield row("compile", cold, "s")
    yield row("compile_from_cache", step.compile_seconds, "s", versus="compile", ratio=step.compile_seconds / cold)
    yield row("peak_memory", step.peak_bytes, "bytes")

    sampling, credit, learner = make_halves(built, mesh)
    sampling = measure.compiled(sampling, state, prompts, knobs)
    tree = sampling.run(state, prompts, knobs)
    reward, cells, denominator, packed = credit(state, tree, prompts, knobs)
    learner = measure.compiled(learner, state, tree, prompts, cells, denominator, knobs)
    for name, program in dict(sampling=sampling, learner=learner).items():
        yield row(f"{name}.compile", program.compile_seconds, "s")
        yield row(f"{name}.peak_memory", program.peak_bytes, "bytes")
    metrics = {}

    def run_step():
        nonlocal state, metrics
        state, metrics = step.run(state, prompts, knobs)
        return metrics

    def run_sampling():
        return sampling.run(state, prompts, knobs)

    def run_learner():
        nonlocal state
        state, told = learner.run(state, tree, prompts, cells, denominator, knobs)
        return told

    times = measure.alternate(dict(step=run_step, sampling=run_sampling, learner=run_learner), sizes["repeats"])
    credits = {name: measure.compiled(estimators.credit_of(name), tree, reward).run for name in ESTIMATORS}
    credit_times = measure.alternate({k: functools.partial(run, tree, reward) for k, run in credits.items()}, sizes["repeats"])
    peak = measure.matrix_peak(sizes["dtype"])
    seconds, metrics = times["step"].median, jax.device_get(metrics)
    if not jnp.isfinite(metrics["loss"]):
        raise ValueError(f"step suite: the loss is {metrics['loss']}.")
    yield row("step", seconds, "s")
    yield row("tokens", metrics["sampled_tokens"] / seconds, "tokens/s")
    for name in ("sampling", "learner"):
        yield row(name, times[name].median, "s", versus="step", ratio=times[name].over(times["step"]))
    both = measure.Times([a + b for a, b in zip(times["sampling"].seconds, times["learner"].seconds)])
    yield row("sampling_and_learner", both.median, "s", versus="step", ratio=both.over(times["step"]))
    yield row("sampling.step", 1e3 * times["sampling"].median / sizes["rows"], "ms a new token of a line, prefill included")
    done = measure.learning_flops(fns.model.config, int(packed))
    yield row("matrix_peak", peak / 1e12, "TFLOP/s")
    yield row("learner.utilisation", done / times["learner"].median / peak, "model FLOPs over the matrix peak, Adam's time included")
    for name, time in credit_times.items():
        yield row(f"advantage.{name}", time.median, "s", versus="step", ratio=time.median / seconds)
    yield row("unique_tokens", metrics["unique_tokens"], "of flattened answer tokens")
    yield row("bins", metrics["bins"], "bins")
