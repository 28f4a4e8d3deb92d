import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import metrics, tree as T
from treerl.sampler import Stats


def write_lines(path, steps):
    with metrics.MetricsFile(path, resume_step=-1) as file:
        for step in steps:
            file.write(step, {"reward": step / 3})


def steps_of(path):
    return [line["step"] for line in metrics.read(path)]


def test_floats_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"  # The folder is made too.
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    with metrics.MetricsFile(path, resume_step=-1) as file:
        for step, value in enumerate(values):
            file.write(step, {"numpy": value, "jax": jnp.asarray(value), "double": np.exp(value)})
    lines = metrics.read(path)
    for key in ("numpy", "jax"):
        np.testing.assert_array_equal(np.float32([line[key] for line in lines]), values)
    assert [line["double"] for line in lines] == [float(x) for x in np.exp(values)]


def test_scalar_kinds_and_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {
        "int": np.int32(3),
        "bool": np.bool_(True),
        "half": jnp.bfloat16(0.5),
        "nan": float("nan"),
        "inf": jnp.float32(-jnp.inf),
        "none": None,
    }
    with metrics.MetricsFile(path, resume_step=-1) as file:
        file.write(np.int64(7), values)
    expected = {"step": 7, "int": 3, "bool": True, "half": 0.5, "nan": None, "inf": None}
    expected["none"] = None

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == expected
    assert type(line["int"]) is int and line["bool"] is True


def test_every_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=-1)
    file.write(1, {"reward": 0.5})
    assert metrics.read(path) == [{"step": 1, "reward": 0.5}]
    file.close()


def test_resume_drops_later_steps_and_a_cut_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 8))
    with open(path, "a") as file:
        file.write('{"step": 8, "rew')
    assert steps_of(path) == list(range(1, 8))
    with metrics.MetricsFile(path, resume_step=5) as file:
        assert steps_of(path) == [1, 2, 3, 4, 5]
        file.write(6, {"reward": 1.0})
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resumed_file_keeps_kept_numbers_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 50))
    before = path.read_bytes()
    metrics.MetricsFile(path, resume_step=49).close()
    assert path.read_bytes() == before


def test_a_cut_line_within_the_kept_steps_goes_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-5])
    with metrics.MetricsFile(path, resume_step=2) as file:
        file.write(2, {"reward": 0.25})
    assert metrics.read(path) == [{"step": 1, "reward": 1 / 3}, {"step": 2, "reward": 0.25}]


def test_starting_anew_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [0, 1, 2])
    metrics.MetricsFile(path, resume_step=-1).close()
    assert metrics.read(path) == []


def test_opening_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2, 3])
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.MetricsFile(path, resume_step=1)
    assert path.read_bytes() == before


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match='metrics.jsonl line 2 is no JSON object with a "step"'):
        metrics.read(path)
    path.write_text('{"step": 1}\n{"reward": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.MetricsFile(path, resume_step=1)


def test_bad_values_are_errors_and_write_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsFile(path, resume_step=-1) as file:
        for value in (np.zeros(3), "text", 1j, {"nested": 1.0}):
            with pytest.raises(ValueError, match='metric "loss" is .*reduce it to one number'):
                file.write(1, {"loss": value})
        with pytest.raises(ValueError, match="rename the metric"):
            file.write(1, {"step": 2})
    assert metrics.read(path) == []


def test_numbers_of_trees_by_hand():
    """A tree that forks at the prompt and below, and a line alone; what is masked may be nan."""
    parent, nan = [[-1, -1, -1], [0, 0, 2]], np.nan
    forked = T.from_parents(
        parent, [[1, 0, 1], [1, 1, 1]], [[1, 0], [1, 1], [1, 2]],
        entropy=jnp.array([[1, nan, 2], [3, 0, 0]]), source=jnp.int8([[0, 0, 0], [T.FORCED, T.FORCED, 0]]),
    )  # fmt: skip
    line = T.from_parents(
        parent, [[1, 0, 0], [1, 0, 0]], [[1, 0], [-1, -1], [-1, -1]],
        entropy=jnp.array([[1, nan, nan], [0, nan, nan]]), end=jnp.int8([[0, 0, 0], [T.TRUNCATED, 0, 0]]),
    )  # fmt: skip
    tree = jax.tree.map(lambda *x: jnp.stack(x), forked, line)
    reward = jnp.array([[1.0, 0.0, 0.5], [0.5, nan, nan]])
    count = lambda *x: jnp.array(x, jnp.int32)
    stats = Stats(sampled=count(6, 2), forks=count(1, 0), restarts=count(0, 1), pruned=count(3, 0), iterations=count(2, 2))
    found = jax.device_get(metrics.describe(tree, reward, stats, 0.5))
    wanted = dict(
        reward=2 / 4, solved=1 / 2, leaves=4 / 2, length=2, truncated=1 / 4, entropy=7 / 7, depth=(2 + 2 + 1 + 0) / 4,
        unique_tokens=7 / 8, forced_tokens=2 / 7, forks=1 / 2, restarts=1 / 2, pruned=3 / 2, sampled_tokens=8,
    )  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
