"""Games of ordinary Python behind the protocol: by live game or by replay, in forks and batches, and when they fail."""

import contextlib
import functools
import gc
import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_games

from treerl import environments
from treerl.environments import host, textworld
from treerl.errors import UserError
from treerl.games import DIED, HUNG, NOT_FINITE, RAISED, Games, Job, Table
from treerl.tokenizers import WordTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:environment")
ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = WordTokenizer(sample_games.WORDS)
O, A, T = 5, 4, 6
USUAL = dict(
    tokenizer=TOKENIZER, tasks=host.numbered(dict(train=40, heldout=5, novel=5)), goal=4, observation=O, action=A, horizon=T,
    seconds=2.0, workers=2, player=True,
)  # fmt: skip
MALFORMED = ((5, 1, 5, 0), (5, 5, 5, 5), (1, 0, 0, 0), (0, 5, 1, 0), (5, 999, 1, 0), (-1, 1, 0, 0))


@contextlib.contextmanager
def adapted(log="", load=sample_games.counter, **options):
    env = host.adapt(load, (str(log),) if load is sample_games.counter else (), **USUAL | options)
    try:
        yield env
    finally:
        env.close()


def encode(text):
    """The action of a text; "" is none at all, and "#i" the malformed one number i."""
    if text.startswith("#"):
        return np.array(MALFORMED[int(text[1:])], np.int32)
    ids = TOKENIZER.encode(text) + [TOKENIZER.eos_id] if text else []
    return np.array(ids + [0] * (A - len(ids)), np.int32)


def begin(env, numbers):
    tasks = dict(number=np.asarray(numbers, np.int32))
    return jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), len(numbers)), tasks)


@functools.cache
def stepper(env):
    return jax.jit(jax.vmap(env.step))


def play(env, numbers, texts):
    """Texts by turn and episode: the last state, and by turns what followed with ids and whether actions were invalid."""
    state, said = begin(env, numbers)
    turns = [(said, *(np.zeros(len(numbers), t) for t in (np.float32, bool)), state["id"], state["invalid"])]
    for row in texts:
        state, *out = stepper(env)(state, np.stack([encode(text) for text in row]))
        turns.append((*out, env.state_id(state), env.invalid(state)))
    return state, [np.stack(x) for x in zip(*jax.device_get(turns))]


def random_texts(seed, turns, count):
    rng = random.Random(seed)
    pool = ["add", *["double"] * 9, "print", *["finish"] * 2, "<unk>", "add add", *(f"#{i}" for i in range(len(MALFORMED)))]
    return [[rng.choice(pool) for _ in range(count)] for _ in range(turns)]


