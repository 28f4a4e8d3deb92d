"""Episodes with a short memory: every turn reads a fresh prompt, the goal and the last turns.

The memory of GiGPO's and HGPO's released agents: at turn t the prompt is the goal, then of the last `window` turns what was
seen and what was done, then what is seen now. What lies further back is gone, exactly: nothing of it is in any hidden state.
So turns share no prefix, neither in the sampler nor in the learner, and nothing forks. The tree of such episodes holds
actions alone, those of a line one below the other; what each was read after is a context of its own.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from treerl import episodes, tree as T
from treerl.environments import Environment, context_width, length
from treerl.sampler import Stats
from treerl.types import Prompts


@chex.dataclass(frozen=True)
class Contexts:
    """What the policy read before each turn, and where in the tree its action lies; W tokens, A of an action."""

    token: jax.Array  # [B, K, T, W] int32, right-padded
    length: jax.Array  # [B, K, T] int32, 0 where there was no turn
    row: jax.Array  # [B, K, T, A] int32, row of each token of the action in column k, -1 for none


def context(goal: jax.Array, heard: jax.Array, done: jax.Array, turn, window: int) -> jax.Array:
    """The context of a turn of one episode: int32 [W], right-padded.

    Args:
      goal: [G] int32, padded. heard: [T + 1, O], the observations, padded; done: [T, A], the actions. turn: [] int32.
    """
    pieces = [goal]
    for back in range(window, 0, -1):
        there, at = turn >= back, jnp.maximum(turn - back, 0)
        pieces += [jnp.where(there, heard[at], 0), jnp.where(there, done[at], 0)]
    words = jnp.concatenate([*pieces, heard[turn]])
    return words[jnp.argsort(words == 0, stable=True)]


def grow(
    environment: Environment, act: Callable, prompts: Prompts, key: jax.Array, *, slots: int, window: int, anchor: str,
    end: jax.Array, penalty,
) -> tuple[T.Tree, Stats, Contexts]:  # fmt: skip
    """Plays `slots` episodes of every task, a turn at a time, until all are over.

    Args:
      act: (prompts of B * slots contexts, key) -> Tree of one line each, the action: A rows, one slot.
      prompts: the goals. key: typed. end: [E] int32, tokens that end an action. The rest: see `sampler.sample`.

    Returns:
      (Tree of T * A rows, Stats, Contexts).
    """
    (batch, _), (O, A, turns) = prompts.token.shape, (environment.observation, environment.action, environment.horizon)
    start_key, draw_key = jax.random.split(key)
    worlds, _ = episodes.begin(environment, start_key, prompts, anchor)
    worlds = jax.tree.map(lambda x: jnp.repeat(x, slots, axis=1), worlds)
    wide = context_width(environment, prompts.token.shape[1], window)
    goal = jnp.where(jnp.arange(prompts.token.shape[1]) < prompts.length[:, None], prompts.token, 0)
    zero = lambda *shape, dtype=jnp.int32: jnp.zeros((batch, slots, *shape), dtype)
    index = (prompts.index[:, None] * slots + jnp.arange(slots)).reshape(-1)
    each = jax.vmap(jax.vmap(context, in_axes=(None, 0, 0, None, None)), in_axes=(0, 0, 0, None, None))
    record = dict(
        context=zero(turns, wide), token=zero(turns, A), entropy=zero(turns, A, dtype=jnp.float32),
        logp_behavior=zero(turns, A, dtype=jnp.float32), logp_policy=zero(turns, A, dtype=jnp.float32),
        count=zero(turns),
    )  # fmt: skip

    def play(carry):
        turn, worlds, heard, done, record = carry
        alive, words = ~worlds.over, each(goal, heard, done, turn, window)
        flat = words.reshape(batch * slots, wide)
        line = act(Prompts(token=flat, length=length(flat), index=index, data={}), jax.random.fold_in(draw_key, turn))
        of = lambda x: x[..., 0].reshape(batch, slots, A)
        count = jnp.where(alive, jax.vmap(T.leaf_length)(line)[:, 0].reshape(batch, slots), 0)
        said = jnp.arange(A) < count[..., None]
        for i in range(A):
            worlds = episodes.advance(environment, worlds, of(line.token)[..., i], said[..., i], end, anchor)
        worlds = worlds.replace(read=length(worlds.heard))
        now = dict({name: of(getattr(line, name)) for name in ("token", "entropy", "logp_behavior", "logp_policy")}, context=words)
        now = {name: jnp.where(alive[..., None], x, 0) for name, x in now.items()} | dict(count=count)
        record = {name: x.at[:, :, turn].set(now[name].astype(x.dtype)) for name, x in record.items()}
        action = jnp.where(said, of(line.token), 0)
        return turn + 1, worlds, heard.at[:, :, turn + 1].set(worlds.heard), done.at[:, :, turn].set(action), record

    heard = zero(turns + 1, O).at[:, :, 0].set(worlds.heard)
    carry = jnp.int32(0), worlds, heard, zero(turns, A), record
    turn, worlds, _, _, record = jax.lax.while_loop(lambda c: (c[0] < turns) & ~jnp.all(c[1].over), play, carry)
    return _lay_out(worlds, record, turn * A, penalty)


def _lay_out(worlds: episodes.Worlds, record: dict, iterations, penalty) -> tuple[T.Tree, Stats, Contexts]:
    """The tree of what was said: the actions of a line one below the other, in its column."""
    count = record["count"]  # [B, K, T]
    batch, slots, turns = count.shape
    place, first = jnp.arange(record["token"].shape[-1]), jnp.cumsum(count, axis=-1) - count
    row = jnp.where(place < count[..., None], first[..., None] + place, T.NONE)  # [B, K, T, A]
    contexts = Contexts(token=record["context"], length=jnp.where(count > 0, length(record["context"]), 0), row=row)
    blank, total = jnp.zeros((batch, turns * place.size, slots)), jnp.sum(count, axis=-1)
    cells = lambda x, kind=jnp.float32: unflatten(x, contexts, blank.astype(kind))
    rows = jnp.arange(blank.shape[1])[:, None]
    used, last = rows < total[:, None], rows == total[:, None] - 1
    column = jnp.arange(slots)
    leaf = jnp.stack([total - 1, jnp.broadcast_to(column, total.shape)], axis=-1)
    inside = jnp.arange(blank.shape[1]) < total[..., None]  # [B, K, S]
    turn = cells(jnp.broadcast_to(jnp.arange(turns)[:, None], row.shape), jnp.int32)
    tree = T.Tree(
        token=cells(record["token"], jnp.int32), used=used, parent=jnp.where(used & (rows > 0), column, T.NONE),
        source=jnp.full(blank.shape, T.SAMPLED, jnp.int8), entropy=cells(record["entropy"]),
        end=jnp.where(last, jnp.where(worlds.over, T.FINISHED, T.TRUNCATED)[:, None], T.RUNNING).astype(jnp.int8),
        logp_behavior=cells(record["logp_behavior"]), logp_policy=cells(record["logp_policy"]),
        leaf=jnp.where(total[..., None] > 0, leaf, T.NONE), leaf_path=jnp.where(inside, column[:, None], T.NONE),
        turns=episodes.turns(worlds, turn, total > 0, penalty),
    )  # fmt: skip
    nothing = jnp.zeros((batch,), jnp.int32)
    return tree, Stats(jnp.sum(total, axis=1), nothing, nothing, nothing, nothing + iterations), contexts


def unflatten(values: jax.Array, contexts: Contexts, like: jax.Array) -> jax.Array:
    """Numbers of actions' tokens, of B * K * T * A elements, in their cells: like `like` [B, S, K], as it is elsewhere."""
    batch, slots = contexts.row.shape[:2]
    row = jnp.where(contexts.row >= 0, contexts.row, like.shape[1]).reshape(batch, slots, -1)
    values = values.reshape(row.shape).astype(like.dtype)
    put = jax.vmap(jax.vmap(lambda line, row, values: line.at[row].set(values, mode="drop")))
    return put(like.swapaxes(1, 2), row, values).swapaxes(1, 2)


