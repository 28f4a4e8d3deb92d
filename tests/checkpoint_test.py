import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treerl import checkpoint
from treerl.checkpoint import Checkpoints, abstract
from treerl.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@chex.dataclass(frozen=True)
class State:
    params: dict
    opt_state: tuple
    reference: dict | None
    step: jax.Array
    key: jax.Array
    typed_key: jax.Array
    nothing: jax.Array


def make_state(seed, width=8):
    rng = np.random.default_rng(seed)
    params = {
        "block_0": {"kernel": jnp.asarray(rng.standard_normal((width, 4)), jnp.float32)},
        "scale.x/y": jnp.asarray(rng.standard_normal(width), jnp.bfloat16),
        "layers": [jnp.arange(3), jnp.ones(())],
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(
        params=params,
        opt_state=optimizer.init(params),
        reference=None,
        step=jnp.int32(seed),
        key=jax.random.PRNGKey(seed),
        typed_key=jax.random.key(seed),
        nothing=jnp.zeros((0, 3)),
    )


def as_numpy(state):
    def plain(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(a), as_numpy(b))


def steps_on_disk(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


def test_nothing_saved_restores_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is None
        assert checkpoints.restore_best(abstract(make_state(0))) is None
        assert checkpoints.latest_step is None and checkpoints.best_metric is None


def test_round_trip_in_the_same_and_in_a_new_object(tmp_path):
    state, extra = make_state(3), {"position": 17, "names": ["a", None], "x": 0.1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, extra=extra)
        extra["names"].append("later")  # Must not reach the checkpoint.
        step, restored, _ = checkpoints.restore_latest(abstract(make_state(0)))
        assert step == 3
        assert_same(restored, state)
    with Checkpoints(str(tmp_path)) as checkpoints:
        step, restored, extra = checkpoints.restore_latest(jax.eval_shape(lambda: make_state(0)))
    assert step == 3 and extra == {"position": 17, "names": ["a", None], "x": 0.1}
    assert_same(restored, state)
    assert restored.reference is None and isinstance(restored, State)


def test_keeps_the_latest_and_the_best(tmp_path):
    like = abstract(make_state(0))
    with Checkpoints(tmp_path) as checkpoints:
        for step, metric in [(1, 0.2), (2, 0.9), (3, None), (4, float("nan")), (5, 0.9), (6, 0.3)]:
            checkpoints.save(step, make_state(step), extra={"step": step}, metric=metric)
        assert checkpoints.restore_latest(like)[0] == 6
        assert checkpoints.restore_best(like)[0] == 2  # 5 ties; the older one stays.
    assert steps_on_disk(tmp_path) == ["2", "6"]
    with Checkpoints(tmp_path) as checkpoints:  # The high survives a restart.
        assert checkpoints.best_metric == 0.9
        checkpoints.save(7, make_state(7), extra={}, metric=0.8)
        assert checkpoints.restore_best(like)[0] == 2
        checkpoints.save(8, make_state(8), extra={}, metric=0.95)
        step, state, extra = checkpoints.restore_best(like)
        assert (step, extra, checkpoints.best_metric) == (8, {}, 0.95)
        assert_same(state, make_state(8))
    assert steps_on_disk(tmp_path) == ["8"]


def test_keeps_as_many_as_asked(tmp_path):
    """The last two, every fourth, and the best."""
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, make_state(step), extra={}, metric=float(step == 3))
            checkpoints.wait()
    assert sorted(map(int, steps_on_disk(tmp_path))) == [3, 4, 8, 9, 10]


def test_a_metric_may_come_after_the_save(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), extra={"first": 1})
        checkpoints.save(1, make_state(1), extra={}, metric=0.5)
        checkpoints.save(1, make_state(1), extra={}, metric=0.6)
        assert checkpoints.best_metric == 0.6
        assert checkpoints.restore_best(abstract(make_state(0)))[::2] == (1, {"first": 1})
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best_step, checkpoints.best_metric) == (1, 0.6)
    assert steps_on_disk(tmp_path) == ["1"]


