"""Agents from the config to the update: the step on the device, what is learnt from, evaluation, several seeds."""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from report_test import told
from sharding_test import on_eight_devices

from treerl import environments, metrics, prompts as P, reprompt, seeds, step as S, tasks, tree as T
from treerl.config import default
from treerl.errors import UserError
from treerl.experiment import Experiment
from treerl.seeds import Seeds
from treerl.supervision import Interrupted
from treerl.train import train
from treerl.types import Cells


def small(name="household", **changes):
    config = default()
    config.task.update(name=name, train_size=64, heldout_size=8)
    config.environment.update(horizon=6, invalid_penalty=0.125)
    config.sampler.update(prompts=2, slots=3, prompt_length=9, answer_length=48, segment=8)
    config.branching.update(rule="lookahead", at="turn", tau_abs=0.01, tau_rel=0.9)
    config.pruning.rule = "none"
    config.advantage.name = "hgpo"
    config.learner.update(bin_tokens=128, bins_per_step=4)
    config.model.update(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=32)
    config.warm_start.update(examples=64, steps=4, batch=8, eval_every=4)
    config.evaluation.update(examples=4, batch=4, samples=2)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    return config


@functools.cache
def experiment(name="household"):
    return Experiment(small(name))


@functools.cache
def sampled(name="household"):
    found = experiment(name)
    prompts = found.prompts(*found.stream().examples(0, 2))
    return found, prompts, found._sample_half(found.init(0), prompts, found.knobs)


