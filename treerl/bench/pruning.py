"""How much contrast each survival rule leaves a group, on easy, balanced and hard prompts, and what pruning saves.

Contrast is simulated, without a model: the share a prompt is solved at is Beta(a, b) by mix; posteriors of its rollouts are
Beta around it (concentration c, theirs the mean), and each answer is right with exactly its posterior: perfect
calibration. E[r (1 - r)] of the share r of right answers among survivors is the expected variance of rewards; a
dead group is one whose survivors are all right or all wrong. All rules see the same groups and answers; arrol's
delta is solved for each mix by itself, as if every batch were of one mix.

The savings are of generation and of whole training steps at a model's shapes, random weights, independent samples that
all run to the last row: without pruning, with everything of a survival rule but nothing dropped (kappa 1), and with half
of the lines dropped at the detection length. An update is the step less the generation of the same turn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from treerl import sharding, step as S, survival
from treerl.bench import measure, synthetic
from treerl.models.presets import PRESETS

MIXES = dict(easy=(3.0, 1.0), balanced=(1.0, 1.0), hard=(1.0, 3.0))
RULES = {
    "random": survival.random,
    "arrol": survival.arrol,
    "arrol_lam_2": functools.partial(survival.arrol, lam=2.0),
    "arrol_group": survival.arrol_group,
    "balance": survival.balance,
}


PRUNING = dict(none=dict(rule="none"), keep_1=dict(rule="balance", kappa=1.0), keep_half=dict(rule="balance", kappa=0.5))


def defaults() -> dict:
    """Sizes of the simulation, the same on every machine, and of the step, for this one."""
    simulation = dict(groups=20000, slots=16, kappa=0.5, rho=0.5, concentration=6.0, seed=0, repeats=5)
    if measure.on_accelerator():
        step = dict(
            preset="qwen2.5-0.5b", dtype="bfloat16", prompts=64, prompt=256, rows=1024, detection=256, segment=32,
            bin_tokens=4352, bins_per_step=4, vocab_chunk=1024, remat="layers", turns=2,
        )  # fmt: skip
    else:
        step = dict(
            preset="tiny", dtype="float32", prompts=8, prompt=20, rows=64, detection=16, segment=8, bin_tokens=276,
            bins_per_step=4, vocab_chunk=1024, remat="none", turns=3,
        )  # fmt: skip
    return simulation | step


def simulate(mix: str, groups: int, slots: int, concentration: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(posteriors [B, K] float32, right answers [B, K] bool) of one mix."""
    rng = np.random.default_rng(seed)
    share = rng.beta(*MIXES[mix], (groups, 1)).clip(1e-4, 1 - 1e-4)
    q = rng.beta(concentration * share, concentration * (1 - share), (groups, slots)).astype(np.float32)
    return q, rng.random(q.shape) < q


def contrast(right: np.ndarray, keep: np.ndarray) -> dict:
    """What the survivors of all groups are like; a group without any has no contrast."""
    count = keep.sum(axis=1)
    share = (right & keep).sum(axis=1) / np.maximum(count, 1)
    dead = np.mean((share == 0) | (share == 1))
    return dict(variance=np.mean(share * (1 - share)), dead=dead, kept=np.mean(count) / keep.shape[1])


def balance_table(*, groups: int, slots: int, kappa: float, rho: float, concentration: float, seed: int) -> dict:
    """{(mix, rule): `contrast`} for every mix and rule, and for the rule `all`, which keeps every line."""
    table, key = {}, jax.random.key(seed)
    for number, mix in enumerate(MIXES):
        q, right = simulate(mix, groups, slots, concentration, seed + number)
        table[mix, "all"] = contrast(right, np.ones_like(right))
        for name, rule in RULES.items():
            run = jax.jit(functools.partial(rule, kappa=kappa, rho=rho))
            keep, _ = run(key, jnp.asarray(q), jnp.ones(q.shape, bool))
            table[mix, name] = contrast(right, np.asarray(keep))
    return table


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    row = functools.partial(measure.row, "pruning", shapes=sizes)
    table = balance_table(**{k: sizes[k] for k in ("groups", "slots", "kappa", "rho", "concentration", "seed")})
    for (mix, rule), found in table.items():
        base = found["variance"] / table[mix, "random"]["variance"]
        yield row(f"{mix}_{rule}", found["variance"], "E[r (1 - r)] of survivors", versus=f"{mix}_random", ratio=base)
        yield row(f"{mix}_{rule}.dead", found["dead"], "of groups")
        yield row(f"{mix}_{rule}.kept", found["kept"], "of lines")

    q, _ = simulate("balanced", sizes["groups"], sizes["slots"], sizes["concentration"], sizes["seed"])
    given = jax.random.key(sizes["seed"]), jnp.asarray(q), jnp.ones(q.shape, bool)
    choose = lambda rule: functools.partial(rule, kappa=sizes["kappa"], rho=sizes["rho"])
    programs = {name: measure.compiled(choose(rule), *given).run for name, rule in RULES.items()}
    times = measure.alternate({k: functools.partial(run, *given) for k, run in programs.items()}, sizes["repeats"])
    for name, time in times.items():
        ratio = time.over(times["random"])
        yield row(f"{name}.seconds", time.median, "s for all groups", versus="random", ratio=ratio)
    yield from savings(sizes, row)


