"""Environments against their twins in plain Python, their ids, their tasks and their bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.household_oracle import Household
from tests.shop_oracle import Shop
from treerl import environments
from treerl.environments import household, shop
from treerl.errors import UserError

IN_JAX = ("household", "shop")
SIZES = dict(train_size=200, heldout_size=100, seed=3)


MANY = dict(household=dict(train_size=20_000, heldout_size=5_000), shop=dict(train_size=3_000, heldout_size=700))


@functools.cache
def made(name, many=False):
    return environments.make(name, **SIZES | (MANY[name] if many else {}))


def twin(name, task, horizon):
    if name == "household":
        return Household(task, horizon)
    return Shop(task, horizon, shop.catalogue(np.random.default_rng([SIZES["seed"], 100 + int(task["shop"])])))


def tasks_of(env, count, seed=0):
    """`count` tasks of all splits, drawn with replacement: dict of [count, ...]."""
    together = {k: np.concatenate([s[k] for s in env.tasks.values()]) for k in env.tasks["train"]}
    pick = np.random.default_rng(seed).integers(len(together["number"]), size=count)
    return {k: v[pick] for k, v in together.items()}


@functools.cache
def episodes(name, count, horizon=None, seed=0, many=False):
    """Episodes of players that mix the script with noise: tasks, first observations, and by turn actions and what followed."""
    env = made(name, many)
    tasks = tasks_of(env, count, seed)

    def act(key, state):
        """The script's action, or admissible words in disorder, or any tokens at all."""
        kind, pick, how, at = jax.random.split(key, 4)
        words = env.player(pick, state)
        noise = jax.random.randint(how, (env.action,), 0, env.tokenizer.vocab_size)
        spoilt = words.at[jax.random.randint(at, (), 0, env.action)].set(noise[0])
        shaped = jnp.append(noise[:2], 1) if env.action == 3 else jnp.array([noise[0], noise[1], 1, 0])
        choice = jax.random.choice(kind, 4, p=jnp.array([0.5, 0.2, 0.15, 0.15]))
        return jnp.stack([words, spoilt, shaped, noise])[choice].astype(jnp.int32)

    def episode(key, task):
        state, first = env.reset(key, task)

        def turn(state, key):
            action = act(key, state)
            before = env.state_id(state)
            state, *out = env.step(state, action)
            return state, (action, state, *out, before, env.state_id(state), env.invalid(state))

        return first, jax.lax.scan(turn, state, jax.random.split(key, horizon or env.horizon))[1]

    first, turns = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(seed), count), tasks)
    return tasks, np.asarray(first), jax.device_get(turns)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_JAX)
