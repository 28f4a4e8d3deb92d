"""Whether an accelerator grows the trees that the CPU grows, from the same float32 parameters.

The default Countdown experiment trains on the accelerator from random parameters; before every
step both devices grow that step's trees from the same parameters and keys. Rounding differs
between devices, so a draw close to the border between two tokens, or a fork close to its
threshold, can fall on the other side. Until one does, a tree is the same, token for token; what
grows after one is another tree, so a tree is compared up to its first difference.
"""

import functools
import os

import jax
import numpy as np
from jax.sharding import Mesh

from treerl import prompts as P, sharding, step as S, tasks, tree as T
from treerl.bench import measure
from treerl.config import default


def compare(a: T.Tree, b: T.Tree) -> dict:
    """Compares batched trees (NumPy) that should be the same.

    Returns:
      same: bool [B], equal tokens and parents everywhere. cells: used cells of `a` in rows above
      the first that differs. drift: largest difference of log-probs in those rows. gap: of each
      tree that differs, the difference of the log-probs of the two tokens in the first cell that
      differs, a logit gap at equal temperature; left out where one of them was not written.
    """
    rows = a.token.shape[1]
    differs = (a.used != b.used) | (a.used & b.used & ((a.token != b.token) | (a.parent != b.parent)))
    same = ~differs.any((1, 2))
    first = np.where(same, rows, differs.any(2).argmax(1))
    above = a.used & (np.arange(rows)[:, None] < first[:, None, None])
    gap = []
    for tree in np.flatnonzero(~same):
        row = first[tree]
        slot = differs[tree, row].argmax()
        at = tree, row, slot
        if a.used[at] and b.used[at]:
            gap.append(abs(float(a.logp_policy[at]) - float(b.logp_policy[at])))
    drift = np.abs(np.where(above, a.logp_policy - b.logp_policy, 0)).max()
    return dict(same=same, cells=int(above.sum()), drift=float(drift), gap=gap)


def defaults() -> dict:
    """Training steps, each preceded by a comparison, and the trees of a step."""
    return dict(steps=20, prompts=32, slots=8)


def rows(*, devices=None, **sizes):
    """Yields rows of the suite.

    Args:
      devices: two, the first compared with the second; by default the CPU and the default device.
      **sizes: replace `defaults()`.

    Raises:
      ValueError: there is no accelerator to compare with.
    """
    if devices is None and not measure.on_accelerator():
        raise ValueError("devices suite: compares an accelerator with the CPU and finds none; run it where one is.")
    devices = devices or (jax.devices("cpu")[0], jax.devices()[0])
    sizes = {**defaults(), **sizes}
    steps, config = sizes["steps"], default()
    config.sampler.update(prompts=sizes["prompts"], slots=sizes["slots"])
    task = tasks.make(config.task, os.path.expanduser(config.data_dir))
    programs = []
    for device in devices:
        mesh = Mesh(np.asarray([device]).reshape(1, 1, 1), sharding.AXES)
        fns = S.make_fns(config, task, mesh)
        whole = sharding.replicated(mesh)

        def grow(fns, state, prompts, knobs):
            key = jax.random.wrap_key_data(state.key)
            return S.rollout(fns, state.params, prompts, key, state.step, knobs)[0]

        knobs = jax.device_put(S.make_knobs(config, task), whole)
        step = jax.jit(functools.partial(S.train_step, fns))
        programs.append((fns, whole, knobs, jax.jit(functools.partial(grow, fns)), step))

    init = jax.jit(functools.partial(S.init_state, programs[1][0]), static_argnums=0, out_shardings=programs[1][1])
    state, stream = init(config.seed), P.Stream(task.train, config.seed)
    found = []
    for _ in range(steps):
        examples, index = stream.examples(int(state.position), config.sampler.prompts)
        batch = P.encode(task, examples, index, config.sampler.prompt_length)
        trees = []
        for _, whole, knobs, grow, _ in programs:
            trees.append(jax.device_get(grow(jax.device_put(state, whole), jax.device_put(batch, whole), knobs)))
        found.append(compare(*trees))
        _, whole, knobs, _, step = programs[1]
        state, _ = step(state, jax.device_put(batch, whole), knobs)

    row = functools.partial(measure.row, "devices", shapes=sizes)
    yield row("trees", steps * config.sampler.prompts, "trees")
    yield row("same_trees", np.mean([f["same"] for f in found]), "of the trees, token for token")
    yield row("same_tokens", sum(f["cells"] for f in found), "tokens before a first difference")
    yield row("logp_difference", max(f["drift"] for f in found), "nats, largest among those tokens")
    gaps = [gap for f in found for gap in f["gap"]]
    if gaps:
        yield row("first_logit_gap", gaps[0], "nats, of the two tokens of the first difference")
