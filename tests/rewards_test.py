"""Grading of leaves, on the device and on the host: equal to a plain loop, each shard of trees once and by its own data.

Run as a program it grades on eight simulated devices, see `test_each_shard_is_graded_once_by_its_own_data`.
"""

import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import leaf_cells, random_tree

from treerl import rewards, sharding, tree as T
from treerl.tasks import HostGraders

ROOT = pathlib.Path(__file__).resolve().parent.parent
WEIGHTS = (1.0, 0.5, -0.25)


def batch(count=6, seed=0, **sizes):
    """Random trees of a small vocabulary, so that answers repeat, some without leaves; rows of data."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, vocab=4, **dict(dict(rows=4, slots=6), **sizes)) for _ in range(count)]
    trees[1] = trees[1].replace(leaf=jnp.full_like(trees[1].leaf, -1), leaf_path=jnp.full_like(trees[1].leaf_path, -1))
    return jax.tree.map(lambda *x: jnp.stack(x), *trees), {"row": jnp.arange(100, 100 + count, dtype=jnp.int32)}


def scores_of(answer: list[int], row: int) -> tuple[list[float], int]:
    """What the graders below give one answer, and its fault."""
    total = sum(answer) + row
    return [total % 3, total / 7, len(answer)], (total % 5 == 0) * (1 + total % 4)


class Recorder:
    """Graders that keep what they were asked: a list of (row, answer), one list a call."""

    def __init__(self):
        self.calls, self.lock = [], threading.Lock()

    def grade(self, tokens, length, data):
        assert all(isinstance(x, np.ndarray) for x in (tokens, length, data["row"]))
        asked = [(int(r), t[:n].tolist()) for t, n, r in zip(tokens, length, data["row"], strict=True)]
        with self.lock:
            self.calls.append(asked)
        found = [scores_of(answer, row) for row, answer in asked]
        return np.array([x for x, _ in found], np.float32).reshape(-1, 3), np.array([x for _, x in found], np.int8)

    def key(self, tokens, length):
        return str(sum(tokens[:length].tolist()) % 3)  # answers that differ vote together

    def host(self):
        return HostGraders(("a", "b", "c"), WEIGHTS, self.grade, self.key)


def by_loop(tree, data) -> rewards.Graded:
    """Leaf by leaf, along its parents."""
    count, leaves = tree.leaf.shape[:2]
    reward, parts = np.zeros((count, leaves)), np.zeros((count, leaves, 3))
    fault, key = np.zeros((count, leaves), int), np.tile(np.arange(leaves), (count, 1))
    for b in range(count):
        one, firsts = jax.tree.map(lambda x: x[b], tree), {}
        for i, cells in leaf_cells(one).items():
            answer = [int(one.token[cell]) for cell in cells]
            parts[b, i], fault[b, i] = scores_of(answer, int(data["row"][b]))
            reward[b, i] = sum(w * x for w, x in zip(WEIGHTS, parts[b, i]))
            key[b, i] = firsts.setdefault(sum(answer) % 3, i)
    return rewards.Graded(reward, parts, fault, key)


def assert_equal(got: rewards.Graded, wanted: rewards.Graded):
    for name, x, y in zip(rewards.Graded._fields, got, wanted):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_in_numpy_is_a_plain_loop(seed):
    tree, data = batch(seed=seed)
    valid = np.asarray(tree.leaf[..., 0] >= 0)
    assert valid.any() and not valid.all() and not valid[1].any()
    got, wanted = rewards.in_numpy(Recorder().host(), *rewards.answers(tree), data), by_loop(tree, data)
    np.testing.assert_allclose(got.reward, wanted.reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.parts, wanted.parts, rtol=1e-6)
    np.testing.assert_array_equal(got.fault, wanted.fault)
    np.testing.assert_array_equal(got.key, wanted.key)
    assert wanted.fault.any() and (wanted.key[valid] != np.nonzero(valid)[1]).any()  # something votes together
    for x, like in zip(got, rewards.shapes(*valid.shape, 3)):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)


@pytest.mark.parametrize("how", ["between", "by_callback"])
def test_the_ways_to_the_host_give_the_same(how):
    tree, data = batch()
    mesh = sharding.make_mesh()
    tree, data = jax.device_put((tree, data), sharding.trees(mesh))
    one, other = Recorder(), Recorder()
    wanted = rewards.in_numpy(one.host(), *rewards.answers(tree), data)
    if how == "between":
        got = rewards.between(other.host(), *rewards.answers(tree), data)
    else:
        got = jax.jit(lambda tree, data: rewards.by_callback(other.host(), tree, data, mesh))(tree, data)
    assert_equal(got, wanted)
    assert one.calls == other.calls and len(one.calls) == 1
    for x, like in zip(got, rewards.shapes(*tree.leaf.shape[:2], 3)):
        assert isinstance(x, jax.Array) and (x.dtype, x.shape) == (like.dtype, like.shape)


def test_a_batch_without_any_leaf():
    tree, data = batch(count=2)
    tree, data = jax.tree.map(lambda x: x[1:], (tree, data))
    got = rewards.in_numpy(Recorder().host(), *rewards.answers(tree), data)
    assert not np.any(got.reward) and not np.any(got.fault) and got.key.tolist() == [list(range(6))]


def test_a_callback_with_large_arrays_ends():
    """Reading the operands inside of a callback may not wait for the device that waits for the callback."""
    mesh, size = sharding.make_mesh(), (4, 8, 4096)
    grade = lambda tokens, length, data: (tokens[:, :1].astype(np.float32), np.zeros(len(tokens), np.int8))
    host = HostGraders(("a",), (2.0,), grade, lambda tokens, length: "")

    @jax.jit
    def program(x):
        tokens = jnp.broadcast_to(jnp.cumsum(x)[:4, None, None], size).astype(jnp.int32)
        pad = jnp.arange(size[2])[None, :, None] >= 0
        tree = T.from_parents(jnp.zeros((size[2], 1), jnp.int32), pad[0], jnp.array([[size[2] - 1, 0]] * size[1]))
        tree = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size[0], *leaf.shape)), tree).replace(
            token=tokens[:, :1].transpose(0, 2, 1)
        )
        return rewards.by_callback(host, tree, {"row": tokens[:, 0, 0]}, mesh).reward

    got = program(jnp.ones(1_000_000))
    np.testing.assert_array_equal(got, np.broadcast_to(2.0 * np.arange(1, 5)[:, None], size[:2]))


# --- on the device --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_on_the_device_equal_answers_are_equal_tokens(seed):
    tree, data = batch(seed=seed, slots=8)
    total = lambda tokens, length: jnp.sum(jnp.where(jnp.arange(4) < length, tokens, 0))
    score = lambda tokens, length, data: (total(tokens, length) + data["row"]).astype(jnp.float32)
    got = jax.jit(lambda tree, data: rewards.on_device(tree, data, score))(tree, data)
    repeated = 0
    for b in range(len(data["row"])):
        one, said = jax.tree.map(lambda x: x[b], tree), {}
        cells = leaf_cells(one)
        for i in range(tree.leaf.shape[1]):
            answer = tuple(int(one.token[cell]) for cell in cells[i]) if i in cells else None
            first = said.setdefault(answer, i)
            if answer is None:
                assert got.reward[b, i] == 0
                continue
            assert got.key[b, i] == first and got.reward[b, i] == sum(answer) + data["row"][b]
            repeated += first != i
    assert repeated
    assert got.parts.shape == (*got.reward.shape, 0) and not got.fault.any()
    for x, like in zip(got, rewards.shapes(*got.reward.shape, 0)):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)


def test_a_prefix_is_another_answer():
    """What lies behind an answer's end does not make it a longer one."""
    parent, used, ends = [[-1, -1], [0, 1], [-1, 1]], [[1, 1], [1, 1], [0, 1]], [[1, 0], [2, 1]]
    tree = jax.vmap(lambda token: T.from_parents(parent, used, ends, token=token))(jnp.array([[[5, 5], [6, 6], [0, 0]]]))
    got = rewards.on_device(tree, {}, lambda tokens, length, data: length.astype(jnp.float32))
    assert got.key.tolist() == [[0, 1]] and got.reward.tolist() == [[2, 3]]


