"""How much contrast each survival rule leaves a group, on easy, balanced and hard prompts.

A simulation, no model: the share a prompt is solved at is Beta(a, b) by mix; posteriors of its rollouts are
Beta around it (concentration c, theirs the mean), and each answer is right with exactly its posterior: perfect
calibration. E[r (1 - r)] of the share r of right answers among survivors is the expected variance of rewards; a
dead group is one whose survivors are all right or all wrong. All rules see the same groups and answers; arrol's
delta is solved for each mix by itself, as if every batch were of one mix.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from treerl import survival
from treerl.bench import measure

MIXES = dict(easy=(3.0, 1.0), balanced=(1.0, 1.0), hard=(1.0, 3.0))
RULES = {
    "random": survival.random,
    "arrol": survival.arrol,
    "arrol_lam_2": functools.partial(survival.arrol, lam=2.0),
    "arrol_group": survival.arrol_group,
    "balance": survival.balance,
}


def defaults() -> dict:
    """Sizes, the same on every machine."""
    return dict(groups=20000, slots=16, kappa=0.5, rho=0.5, concentration=6.0, seed=0, repeats=5)


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
    settings = {name: value for name, value in sizes.items() if name != "repeats"}
    table = balance_table(**settings)
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
