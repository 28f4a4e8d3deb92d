"""Episodes in the sampler, against a replay in plain Python of what each leaf says."""

import functools

import corridor
import hgpo_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from sampler_test import chaos, chaos_prune

from treerl import branching, episodes, pruning, rewards, sampler, survival, tree as T
from treerl.advantages import gigpo_tree, grpo, hgpo_tree
from treerl.advantages.hgpo import of_turns
from treerl.environments import length
from treerl.types import Policy, Prompts

B, K, S, P = 6, 4, 40, 2
ENV = corridor.make(shaky=True)
END, VOCAB = 1, corridor.TOKENIZER.vocab_size
PENALTY = 0.25


def table():
    """Logits of the next token given the last: right, left and the end are likely, the rest happens."""
    logits = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 0.3
    logits[:, [corridor.LEFT, corridor.RIGHT]] += 2
    logits[corridor.LEFT] = logits[corridor.RIGHT] = np.where(np.arange(VOCAB) == END, 4, logits[0])
    return logits


def policy():
    logits = jnp.asarray(table())
    return Policy(
        prefill=lambda token, length: jnp.take_along_axis(token, length[:, None] - 1, axis=1),
        decode=lambda last, token, row, path, write, rows: (logits[jnp.where(row < 0, last, token)], last),
        hidden=lambda last: jnp.broadcast_to(last.astype(jnp.float32)[..., None], (last.shape[0], K, 2)),
        gather=lambda last, path: last,
    )


def goals(index):
    """Prompts of the corridor's training tasks."""
    index = np.asarray(list(index))
    tasks = jax.tree.map(lambda x: jnp.asarray(x[index % 12]), ENV.tasks["train"])
    token = jnp.broadcast_to(ENV.goal(None), (len(index), P))
    return Prompts(token=token, length=jnp.full(len(index), P), index=jnp.asarray(index), data=tasks)


@functools.partial(jax.jit, static_argnames=("rule", "prune", "anchor", "at", "rows", "columns"))
def grow(key, prompts, *, rule="stochastic", prune="none", anchor="state", at="token", rows=S, columns=None):
    rules = {
        "stochastic": branching.stochastic, "chaos": lambda: chaos(key),
        "lookahead": lambda: branching.lookahead(tau_abs=0.05, tau_rel=0.9, share=1.0, fill_after=9, greedy=False),
    }  # fmt: skip
    judge = lambda hidden: (hidden[..., 0], jnp.full(hidden.shape[:2], 0.5))
    keep = functools.partial(survival.random, kappa=0.5, rho=0.5, least=1)
    prunes = {
        "none": pruning.none, "chaos": lambda: chaos_prune(key),
        "survival": lambda: pruning.survival(judge, keep, detection=4, columns=columns, rho=0.5, warm=False, refork=False),
    }  # fmt: skip
    worlds, prompts = episodes.begin(ENV, key, prompts, anchor)
    tree, stats, _ = sampler.sample(
        policy(), rules[rule](), prunes[prune](), prompts, key, slots=K, rows=rows, budget=rows + 12, segment=4, lengths=(rows,),
        temperature=jnp.float32(1), top_p=jnp.float32(1), eos=jnp.array([END]), review_at=12 if prune == "survival" else 0,
        columns=columns, environment=ENV, worlds=worlds, anchor=anchor, fork_at=at, penalty=PENALTY,
    )  # fmt: skip
    return tree, stats, prompts, jax.tree.map(lambda x: x[:, 0], worlds.state)


@functools.cache
def step():
    return jax.jit(ENV.step)


def replay(tokens, state, rows):
    """What a leaf's tokens mean: sources and turns of cells; rewards, anchors (place, observation), invalid of turns; how it ends."""
    source, turn, reward, anchor, invalid = [], [], [], [], []
    place, i, over = int(state["place"]), 0, False
    while i < len(tokens):
        assert not over, "an episode goes on behind its end"
        action = []
        while i < len(tokens) and len(action) < ENV.action and END not in action:
            action.append(int(tokens[i]) or VOCAB)  # a pad that was drawn is a word that nobody knows
            source.append(T.SAMPLED)
            turn.append(len(reward))
            i += 1
        if END not in action and len(action) < ENV.action:
            assert i == rows, "an action stops in the middle, before the last row"
            break
        state, said, earned, over = step()(state, jnp.array(action + [0] * (ENV.action - len(action)), jnp.int32))
        anchor.append(place)
        place = int(state["place"])
        reward.append(float(earned))
        invalid.append(bool(state["invalid"]))
        said = [int(t) for t in said if t]
        if over:
            continue
        for word in said[: len(tokens) - i]:
            assert int(tokens[i]) == word, "an observation is not what the environment said"
            source.append(T.ENVIRONMENT)
            turn.append(len(reward) - 1)
            i += 1
    return source, turn, reward, anchor, invalid, over