def children():
    """Processes of this one, with their threads' ends waited for by nobody left out."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(path.parent.name))
    return found


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid):
    for _ in range(500):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


# --- the same as plain play -----------------------------------------------------------------------


def test_every_turn_is_that_of_plain_python(tmp_path):
    """Of 40 episodes in a batch, past the end too; each game is started once and never played again."""
    texts = random_texts(1, T + 2, 40)
    with adapted(tmp_path / "log") as env:
        state, (said, reward, done, ids, invalid) = play(env, range(40), texts)
        assert sum(env.faults().values()) == 0
    calls = (tmp_path / "log").read_text().splitlines()
    kinds, states = set(), {}
    for i in range(40):
        game, over, steps = sample_games.Counter(""), False, 0
        text, earned, fine = game.reset(i), 0.0, True
        for t in range(T + 3):
            if t and over:
                text, earned = None, 0.0
            elif t:
                action = texts[t - 1][i]
                text, earned, ended, fine = ("", 0.0, False, False) if action[0] == "#" else game.step(action)
                steps += action[0] != "#"
                over = ended or t == T
                kinds.add((action, fine, ended))
            words = [w if w in TOKENIZER.words else "<unk>" for w in host.words(text or "") if w != "."]
            assert TOKENIZER.decode(said[t, i]) == ("" if text is None else " ".join(words[: O - 1] + [">"]))
            assert (reward[t, i], done[t, i], invalid[t, i]) == (earned, over, not fine), (i, t)
            states.setdefault((i, game.total, over), set()).add(ids[t, i].tobytes())
        assert sum(line.split()[0] == str(i) for line in calls) == steps and calls.count(f"reset {i}") == 1
    assert ("finish", True, True) in kinds and ("print", False, False) in kinds and np.any(reward == 1)
    assert all(len(found) == 1 for found in states.values())  # ids are those of states
    assert len(set.union(*states.values())) == len(states)
    assert np.all(state["turn"] <= T)


def test_a_replay_gives_what_a_live_game_gives(tmp_path):
    numbers, texts = [0, 2, 4, 6, 0, 2], random_texts(2, T, 6)
    with adapted(tmp_path / "live") as env, adapted(tmp_path / "replayed", live=1) as other:
        live, replayed = play(env, numbers, texts), play(other, numbers, texts)
        jax.tree.map(np.testing.assert_array_equal, live, replayed)
    count = lambda name: (tmp_path / name).read_text().count("reset")
    assert count("replayed") > 2 * count("live")


def test_forks_are_separate_plays(tmp_path):
    """Two actions after the same start, in either order and interleaved, from one state that is used again."""
    first, after = [["add", "#0", "double"], ["add", "double", "<unk>"]], {"a": ["add", "add"], "b": ["double", "double"]}
    with adapted(tmp_path / "log") as env:
        numbers = [1, 2, 3]
        trunk, _ = play(env, numbers, first)
        step = stepper(env)
        act = lambda text: np.stack([encode(text)] * 3)
        a, *seen_a = step(trunk, act("add"))
        b, *seen_b = step(trunk, act("double"))
        (a, *last_a), (b, *last_b) = step(a, act("add")), step(b, act("double"))
        before = (tmp_path / "log").read_text()
        again, *seen_again = step(trunk, act("add"))
        jax.tree.map(np.testing.assert_array_equal, seen_again, seen_a)
        assert (tmp_path / "log").read_text() != before  # it was played again
    for branch, seen, last in (("a", seen_a, last_a), ("b", seen_b, last_b)):
        with adapted() as env:
            _, turns = play(env, numbers, first + [[text] * 3 for text in after[branch]])
        jax.tree.map(np.testing.assert_array_equal, [x[-2] for x in turns[:3]], seen)
        jax.tree.map(np.testing.assert_array_equal, [x[-1] for x in turns[:3]], last)
    assert not np.array_equal(a["id"], b["id"])


def test_an_episode_does_not_depend_on_its_batch():
    """Alone without vmap or jit, in a batch of two axes, and in one that holds it twice."""
    texts = ["add", "double", "#3", "add", "finish"]
    with adapted() as env:
        alone, said = env.reset(jax.random.key(5), dict(number=jnp.int32(7)))
        both = jax.vmap(jax.vmap(env.reset, (None, 0)), (None, 0))
        pairs, _ = both(jax.random.key(0), dict(number=jnp.array([[7, 1], [2, 7]])))
        assert TOKENIZER.decode(np.asarray(said)) == "at 7 >"
        two = jax.jit(jax.vmap(jax.vmap(env.step, (0, None)), (0, None)))
        for text in texts:
            alone, *out = env.step(alone, encode(text))
            pairs, *outs = two(pairs, encode(text))
            for i in ((0, 0), (1, 1)):
                jax.tree.map(np.testing.assert_array_equal, (alone, out), jax.tree.map(lambda x: x[i], (pairs, outs)))


def test_no_action_and_episodes_that_are_over_ask_nothing(tmp_path):
    with adapted(tmp_path / "log") as env:
        state, _ = play(env, [0, 1], [["finish", "add"]])
        before = (tmp_path / "log").read_text()
        new, said, reward, done = stepper(env)(state, np.stack([encode("add"), encode("")]))
        assert (tmp_path / "log").read_text() == before
        jax.tree.map(np.testing.assert_array_equal, new, state)
        assert not np.any(said) and not np.any(reward) and done.tolist() == [True, False]
        assert not np.any(jax.vmap(env.player)(jax.random.split(jax.random.key(0), 2), state)[0])


def test_goals_are_the_games_own():
    with adapted() as env:
        goals = jax.jit(jax.vmap(env.goal))(dict(number=jnp.arange(3)))
        assert [TOKENIZER.decode(g) for g in np.asarray(goals)] == ["at 20 >", "at 21 >", "at 22 >"]
    with adapted(load=sample_games.plain) as env:
        assert TOKENIZER.decode(np.asarray(env.goal(dict(number=jnp.int32(0))))) == ">"


def test_the_player_follows_the_script():
    """A function of its key and state, which changes no game."""
    with adapted() as env:
        state, _ = begin(env, range(20))
        keys = jax.random.split(jax.random.key(1), 20)
        player = jax.jit(jax.vmap(env.player))
        for _ in range(T):
            action = player(keys, state)
            np.testing.assert_array_equal(player(keys, state), action)
            state, _, reward, _ = stepper(env)(state, action)
        assert {TOKENIZER.decode(x) for x in np.asarray(player(keys, begin(env, range(20))[0]))} >= {"add .", "double ."}
        assert np.any(state["actions"] == TOKENIZER.encode("finish")[0])
    with adapted(player=False) as env:
        assert env.player is None


def test_text_is_cut_and_unknown_words_are_marked():
    find = lambda tokenizer, text, width: tokenizer.decode(host._Host(None, tokenizer, 1, 1, 1, 1).write(text, width))
    assert find(TOKENIZER, "At 3, at > Don't. add!", 9) == "at 3 <unk> at <unk> add <unk> >"
    assert find(TOKENIZER, "at at at at", 3) == "at at >"
    assert find(TOKENIZER, "", 2) == ">"
    own = WordTokenizer(("don't", "well-used", ">"))
    assert host._Host(None, own, 1, 1, 1, 1).write("Well-used 'it' -- don't it.", 5).tolist() == [3, 2, 4, 0, 0]


# --- games that fail ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how, kind, words", [
    ("raise", "raised", "raised ValueError: no such luck"),
    ("garbage", "raised", "raised ValueError"),
    ("hang", "hung", "took longer than 0.6 s"),
    ("spin", "hung", "took longer than 0.6 s"),
    ("end", "died", "ended its process with exit status 3"),
    ("nan", "not_finite", "gave the reward nan"),
    ("huge", "not_finite", "gave the reward 1e+300"),
])  # fmt: skip
def test_a_failure_ends_its_own_episode_alone(how, kind, words, tmp_path):
    """Others of the same process go on, as does another line of the same task; the reason is told once."""
    numbers = [0, 2, 2, 4, 1]
    texts = [["add"] * 5, ["add", how, "double", "add", "add"], ["double"] * 5, [how, "add", "double", "double", "add"]]
    with adapted(tmp_path / "log", seconds=0.6) as env, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, (said, reward, done, ids, _) = play(env, numbers, texts)
        assert env.faults() == {"raised": 0, "hung": 0, "not_finite": 0, "died": 0} | {kind: 2}
        before = (tmp_path / "log").read_text()
        repeated = play(env, [2], [["add"], [how]])[1]
        assert repeated[2][-1] and (tmp_path / "log").read_text().count(how) == before.count(how)  # it is not asked again
    with adapted() as env:
        _, expected = play(env, [2, 4, 1], [row[2:] for row in texts])
    jax.tree.map(np.testing.assert_array_equal, [x[:, 2:] for x in (said, reward, done, ids)], list(expected[:4]))
    assert done[:, 1].tolist() == [False, False, True, True, True] and done[:, 0].tolist() == [False] * 4 + [True]
    assert not reward[:, :2].any() and TOKENIZER.decode(said[2, 1]) == ">" and state["turn"].tolist() == [4, 2, 4, 4, 4]
    [told] = [str(w.message) for w in caught if "environment" in str(w.message)]
    assert told.startswith(f"environment: a game {words}") and told.endswith("; such an episode ends with reward 0.")


def test_a_task_that_cannot_start_is_over():
    with adapted() as env, pytest.warns(UserWarning, match="a game raised LookupError: no task -3; such"):
        state, said = begin(env, [3, -3])
        state, said, reward, done = stepper(env)(state, np.stack([encode("add")] * 2))
        assert done.tolist() == [False, True] and said[0].any() and not said[1].any()


def test_a_script_that_fails_says_nothing():
    with adapted() as env, pytest.warns(UserWarning, match="the script of a game raised ValueError: no such luck; it then"):
        state, _ = begin(env, [7, 8])
        action = jax.vmap(env.player)(jax.random.split(jax.random.key(0), 2), state)
        assert TOKENIZER.decode(np.asarray(action[0])) == "." and len(TOKENIZER.decode(np.asarray(action[1]))) > 2
        state, said, _, _ = stepper(env)(state, np.stack([encode("add")] * 2))
        assert TOKENIZER.decode(np.asarray(said[0])) == "at 8 >" and sum(env.faults().values()) == 0


@pytest.mark.parametrize("ended", [True, False])
def test_games_start_again_in_a_process_that_was_killed(ended):
    """Whether it has ended when it is asked again, or is about to."""
    games = Games(sample_games.counter, ("",), count=1, seconds=5.0)
    history = ("add", "double")
    [before] = games.ask([Job("play", 3, history)])
    first = games._slots[0][0].process.pid
    os.kill(first, signal.SIGKILL)  # as the system does when memory runs out
    if ended:
        games._slots[0][0].process.wait()
    [after, longer] = games.ask([Job("play", 3, history), Job("play", 3, (*history, "add"))])
    assert after == before and after.value.text == "at 8" and longer.value.text == "at 9"
    assert games._slots[0][0].process.pid != first and not sum(games.faults.values())
    games.close()


def test_faults_have_their_codes():
    texts = {"raise": RAISED, "hang": HUNG, "end": DIED, "nan": NOT_FINITE, "add": 0}
    games = Games(sample_games.counter, ("",), count=1, seconds=0.6)
    answers = games.ask([Job("play", 1, (text,)) for text in texts])
    assert [a.fault for a in answers] == list(texts.values()) and answers[-1].value.text == "at 2"
    games.close()


# --- processes ------------------------------------------------------------------------------------


def test_games_of_a_task_are_in_one_process_and_end_with_it():
    before = set(children())
    with adapted(workers=3) as env:
        play(env, [0, 3, 1], [["add", "add", "add"]])
        own = set(children()) - before
        assert len(own) == 2  # of three: none has a task of the third
    assert all(map(ends, own))


def test_processes_end_with_the_environment():
    before = set(children())
    env = host.adapt(sample_games.counter, ("",), **USUAL)
    env.reset(jax.random.key(0), dict(number=jnp.int32(0)))
    [own] = set(children()) - before
    assert alive(own)
    del env
    jax.clear_caches()  # programs hold the functions that they call
    gc.collect()
    assert not os.path.exists(f"/proc/{own}")  # and it is waited for


SCRIPT = """
import sys, numpy as np
from treerl.games import Games, Job
import sample_games
games = Games(sample_games.counter, (sys.argv[1],), count=1, seconds=600.0)
games.ask([Job("play", 0, tuple(sys.argv[2:]))])
print(games._slots[0][0].process.pid)
"""


def test_processes_end_with_their_parent(tmp_path):
    """At its end, and where it is killed with a call under way that started a process of its own."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "log")]
    run = subprocess.run([*command, "add"], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and ends(int(run.stdout))
    with subprocess.Popen([*command, "child"], env=environment) as parent:
        file = tmp_path / "log.pid"
        while not file.exists() or len(file.read_text().split()) < 2:
            time.sleep(0.01)
        pids = list(map(int, file.read_text().split()))
        assert all(map(alive, pids))
        parent.kill()
    assert all(map(ends, pids))


def test_processes_import_no_jax():
    with adapted(load=sample_games.plain, player=False) as env:
        state, _ = begin(env, [0])
        state, said, _, _ = stepper(env)(state, encode("add")[None])
        assert not env.invalid(state)[0] and TOKENIZER.decode(np.asarray(said[0])) == "add >"
        assert np.array_equal(env.state_id(state), env.state_id(stepper(env)(state, encode("add")[None])[0]))  # of what it said


def test_a_process_keeps_no_more_games_than_it_may():
    table = Table(sample_games.counter, 3)
    for i in range(10):
        for t in range(3):
            assert table.answer(Job("play", i, ("add",) * t)).text.casefold().startswith(f"at {i + t}")
    assert list(table._games) == [(i, ("add", "add")) for i in (7, 8, 9)]


def test_threads_ask_at_once():
    """As the callbacks of several devices do."""
    games, found = Games(sample_games.counter, ("",), count=2, seconds=5.0), {}

    def ask(i):
        for t in range(4):
            found[i, t] = [a.value.text.casefold() for a in games.ask([Job("play", n, ("add",) * t) for n in range(i, i + 4)])]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    games.close()
    assert found == {(i, t): [f"at {n + t}" + "." * (t == 0) for n in range(i, i + 4)] for i in range(4) for t in range(4)}


def test_an_interrupt_leaves_no_answers_for_the_next_call(monkeypatch):
    from multiprocessing import connection

    wait, calls = connection.wait, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return wait(*args, **options)

    games = Games(sample_games.counter, ("",), count=1, seconds=5.0)
    games.ask([Job("play", 0)])
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(connection, "wait", interrupted)
        games.ask([Job("play", 1), Job("play", 2)])
    assert not any(games._slots)
    assert games.ask([Job("play", 3)])[0].value.text == "At 3."
    games.close()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    (dict(workers=0), "environment.options.workers=0 cannot work; set it to 1 or more."),
    (dict(live=0), "environment.options.live=0"),
    (dict(goal=0), "environment.options.goal=0"),
    (dict(observation=0), "environment.options.observation=0"),
    (dict(action=1), "environment.options.action=1 cannot work; set it to 2 or more."),
    (dict(horizon=0), "environment.options.horizon=0"),
    (dict(seconds=0.0), "environment.options.seconds=0.0 cannot work; set it above 0."),
    (dict(seconds=float("nan")), "environment.options.seconds=nan"),
    (dict(tokenizer=WordTokenizer(("add",))), "tokenizer lacks the word '>'"),
    (dict(load=lambda: None), "cannot be sent to a process"),
])  # fmt: skip
def test_numbers_that_cannot_work(options, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")), adapted(**options):
        pass


def test_tasks_that_cannot_be_numbered():
    tasks = host.numbered(dict(train=2, heldout=3), 10)
    assert [t["number"].tolist() for t in tasks.values()] == [[0, 1], [10, 11, 12]]
    for size in (0, 11):
        with pytest.raises(UserError, match=f"{size} tasks of the split novel cannot work"):
            host.numbered(dict(novel=size), 10)


def test_a_game_that_cannot_be_made():
    for load, words in ((sample_games.broken, "cannot be made .OSError: no licence.; mend"),
                        (sample_games.ends, "ended with exit status 3 before it was ready")):  # fmt: skip
        games = Games(load, (), count=1, seconds=5.0)
        with pytest.raises(UserError, match=words):
            games.ask([Job("play", 0)])


# --- TextWorld ------------------------------------------------------------------------------------

missing = importlib.util.find_spec("textworld") is None
with_textworld = pytest.mark.skipif(missing, reason="needs a package that is missing: pip install textworld")


def test_textworld_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="^task.name=textworld needs a package that is missing; pip install textworld.$"):
        environments.make("textworld")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("textworld"))