def test_first_equal():
    rows = jnp.array([[1, 2], [2, 2], [1, 2], [2, 2], [1, 1]])
    assert rewards.first_equal(rows).tolist() == [0, 1, 0, 1, 4]


# --- several devices ------------------------------------------------------------------------------


MESHES = {"data=8": (8, 1, 1), "data=4, fsdp=2": (4, 2, 1), "data=2, fsdp=2, tensor=2": (2, 2, 2)}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(mesh, way) -> what eight devices were given and asked."""
    folder = tmp_path_factory.mktemp("eight")
    environment = dict(
        os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    run = subprocess.run([sys.executable, __file__, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return np.load(folder / "eight.npz", allow_pickle=True)["found"].item()


@pytest.mark.parametrize("way", ["between", "by_callback"])
@pytest.mark.parametrize("name", MESHES)
def test_each_shard_is_graded_once_by_its_own_data(eight, name, way):
    """Also where devices along the tensor axis hold the same trees: they get what one of them asked for."""
    tree, data = batch(count=8)
    recorder = Recorder()
    wanted = rewards.in_numpy(recorder.host(), *rewards.answers(tree), data)
    graded, calls, equal = eight[name, way]
    assert_equal(graded, wanted)
    assert equal  # copies of a tree on several devices
    assert sorted(sum(calls, [])) == sorted(recorder.calls[0])  # each leaf once
    if way == "between":
        assert len(calls) == 1  # all of this process together
        return
    shards = 8 // MESHES[name][2]
    assert len(calls) == shards
    owners = [{(row - 100) // (8 // shards) for row, _ in call} for call in calls]
    assert sorted(len(owner) for owner in owners) in ([1] * shards, [0] + [1] * (shards - 1))  # one tree has no leaf
    assert set.union(*owners) >= set(range(shards)) - {1}


def main(folder: str):
    assert jax.device_count() == 8
    found = {}
    for name, (data, fsdp, tensor) in MESHES.items():
        mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        tree, rows = jax.device_put(batch(count=8), sharding.trees(mesh))
        assert len({shard.index[0].start for shard in tree.leaf.addressable_shards}) == data * fsdp
        for way in ("between", "by_callback"):
            recorder = Recorder()
            host = recorder.host()
            if way == "between":
                graded = rewards.between(host, *jax.jit(rewards.answers, out_shardings=sharding.trees(mesh))(tree), rows)
            else:
                graded = jax.jit(lambda tree, rows: rewards.by_callback(host, tree, rows, mesh))(tree, rows)
            assert all(x.sharding.is_equivalent_to(sharding.trees(mesh), x.ndim) for x in graded)
            equal = all(np.array_equal(shard.data, np.asarray(x)[shard.index]) for x in graded for shard in x.addressable_shards)
            found[name, way] = rewards.Graded(*map(np.asarray, graded)), recorder.calls, equal
    np.savez(os.path.join(folder, "eight.npz"), found=np.array(found, dtype=object))


if __name__ == "__main__":
    main(sys.argv[1])
