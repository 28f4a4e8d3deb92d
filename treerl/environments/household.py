"""Household chores in a house of four rooms, the ALFWorld shape of problem: "put clean mug in cabinet".

Every room has three places, of twelve; fridge, cabinet, drawer, chest and box have to be opened. Six things lie about.
The agent sees the places of the room it enters, and what lies on or in the place it stands at. What it can do:

    go ROOM              always: it then stands at no place
    go PLACE             in the same room
    open PLACE           where it stands, if it is closed
    close PLACE          where it stands, if it is open and can be closed
    take THING           from the place where it stands, if that is not closed and the hand is empty
    put THING            that is in its hand, where it stands, if that is not closed
    clean | heat | cool THING     that is in its hand, at the sink, the stove, the fridge

Anything else changes nothing and is answered by "nothing". An episode is solved, with reward 1, once the wanted thing
was put at the wanted place in the wanted condition. Tasks of the split novel ask for pairs of thing and place that no
other task asks for; those of heldout are new houses.
"""

import jax
import jax.numpy as jnp
import numpy as np

from treerl.environments import Environment, draw_tasks, ended, say, timed
from treerl.errors import UserError
from treerl.tokenizers import WordTokenizer

ROOMS = ("kitchen", "bathroom", "bedroom", "study")
PLACES = ("sink", "stove", "fridge", "cabinet", "drawer", "chest", "box", "counter", "table", "shelf", "desk", "bed")
THINGS = (
    "mug", "plate", "bowl", "cup", "knife", "fork", "spoon", "pan", "apple", "egg", "bread", "potato", "book", "pen",
    "cloth", "soap",
)  # fmt: skip
CONDITIONS = ("plain", "clean", "hot", "cold")
VERBS = ("go", "open", "close", "take", "put", "clean", "heat", "cool")
OTHERS = (":", ">", "in", "closed", "empty", "holding", "nothing", "hot", "cold")
TOKENIZER = WordTokenizer(VERBS + ROOMS + PLACES + THINGS + OTHERS)
GO, OPEN, CLOSE, TAKE, PUT, CLEAN, HEAT, COOL = TOKENIZER.encode(" ".join(VERBS))
ROOM, PLACE, THING = (TOKENIZER.encode(names[0])[0] for names in (ROOMS, PLACES, THINGS))
COLON, TURN, IN, CLOSED, EMPTY, HOLDING, NOTHING, HOT, COLD = TOKENIZER.encode(" ".join(OTHERS))
END = TOKENIZER.eos_id
SINK, STOVE, FRIDGE = range(3)  # in the order of CONDITIONS from "clean"
CLOSABLE = range(2, 7)
COUNT = 6  # things in a house
HAND = len(PLACES)  # as the place of a thing, and NOWHERE as that of the agent
NOWHERE = len(PLACES)
O, A, HORIZON = 9, 3, 30
LIMIT = 2**15  # tasks that ids can tell apart


def is_novel(thing, place):
    """Whether a goal belongs to the split novel: a fifth of all pairs, each thing and place in many others."""
    return (thing + 2 * place) % 5 == 0