@with_textworld
def test_textworld_is_solved_by_its_own_solution(folder):
    """Of all splits, in as many commands as the quest has; what it says and asks is text, and a second start makes no game."""
    options = dict(folder=folder, mistakes=0.0, workers=1)
    env = environments.make("textworld", train_size=2, heldout_size=1, options=options)
    numbers = np.concatenate([t["number"] for t in env.tasks.values()])
    assert len(set(numbers.tolist())) == 4 and list(env.tasks) == list(environments.SPLITS)
    state, first = begin(env, numbers)
    goals = [env.tokenizer.decode(g) for g in np.asarray(jax.vmap(env.goal)(dict(number=numbers)))]
    assert len(set(goals)) == 4 and all(len(goal.split()) > 8 and goal.endswith(" >") for goal in goals)
    assert all(env.tokenizer.decode(x).endswith(" >") for x in np.asarray(first))
    [games] = os.listdir(folder)
    assert sorted(os.listdir(os.path.join(folder, games))) == ["heldout-0", "novel-0", "train-0", "train-1"]
    reward, ended = [], []
    for key in jax.random.split(jax.random.key(0), 5):
        action = jax.vmap(env.player)(jax.random.split(key, 4), state)
        state, _, *out = stepper(env)(state, action)
        assert not np.any(state["invalid"])
        reward.append(out[0]), ended.append(out[1])
    assert np.sum(reward, axis=0).tolist() == [1, 1, 1, 1] and not sum(env.faults().values())
    assert (5 - np.sum(ended, axis=0) + 1).tolist() == [3, 3, 3, 4]  # the turns that it took
    env.close()
    times = {f: os.stat(f).st_mtime_ns for f in pathlib.Path(folder).rglob("*.z8")}
    other = environments.make("textworld", train_size=1, heldout_size=1, options=options)
    np.testing.assert_array_equal(begin(other, numbers[:1])[1], first[:1])
    assert times == {f: os.stat(f).st_mtime_ns for f in pathlib.Path(folder).rglob("*.z8")}
    other.close()