def test_every_step_is_that_of_the_twin(name):
    """10,000 sequences of sensible, spoilt and senseless actions, past the end too: state, observation, reward, done."""
    count, env = 10_000, made(name)
    tasks, first, (action, state, observation, reward, done, _, _, invalid) = episodes(name, count, env.horizon + 1)
    rewards, refused = 0, 0
    for i in range(count):
        task = {k: v[i] for k, v in tasks.items()}
        other = twin(name, task, env.horizon)
        if i % 50 == 0:
            assert env.tokenizer.decode(np.asarray(env.goal(task))) == other.ask()
        for t in range(action.shape[1]):
            tokens = action[i, t].tolist()
            text = env.tokenizer.decode(tokens) if 0 not in tokens[: max(np.flatnonzero(tokens), default=-1) + 1] else "no words"
            said, earned, over = other.step(text)
            assert env.tokenizer.decode(observation[i, t]) == said, (i, t, text)
            assert reward[i, t] == np.float32(earned) and done[i, t] == over and invalid[i, t] == other.invalid
            for field, value in other.state().items():
                assert np.array_equal(state[field][i, t], value), (field, text)
            rewards, refused = rewards + (earned == 1), refused + other.invalid
    assert rewards > 200 and refused > 10_000  # both ends of the range were seen


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_JAX)
def test_ids_of_a_million_states_are_injective(name):
    env = made(name, True)
    count = -(-1_000_000 // env.horizon)
    _, _, (_, state, _, _, _, _, ids, _) = episodes(name, count, seed=1, many=True)
    ids = ids.reshape(-1, 2).astype(np.uint64)
    ids = ids[:, 0] << np.uint64(32) | ids[:, 1]
    names = (
        ("at", "condition", "room", "place", "open", "over")
        if name == "household"
        else ("view", "page", "item", "query", "color", "size", "over")
    )
    parts = [state[k].reshape(ids.size, -1) for k in names] + [state["task"]["number"].reshape(-1, 1)]
    whole = np.concatenate([np.asarray(x, np.int16) for x in parts], axis=1)
    whole = np.ascontiguousarray(whole).view([("", np.int16)] * whole.shape[1]).ravel()
    states = len(np.unique(whole))
    assert states > 150_000 and len(np.unique(ids)) == states == len(np.unique(np.rec.fromarrays([ids, whole])))


@pytest.mark.parametrize("name", IN_JAX)
def test_an_episode_ends_by_itself(name):
    """At the horizon at the latest; from then on nothing changes, whatever is said."""
    env = environments.make(name, horizon=3, train_size=4, heldout_size=1)
    task = {k: v[0] for k, v in env.tasks["train"].items()}
    state, _ = env.reset(jax.random.key(0), task)
    done, step = [], jax.jit(env.step)
    for _ in range(5):
        state, observation, reward, over = step(state, jnp.zeros(env.action, jnp.int32))
        done.append(bool(over))
        assert env.invalid(state)
    assert done == [False, False, True, True, True] and state["turn"] == 3
    assert reward == 0 and not observation.any()


@pytest.mark.parametrize("name", IN_JAX)
def test_an_episode_does_not_depend_on_its_batch(name):
    tasks, _, turns = episodes(name, 64)
    env = made(name)
    action, observation, reward = turns[0], turns[2], turns[3]

    def play(task, actions):
        state, _ = env.reset(jax.random.key(9), task)
        return jax.lax.scan(lambda s, a: (lambda s, *out: (s, out))(*env.step(s, a)), state, actions)[1]

    for i in (0, 17, 63):
        own = jax.jit(play)({k: v[i] for k, v in tasks.items()}, action[i])
        np.testing.assert_array_equal(own[0], observation[i])
        np.testing.assert_array_equal(own[1], reward[i])


@pytest.mark.parametrize("name", IN_JAX)
def test_the_player_is_mediocre_and_one_without_mistakes_is_not(name):
    def success(mistakes):
        env = environments.make(name, **SIZES, options=dict(mistakes=mistakes))

        def episode(key, task):
            state, _ = env.reset(key, task)
            go = lambda state, key: (lambda s, _, r, __: (s, (r, env.invalid(s))))(*env.step(state, env.player(key, state)))
            return jax.lax.scan(go, state, jax.random.split(key, env.horizon))[1]

        reward, invalid = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 200), env.tasks["train"])
        return float(np.mean(reward.sum(1) > 0.99)), float(np.mean(invalid))

    assert success(0.0) == (1.0, 0.0)
    most, few = success(0.75)
    assert 0.05 < most < 0.8 and few < 0.2


@pytest.mark.parametrize("name", IN_JAX)
def test_splits_share_nothing(name):
    env = made(name)
    rows = {
        s: {tuple(np.concatenate([np.ravel(v[i]) for k, v in t.items() if k != "number"]).tolist()) for i in range(environments.count(t))}
        for s, t in env.tasks.items()
    }
    assert [len(rows[s]) for s in environments.SPLITS] == [200, 100, 100]
    assert not rows["train"] & rows["heldout"] and not (rows["train"] | rows["heldout"]) & rows["novel"]
    numbers = np.concatenate([t["number"] for t in env.tasks.values()])
    assert len(set(numbers.tolist())) == 400


def test_novel_goals_of_the_household_are_asked_for_nowhere_else():
    pairs = lambda t: {(int(t["things"][i][t["target"][i]]), int(t["place"][i])) for i in range(environments.count(t))}
    found = {s: pairs(t) for s, t in made("household").tasks.items()}
    assert not found["novel"] & (found["train"] | found["heldout"]) and found["heldout"] & found["train"]
    assert {t for t, _ in found["novel"]} <= {t for t, _ in found["train"]}  # of things that are known


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="garden"), f"task.name='garden' is unknown; known are {', '.join(sorted(environments.NAMES))}."),
        (dict(name="household", horizon=-1), "environment.horizon=-1"),
        (dict(name="household", train_size=0), "task.train_size=0"),
        (dict(name="household", train_size=40_000), "lower them"),
        (dict(name="shop", train_size=40_000), "lower them"),
        (dict(name="shop", train_size=9_000), "different tasks of the split train"),
        (dict(name="shop", options=dict(mistakes=2.0)), "environment.options.mistakes=2.0"),
        (dict(name="household", options=dict(mistakes=-1.0)), "environment.options.mistakes=-1.0"),
        (dict(name="shop", options=dict(colour="red")), "environment.options has no 'colour' for task.name=shop"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        environments.make(**arguments)


def test_an_unknown_split_gets_a_sentence():
    with pytest.raises(UserError, match="the split of tasks='test' is unknown; known are heldout, novel, train"):
        environments.split(made("shop"), "test")


def test_a_player_never_needs_more_than_the_words_it_has():
    """Every word that either environment says is in its vocabulary; the tokenizer reads what it wrote."""
    for module in (household, shop):
        words = module.TOKENIZER.words
        assert module.TOKENIZER.decode(module.TOKENIZER.encode(" ".join(words))) == " ".join(words)
    with pytest.raises(ValueError, match="'sofa' is unknown"):
        household.TOKENIZER.encode("go sofa")
