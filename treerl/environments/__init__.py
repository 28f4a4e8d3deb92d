"""Environments of words: an agent reads an observation, writes an action, and so on until the episode is over.

An environment is an `Environment` of pure functions. Those of JAX run inside the sampler's loop, vmapped over all lines
of all trees; ordinary Python runs behind the same functions, see `host`. To add one, write a module with

    make(*, seed, train_size, heldout_size, horizon=30, my_option=1.0) -> Environment

and name it in NAMES; options have the type of their default. An episode is solved (pass@k) where its rewards sum to 1.
`household` is the example to start from.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treerl.errors import UserError
from treerl.options import bind, known
from treerl.tokenizers import WordTokenizer

NAMES = ("household", "shop", "textworld")
SPLITS = ("train", "heldout", "novel")
State = Any  # pytree of arrays of fixed shape


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """The functions of an environment, of ONE episode; callers vmap. Tokens are int32, padded at the end with 0.

    A task is a pytree of arrays that decides an episode but for the agent's actions and what a key draws.
    """

    tokenizer: WordTokenizer
    observation: int  # O: tokens of an observation, at most
    action: int  # A: tokens of an action with its end, at most
    horizon: int  # T: turns of an episode, at most
    tasks: dict[str, Any]  # split -> numpy pytree of [N, ...]: train; heldout, like it; novel, of another distribution
    goal: Callable  # (task) -> [G]: what the agent is asked for, in front of the first observation
    reset: Callable  # (key, task) -> (state, observation [O])
    step: Callable  # (state, action [A]) -> (state, observation [O], reward [] float32, done [] bool); any tokens are
    #                 legal input, ids beyond the vocabulary too. When an episode is over nothing changes: reward 0, done.
    state_id: Callable  # (state) -> [2] uint32, equal exactly where states are
    invalid: Callable = lambda state: state["invalid"]  # (state) -> [] bool: the action before was malformed, or not to be done
    player: Callable | None = None  # (key, state) -> action [A], of a script of middling quality: who to learn from at first
    on_host: bool = False  # `step` calls Python: the sampler then asks only when an action has ended, and an action of
    #                        padding alone is none: it changes nothing and takes no turn
    faults: Callable = dict  # () -> how many episodes ended because Python failed, by kind
    close: Callable = lambda: None  # () ends what runs beside: processes, which a later `step` starts again


def make(name: str, *, horizon: int = 0, seed: int = 0, train_size: int = 2048, heldout_size: int = 512, options: dict = {}) -> Environment:
    """Builds the environment `name`.

    Args:
      horizon: turns of an episode at most; 0 is the environment's own default.
      seed, train_size, heldout_size: of the tasks; heldout_size of the split heldout and of novel each.
      options: further keyword arguments of the environment's own `make`.

    Raises:
      UserError: a name or option is unknown, or a number cannot work.
    """
    known(name, NAMES, "task.name")
    if horizon < 0:
        raise UserError(f"environment.horizon={horizon} cannot work; set it to 1 or more turns, or 0 for the environment's own.")
    for field, value in dict(train_size=train_size, heldout_size=heldout_size).items():
        if value < 1:
            raise UserError(f"task.{field}={value} cannot work; set it to 1 or more.")
    build = importlib.import_module(f"treerl.environments.{name}").make
    given = dict(seed=seed, train_size=train_size, heldout_size=heldout_size) | (dict(horizon=horizon) if horizon else {})
    return bind(build, options, "environment.options", f"task.name={name}", (*given, "horizon"))(**given)


def split(environment: Environment, name: str):
    """The tasks of a split. Raises UserError for one that the environment lacks."""
    return known(name, environment.tasks, "the split of tasks")


def count(tasks) -> int:
    """How many tasks a split has."""
    return len(jax.tree.leaves(tasks)[0])


def length(tokens: jax.Array) -> jax.Array:
    """Number of tokens before the padding: [..., n] -> int32 [...]."""
    return jnp.sum(tokens != 0, axis=-1, dtype=jnp.int32)


def timed(reset: Callable, step: Callable, horizon: int) -> tuple[Callable, Callable]:
    """Ends episodes after `horizon` turns, and freezes them when they are over.

    Args:
      reset, step: as in `Environment`, of a state that is a dict, which gets the fields turn (int32 []) and over (bool []).
    """

    def start(key, task):
        state, observation = reset(key, task)
        return dict(state, turn=jnp.int32(0), over=jnp.bool_(False)), observation

    def go(state, action):
        new, observation, reward, done = step(state, action)
        over, turn = state["over"], state["turn"] + 1
        new = dict(new, turn=turn, over=done | (turn >= horizon))
        new = jax.tree.map(lambda old, new: jnp.where(over, old, new), state, new)
        return new, jnp.where(over, 0, observation), jnp.where(over, 0.0, reward), new["over"]

    return start, go


def say(tokens: list, keep: list, width: int) -> jax.Array:
    """The tokens that are kept, in their order, padded: n scalars and n booleans -> int32 [width]."""
    tokens, keep = jnp.stack([jnp.asarray(x, jnp.int32) for x in tokens]), jnp.stack([jnp.asarray(x, bool) for x in keep])
    place = jnp.where(keep, jnp.cumsum(keep) - 1, width)
    return jnp.sum(jnp.where(place[:, None] == jnp.arange(width), tokens[:, None], 0), axis=0, dtype=jnp.int32)


def ended(action: jax.Array, words: int) -> jax.Array:
    """Whether an action [A] is so many words, its end, and nothing else: bool []."""
    return (action[words] == WordTokenizer.eos_id) & (length(action) == words + 1)


def demonstration(environment: Environment) -> Callable:
    """One episode of the scripted player: (key, task) -> (token [T * (A + O)] int32, own, the agent's, bool, reward []).

    The first observation comes first; what belongs to no turn is padding.
    """

    def play(key, task):
        keys = jax.random.split(key, environment.horizon + 1)
        state, first = environment.reset(keys[0], task)

        def turn(carry, key):
            state, over = carry
            action = jnp.where(over, 0, environment.player(key, state))
            state, observation, reward, done = environment.step(state, action)
            heard = jnp.where(over | done, 0, observation)
            return (state, over | done), (jnp.concatenate([action, heard]), jnp.where(over, 0.0, reward))

        _, (token, reward) = jax.lax.scan(turn, (state, jnp.bool_(False)), keys[1:])
        own = jnp.broadcast_to(jnp.arange(token.shape[1]) < environment.action, token.shape)
        token = jnp.concatenate([first, token.reshape(-1)])
        own = jnp.concatenate([jnp.zeros(first.shape, bool), own.reshape(-1)])
        order = jnp.argsort(token == 0, stable=True)
        return token[order], own[order] & (token[order] != 0), jnp.sum(reward)

    return play


def context_width(environment: Environment, goal: int, window: int) -> int:
    """Tokens at most of what an agent with a short memory reads: a goal of so many, `window` turns, an observation."""
    return goal + window * (environment.observation + environment.action) + environment.observation


def lesson(goal: list[int], token, own, turn: int, window: int) -> tuple[list[int], list[int]]:
    """(context, action) of a turn of a demonstration, on the host.

    Args:
      token, own: [n] numpy, see `tasks.Task.demonstrate`.
    """
    heard, done = [[]], []
    for word, mine in zip(token.tolist(), own.tolist()):
        if mine and len(done) < len(heard):
            done.append([])
        elif not mine and len(heard) <= len(done):
            heard.append([])
        (done if mine else heard)[-1].append(word)
    first = max(turn - window, 0)
    pieces = [piece for pair in zip(heard[first:turn], done[first:turn]) for piece in pair]
    return [word for piece in [goal, *pieces, heard[turn]] for word in piece], done[turn]


def draw_tasks(draw: Callable[[np.random.Generator, str], dict], seed: int, sizes: dict[str, int]) -> dict[str, dict]:
    """Draws the tasks of every split, no two alike: split -> dict of numpy arrays [N, ...].

    Each has a field `number`, which no other has. Raises UserError where there are too few different ones.
    """
    seen, found, number = set(), {}, 0
    for i, (name, size) in enumerate(sizes.items()):
        rng, tasks, tries = np.random.default_rng([seed, i]), [], 0
        while len(tasks) < size:
            task, tries = draw(rng, name), tries + 1
            key = repr(sorted((k, np.asarray(v).tolist()) for k, v in task.items()))
            if key not in seen:
                seen.add(key)
                tasks.append(dict(task, number=np.int32(number)))
                number += 1
            elif tries > 20 * size + 1000:
                raise UserError(f"there are only {len(tasks)} different tasks of the split {name}; lower task.train_size or heldout_size.")
        found[name] = {k: np.stack([np.asarray(task[k], np.int32) for task in tasks]) for k in tasks[0]}
    return found
