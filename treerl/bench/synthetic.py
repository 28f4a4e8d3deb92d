"""Prompts, trees and a task made of random tokens, for benchmarks of any model shape."""

import jax
import jax.numpy as jnp
import numpy as np

from treerl import config as C, tree as T
from treerl.models.presets import PRESETS
from treerl.tasks import Task
from treerl.types import Prompts


class Tokens:
    """A vocabulary without an end-of-sequence id: every answer runs to its last row."""

    eos_ids = (-1,)

    def __init__(self, vocab: int):
        self.vocab_size = vocab


def task(vocab: int) -> Task:
    """Grades an answer by its share of even tokens, on the device."""

    def grade(tokens, length, data):
        del data
        real = jnp.arange(tokens.shape[0]) < length
        return jnp.sum(real & (tokens % 2 == 0)) / jnp.maximum(length, 1).astype(jnp.float32)

    return Task(tokenizer=Tokens(vocab), train=(), heldout=(), encode=None, grade=grade)


def prompts(vocab: int, batch: int, width: int, seed: int = 0) -> Prompts:
    """Prompts of random tokens that fill their width."""
    token = jax.random.randint(jax.random.key(seed), (batch, width), 0, vocab, jnp.int32)
    return Prompts(token=token, length=jnp.full((batch,), width), index=jnp.arange(batch), data=())


def config(sizes: dict):
    """The default config at a suite's sizes; see `treerl.config`. param_dtype, lora_rank and moment_dtype are read if there are any."""
    result = C.default()
    result.samples_every = 0
    model = dict(dict(qk_norm=False, qkv_bias=False, tied=True), **PRESETS[sizes["preset"]])
    model.pop("vocab")
    result.model.update(dict(model, dtype=sizes["dtype"]) | {k: sizes[k] for k in ("param_dtype", "lora_rank") if k in sizes})
    result.sampler.update(prompts=sizes["prompts"], slots=sizes["slots"], prompt_length=sizes["prompt"], answer_length=sizes["rows"])
    result.learner.update({k: sizes[k] for k in ("vocab_chunk", "remat")})
    result.optimizer.moment_dtype = sizes.get("moment_dtype", result.optimizer.moment_dtype)
    return result


def forked_tree(slots: int, rows: int, last_fork: int):
    """Parents and used cells [S, K] of a tree that doubles its lines at evenly spaced rows.

    Rows above `last_fork` are shared by two leaves or more, rows from it on by none; all K
    leaves end in the last row.
    """
    doublings = max(1, (slots - 1).bit_length())
    forks = np.array([last_fork * j // doublings for j in range(1, doublings + 1)])
    lines = np.minimum(slots, 2 ** (np.arange(rows)[:, None] >= forks).sum(1))
    if slots == 1:
        lines[:] = 1
    column = np.arange(slots)
    before = np.concatenate([[1], lines[:-1]])[:, None]
    return np.where(column < before, column, column % before), column < lines[:, None]


def trees(vocab: int, batch: int, slots: int, rows: int, last_fork: int, seed: int = 0) -> T.Tree:
    """Batched trees of `forked_tree`'s shape, with random tokens and log-probs near 1 / vocab."""
    parent, used = forked_tree(slots, rows, last_fork)
    leaves = np.stack([np.full(slots, rows - 1), np.arange(slots)], axis=1)

    def one(key):
        a, b = jax.random.split(key)
        token = jax.random.randint(a, (rows, slots), 0, vocab, jnp.int32)
        logp = -jnp.log(vocab) - jnp.abs(jax.random.normal(b, (rows, slots)))
        return T.from_parents(parent, used, leaves, token=token, logp_policy=logp, logp_behavior=logp)

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), batch))