@pytest.mark.slow
def test_the_whole_step_stays_on_the_device():
    """No transfer, however small, and no call of the host, while a step samples, acts, grades, credits and updates."""
    found, prompts, _ = sampled()
    state, knobs = found.init(0), found.knobs
    state, _ = found.train_step(state, prompts, knobs)
    with jax.transfer_guard("disallow"):
        state, values = found.train_step(state, prompts, knobs)
        jax.block_until_ready(values)
    text = found._whole_step.lower(found.state_shape(), found.prompts_shape(), knobs).compile().as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text and " send(" not in text
    assert int(state.step) == 2 and float(values["turns"]) > 1 and 0 < float(values["invalid"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", environments.NAMES[:2])
def test_sampler_and_learner_agree_on_episodes(name):
    """Log-probs of every kept cell, observations too: the learner reads the very text that the sampler read."""
    found, _, grown = sampled(name)
    logp = S.cell_logps(found.fns, found.init(0).params, grown.tree, grown.prompts, jnp.float32(1))
    kept = np.asarray(jax.vmap(T.kept)(grown.tree))
    assert np.any(kept & (np.asarray(grown.tree.source) == T.ENVIRONMENT))
    np.testing.assert_allclose(np.where(kept, logp, 0), np.where(kept, grown.tree.logp_policy, 0), atol=2e-5)


@pytest.mark.slow
def test_observations_have_no_weight_and_their_log_probs_do_not_matter():
    found, prompts, grown = sampled()
    tree = grown.tree
    told = np.asarray(tree.source) == T.ENVIRONMENT
    reward = jnp.asarray(np.random.default_rng(0).normal(size=tree.leaf.shape[:2]), jnp.float32)
    for credit in (reward, jnp.ones(tree.token.shape)):
        cells, denominator = jax.vmap(lambda t, c: S.weigh(found.fns, t, c, jnp.ones(3), found.knobs))(tree, credit)
        assert all(not np.any(np.asarray(x)[told]) for x in cells) and np.any(cells.weight)
    np.testing.assert_allclose(denominator.sum(), np.asarray(jax.vmap(T.kept)(tree) & ~told).sum())
    lied = tree.replace(logp_policy=jnp.where(told, tree.logp_policy - 3, tree.logp_policy))
    np.testing.assert_array_equal(jax.vmap(S.leaf_importance)(tree), jax.vmap(S.leaf_importance)(lied))


@pytest.mark.slow
def test_a_penalty_comes_off_the_reward_that_is_trained_on():
    found, _, grown = sampled()
    graded = S.grade(found.fns, grown.tree, grown.prompts)
    shaped = S.shape_reward(found.fns, grown.tree, graded.reward)
    count = np.asarray(grown.tree.turns.invalid).sum(-1)
    assert count.max() > 0
    np.testing.assert_allclose(shaped, np.asarray(graded.reward) - 0.125 * count, atol=1e-6)


# --- demonstrations --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", environments.NAMES[:2])
def test_a_demonstration_is_an_episode_of_the_player(name):
    """Its own tokens, carried out by the environment, give the observations that stand between them."""
    task = experiment(name).task
    env, solved = task.environment, 0
    step = jax.jit(env.step)
    for row in range(12):
        example = task.train[row]
        token, own = task.demonstrate(example)
        state, observation = env.reset(jax.random.key(0), task.encode(example).data)
        want, mine, over, reward = [int(t) for t in observation if t], [False], False, 0.0
        mine = [False] * len(want)
        while not over:
            action = [int(t) for t in token[len(want) :][: env.action]]
            action = action[: action.index(1) + 1]
            state, observation, earned, over = step(state, jnp.array(action + [0] * (env.action - len(action)), jnp.int32))
            said = [] if over else [int(t) for t in observation if t]
            want, mine, reward = want + action + said, mine + [True] * len(action) + [False] * len(said), reward + float(earned)
        assert token.tolist() == want and own.tolist() == mine
        solved += reward == 1
    again = tasks.make(small(name).task, "", environment=small(name).environment)
    np.testing.assert_array_equal(again.demonstrate(task.train[3])[0], task.demonstrate(task.train[3])[0])


@pytest.mark.slow
def test_long_demonstrations_are_cut_and_observations_are_not_learnt():
    task = experiment().task
    token, length, own = P.encode_answers(task, [task.train[i] for i in range(8)], 20)
    assert token.shape == own.shape == (8, 20) and length.max() == 20
    for i in range(8):
        whole, mine = task.demonstrate(task.train[i])
        np.testing.assert_array_equal(token[i, : length[i]], whole[:20])
        np.testing.assert_array_equal(own[i, : length[i]], mine[:20])
    found = experiment()
    state, prompts = found.init(0), found.prompts([task.train[i] for i in range(8)], np.arange(8))
    loss = lambda own: S.supervised_step(found.fns, state, prompts, token, length, own)[1]["loss"]
    assert abs(float(loss(own)) - float(loss(np.arange(20) < length[:, None]))) > 1e-4


# --- a short memory --------------------------------------------------------------------------------


@functools.cache
def forgetful(window):
    found = Experiment(small(environment__memory="reprompt", environment__window=window, branching__rule="stochastic"))
    prompts = found.prompts(*found.stream().examples(0, 2))
    return found, prompts, found._sample_half(found.init(0), prompts, found.knobs)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_every_turn_reads_the_goal_and_the_last_turns(window):
    """Contexts against a replay of what was done, up to a window longer than the episode."""
    found, prompts, grown = forgetful(window)
    env, tree, contexts = found.fns.environment, jax.device_get(grown.tree), jax.device_get(grown.contexts)
    step = jax.jit(env.step)
    for b in range(2):
        T.check(jax.tree.map(lambda x: x[b], tree))
        task = jax.tree.map(lambda x: x[b], jax.device_get(prompts.data))
        for k in range(3):
            state, said = env.reset(jax.random.key(0), task)
            goal, heard, done, row = [int(t) for t in prompts.token[b] if t], [[int(t) for t in said if t]], [], 0
            for t in range(env.horizon):
                pairs = list(zip(heard, done))[max(t - window, 0) : t] if window else []
                want = goal + [x for h, d in pairs for x in (*h, *d)] + heard[t]
                assert contexts.token[b, k, t, : contexts.length[b, k, t]].tolist() == want
                rows = [r for r in contexts.row[b, k, t].tolist() if r >= 0]
                assert rows == list(range(row, row + len(rows))) and rows
                action, row = tree.token[b, rows, k].tolist(), row + len(rows)
                assert np.all(tree.turns.turn[b, rows, k] == t)
                padded = [x or env.tokenizer.vocab_size for x in action] + [0] * (env.action - len(action))
                assert tree.turns.state_id[b, k, t].tolist() == np.asarray(env.state_id(state)).tolist()
                state, said, reward, over = step(state, jnp.array(padded, jnp.int32))
                done.append([x for x in action if x])
                heard.append([int(x) for x in said if x])
                assert tree.turns.reward[b, k, t] == reward and tree.turns.invalid[b, k, t] == env.invalid(state)
            assert over and row == tree.leaf[b, k, 0] + 1 and not tree.used[b, row:, k].any()


@pytest.mark.slow
def test_the_learner_reads_the_same_contexts_and_moves_nothing():
    found, prompts, grown = forgetful(2)
    params = found.init(0).params
    logp = S.logps(found.fns, params, grown.tree, grown.prompts, grown.contexts, jnp.float32(1))
    kept = np.asarray(jax.vmap(T.kept)(grown.tree))
    np.testing.assert_allclose(np.where(kept, logp, 0), np.where(kept, grown.tree.logp_policy, 0), atol=2e-5)
    lines, _, move = reprompt.flatten(grown.tree, grown.contexts)
    value = jnp.asarray(np.random.default_rng(0).normal(size=kept.shape), jnp.float32)
    back = reprompt.unflatten(move(value), grown.contexts, jnp.zeros_like(value))
    np.testing.assert_array_equal(back, np.where(kept, value, 0))
    assert int(jnp.sum(jax.vmap(T.kept)(lines))) == kept.sum()
    credit = jax.vmap(lambda t, c: T.spread(t, cell_credit=c))(grown.tree, jnp.where(kept, value, 0))
    learn = lambda contexts, prompts: S.learn(
        found.fns, found.init(0), grown.tree, prompts, Cells(*credit), jnp.float32(1), found.knobs, contexts=contexts
    )[1]
    values = learn(grown.contexts, grown.prompts)
    assert float(values["grad_norm"]) > 0 and float(values["logp_drift_max"]) < 2e-5
    _, values = found.train_step(found.init(0), prompts, found.knobs)
    assert float(values["turns"]) == 6


@pytest.mark.slow
def test_a_lesson_is_a_turn_of_a_demonstration_as_the_policy_would_read_it():
    found, _, _ = forgetful(2)
    task = found.task
    for row in range(6):
        token, own = task.demonstrate(task.train[row])
        goal = task.encode(task.train[row]).prompt
        starts = np.flatnonzero(own & ~np.append(False, own[:-1]))
        for turn, start in enumerate(starts):
            context, action = environments.lesson(goal, token, own, turn, 2)
            first = 0 if turn <= 2 else next(i for i in range(starts[turn - 3], len(own)) if not own[i])
            assert context == goal + token[first:start].tolist()
            assert action == token[start : start + len(action)].tolist() and own[start : start + len(action)].all()
            assert start + len(action) == len(own) or not own[start + len(action)]
    prompts, token, length, own = found.lessons([task.train[i] for i in range(4)], np.arange(4))
    assert token.shape == (4, task.environment.action) and np.all(own == (np.arange(token.shape[1]) < length[:, None]))
    assert len({int(n) for n in prompts.length}) > 1


# --- devices ---------------------------------------------------------------------------------------

MEMORIES = {
    "full": dict(mesh__data=4, mesh__fsdp=2),
    "reprompt": dict(mesh__data=4, mesh__tensor=2, environment__memory="reprompt", environment__window=1, branching__rule="stochastic"),
}  # fmt: skip
SPREAD = dict(
    sampler__prompts=8, sampler__answer_length=32, environment__horizon=4, model__kv_heads=2, evaluation__examples=8, evaluation__batch=8
)


def spread(memory, **changes) -> dict[str, np.ndarray]:
    """The trees of a step, and what is learnt from them when turns have rewards that chance gave."""
    found = Experiment(small(**SPREAD | MEMORIES[memory] | changes))
    prompts, state = found.prompts(*found.stream().examples(0, 8)), found.init(0)
    sampled = found._sample_half(state, prompts, found.knobs)
    tree = jax.device_get(sampled.tree)
    shown = {f"tree.{k}": v for k, v in dict(token=tree.token, parent=tree.parent, source=tree.source, **tree.turns).items()}
    luck = jax.device_put(np.random.default_rng(0).random(tree.turns.reward.shape, np.float32), found.trees)
    sampled = sampled._replace(tree=sampled.tree.replace(turns=sampled.tree.turns.replace(reward=luck * sampled.tree.turns.valid)))
    graded = S.grade(found.fns, sampled.tree, sampled.prompts)
    values = jax.device_get(found._learn_half(state, sampled, jax.device_put(graded, found.trees), found.knobs)[1])
    fills = ("samples", "bins", "logp_drift", "logp_drift_max")  # bins are filled shard by shard
    return shown | {k: np.asarray(v) for k, v in values.items() if k not in fills}


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    run = on_eight_devices(__file__, folder)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_devices_do_not_change_the_step(memory, on_eight):
    wanted, found = spread(memory, mesh__data=1, mesh__fsdp=1, mesh__tensor=1), np.load(on_eight / f"{memory}.npz")
    assert set(found) == set(wanted) and wanted["grad_norm"] > 0 and np.ptp(wanted["tree.turn"]) == 3
    for name, want in wanted.items():
        if name.startswith("tree."):
            np.testing.assert_array_equal(found[name], want, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-6, err_msg=name)


def main(folder: str):
    assert jax.device_count() == 8
    for memory in MEMORIES:
        np.savez(os.path.join(folder, f"{memory}.npz"), **spread(memory))


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_evaluated_on_both_distributions(tmp_path):
    config, watched = small(steps=2, evaluation__every=1), []
    summary = train(config, str(tmp_path), progress=False, watch=watched.append)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert watched == lines[1:] and lines[0]["step"] == 0
    assert {"pass@1", "pass@2", "heldout/reward", "novel/pass@1", "novel/pass@2", "novel/reward", "turns", "invalid"} <= set(lines[-1])
    assert not any("majority" in name for name in lines[-1]) and summary["steps"] == 2
    page = (tmp_path / "report.html").read_text()
    assert "held-out tasks of another distribution" in page and ("invalid actions" in page or "invalid" in told(page))


@pytest.mark.slow
def test_a_tree_is_shown_below_what_the_agent_saw_first():
    own = experiment()
    example = own.task.heldout[0]
    goal, data = own.task.encode(example)[0], own.task.encode(example).data
    _, seen = own.task.environment.reset(jax.random.key(0), data)
    text = own.read_text(own.grow(own.init(0), [example], step=0), 0)
    assert text == own.task.tokenizer.decode_prompt([*goal, *(int(t) for t in seen if t)]) != own.task.tokenizer.decode_prompt(goal)


RUN = dict(steps=3, evaluation__every=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of seeds 0 and 1, and its result; runs of the same seeds below do not compile again."""
    make = functools.cache(lambda own, shared: Seeds(small(**RUN, seed=own[0]), list(own), shared))
    folder = tmp_path_factory.mktemp("seeds") / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "Seeds", lambda config, own, shared: make(tuple(own), shared))
        yield folder, seeds.train(small(**RUN), str(folder), 2, progress=False)


@pytest.mark.slow
def test_seeds_in_one_program_are_what_each_is_alone(two, tmp_path):
    """Trees and updates of a seed do not depend on its neighbours."""
    folder, found = two
    seeds.train(small(**RUN, seed=1), str(tmp_path), 1, progress=False)
    both, alone = (metrics.read(where / "seed1" / "metrics.jsonl") for where in (folder, tmp_path))
    assert [line["step"] for line in both] == [0, 1, 2, 3]
    for mine, own in zip(both, alone, strict=True):
        assert mine.keys() == own.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], own[name], rtol=2e-3, atol=2e-5, err_msg=name)
    other = metrics.read(folder / "seed0" / "metrics.jsonl")
    assert other[1]["entropy"] != both[1]["entropy"] and 0 <= found["pass@1"][0] <= 1


@pytest.mark.slow
def test_a_shared_warm_start_is_that_of_the_first_seed():
    config = small()
    own, shared = (Seeds(config, [0, 1], shared) for shared in (False, True))
    apart, alike = own.warm_start(own.start()), shared.warm_start(shared.start())
    first = lambda states, i: [np.asarray(x[i]) for x in jax.tree.leaves(states.params)]
    for i in (0, 1):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), first(alike, i), first(apart, 0))
    assert any(np.abs(x - y).max() > 1e-3 for x, y in zip(first(apart, 0), first(apart, 1)))
    assert not np.array_equal(alike.key[0], alike.key[1])


def test_seeds_in_one_program_have_no_wandb(tmp_path):
    with pytest.raises(UserError, match="write metrics.jsonl alone; set wandb='', or use launch.sweep."):
        seeds.train(small(wandb="mine"), str(tmp_path / "run"), 2, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_seeds_go_on_after_a_stop(two, tmp_path, monkeypatch):
    """After a signal, which saves, and after an end without one."""
    folder, found = two
    step, rare = Seeds.step, small(**dict(RUN, checkpoint_every=10))
    saved = lambda: {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}

    def stops(self, states, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == 3:
            raise KeyboardInterrupt
        return step(self, states, number)

    with monkeypatch.context() as patch:
        patch.setattr(Seeds, "step", stops)
        with pytest.raises(Interrupted, match="SIGTERM: stopped after step 1 of 3;"):
            seeds.train(rare, str(tmp_path), 2, progress=False)
        assert "1" in saved()
        with pytest.raises(KeyboardInterrupt):
            seeds.train(rare, str(tmp_path), 2, progress=False)
    assert not saved() & {"2", "3"}
    with pytest.raises(UserError, match="has a run of 2 seeds; give --count=2"):
        seeds.train(rare, str(tmp_path), 1, progress=False)
    for _ in range(2):  # a run that is done does nothing more
        assert seeds.train(small(**RUN), str(tmp_path), 2, progress=False) == found
        for name in ("seed0", "seed1"):
            whole, cut = (metrics.read(where / name / "metrics.jsonl") for where in (folder, tmp_path))
            assert whole == cut


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Experiment(small(task__name="garden")), "task.name='garden' is unknown"),
        (lambda: Experiment(small(environment__horizon=-2)), "environment.horizon=-2 cannot work"),
        (lambda: Experiment(small(environment__anchor="place")), "environment.anchor='place' cannot work"),
        (lambda: Experiment(small(environment__memory="none")), "environment.memory='none' cannot work"),
        (lambda: Experiment(small(environment__memory="reprompt")), "set branching.rule=stochastic"),
        (
            lambda: Experiment(small(environment__memory="reprompt", branching__rule="stochastic", advantage__name="minimum_variance")),
            "advantage.name=minimum_variance takes gradients of whole rollouts",
        ),
        (lambda: Experiment(small(advantage__name="grpo", learner__objective="gspo")), "learner.objective=gspo counts every token"),
        (lambda: Experiment(small(branching__at="word")), "branching.at='word' cannot work"),
        (lambda: Experiment(small(learner__bin_tokens=60)), "first observation"),
        (lambda: Experiment(small(environment__options=ConfigDict({"mistake": 1.0}))), "environment.options has no 'mistake'"),
        (lambda: Experiment(small(evaluation__batch=3, evaluation__examples=8)), "evaluation.batch=3"),
        (lambda: seeds.train(small(), "unused", 0), "--count=0 cannot work"),
    ],
)
def test_bad_input_gets_a_sentence(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


if __name__ == "__main__":
    main(sys.argv[1])