def test_a_metric_whose_checkpoint_was_never_finished_is_forgotten(tmp_path):
    """Killed between the two: the step is done again, and may be worth another number in another run."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, make_state(4), extra={}, metric=0.1)
    known = tmp_path / "checkpoints.json"
    known.write_text(known.read_text().replace("}", ', "6": 0.7}'))
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best_step, checkpoints.best_metric) == (4, 0.1)
        checkpoints.save(5, make_state(5), extra={}, metric=0.3)
        checkpoints.save(6, make_state(6), extra={})
        assert (checkpoints.best_step, checkpoints.best_metric) == (5, 0.3)
    assert steps_on_disk(tmp_path) == ["5", "6"]


def test_metrics_that_are_damaged(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, make_state(4), extra={}, metric=0.1)
    (tmp_path / "checkpoints.json").write_text("{")
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path)
    assert str(error.value) == (f"checkpoint {tmp_path}/checkpoints.json is damaged; delete it to go on without a best checkpoint.")


def test_other_formats_are_one_sentence(tmp_path):
    (tmp_path / "old" / "checkpoints" / "latest").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path / "old")
    assert str(error.value) == (
        f"{tmp_path}/old/checkpoints was written by an older treerl (format 1 of 2); go on with that one, or use a new workdir."
    )
    with mock.patch.object(checkpoint, "VERSION", 3), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), extra={})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore_latest(abstract(make_state(0)))
    assert str(error.value) == (
        f"checkpoint {tmp_path}/checkpoints/1 has format 3 and this treerl reads up to 2; update treerl, or use a new workdir."
    )


def test_state_may_be_donated_right_after_save(tmp_path):
    state = {"x": jnp.arange(500_000, dtype=jnp.float32)}
    expected = np.array(state["x"])
    overwrite = jax.jit(lambda s: {"x": s["x"] * 0 - 1}, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, extra={}, metric=1.0)
        jax.block_until_ready(overwrite(state))
        like = {"x": jax.ShapeDtypeStruct((500_000,), jnp.float32)}
        for restore in (checkpoints.restore_latest, checkpoints.restore_best):
            np.testing.assert_array_equal(restore(like)[1]["x"], expected)


def test_going_back_and_read_only_are_errors(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), extra={})
        with pytest.raises(ValueError, match="step 4 lies before the latest checkpoint, 5"):
            checkpoints.save(4, make_state(4), extra={})
    leftover = tmp_path / "checkpoints/6.orbax-checkpoint-tmp"
    leftover.mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0)))[0] == 5
        with pytest.raises(ValueError, match="read_only=True"):
            checkpoints.save(6, make_state(6), extra={})
    assert leftover.exists()
    with Checkpoints(tmp_path / "absent", read_only=True) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is None
    assert not (tmp_path / "absent").exists()


def test_what_cannot_be_saved_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="state leaf 'a/0' is a float"):
            checkpoints.save(1, {"a": [1.0]}, extra={})
        with pytest.raises(TypeError, match="extra does not fit into JSON"):
            checkpoints.save(1, {"a": jnp.ones(2)}, extra={"x": np.ones(2)})
        with pytest.raises(ValueError, match="share the path 'a/b'"):
            checkpoints.save(1, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, extra={})
    assert steps_on_disk(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_names_the_first_path(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), extra={})
        other = abstract(make_state(0, width=16))
        expected = r"checkpoints/1 has float32\[8, 4\] at '.*block_0/kernel' where the state has"
        with pytest.raises(ValueError, match=expected + r" float32\[16, 4\]"):
            checkpoints.restore_latest(other)
        like = abstract(make_state(0))
        with pytest.raises(ValueError, match=r"float32\[0, 3\] at 'nothing' .* float32\[0, 4\]"):
            checkpoints.restore_latest(like.replace(nothing=jax.ShapeDtypeStruct((0, 4), jnp.float32)))
        with pytest.raises(ValueError, match=r"has int32\[\] at 'step' .* float32\[\]"):
            checkpoints.restore_latest(like.replace(step=jax.ShapeDtypeStruct((), jnp.float32)))
        with pytest.raises(ValueError, match="has no 'reference/w', which the state has;"):
            checkpoints.restore_latest(like.replace(reference={"w": like.step}))
        with pytest.raises(ValueError, match="has 'params/layers/0', which the state has not;"):
            params = {k: v for k, v in like.params.items() if k != "layers"}
            checkpoints.restore_latest(like.replace(params=params))
        assert_same(checkpoints.restore_latest(like)[1], make_state(1))


KILLED = """
import os, sys, threading, time
import jax.numpy as jnp
from treerl.checkpoint import Checkpoints
workdir, delay = sys.argv[1], float(sys.argv[2])
checkpoints = Checkpoints(workdir)
state = lambda step: {"x": jnp.full((1500, 1500), step, jnp.float32), "step": jnp.int32(step)}
checkpoints.save(1, state(1), extra={"step": 1}, metric=1.0)
checkpoints.wait()
checkpoints.save(2, state(2), extra={"step": 2}, metric=2.0)
checkpoints.wait()
def kill():
    time.sleep(delay)
    os.kill(os.getpid(), 9)
threading.Thread(target=kill).start()
for step in range(3, 1000):
    checkpoints.save(step, state(step), extra={"step": step}, metric=float(step))
"""


def run_python(code, *arguments, devices=1):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("delay", [0.01, 0.13, 0.31])
def test_kill_in_the_middle_of_writing(tmp_path, delay):
    assert run_python(KILLED, tmp_path, delay).returncode == -9
    like = {"x": jax.ShapeDtypeStruct((1500, 1500), jnp.float32), "step": jnp.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore_latest, checkpoints.restore_best):
            step, state, extra = restore(like)
            assert step >= 2 and extra == {"step": step} and state["step"] == step
            np.testing.assert_array_equal(state["x"], np.full((1500, 1500), step, np.float32))
        assert checkpoints.best_metric == checkpoints.best_step
        checkpoints.save(5000, {"x": jnp.zeros((1500, 1500)), "step": jnp.int32(5000)}, extra={},
                         metric=5000.0)  # fmt: skip
    assert steps_on_disk(tmp_path) == ["5000"]


def folder_and_copy(tmp_path):
    """A finished checkpoint of step 2, and the files of the one of step 1 before it."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), extra={}, metric=1.0)
        checkpoints.wait()
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
        checkpoints.save(2, make_state(2), extra={}, metric=2.0)
    return tmp_path / "checkpoints", tmp_path / "copy"