def flatten(tree: T.Tree, contexts: Contexts) -> tuple[T.Tree, Prompts, Callable]:
    """Every turn as a tree of its own: what the learner packs.

    Returns:
      (B * K * T trees of A rows and one slot, without a leaf where there was no turn; their prompts; a function that takes
      numbers of cells [B, S, K] to those of the turns' cells).
    """
    row = contexts.row.reshape(*contexts.row.shape[:2], -1)  # [B, K, T * A]
    size = contexts.row.shape[-1]

    def move(x):
        found = jnp.take_along_axis(x.swapaxes(1, 2), jnp.maximum(row, 0), axis=2)
        return jnp.where(row >= 0, found, 0).reshape(-1, size, 1)

    def line(token, logp, source, used):
        count = jnp.sum(used)
        last = jnp.where(count > 0, jnp.stack([count - 1, jnp.zeros_like(count)]), T.NONE)
        return T.from_parents(jnp.zeros_like(token), used, last[None], token=token, logp_policy=logp, source=source)

    used = (contexts.row >= 0).reshape(-1, size, 1)
    lines = jax.vmap(line)(move(tree.token), move(tree.logp_policy), move(tree.source), used)
    count = contexts.length.size
    prompts = Prompts(
        token=contexts.token.reshape(count, -1), length=contexts.length.reshape(count), index=jnp.arange(count), data={}
    )  # fmt: skip
    return lines, prompts, move
