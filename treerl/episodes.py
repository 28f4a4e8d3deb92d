"""Episodes in an environment, one a line of the sampler: whose word is next, what an action does, what is remembered."""

from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from treerl import tree as T
from treerl.compaction import take
from treerl.environments import Environment, length
from treerl.types import Prompts

ANCHORS = ("state", "observation")


@chex.dataclass(frozen=True)
class Worlds:
    """The episode of every line; N lines of each of B trees, T turns, O and A tokens of an observation and an action."""

    state: Any  # of the environment, pytree of [B, N, ...]
    said: jax.Array  # [B, N, A] int32, the action so far, padded
    heard: jax.Array  # [B, N, O] int32, the observation under way or read last
    read: jax.Array  # [B, N] int32, how many of its tokens the line has
    turn: jax.Array  # [B, N] int32, turns carried out
    over: jax.Array  # [B, N] bool
    seen: jax.Array  # [B, N, 2] uint32, id of what the next action is taken in
    reward: jax.Array  # [B, N, T] float32
    state_id: jax.Array  # [B, N, T, 2] uint32
    invalid: jax.Array  # [B, N, T] bool


def _identify(environment: Environment, anchor: str, state, observation) -> jax.Array:
    """The id of what an agent acts in: the environment's state, or the observation that it reads."""
    return environment.state_id(state) if anchor == "state" else T.text_id(observation)


def begin(environment: Environment, key: jax.Array, prompts: Prompts, anchor: Literal["state", "observation"]) -> tuple[Worlds, Prompts]:
    """An episode for every tree, at its start, and the prompts with the first observation behind the goal.

    Args:
      key: typed; each tree folds its example's index. prompts: goals; their data is the tasks.
      anchor: what turns are compared by: the state of the environment, or the observation alone.

    Returns:
      (Worlds of one line, prompts of P + O tokens).
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts.index)
    state, observation = jax.vmap(environment.reset)(keys, prompts.data)
    seen = jax.vmap(lambda *x: _identify(environment, anchor, *x))(state, observation)
    batch, A, turns = prompts.token.shape[0], environment.action, environment.horizon
    zero = jnp.zeros((batch, 1), jnp.int32)
    one = lambda x: x[:, None]
    worlds = Worlds(
        state=jax.tree.map(one, state), said=jnp.zeros((batch, 1, A), jnp.int32), heard=one(observation), read=one(length(observation)),
        turn=zero, over=zero > 0, seen=one(seen), reward=jnp.zeros((batch, 1, turns)),
        state_id=jnp.zeros((batch, 1, turns, 2), jnp.uint32), invalid=jnp.zeros((batch, 1, turns), bool),
    )  # fmt: skip
    return worlds, extend(prompts, observation)


def extend(prompts: Prompts, observation: jax.Array) -> Prompts:
    """Prompts with an observation [B, O] behind them: P + O tokens."""
    width = prompts.token.shape[1]
    place = jnp.arange(width + observation.shape[1]) - prompts.length[:, None]
    said = jnp.pad(prompts.token, ((0, 0), (0, observation.shape[1])))
    more = jnp.take_along_axis(observation, jnp.clip(place, 0, observation.shape[1] - 1), axis=1)
    token = jnp.where(place < 0, said, jnp.where(place < observation.shape[1], more, 0))
    return prompts.replace(token=token, length=prompts.length + length(observation))


def listens(worlds: Worlds) -> jax.Array:
    """Lines whose next token is the environment's: bool [B, N]."""
    return worlds.read < length(worlds.heard)


def fresh(worlds: Worlds) -> jax.Array:
    """Lines whose next token begins an action: bool [B, N]."""
    return ~listens(worlds) & (length(worlds.said) == 0)


def next_word(worlds: Worlds) -> jax.Array:
    """The token that a listening line reads next: int32 [B, N]."""
    place = jnp.minimum(worlds.read, worlds.heard.shape[-1] - 1)
    return jnp.take_along_axis(worlds.heard, place[..., None], axis=-1)[..., 0]


