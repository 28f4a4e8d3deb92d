"""Lay trees out as bins of tokens, each token once, for the learner.

A bin is a row of C tokens in depth-first order; a token's subtree is an interval [tin, stop) of
it, tin being the token's own index. Whole trees share a bin. A tree larger than what is left of
a bin goes to the next one, and a tree larger than a bin is split between leaves: the rest
starts anew with its prompt and path as context, whose weights are zero.
"""

import chex
import jax
import jax.numpy as jnp

from treerl import tree as T
from treerl.errors import UserError
from treerl.types import Prompts


@chex.dataclass(frozen=True)
class Bins:
    """Packed tokens; N bins are allocated, the first `count` are used."""

    token: jax.Array  # [N, C] int32
    position: jax.Array  # [N, C] int32, distance from the prompt's first token
    stop: jax.Array  # [N, C] int32, one past the last token of the subtree; 0 for padding
    parent: jax.Array  # [N, C] int32, index in the bin of the token that predicts this one
    positive: jax.Array  # [N, C] float32, sum of positive credit
    negative: jax.Array  # [N, C] float32, sum of negative credit
    weight: jax.Array  # [N, C] float32, 0 for prompts, context and padding
    logp: jax.Array  # [N, C] float32, log-prob by the policy that the ratio starts from
    reference: jax.Array  # [N, C] float32, log-prob by the reference policy; 0 without one
    cell: jax.Array  # [N, C] int32, index into the shard's B * S * K cells; -1 for prompts and padding
    count: jax.Array  # [] int32


