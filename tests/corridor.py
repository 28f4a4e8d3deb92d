"""A corridor: an environment whose best play is known, small enough for tests.

Of N places the agent starts at the one that the task says, or one up as the key says; "left ." and "right ." move it, and at
the right end it has won.
"""

import jax
import jax.numpy as jnp
import numpy as np

from treerl.environments import Environment, ended, say, timed
from treerl.tokenizers import WordTokenizer

TOKENIZER = WordTokenizer(("left", "right", "at", "wall", ">", "win", *map(str, range(8))))
LEFT, RIGHT, AT, WALL, TURN, WIN, ZERO = TOKENIZER.encode("left right at wall > win 0")
O, A = 4, 3


def make(places=4, horizon=6, shaky=False) -> Environment:
    """With `shaky` the first place is drawn; an observation says "at wall 0 >" at the left end, else "at 2 >"."""
    tasks = {split: dict(start=np.arange(n, dtype=np.int32) % (places - 1), number=np.arange(n, dtype=np.int32) + base)
             for split, n, base in (("train", 12, 0), ("heldout", 6, 100), ("novel", 6, 200))}  # fmt: skip

    def look(place):
        return say([AT, WALL, ZERO + place, TURN], [True, place == 0, True, True], O)

    def reset(key, task):
        place = jnp.minimum(task["start"] + (jax.random.bernoulli(key) if shaky else 0), places - 2).astype(jnp.int32)
        return dict(place=place, invalid=jnp.bool_(False), task=task), look(place)

    def step(state, action):
        good = ended(action, 1) & ((action[0] == LEFT) | (action[0] == RIGHT))
        move = jnp.where(good, jnp.where(action[0] == RIGHT, 1, -1), 0)
        place = jnp.clip(state["place"] + move, 0, places - 1)
        won = place == places - 1
        reply = jnp.where(won, say([WIN, TURN], [True, True], O), look(place))
        return dict(state, place=place, invalid=~good), reply, won.astype(jnp.float32), won

    begin, go = timed(reset, step, horizon)
    return Environment(
        tokenizer=TOKENIZER, observation=O, action=A, horizon=horizon, tasks=tasks,
        goal=lambda task: jnp.array([WIN, TURN], jnp.int32), reset=begin, step=go,
        state_id=lambda s: jnp.stack([s["place"], s["task"]["number"]]).astype(jnp.uint32),
        player=lambda key, s: jnp.stack([jnp.where(jax.random.bernoulli(key, 0.6), RIGHT, LEFT), 1, 0]).astype(jnp.int32),
    )  # fmt: skip