RUNS = [
    dict(), dict(anchor="observation"), dict(rule="lookahead"), dict(rule="lookahead", at="turn"), dict(rule="chaos", prune="chaos"),
    dict(rule="lookahead", prune="survival", columns=2), dict(rule="chaos", rows=13),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_leaf_is_what_a_replay_of_its_tokens_gives(run):
    """Whatever forks, stops, moves or runs out of rows on the way: forked states equal replayed ones."""
    rows, seen = run.get("rows", S), dict(won=0, lost=0, cut=0, invalid=0, shared=0)
    for seed in range(3):
        tree, _, prompts, starts = grow(jax.random.key(seed), goals(range(B)), **run)
        for b in range(B):
            one, state = jax.tree.map(lambda x: np.asarray(x[b]), (tree, starts))
            T.check(one)
            assert corridor.TOKENIZER.decode(prompts.token[b]).startswith("win > at ")
            assert str(int(state["place"])) == corridor.TOKENIZER.decode(prompts.token[b]).split()[-2]
            for leaf in np.flatnonzero(one.leaf[:, 0] >= 0):
                n = one.leaf[leaf, 0] + 1
                cells = np.arange(n), one.leaf_path[leaf, :n]
                source, turn, reward, anchor, invalid, over = replay(one.token[cells], state, rows)
                told = one.source[cells] == T.ENVIRONMENT
                assert told.tolist() == [s == T.ENVIRONMENT for s in source]
                assert one.turns.turn[cells].tolist() == turn
                count = len(reward)
                assert one.turns.valid[leaf].tolist() == [t < count for t in range(ENV.horizon)]
                np.testing.assert_array_equal(one.turns.reward[leaf, :count], reward)
                np.testing.assert_array_equal(one.turns.invalid[leaf, :count], invalid)
                np.testing.assert_array_equal(one.turns.penalty[leaf, :count], PENALTY * np.array(invalid))
                if run.get("anchor") == "observation":
                    ids = {tuple(x) for x in zip(anchor, *one.turns.state_id[leaf, :count].T.tolist())}
                    assert len(ids) == len(set(anchor))  # one id a place, as here the one shows the other
                else:
                    assert one.turns.state_id[leaf, :count, 0].tolist() == anchor
                assert one.end[cells][-1] == (T.FINISHED if over else T.TRUNCATED)
                seen["won"] += sum(reward) > 0
                seen["lost"] += over and not sum(reward)
                seen["cut"] += not over
                seen["invalid"] += any(invalid)
            seen["shared"] += int(np.sum(np.asarray(T.leaf_count(one)) > 1))
    assert seen["won"] and seen["invalid"]
    assert seen["cut"] if rows < S else seen["lost"]
    assert (seen["shared"] > 0) == (run.get("rule") is not None)


@pytest.mark.slow
def test_lines_fork_where_actions_begin_if_asked():
    """With at=token some fork inside an action too, never inside an observation or right in front of its next word."""
    inside = 0
    for at in ("turn", "token"):
        for seed in range(4):
            tree, stats, _, _ = grow(jax.random.key(seed), goals(range(B)), rule="lookahead", at=at)
            tree = jax.tree.map(np.asarray, tree)
            for b, row, k in np.argwhere((tree.source == T.FORCED) & tree.used).tolist():
                above = row - 1, tree.parent[b, row, k]
                begins = row == 0 or tree.source[b][above] == T.ENVIRONMENT
                assert begins or at == "token"
                inside += not begins
            assert stats.forks.sum() > 0
    assert inside


@pytest.mark.slow
def test_a_tree_does_not_depend_on_its_batch():
    whole = grow(jax.random.key(1), goals(range(B)), rule="lookahead")
    for b in (0, 4):
        own = grow(jax.random.key(1), goals([b]), rule="lookahead")
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[b], y[0]), whole[0], own[0])


def test_a_reward_is_that_of_the_turns_and_tokens_of_the_policy_are_counted_alone():
    tree, stats, _, _ = grow(jax.random.key(0), goals(range(B)))
    graded = rewards.of_turns(tree)
    np.testing.assert_array_equal(graded.reward, np.asarray(tree.turns.reward).sum(-1))
    assert 0 < float(graded.reward.mean()) < 1
    drawn = np.sum(np.asarray(tree.used) & (np.asarray(tree.source) != T.ENVIRONMENT), axis=(1, 2))
    np.testing.assert_array_equal(stats.sampled, drawn)