def damage(folder):
    """Yields the folder's state after more and more of its files are gone, as when killed."""
    yield
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        file.unlink()
        yield
    for entry in list(folder.iterdir()):
        shutil.rmtree(entry)
        yield


@pytest.mark.parametrize("left", ["{}.orbax-checkpoint-tmp", "{}.orbax-checkpoint-tmp-1754000000"])
def test_half_written_folders_are_ignored_and_removed(tmp_path, left):
    folder, copy = folder_and_copy(tmp_path)
    shutil.copytree(copy / "1", folder / left.format(3))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2 and checkpoints.best_metric == 2.0
        assert_same(checkpoints.restore_latest(abstract(make_state(0)))[1], make_state(2))
        checkpoints.save(3, make_state(3), extra={}, metric=3.0)
    assert steps_on_disk(tmp_path) == ["3"]


def test_half_deleted_folders_do_no_harm(tmp_path):
    """Killed while the old checkpoint, behind a finished new one, was being deleted."""
    folder, copy = folder_and_copy(tmp_path)
    shutil.move(copy / "1", folder / "1")
    for i, _ in enumerate(damage(folder / "1")):
        if i % 4:  # Each opening takes a while; every fourth state is enough.
            continue
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step == 2 and checkpoints.best_metric == 2.0
            assert_same(checkpoints.restore_best(abstract(make_state(0)))[1], make_state(2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3), extra={}, metric=3.0)
    assert steps_on_disk(tmp_path) == ["3"]


CHAIN = """
import sys
import jax, numpy as np
sys.path.insert(0, sys.argv[2])
from sharding_test import Tiny
from treerl import sharding
from treerl.checkpoint import Checkpoints, abstract
made, saved = {}, None
for shape in ((2, 2, 2), (1, 4, 1), (1, 1, 1), (2, 2, 2)):
    if shape not in made:
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        made[shape] = Tiny(mesh)
    tiny = made[shape]
    with Checkpoints(sys.argv[1]) as checkpoints:
        found = checkpoints.restore_latest(abstract(jax.eval_shape(tiny.state), tiny.shardings))
        if saved is None:
            assert found is None
            state = tiny.state()
        else:
            step, state, extra = found
            assert step == extra["step"] == int(state.step) and len(jax.tree.leaves(state)) == len(saved)
            for leaf, where, before in zip(jax.tree.leaves(state), jax.tree.leaves(tiny.shardings), saved):
                np.testing.assert_array_equal(np.asarray(leaf), before)
                assert leaf.sharding == where
        before = np.asarray(state.params["embedding"])
        state, metrics = tiny.step(state, tiny.prompts(), tiny.knobs)
        assert metrics["grad_norm"] > 0 and np.any(np.asarray(state.params["embedding"]) != before)
        saved = [np.asarray(x) for x in jax.tree.leaves(state)]
        checkpoints.save(int(state.step), state, extra=dict(step=int(state.step)))
print("ok", int(state.step))
"""


@pytest.mark.slow
def test_a_run_goes_on_from_8_to_4_to_1_to_8_devices(tmp_path):
    """What is restored has every bit of what was saved, lies as the mesh says, and a step changes it."""
    run = run_python(CHAIN, tmp_path, ROOT / "tests", devices=8)
    assert run.stdout == "ok 4\n", run.stderr[-3000:]


RESHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[2])
from checkpoint_test import make_state, assert_same
from treerl.checkpoint import Checkpoints, abstract
assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
def place(x):
    return NamedSharding(mesh, P("fsdp") if x.ndim and x.shape[0] == 8 else P())
state = make_state(3)
shardings = jax.tree.map(place, state)
with Checkpoints(sys.argv[1]) as checkpoints:
    step, restored, extra = checkpoints.restore_latest(abstract(state, shardings))
    assert step == 3 and extra == {"position": 5}
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, restored, shardings))
    assert restored.params["block_0"]["kernel"].addressable_shards[0].data.shape == (4, 4)
    assert_same(restored, state)
    checkpoints.save(4, restored, extra={"position": 6}, metric=0.5)
print("ok")
"""


def test_resume_on_8_devices_and_back_on_1(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3), extra={"position": 5})
    result = run_python(RESHARDED, tmp_path, ROOT / "tests", devices=8)
    assert result.stdout == "ok\n", result.stderr
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore_latest, checkpoints.restore_best):
            step, state, extra = restore(jax.eval_shape(lambda: make_state(0)))
            assert step == 4 and extra == {"position": 6}
            assert_same(state, make_state(3))
            assert state.key.sharding == jax.sharding.SingleDeviceSharding(jax.devices()[0])
