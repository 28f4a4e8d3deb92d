"""An experiment built from its config: what growing trees and evaluating need, training aside."""
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from treerl import draw, sharding, tasks
from treerl import prompts as P
from treerl import step as S
from treerl import tree as T
from treerl.checkpoint import Checkpoints, abstract
from treerl.config import check
from treerl.errors import UserError
from treerl.evaluate import majority_vote, pass_at_k, weighted_vote
from treerl.workdir import read_config


class Grown(NamedTuple):
    """Trees grown and graded, on the host."""

    tree: T.Tree  # B in front
    reward: np.ndarray  # [B, L] float32
    advantage: np.ndarray  # [B, S, K] float32; of leaf credit, the mean over the leaves below a cell
    forks: np.ndarray  # [B] int32
    pruned: np.ndarray  # [B] int32


class Experiment:
    """A config built: its task, its functions compiled for the mesh, its held-out examples."""

    def __init__(self, config: ConfigDict):
        check(config)
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh)
        self.task = tasks.make(config.task, os.path.expanduser(config.data_dir))
        self.fns = S.make_fns(config, self.task, self.mesh)
        self.knobs = jax.device_put(S.make_knobs(config, self.task), sharding.replicated(self.mesh))
        trees, whole = sharding.trees(self.mesh), sharding.replicated(self.mesh)
        self.trees = trees
        self.shardings = S.state_shardings(self.fns)
        self.init = jax.jit(functools.partial(S.init_state, self.fns), static_argnums=0, out_shardings=self.shardings)
        self.train_step = jax.jit(
            functools.partial(S.train_step, self.fns),
            in_shardings=(self.shardings, trees, whole),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._evaluate = jax.jit(
            functools.partial(S.evaluate_step, self.fns, samples=config.evaluation.samples),
            in_shardings=(self.shardings.params, self.shardings.quality, trees, whole, whole),
            out_shardings=whole,
        )
        self._grow = jax.jit(functools.partial(grow, self.fns))
        count = min(config.evaluation.examples, len(self.task.heldout))
        batch = min(config.evaluation.batch, count)
        shards = sharding.tree_shards(self.mesh)
        if batch % shards or count % batch:
            raise UserError(
                f"evaluation.batch={batch} must divide over {shards} shards and into the {count} held-out "
                "examples used; change evaluation.batch or evaluation.examples."
            )
        self._heldout = [
            self.prompts([self.task.heldout[i] for i in range(start, start + batch)], np.arange(start, start + batch))
            for start in range(0, count, batch)
        ]

    def prompts(self, examples, index):
        """Examples as prompts on the mesh."""
        return P.to_device(P.encode(self.task, examples, index, self.config.sampler.prompt_length), self.trees)

    def stream(self) -> P.Stream:
        """The training examples of this seed."""
        return P.Stream(self.task.train, self.config.seed)

    def state_shape(self):
        """The state as ShapeDtypeStructs with shardings, to restore into."""
        return abstract(jax.eval_shape(lambda: S.init_state(self.fns, 0)), self.shardings)

    def evaluate(self, state, seed: int = 0) -> dict:
        """Scores on held-out examples, from n samples of each.

        Returns:
          pass@k, unbiased, for k = 1, 2, 4, ... up to n; majority@n, the share of examples whose most frequent answer
          is right; with a quality head weighted@n, where samples vote by the rank of their scores.
        """
        key, n = jax.random.key(seed), self.config.evaluation.samples
        graded = [self._evaluate(state.params, state.quality, batch, key, self.knobs) for batch in self._heldout]
        found = {name: np.concatenate([x[name] for x in jax.device_get(graded)]) for name in graded[0]}
        right = found["reward"] > 0.5
        powers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
        scores = {f"pass@{k}": pass_at_k(right.sum(axis=1), n, k) for k in powers}
        elected = lambda winner: float(np.mean((winner >= 0) & right[np.arange(len(right)), winner]))
        scores[f"majority@{n}"] = elected(majority_vote(found["answer"], found["valid"]))
        if "score" in found:
            scores[f"weighted@{n}"] = elected(weighted_vote(found["answer"], found["score"], found["valid"]))
        return scores

    def grow(self, state, examples: list[dict], *, step: int, seed: int = 0) -> Grown:
        """Grows and grades a tree for each example by the run's own rules, as they are at `step`.

        An example's place in the list is part of its random key; the number of devices is not.
        """
        shards = sharding.tree_shards(self.mesh)
        index = np.arange(-(-len(examples) // shards) * shards)  # repeats fill the last shard
        prompts = self.prompts([examples[i % len(examples)] for i in index], index)
        grown = jax.device_get(self._grow(state, prompts, jax.random.key(seed), jnp.int32(step), self.knobs))
        return jax.tree.map(lambda x: x[: len(examples)], grown)

    def prompt_text(self, example: dict) -> str:
        """What the model reads."""
        return self.task.tokenizer.decode(self.task.encode(example).prompt)

    def parse(self, text: str) -> dict:
        """The example of a prompt that a user wrote.

        Raises:
          UserError: it is no prompt of the run's task, or is too long for its sampler.
        """
        if self.task.parse is None:
            raise UserError(f"task {self.config.task.name!r} takes no --prompt; use a run of another task.")
        example = self.task.parse(text)
        length, limit = len(self.task.encode(example).prompt), self.config.sampler.prompt_length
        if length > limit:
            raise UserError(
                f"--prompt={text!r} has {length} tokens and this run reads at most {limit}; give a shorter --prompt."
            )
        return example

    def tree_text(self, grown: Grown, i: int) -> str:
        """Tree i as text: its forks and its leaves."""
        view = dict(reward=grown.reward[i], advantage=grown.advantage[i])
        tree, decode = jax.tree.map(lambda x: x[i], grown.tree), self.task.tokenizer.decode
        return draw.format_tree(tree, decode, **view) + "\n\n" + draw.format_leaves(tree, decode, **view)


def grow(fns: S.Fns, state, prompts, key, step, knobs) -> Grown:
    """Grows, grades and estimates the trees of a batch of prompts; traceable."""
    tree, stats, seen = S.rollout(fns, state.params, prompts, key, step, knobs, quality=state.quality)
    reward, shaped = S.grade(fns, tree, prompts)
    credit, *_ = S.estimate(fns, state, tree, prompts, shaped, knobs, graded=reward, chance=S.survival_chance(fns, seen))
    if credit.ndim == 2:
        credit = jax.vmap(lambda t, x: T.up(t, x) / jnp.maximum(T.leaf_count(t), 1))(tree, credit)
    return Grown(tree, reward, credit, stats.forks, stats.pruned)


def load(workdir: str, *, best: bool = False) -> tuple[Experiment, object, int]:
    """Rebuilds the experiment of a workdir on this machine's devices and restores its latest (or best) checkpoint.

    On a number of devices that the run's own mesh does not fit, the mesh is data=-1, fsdp=1, tensor=1.

    Returns:
      (experiment, state, step).
    """
    config = ConfigDict(read_config(workdir))
    try:
        sharding.make_mesh(**config.mesh)
    except UserError:
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
    experiment = Experiment(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    restore = checkpoints.restore_best if best else checkpoints.restore_latest
    restored = restore(experiment.state_shape())
    if restored is None:
        raise UserError(f"workdir={workdir} has no checkpoint yet; wait for the first or train longer.")
    step, state, _ = restored
    return experiment, state, step