def test_births_that_would_need_a_state_of_the_past_are_ignored():
    """An episode is known at its end alone: chaos asks for older cells, and every birth is at a head or the prompt."""
    tree, stats, _, _ = grow(jax.random.key(5), goals(range(B)), rule="chaos", prune="chaos")
    assert stats.forks.sum() + stats.restarts.sum() > 3  # and the replay above holds for what came of them


# --- credit ---------------------------------------------------------------------------------------


def steps_of(one):
    """(returns, ids, valid) of one tree, by hand."""
    t = jax.tree.map(np.asarray, one.turns)
    returns = np.zeros(t.reward.shape)
    for leaf in range(len(returns)):
        later = 0.0
        for i in reversed(range(t.reward.shape[1])):
            if t.valid[leaf, i]:
                later = t.reward[leaf, i] + 0.9 * later
                returns[leaf, i] = later - t.penalty[leaf, i]
    return returns, t.state_id, t.valid


@functools.cache
def estimates():
    """Credit of one tree by name: `item` and `sum` are HGPO with an episode term."""
    return jax.jit(lambda tree, reward: dict(
        hgpo=hgpo_tree(tree, reward, gamma=0.9), gigpo=gigpo_tree(tree, reward, gamma=0.9),
        **{base: hgpo_tree(tree, reward, gamma=0.9, levels=1, base=base) for base in ("item", "sum")},
    ))  # fmt: skip


@pytest.mark.parametrize("rule", ["stochastic", "lookahead"])
def test_credit_of_a_cell_is_the_oracles_on_the_same_arrays(rule):
    """HGPO and GiGPO from rollouts: each cell of the policy has the mean over the leaves below of their turns' advantages."""
    compared = 0
    tree, _, _, _ = grow(jax.random.key(2), goals(range(B)), rule=rule)
    for b in range(B):
        one = jax.tree.map(lambda x: x[b], tree)
        returns, ids, valid = steps_of(one)
        np.testing.assert_allclose(of_turns(one, 0.9)[0], returns, atol=1e-6)
        reward = np.asarray(one.turns.reward - one.turns.penalty).sum(1)
        batch = [(0, [tuple(x) for x in states[own].tolist()], value[own].tolist()) for states, value, own in zip(ids, returns, valid)]
        episode = dict(episode=reward.tolist())
        wanted = dict(
            hgpo=hgpo_oracle.hgpo(batch, levels=2), gigpo=hgpo_oracle.gigpo(batch, **episode),
            **{base: hgpo_oracle.hgpo(batch, levels=1, base=base, **episode) for base in ("item", "sum")},
        )  # fmt: skip
        got = estimates()(one, reward)
        cells = oracles.leaf_cells(one)
        at = lambda values, turn: values[turn] if turn < len(values) else 0.0  # an action that the last row cut off
        for name, by_step in wanted.items():
            below = {}
            for leaf, path in cells.items():
                for row, column in path:
                    below.setdefault((row, column), []).append(at(by_step[leaf], int(one.turns.turn[row, column])))
            for cell, values in below.items():
                spoken = int(one.source[cell]) != T.ENVIRONMENT
                np.testing.assert_allclose(got[name][cell], np.mean(values) if spoken else 0.0, atol=2e-5)
                compared += spoken and abs(np.mean(values)) > 0
    assert compared > 100


def test_grpo_reads_the_episodes_reward_alone():
    tree, _, _, _ = grow(jax.random.key(2), goals(range(B)))
    one = jax.tree.map(lambda x: x[0], tree)
    reward = jnp.asarray([1.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(grpo(one, reward), grpo(one.replace(turns=None), reward))


def test_the_first_observation_joins_the_prompt():
    prompts = Prompts(token=jnp.array([[5, 6, 0], [7, 0, 0]]), length=jnp.array([2, 1]), index=jnp.arange(2), data={})
    found = episodes.extend(prompts, jnp.array([[8, 9, 0, 0], [3, 4, 2, 5]]))
    np.testing.assert_array_equal(found.token, [[5, 6, 8, 9, 0, 0, 0], [7, 3, 4, 2, 5, 0, 0]])
    np.testing.assert_array_equal(found.length, [4, 5])
    assert length(jnp.array([3, 4, 0])) == 2