def draw(rng: np.random.Generator, split: str) -> dict:
    """A task."""
    rooms = rng.permutation(np.repeat(np.arange(len(ROOMS)), len(PLACES) // len(ROOMS)))
    things, at = rng.choice(len(THINGS), COUNT, replace=False), rng.integers(len(PLACES), size=COUNT)
    while True:
        place, condition = rng.integers(len(PLACES)), rng.integers(len(CONDITIONS))
        if is_novel(things[0], place) == (split == "novel") and (condition or place != at[0]):
            break
    order = rng.permutation(COUNT)
    return dict(
        rooms=rooms, things=things[order], at=at[order], target=int(np.argmax(order == 0)), place=place,
        condition=condition, room=rng.integers(len(ROOMS)),
    )  # fmt: skip


def goal(task) -> jax.Array:
    """What is asked: "put clean mug in cabinet >", int32 [6]."""
    words = jnp.array([0, CLEAN, HOT, COLD])[task["condition"]]
    tokens = [PUT, words, THING + task["things"][task["target"]], IN, PLACE + task["place"], TURN]
    return say(tokens, [True, task["condition"] > 0, True, True, True, True], 6)


def _room(state, room):
    """The observation on entering a room: its places."""
    here = state["task"]["rooms"] == room
    tokens = [ROOM + room, COLON, *(PLACE + p for p in range(len(PLACES))), TURN]
    return say(tokens, [True, True, *here, True], O)


def _place(state, place, at):
    """The observation of a place: what is there, with `at` [COUNT] the place of each thing."""
    things = state["task"]["things"]
    shut, there = ~state["open"][place], at == place
    empty = ~shut & ~jnp.any(there)
    tokens = [PLACE + place, CLOSED, EMPTY, *(THING + things[i] for i in range(COUNT)), TURN]
    return say(tokens, [True, shut, empty, *(there & ~shut), True], O)


def reset(key, task):
    """The agent stands in a room; all that can be closed is. Nothing is drawn from the key."""
    del key
    state = dict(
        task=task, at=task["at"].astype(jnp.int32), condition=jnp.zeros(COUNT, jnp.int32), room=task["room"].astype(jnp.int32),
        place=jnp.int32(NOWHERE), open=~jnp.isin(jnp.arange(len(PLACES)), jnp.array(CLOSABLE)), invalid=jnp.bool_(False),
    )  # fmt: skip
    return state, _room(state, state["room"])


def step(state, action):
    """See the module and `Environment`."""
    task, at, condition, place = state["task"], state["at"], state["condition"], state["place"]
    verb, noun = action[0], action[1]
    room, to, thing = noun - ROOM, noun - PLACE, noun - THING
    is_room, is_place = (room >= 0) & (room < len(ROOMS)), (to >= 0) & (to < len(PLACES))
    mine = (task["things"] == thing) & (thing >= 0) & (thing < len(THINGS))  # [COUNT]
    here = jnp.where(jnp.any(mine), jnp.sum(jnp.where(mine, at, 0)), -1)  # where the thing is
    stands = place < NOWHERE
    accessible = stands & state["open"][jnp.minimum(place, NOWHERE - 1)]
    closable = (to >= CLOSABLE.start) & (to < CLOSABLE.stop) & (to == place)
    held, full = here == HAND, jnp.any(at == HAND)
    is_open = state["open"][jnp.clip(to, 0, len(PLACES) - 1)]

    whole = ended(action, 2)
    enter = whole & (verb == GO) & is_room
    walk = whole & (verb == GO) & is_place & (task["rooms"][jnp.clip(to, 0, len(PLACES) - 1)] == state["room"])
    opens = whole & (verb == OPEN) & closable & ~is_open
    closes = whole & (verb == CLOSE) & closable & is_open
    takes = whole & (verb == TAKE) & accessible & (here == place) & ~full
    puts = whole & (verb == PUT) & accessible & held
    changes = [whole & (verb == v) & held & (place == p) for v, p in ((CLEAN, SINK), (HEAT, STOVE), (COOL, FRIDGE))]
    change = changes[0] | changes[1] | changes[2]
    to_condition = changes[0] * 1 + changes[1] * 2 + changes[2] * 3

    at = jnp.where(mine & takes, HAND, jnp.where(mine & puts, place, at))
    condition = jnp.where(mine & change, to_condition, condition)
    new_room = jnp.where(enter, room, state["room"])
    new_place = jnp.where(enter, NOWHERE, jnp.where(walk, to, place))
    turned = jnp.arange(len(PLACES)) == place
    new = dict(
        state, at=at, condition=condition, room=new_room, place=new_place,
        open=jnp.where(turned & opens, True, jnp.where(turned & closes, False, state["open"])),
        invalid=~(enter | walk | opens | closes | takes | puts | change),
    )  # fmt: skip

    looks = walk | opens | closes | puts
    seen = _place(new, jnp.minimum(new_place, NOWHERE - 1), at)
    words = jnp.array([NOTHING, CLEAN, HOT, COLD])[jnp.where(change, to_condition, 0)]
    short = say([HOLDING, words, noun, TURN], [takes, ~takes, takes | change, True], O)
    observation = jnp.where(enter, _room(new, new_room), jnp.where(looks, seen, short))
    target = jnp.arange(COUNT) == task["target"]
    right = (at == task["place"]) & ((condition == task["condition"]) | (task["condition"] == 0))
    solved = puts & jnp.any(target & right)
    return new, observation, solved.astype(jnp.float32), solved


def state_id(state) -> jax.Array:
    """All that an action can change, and the task's number: uint32 [2]."""
    bits = lambda values, width: jnp.sum(values.astype(jnp.uint32) << (width * jnp.arange(values.size, dtype=jnp.uint32)), dtype=jnp.uint32)
    doors = state["open"][CLOSABLE.start : CLOSABLE.stop]
    low = bits(state["at"], 4) | bits(doors, 1) << 24 | state["room"].astype(jnp.uint32) << 29  # 24 + 5 + 2 bits
    high = bits(state["condition"], 2) | state["place"].astype(jnp.uint32) << 12  # 12 + 4 bits
    high |= state["over"].astype(jnp.uint32) << 16 | state["task"]["number"].astype(jnp.uint32) << 17
    return jnp.stack([low, high])


def best(state) -> jax.Array:
    """What somebody who knows the house does next: (verb, noun), int32 [2]."""
    task, at, place, opened = state["task"], state["at"], state["place"], state["open"]
    rooms, target = task["rooms"], task["target"]
    where, wanted = at[target], task["condition"]
    ready = (wanted == 0) | (state["condition"][target] == wanted)
    own = jnp.argmax(at == HAND)  # what is in the hand, if anything
    burdened = jnp.any(at == HAND) & (where != HAND)
    nearby = jnp.argmax(rooms == state["room"])
    spot = jnp.where(place < NOWHERE, place, nearby)  # to lay down what is in the way
    goal = jnp.where(burdened, spot, jnp.where(where != HAND, where, jnp.where(ready, task["place"], wanted - 1)))
    goal = jnp.clip(goal, 0, len(PLACES) - 1)
    treats = ~burdened & (where == HAND) & ~ready
    verb = jnp.where(treats, jnp.array([CLEAN, CLEAN, HEAT, COOL])[wanted], jnp.where(burdened | (where == HAND), PUT, TAKE))
    deed = jnp.stack([verb, THING + task["things"][jnp.where(burdened, own, target)]])
    deed = jnp.where(treats | opened[goal], deed, jnp.stack([OPEN, PLACE + goal]))
    go = jnp.where(rooms[goal] == state["room"], PLACE + goal, ROOM + rooms[goal])
    return jnp.where(place == goal, deed, jnp.stack([GO, go])).astype(jnp.int32)


def wander(key, state) -> jax.Array:
    """Goes somewhere, or opens or takes what is at hand: (verb, noun), int32 [2], always admissible."""
    kinds, pick = jax.random.split(key)
    task, place, rooms = state["task"], state["place"], state["task"]["rooms"]
    spot = jnp.minimum(place, NOWHERE - 1)
    near, there = rooms == state["room"], (state["at"] == place) & (place < NOWHERE)
    choose = lambda mask: jax.random.categorical(pick, jnp.where(mask, 0.0, -jnp.inf))
    enter = jnp.stack([GO, ROOM + jax.random.randint(pick, (), 0, len(ROOMS))])
    walk = jnp.stack([GO, PLACE + choose(near)])
    take = jnp.stack([TAKE, THING + task["things"][choose(there | ~jnp.any(there))]])
    opens = jnp.stack([OPEN, PLACE + spot])
    shut = (place < NOWHERE) & ~state["open"][spot]
    may_take = jnp.any(there) & ~shut & ~jnp.any(state["at"] == HAND)
    kind = jax.random.randint(kinds, (), 0, 4)
    local = jnp.where(shut, opens, jnp.where(may_take, take, walk))
    return jnp.where(kind == 0, enter, jnp.where(kind == 1, local, walk)).astype(jnp.int32)


def make(*, seed: int = 0, train_size: int = 2048, heldout_size: int = 512, horizon: int = HORIZON, mistakes: float = 0.4) -> Environment:
    """The environment with its tasks.

    Args:
      mistakes: chance of each of the scripted player's actions to be drawn from `wander` instead of `best`.
    """
    sizes = dict(train=train_size, heldout=heldout_size, novel=heldout_size)
    if sum(sizes.values()) > LIMIT:
        raise UserError(
            f"task.train_size + 2 task.heldout_size = {sum(sizes.values())} is more than the {LIMIT} tasks of household; lower them."
        )
    if not 0 <= mistakes <= 1:
        raise UserError(f"environment.options.mistakes={mistakes!r} cannot work; set it to a number from 0 to 1.")

    def player(key, state):
        errs, pick = jax.random.split(key)
        words = jnp.where(jax.random.bernoulli(errs, mistakes), wander(pick, state), best(state))
        return jnp.append(words, END)

    begin, go = timed(reset, step, horizon)
    return Environment(
        tokenizer=TOKENIZER, observation=O, action=A, horizon=horizon, tasks=draw_tasks(draw, seed, sizes), goal=goal,
        reset=begin, step=go, state_id=state_id, player=player,
    )  # fmt: skip