@with_textworld
def test_textworld_answers_what_is_not_admissible(folder):
    make = lambda mistakes: environments.make(
        "textworld", train_size=2, heldout_size=1, options=dict(folder=folder, mistakes=mistakes, workers=1)
    )
    env, best = make(1.0), make(0.0)
    say = lambda tokens: env.tokenizer.decode(np.asarray(tokens))
    write = lambda text: np.array((env.tokenizer.encode(text) + [1] + [0] * env.action)[: env.action], np.int32)
    state, first = begin(env, [0])
    before = state["id"]
    for text in ("eat door", "open", "turn around", "north"):
        state, said, reward, done = stepper(env)(state, write(text)[None])
        assert state["invalid"][0] and np.array_equal(state["id"], before) and not done[0] and len(say(said[0])) > 1
    state, said, _, _ = stepper(env)(state, write("look")[None])
    assert not state["invalid"][0] and say(said[0]) == say(first[0])
    keys, here = jax.random.split(jax.random.key(0), 8), jax.tree.map(lambda x: x[0], state)
    others, right = ({say(a) for a in jax.vmap(e.player, (0, None))(keys, here)} for e in (env, best))
    assert len(others) > 1 and len(right) == 1 and not right & others
    env.close(), best.close()


@with_textworld
@pytest.mark.filterwarnings("ignore:Game")
@pytest.mark.parametrize("command", ["undo", "restart"])
def test_textworld_gets_no_commands_for_its_machine(folder, command):
    env = environments.make("textworld", train_size=2, heldout_size=1, options=dict(folder=folder))
    [own] = [os.path.join(folder, name) for name in os.listdir(folder)]
    game = textworld.load(own, 0, dict.fromkeys(environments.SPLITS, (2, 4, 3)), "all", 0.0)
    game.reset(0)
    for i in range(3):
        last = game.step(game.script(random.Random(0)))
        before = game.key()
        if i < 2:
            assert game.step(command)[2:] == (False, False) and game.step("yes")[2:] == (False, False) and game.key() == before
    assert last[1:] == (1.0, True, True)
    env.close()