class _Run:
    """Generation and the step of one kind of pruning, compiled, with a state that goes on from step to step."""

    def __init__(self, kind: str, sizes: dict, mesh):
        config = synthetic.config(sizes)
        config.sampler.segment, config.branching.rule = sizes["segment"], "stochastic"
        config.pruning.update(dict(PRUNING[kind], detection=sizes["detection"], warmup_steps=0))
        config.learner.update(bin_tokens=sizes["bin_tokens"], bins_per_step=sizes["bins_per_step"])
        vocab = PRESETS[sizes["preset"]]["vocab"]
        task = synthetic.task(vocab)
        fns = S.make_fns(config, task, mesh)
        shardings, trees, whole = S.state_shardings(fns), sharding.trees(mesh), sharding.replicated(mesh)
        self.state = jax.jit(functools.partial(S.init_state, fns), static_argnums=0, out_shardings=shardings)(0)
        self.knobs = jax.device_put(S.make_knobs(config, task), whole)
        self.prompts = jax.device_put(synthetic.prompts(vocab, sizes["prompts"], sizes["prompt"]), trees)
        self.metrics = {}

        def generate(params, quality, prompts, key, number, knobs):
            tree, stats, *_ = S.rollout(fns, params, prompts, jax.random.wrap_key_data(key), number, knobs, quality=quality)
            return tree.token, stats

        step = jax.jit(
            functools.partial(S.train_step, fns),
            in_shardings=(shardings, trees, whole), out_shardings=(shardings, whole), donate_argnums=0,
        )  # fmt: skip
        self._generate = measure.compiled(generate, *self._inputs())
        self._step = measure.compiled(step, self.state, self.prompts, self.knobs)
        self.compile_seconds, self.peak_bytes = self._step.compile_seconds, self._step.peak_bytes

    def _inputs(self):
        return self.state.params, self.state.quality, self.prompts, self.state.key, self.state.step, self.knobs

    def generate(self):
        return self._generate.run(*self._inputs())

    def step(self):
        self.state, self.metrics = self._step.run(self.state, self.prompts, self.knobs)
        return self.metrics


def savings(sizes: dict, row):
    """Yields seconds of generation, update and step for each kind of pruning, and tokens and bins of the last step."""
    mesh, runs = sharding.make_mesh(), {}
    for kind in PRUNING:
        runs[kind] = _Run(kind, sizes, mesh)
        yield row(f"{kind}.compile", runs[kind].compile_seconds, "s, of the step")
        yield row(f"{kind}.peak_memory", runs[kind].peak_bytes, "bytes, of the step")
    programs = {f"{kind}.generation": run.generate for kind, run in runs.items()}
    times = measure.alternate(programs | {f"{kind}.step": run.step for kind, run in runs.items()}, sizes["turns"])
    for kind in runs:
        pairs = zip(times[f"{kind}.step"].seconds, times[f"{kind}.generation"].seconds)
        times[f"{kind}.update"] = measure.Times([step - generation for step, generation in pairs])
    for kind, run in runs.items():
        for part in ("generation", "update", "step"):
            found, base = times[f"{kind}.{part}"], times[f"none.{part}"]
            compared = {} if kind == "none" else dict(versus=f"none.{part}", ratio=found.over(base))
            yield row(f"{kind}.{part}", found.median, "s", **compared)
        yield row(f"{kind}.sampled_tokens", run.metrics["sampled_tokens"], "tokens a step")
        yield row(f"{kind}.bins", run.metrics["bins"], "bins")