def bin_bound(trees: int, leaves: int, longest: int, size: int) -> int:
    """Bins that always suffice: two neighbours together hold more than one bin's tokens.

    Args:
      trees, leaves: B and L. longest: P + S. size: C.

    Raises:
      ValueError: if one path may not fit into a bin.
    """
    if longest > size:
        raise UserError(
            f"learner.bin_tokens={size} is less than sampler.prompt_length + sampler.answer_length = {longest}; "
            "raise it so that any one path fits into a bin."
        )
    return min(trees * leaves, 2 * -(-trees * leaves * longest // size) + 1)


def trim(tree: T.Tree, used: jax.Array) -> T.Tree:
    """One tree with only those paths, and only as far, as lead to cells that are used [S, K]; the rest need not be packed.

    Cells keep their places; a path that ends early ends in a leaf there.
    """
    row, valid = jnp.arange(tree.token.shape[0]), T.leaf_valid(tree)
    on = (T.along(tree, used.astype(jnp.int32)) > 0) & valid[:, None]
    need = jnp.max(jnp.where(on, row, T.NONE), axis=1)  # last row that the leaf's path is wanted to
    leaf = jnp.arange(need.size)
    prior = (need > need[:, None]) | ((need == need[:, None]) & (leaf < leaf[:, None]))
    covered = jnp.any((T.shared_rows(tree) > need[:, None]) & prior, axis=1)  # another path goes through its last cell
    keep = (need >= 0) & ~covered
    column = jnp.take_along_axis(tree.leaf_path, jnp.maximum(need, 0)[:, None], axis=1)
    return tree.replace(
        leaf=jnp.where(keep[:, None], jnp.concatenate([need[:, None], column], axis=1), T.NONE),
        leaf_path=jnp.where(keep[:, None] & (row <= need[:, None]), tree.leaf_path, T.NONE),
    )


def unpack(values: jax.Array, bins: Bins, like: jax.Array) -> jax.Array:
    """Numbers of tokens [N, C] back in their cells: like `like` [B, S, K], 0 in cells that no bin owns."""
    owned = bins.weight > 0  # repeated context would write a cell twice
    index = jnp.where(owned, bins.cell, like.size).reshape(-1)
    return jnp.zeros((like.size,), values.dtype).at[index].set(values.reshape(-1), mode="drop").reshape(like.shape)


def _assign(length, shared, prompt, size):
    """Puts leaves into bins, one after the other.

    Args:
      length, shared: [B, L], leaves in depth-first order; length 0 where missing.
      prompt: [B].

    Returns:
      (start [B, L] offset of a leaf's tokens in the row of all bins, whole [B, L] whether it
      starts with its prompt, number of bins).
    """
    need = prompt + jnp.sum(length - shared, axis=1)  # of whole trees

    def step(state, leaf):
        used, fill = state  # bins finished, tokens in the current one
        length, shared, prompt, need, first = leaf
        full = prompt + length
        fresh_tree = (fill + need > size) & ((need <= size) | (fill + full > size))
        fresh = jnp.where(first, fresh_tree, fill + length - shared > size) & (fill > 0)
        whole = (first | fresh) & (length > 0)
        fresh &= length > 0
        used, fill = used + fresh, jnp.where(fresh, 0, fill)
        start = used * size + fill
        fill = fill + jnp.where(length == 0, 0, jnp.where(whole, full, length - shared))
        return (used, fill), (start, whole)

    first = jnp.zeros(length.shape, bool).at[:, 0].set(True)
    flat = lambda x: jnp.broadcast_to(x.reshape(x.shape[0], -1), length.shape).reshape(-1)
    leaves = tuple(map(flat, (length, shared, prompt, need, first)))
    (used, fill), (start, whole) = jax.lax.scan(step, (jnp.int32(0), jnp.int32(0)), leaves)
    return start.reshape(length.shape), whole.reshape(length.shape), used + (fill > 0)


def pack(
    tree: T.Tree, prompts: Prompts, credit, include: jax.Array | None = None, *,
    reference: jax.Array | None = None, size: int, bins: int | None = None,
) -> Bins:  # fmt: skip
    """Packs batched trees into bins.

    Args:
      tree: B trees, whose logp_policy is what ratios start from. prompts: theirs.
      credit: (positive, negative, weight), each [B, S, K].
      include: [B] bool; other trees are left out (a tree without credit has no gradient). None: all.
      reference: [B, S, K] log-probs by the reference policy, or None.
      size: C, tokens a bin (static). bins: N (static); None: as many as always suffice, see
        `bin_bound`. With fewer, what does not fit is dropped, and `count` is more than N.
    """
    batch, rows, slots = tree.token.shape
    width = prompts.token.shape[1]
    bound = bin_bound(batch, tree.leaf.shape[1], width + rows, size)
    bins = bound if bins is None else bins
    include = jnp.ones((batch,), bool) if include is None else include
    reference = jnp.zeros(tree.token.shape) if reference is None else reference
    order, shared = jax.vmap(T.leaf_order)(tree)
    path = jnp.take_along_axis(tree.leaf_path, order[..., None], axis=1)  # [B, L, S]
    length = jnp.sum(path >= 0, axis=-1) * include[:, None]
    shared = jnp.minimum(shared, length)
    start, whole, count = _assign(length, shared, prompts.length, size)

    row, column = jnp.arange(rows), jnp.arange(width)
    leaf = jnp.arange(path.shape[1])
    there = length > 0
    first_row = jnp.where(whole, 0, shared)  # first row that this leaf writes
    offset = start + jnp.where(whole, prompts.length[:, None], -shared)  # index of its row 0
    stop = jnp.where(there, offset + length, 0)

    def writer(writes):  # latest leaf up to each one that wrote the row or the prompt
        return jax.lax.cummax(jnp.where(writes, leaf.reshape(-1, *[1] * (writes.ndim - 2)), -1), axis=1)

    last = writer((first_row[..., None] <= row) & there[..., None])  # [B, L, S]
    last_prompt = writer(whole)  # [B, L]
    on = (row < length[..., None])[:, None] & (last[:, None] == leaf[:, None, None])  # [B, writer, leaf, S]
    cell_stop = jnp.max(jnp.where(on, stop[:, None, :, None], 0), axis=2)  # [B, L, S]
    on = there[:, None] & (last_prompt[:, None] == leaf[:, None])
    prompt_stop = jnp.max(jnp.where(on, stop[:, None], 0), axis=2)  # [B, L]

    # where the row above a leaf's first row lies: written by an earlier leaf of the same bin
    above = jnp.maximum(first_row - 1, 0)
    above_writer = jnp.take_along_axis(last, above[..., None], axis=-1)[..., 0]
    pick = lambda x, i: jnp.take_along_axis(x, jnp.maximum(i, 0), axis=-1)
    branch_point = pick(offset, above_writer) + above
    prompt_end = pick(start, last_prompt) + prompts.length[:, None] - 1
    before = jnp.where(first_row > 0, branch_point, prompt_end)  # [B, L]

    writes = there[..., None] & (row >= first_row[..., None]) & (row < length[..., None])
    at = offset[..., None] + row  # [B, L, S]
    cell = jnp.arange(batch)[:, None, None] * (width + rows * slots) + width + row * slots + path
    parent = jnp.where(row == first_row[..., None], before[..., None], at - 1)
    owned = row >= shared[..., None]

    prompt_writes = whole[..., None] & (column < prompts.length[:, None, None])
    prompt_at = start[..., None] + column  # [B, L, P]
    prompt_cell = jnp.arange(batch)[:, None, None] * (width + rows * slots) + column
    prompt_cell = jnp.broadcast_to(prompt_cell, prompt_at.shape)

    nowhere = bins * size

    def scatter(values, prompt_values, fill):
        index = jnp.concatenate([jnp.where(writes, at, nowhere).reshape(-1), jnp.where(prompt_writes, prompt_at, nowhere).reshape(-1)])
        values = jnp.concatenate([values.reshape(-1), jnp.broadcast_to(prompt_values, prompt_at.shape).reshape(-1)])
        return jnp.full((bins * size,), fill, jnp.int32).at[index].set(values, mode="drop")

    source = scatter(cell, prompt_cell, -1)
    stop = scatter(cell_stop, prompt_stop[..., None], 0)
    parent = scatter(parent, prompt_at - 1, 0)
    owned = scatter(owned, 0, 0)
    base = (jnp.arange(bins * size) // size) * size
    depth = jnp.concatenate(
        [
            jnp.broadcast_to(column, (batch, width)),
            jnp.broadcast_to(prompts.length[:, None, None] + row[:, None], (batch, rows, slots)).reshape(batch, -1),
        ],
        axis=1,
    )

    def fetch(prompt_value, cell_value, real):
        prompt_value = jnp.broadcast_to(prompt_value, (batch, width))
        flat = jnp.concatenate([prompt_value, cell_value.reshape(batch, -1)], axis=1).reshape(-1)
        return jnp.where(real, flat[jnp.maximum(source, 0)], 0).reshape(bins, size)

    real = source >= 0
    inside = lambda x: jnp.where(real, jnp.maximum(x - base, 0), 0).reshape(bins, size)
    positive, negative, weight = (fetch(0.0, c, real & (owned > 0)) for c in credit)
    return Bins(
        token=fetch(prompts.token, tree.token, real),
        position=fetch(depth[:, :width], depth[:, width:], real),
        stop=inside(stop),
        parent=inside(parent),
        positive=positive,
        negative=negative,
        weight=weight,
        logp=fetch(0.0, tree.logp_policy, real),
        reference=fetch(0.0, reference, real),
        cell=jnp.where(real.reshape(bins, size), fetch(-1, jnp.arange(batch * rows * slots), real), -1),
        count=count.astype(jnp.int32),
    )