@with_textworld
@pytest.mark.parametrize("options, words", [
    (dict(rooms=0), "environment.options.rooms=0"),
    (dict(mistakes=1.5), "environment.options.mistakes=1.5"),
    (dict(novel_rooms=2, novel_quest=3), "novel games are like the others"),
    (dict(instructions="none"), "environment.options.instructions='none' is unknown; known are all, last."),
    (dict(folder="/proc/none"), "/proc/none.* cannot be written"),
])  # fmt: skip
def test_options_of_textworld_that_cannot_work(options, words):
    with pytest.raises(UserError, match=words):
        environments.make("textworld", train_size=1, heldout_size=1, options=options)


# --- in the sampler -------------------------------------------------------------------------------


def test_lines_of_the_sampler_play_games_and_a_fault_ends_one_of_them():
    """Episodes grown by the sampler are what the game says of their actions; a game that raises or dies costs its own episode."""
    from treerl import branching, episodes, pruning, sampler, tree as T
    from treerl.types import Policy, Prompts

    tokenizer = WordTokenizer(sample_games.WORDS)
    number = np.array([3, 19, 8], np.int32)
    env = host.adapt(
        sample_games.counter, ("",), tokenizer=tokenizer, tasks=dict(train=dict(number=number)), goal=4, observation=5, action=3,
        horizon=5, seconds=20.0, workers=1,
    )  # fmt: skip
    logits = np.full((tokenizer.vocab_size, tokenizer.vocab_size), -9.0, np.float32)
    says, end = {"double": 2.0, "add": 1.0, "finish": 1.0, "raise": 0.0, "end": -1.0}, tokenizer.eos_id
    for word, weight in says.items():
        logits[:, tokenizer.encode(word)[0]] = weight
        logits[tokenizer.encode(word)[0]] = np.where(np.arange(len(logits)) == end, 9.0, -9.0)
    table = jnp.asarray(logits)
    policy = Policy(
        prefill=lambda token, length: jnp.take_along_axis(token, length[:, None] - 1, axis=1),
        decode=lambda last, token, row, path, write, rows: (table[jnp.where(row < 0, last, token)], last),
    )

    @jax.jit
    def grow(key, prompts):
        worlds, prompts = episodes.begin(env, key, prompts, "state")
        return sampler.sample(
            policy, branching.stochastic(), pruning.none(), prompts, key, slots=6, rows=40, budget=40, segment=8, lengths=(40,),
            temperature=jnp.float32(1), top_p=jnp.float32(1), eos=jnp.array([end]), environment=env, worlds=worlds,
        )[0]  # fmt: skip

    goal = jax.vmap(env.goal)(dict(number=number))
    prompts = Prompts(token=goal, length=jnp.sum(goal != 0, axis=1), index=jnp.arange(3), data=dict(number=number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = jax.device_get(grow(jax.random.key(0), prompts))
    won = failed = 0
    for b in range(3):
        T.check(jax.tree.map(lambda x: x[b], tree))
        for leaf in range(6):
            n = tree.leaf[b, leaf, 0] + 1
            cells = np.arange(n), tree.leaf_path[b, leaf, :n]
            found = tree.token[b][cells].tolist()
            game, want, reward, turn, over = sample_games.Counter(""), [], 0.0, 0, False
            game.reset(int(number[b]))
            while not over:
                action = tokenizer.decode(found[len(want) : len(want) + 1])
                want, turn = want + tokenizer.encode(action) + [end], turn + 1
                if action in ("raise", "end"):
                    failed += 1
                    break
                said, earned, over, _ = game.step(action)
                reward, over = reward + earned, over or turn == env.horizon
                ids = [tokenizer.encode(word if word in tokenizer.words else "<unk>")[0] for word in host.words(said)]
                want += [] if over else ids[:4] + tokenizer.encode(">")
            assert found == want
            assert tree.turns.reward[b, leaf].sum() == reward and tree.turns.valid[b, leaf].sum() == turn
            won += reward
    assert won and failed and sum(env.faults().values())
    env.close()


# --- in a run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_counts_failures_goes_on_and_leaves_no_process(tmp_path, monkeypatch):
    """Three of eight tasks cannot start, nor be shown; a user's environment is a module and its name in NAMES."""
    from agents_test import small

    from treerl import metrics, tasks
    from treerl.train import train

    def make(*, seed, train_size, heldout_size, horizon=3):
        number = dict(train=np.array([-3, 1, 2, -2, 3, 4, -1, 5]), heldout=np.array([6, 7, 8, 9]), novel=np.array([10, 11, 12, 13]))
        numbers = {split: dict(number=x.astype(np.int32)) for split, x in number.items()}
        return host.adapt(sample_games.counter, ("",), **USUAL | dict(tasks=numbers, horizon=horizon, workers=1))

    monkeypatch.setattr(environments, "NAMES", ("counting",))
    monkeypatch.setattr(tasks, "NAMES", ("counting",))
    monkeypatch.setitem(sys.modules, "treerl.environments.counting", types.SimpleNamespace(make=make))
    before = set(children())
    config = small(
        "counting", steps=3, evaluation__every=3, environment__horizon=3, environment__memory="reprompt", branching__rule="stochastic",
    )  # fmt: skip
    train(config, str(tmp_path), progress=False)
    lines = metrics.read(tmp_path / "metrics.jsonl")[1:]
    failed = [line["games_raised"] for line in lines]
    assert len(lines) == 3 and sum(failed) >= 1 and all(line["games_hung"] == line["games_died"] == 0 for line in lines)
    assert all(line["loss"] is not None and line["skipped"] == 0 for line in lines)
    assert "episodes that games failed in" in (tmp_path / "report.html").read_text()
    assert all(map(ends, set(children()) - before))
