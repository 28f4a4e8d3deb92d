"""Grade the leaves of trees: on the device, or on the host from within the step or between its halves."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from treerl import sharding, tree as T
from treerl.tasks import HostGraders


class Graded(NamedTuple):
    """What the leaves of batched trees are worth, zero where there is no leaf."""

    reward: jax.Array  # [B, L] float32
    parts: jax.Array  # [B, L, G] float32, scores of the host's graders before they are weighted; G = 0 on the device
    fault: jax.Array  # [B, L] int8, what went wrong on the host, see `treerl.graders.FAULTS`
    key: jax.Array  # [B, L] int32, the first leaf with the same answer: answers with equal keys vote together


def answers(tree: T.Tree) -> tuple[jax.Array, jax.Array]:
    """Tokens of batched trees' leaves, int32 [B, L, S], and their number, 0 where there is no leaf, int32 [B, L]."""
    tokens = jax.vmap(lambda t: T.along(t, t.token))(tree)
    return tokens, jnp.where(jax.vmap(T.leaf_valid)(tree), jax.vmap(T.leaf_length)(tree), 0)


def on_device(tree: T.Tree, data, grader: Callable) -> Graded:
    """Grades every leaf in the program; answers are equal if their tokens are.

    Args:
      tree: batched. data: pytree of [B, ...], the task's own.
      grader: grader(tokens [S] int32, length [] int32, data) -> [] float32, for one answer.
    """
    tokens, length = answers(tree)
    reward = jax.vmap(jax.vmap(grader, in_axes=(0, 0, None)))(tokens, length, data)
    key = jax.vmap(first_equal)(jnp.where(jnp.arange(tokens.shape[2]) < length[..., None], tokens, T.NONE))
    reward = jnp.where(length > 0, reward, 0.0)
    return Graded(reward, jnp.zeros((*length.shape, 0)), jnp.zeros(length.shape, jnp.int8), key)


def of_turns(tree: T.Tree) -> Graded:
    """What episodes were worth: the sum of their turns' rewards, undiscounted. Answers are equal if their tokens are."""
    tokens, length = answers(tree)
    key = jax.vmap(first_equal)(jnp.where(jnp.arange(tokens.shape[2]) < length[..., None], tokens, T.NONE))
    reward = jnp.sum(tree.turns.reward, axis=-1)
    return Graded(reward, jnp.zeros((*length.shape, 0)), jnp.zeros(length.shape, jnp.int8), key)


def shapes(batch: int, leaves: int, graders: int) -> Graded:
    """What `Graded` holds, as `jax.ShapeDtypeStruct`."""
    of = functools.partial(jax.ShapeDtypeStruct, (batch, leaves))
    return Graded(of(jnp.float32), jax.ShapeDtypeStruct((batch, leaves, graders), jnp.float32), of(jnp.int8), of(jnp.int32))


def first_equal(rows: jax.Array) -> jax.Array:
    """For each row the first that equals it: [L, ...] -> int32 [L]."""
    return jnp.argmax(jnp.all((rows[:, None] == rows).reshape(*(rows.shape[:1] * 2), -1), axis=-1), axis=1).astype(jnp.int32)


def in_numpy(host: HostGraders, tokens, length, data) -> Graded:
    """Grades some trees' leaves on this host.

    Args:
      tokens: [b, L, S] int32. length: [b, L]. data: pytree of [b, ...], as the task encoded it.
    """
    tokens, length = np.asarray(tokens), np.asarray(length)
    tree, leaf = np.nonzero(length > 0)
    own = jax.tree.map(lambda x: np.asarray(x)[tree], data)
    scores, faults = host.grade(tokens[tree, leaf], length[tree, leaf], own)
    parts = np.zeros((*length.shape, len(host.names)), np.float32)
    fault = np.zeros(length.shape, np.int8)
    parts[tree, leaf], fault[tree, leaf] = scores, faults
    key, seen = np.tile(np.arange(length.shape[1], dtype=np.int32), (len(length), 1)), {}
    for b, i in zip(tree.tolist(), leaf.tolist()):
        key[b, i] = seen.setdefault((b, host.key(tokens[b, i], int(length[b, i]))), i)
    return Graded(parts @ np.asarray(host.weights, np.float32), parts, fault, key)


def between(host: HostGraders, tokens: jax.Array, length: jax.Array, data) -> Graded:
    """`in_numpy` outside of any program: this process grades the trees of its own devices. Shardings as of the trees."""
    rows = lambda index: range(length.shape[0])[index[0]]
    mine = sorted({rows(shard.index) for shard in length.addressable_shards}, key=min)  # copies along the tensor axis once
    local = lambda x, own: next(np.asarray(s.data) for s in x.addressable_shards if rows(s.index) == own)
    together = jax.tree.map(lambda x: np.concatenate([local(x, own) for own in mine]), (tokens, length, data))
    graded, start = in_numpy(host, *together), {}
    for own in mine:
        start[own] = sum(map(len, start))
    part = lambda x, index: x[start[rows(index)] :][: len(rows(index))]
    make = lambda x: jax.make_array_from_callback(
        (length.shape[0], *x.shape[1:]), length.sharding, functools.partial(part, x)
    )  # fmt: skip
    return Graded(*map(make, graded))


def by_callback(host: HostGraders, tree: T.Tree, data, mesh: Mesh) -> Graded:
    """`in_numpy` called by the program, on the host of each device, with the device's own trees.

    Of devices along the tensor axis, which hold the same trees, one asks for all: graders that keep a time limit may
    judge an answer differently when asked again, and copies that differ would stay different.
    """
    tokens, length = answers(tree)

    def own(*own):
        made = shapes(*own[1].shape, len(host.names))
        ask = lambda: jax.pure_callback(functools.partial(in_numpy, host), made, *own)
        if mesh.shape["tensor"] == 1:
            return ask()
        nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        return jax.lax.psum(jax.lax.cond(jax.lax.axis_index("tensor") == 0, ask, nothing), "tensor")

    return jax.shard_map(own, mesh=mesh, in_specs=sharding.TREES, out_specs=sharding.TREES, check_vma=False)(tokens, length, data)


def overlong(tree: T.Tree, buffer: int) -> jax.Array:
    """Soft punishment of length: 0 up to S - buffer tokens, then falling to -1 at S: float32 [L].

    DAPO, arXiv 2503.14476, eq. 13, with S rows as its longest answer. An answer cut off there has -1.

    Args:
      tree: one tree. buffer: tokens over which it falls, at least 1.
    """
    allowed = tree.token.shape[0] - buffer
    punished = -(T.leaf_length(tree) - allowed).astype(jnp.float32) / buffer
    return jnp.where(T.leaf_valid(tree), jnp.clip(punished, -1.0, 0.0), 0.0)