def pick(mask: jax.Array, new, old):
    """Chooses between pytrees of [B, N, ...] by a mask [B, N]."""
    return jax.tree.map(lambda new, old: jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - 2)), new, old), new, old)


def born(worlds: Worlds, start: Worlds, line: jax.Array, row: jax.Array) -> Worlds:
    """Worlds with those of newborn lines in their slots: copies of the line forked from, or the start of the tree.

    Args:
      start: of one line, see `begin`. line, row: [B, N], as in `types.Births`; a row of -1 is the prompt.
    """
    copied = jax.tree.map(lambda x: take(x, line), worlds)
    return pick(line >= 0, pick(row < 0, start, copied), worlds)


def advance(environment: Environment, worlds: Worlds, token: jax.Array, writes: jax.Array, end: jax.Array, anchor: str) -> Worlds:
    """What the next token of each line does.

    A listening line has read a token more. A speaking one has said it; where that ends the action, or fills it, the
    environment answers, and the line listens to the answer unless the episode is over. Lines that do not write stay.

    Args:
      token: [B, N] int32. writes: [B, N] bool. end: [E] int32, tokens that end an action.
    """
    heard, speaks = listens(worlds), writes & ~listens(worlds)
    place, token = length(worlds.said), jnp.where(token == 0, environment.tokenizer.vocab_size, token)  # a pad is no word
    said = jnp.where((jnp.arange(worlds.said.shape[-1]) == place[..., None]) & speaks[..., None], token[..., None], worlds.said)
    acts = speaks & (jnp.any(token[..., None] == end, axis=-1) | (place == worlds.said.shape[-1] - 1))
    action = jnp.where(acts[..., None], said, 0)

    def carry_out():
        state, observation, reward, done = jax.vmap(jax.vmap(environment.step))(worlds.state, action)
        seen = jax.vmap(jax.vmap(lambda *x: _identify(environment, anchor, *x)))(state, observation)
        return state, observation, reward, done, seen, jax.vmap(jax.vmap(environment.invalid))(state)

    if environment.on_host:  # a call costs more than the loop's iteration
        shapes = jax.eval_shape(carry_out)
        nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state, observation, reward, done, seen, invalid = jax.lax.cond(jnp.any(acts), carry_out, nothing)
    else:
        state, observation, reward, done, seen, invalid = carry_out()
    now = (jnp.arange(worlds.reward.shape[-1]) == worlds.turn[..., None]) & acts[..., None]  # [B, N, T]
    return Worlds(
        state=pick(acts, state, worlds.state),
        said=jnp.where(acts[..., None], 0, said),
        heard=jnp.where(acts[..., None], observation, worlds.heard),
        read=jnp.where(acts, 0, worlds.read + (writes & heard)),
        turn=worlds.turn + acts,
        over=worlds.over | (acts & (done | (worlds.turn + 1 >= environment.horizon))),
        seen=jnp.where(acts[..., None], seen, worlds.seen),
        reward=jnp.where(now, reward[..., None], worlds.reward),
        state_id=jnp.where(now[..., None], worlds.seen[..., None, :], worlds.state_id),
        invalid=jnp.where(now, invalid[..., None], worlds.invalid),
    )


def turns(worlds: Worlds, cells: jax.Array, leaf: jax.Array, penalty: jax.Array) -> T.Turns:
    """The turns of trees whose leaves are lines.

    Args:
      cells: [B, S, N] int32, the turn of each cell. leaf: [B, N] bool, lines that are leaves. penalty: [] float32, what
        an invalid action costs.
    """
    valid = (jnp.arange(worlds.reward.shape[-1]) < worlds.turn[..., None]) & leaf[..., None]
    invalid = worlds.invalid & valid
    return T.Turns(
        turn=cells, reward=jnp.where(valid, worlds.reward, 0.0), penalty=jnp.where(invalid, penalty, 0.0),
        state_id=jnp.where(valid[..., None], worlds.state_id, 0), valid=valid, invalid=invalid,
    )  # fmt: skip
