"""What the compiler makes of a step on eight devices: which communication, how much work and memory for each.

Run as a program it compiles on simulated devices and checks the texts, see `test_on_eight_devices`.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sharding_test import ROOT, Tiny, numbers, on_eight_devices, tiny_task, with_trees

from treerl import plan, profiling, sharding, step as S
from treerl.bench import scaling
from treerl.errors import UserError
from treerl.models.presets import PRESETS
from treerl.tokenizers import CharTokenizer

VOCAB, LAYERS, SLOTS, ROWS, BINS, HEADS = 512, 3, 4, 8, (2, 24), dict(heads=4, kv_heads=2, head_dim=16)


def wide(mesh) -> Tiny:
    """The tiny step with a vocabulary that is cut along tensor; no other size is VOCAB."""
    letters = "abcdefghij" + "".join(chr(0x4E00 + i) for i in range(VOCAB - 12))
    task = dataclasses.replace(tiny_task(), tokenizer=CharTokenizer(letters))
    model = dict(layers=LAYERS, width=64, hidden=192, **HEADS)
    return Tiny(mesh, task=task, model=model, bins_per_step=BINS[0], bin_tokens=BINS[1], vocab_chunk=16)


def compiled(tiny: Tiny):
    return tiny.step.lower(jax.eval_shape(lambda: S.init_state(tiny.fns, 0)), tiny.prompts(), tiny.knobs).compile()


def complaints(collectives: list[profiling.Collective], mesh) -> list[str]:
    """Collectives that no step should have: they bring together what is spread over devices for good."""
    found, cuts = [], {VOCAB // n for n in (1, mesh.shape["tensor"])}
    bins = BINS[0] * sharding.tree_shards(mesh)
    for c in collectives:
        dims = [int(x) for x in re.search(r"\[(.*)\]", c.shape)[1].split(",") if x]
        gathers = c.kind != "all-reduce"
        if len(dims) > 1 and dims[-1] in cuts:
            found.append(f"tokens x vocabulary: {c}")
        if tuple(dims[-3:]) == (SLOTS, ROWS, HEADS["head_dim"]):
            found.append(f"a pool: {c}")
        if gathers and c.depth and dims[:1] == [LAYERS] and len(dims) > 2:
            found.append(f"all layers' weights within a loop: {c}")
        if dims[:2] == [bins, BINS[1]] and len(dims) > 2:
            found.append(f"all bins: {c}")
    return found


# --- on eight simulated devices --------------------------------------------------------------------


def check_a_known_program():
    """A gather over fsdp within a loop, and a sum over data and fsdp: kinds, shapes, bytes, axes, depth."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

    def program(x, y):
        gathered = lambda i, x: jax.lax.with_sharding_constraint(
            jnp.sin(jax.lax.with_sharding_constraint(x, put(None, "tensor"))), put("fsdp", "tensor")
        )
        return jax.lax.fori_loop(0, 3, gathered, x), jnp.sum(y)

    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=put("fsdp", "tensor"))
    y = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=put(("data", "fsdp")))
    text = jax.jit(program, out_shardings=(put("fsdp", "tensor"), put())).lower(x, y).compile()
    gather, total = profiling.collectives(text, mesh)
    assert gather[:4] == ("all-gather", "f32[8,3]", 96, "fsdp") and gather.depth == 1, gather
    assert total[:4] == ("all-reduce", "f32[]", 4, "data x fsdp") and total.depth == 0, total


def check_no_step_gathers_what_is_spread():
    for sizes in (dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)):
        mesh = sharding.make_mesh(**sizes)
        collectives = profiling.collectives(compiled(wide(mesh)), mesh)
        assert not complaints(collectives, mesh), complaints(collectives, mesh)
        layers = [c for c in collectives if c.kind == "all-gather" and c.axes == "fsdp" and c.depth >= 2]
        assert len(layers) >= 8, "a layer's weights are gathered where they are used, forward and backward"
    with mock.patch.object(sharding, "constrain", lambda x, *_, **__: x):  # the check is able to fail
        found = complaints(profiling.collectives(compiled(wide(mesh)), mesh), mesh)
    assert {text.partition(":")[0] for text in found} == {"all bins"}, found


def check_a_vocabulary_that_is_cut_changes_nothing():
    results = []
    for sizes in (dict(data=1, devices=jax.devices()[:1]), dict(data=2, fsdp=2, tensor=2)):
        with with_trees():
            tiny = wide(sharding.make_mesh(**sizes))
            results.append(numbers(*tiny.step(tiny.state(), tiny.prompts(), tiny.knobs)))
    one, cut = results
    assert tiny.state().params["embedding"].addressable_shards[0].data.shape == (VOCAB // 2, 32)
    for name, wanted in one.items():
        if name.startswith("tree.") and np.issubdtype(wanted.dtype, np.integer):
            np.testing.assert_array_equal(cut[name], wanted, err_msg=name)
        elif name.startswith(("grad", "params")):
            np.testing.assert_allclose(cut[name], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)


def check_work_stays_with_the_device():
    """Weak scaling: eight trees a device, and what the compiler counts for each stays within 10% of one device alone.

    Along fsdp it may shrink: a device has its part of the optimizer alone.
    """

    def cost(count, **sizes):
        tiny = wide(sharding.make_mesh(**sizes, devices=jax.devices()[:count]))
        batch = jax.tree.map(lambda x: np.tile(np.asarray(x), (count,) + (1,) * (x.ndim - 1)), tiny.prompts())
        shapes = jax.eval_shape(lambda: S.init_state(tiny.fns, 0)), sharding.shapes(batch, tiny.trees)
        return tiny.step.lower(*shapes, tiny.knobs).compile().cost_analysis()

    one, data, fsdp = cost(1, data=1), cost(8, data=8), cost(8, data=1, fsdp=8)
    for name in ("flops", "bytes accessed"):
        assert 0.9 < data[name] / one[name] < 1.1, (name, data[name], one[name])
        assert 0.8 < fsdp[name] / one[name] < 1.1, (name, fsdp[name], one[name])


def check_the_suite_of_scaling():
    """The largest meshes come first; the same trees on each; of a model that needs several devices nothing on one."""
    every = list(scaling.meshes(("data", "fsdp", "tensor"), "qwen2.5-1.5b"))  # of two key heads
    assert every == ["data8", "fsdp8", "data4", "fsdp4", "data2", "fsdp2", "tensor2"], every
    toy = dict(layers=1, width=16, heads=4, kv_heads=2, head_dim=8, hidden=16, vocab=24)
    sizes = dict(
        preset="toy", prompts=8, slots=4, prompt=5, rows=8, segment=2, windows=(2,), bin_tokens=32, bins_per_step=1, vocab_chunk=16
    )
    with mock.patch.dict(PRESETS, toy=toy), mock.patch.object(scaling, "COUNTS", ()):
        small = dict(scaling.SMALL, **sizes)
        rows = list(scaling.rows(**dict(sizes, prompts=2), small=small, large=dict(preset="toy")))
    found = {row["name"]: row["value"] for row in rows}
    names = [name.partition(".")[0] for name in found if name.endswith(".same_trees")]
    assert names == ["data8", "fsdp8"], names
    assert all(found[f"{name}.same_trees"] == 1 for name in names), found
    assert {name.split(".")[1] for name in found if name.startswith("large.")} == {"fsdp8"}
    assert found["one.memory"] > 0 and found["fsdp8.sent_1"] >= found["fsdp8.sent_3"] > 0 and "one.sent_1" not in found


def main(folder: str):
    assert jax.device_count() == 8
    for check in (
        check_a_known_program, check_no_step_gathers_what_is_spread, check_a_vocabulary_that_is_cut_changes_nothing,
        check_work_stays_with_the_device, check_the_suite_of_scaling,
    ):  # fmt: skip
        check()
        print(check.__name__, "done", flush=True)


@pytest.mark.slow
def test_on_eight_devices(tmp_path):
    run = on_eight_devices(__file__, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert run.stdout.count("done") == 5


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,2},{1,3}}, metadata", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), x", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("dimensions={0}", None),
    ],
)
def test_groups_of_devices_as_xla_writes_them(text, groups):
    assert profiling._groups(text) == groups


@pytest.mark.parametrize(
    "kind, shape, depth, wrong",
    [
        ("all-gather", "f32[8,16,512]", 2, "tokens x vocabulary"),
        ("all-reduce", "bf16[16,256]", 2, "tokens x vocabulary"),
        ("all-gather", "f32[512,64]", 2, None),  # the table itself
        ("all-gather", "f32[8,2,4,8,16]", 1, "a pool"),
        ("collective-permute", "f32[2,1,4,8,16]", 1, "a pool"),
        ("all-gather", "f32[3,64,2,192]", 3, "all layers' weights within a loop"),
        ("all-gather", "f32[3,64,2,192]", 0, None),  # once, for the sampler
        ("all-gather", "f32[8,24,64]", 2, "all bins"),
        ("all-gather", "f32[2,24,64]", 2, None),
    ],
)
def test_what_is_complained_about(kind, shape, depth, wrong):
    mesh = types.SimpleNamespace(shape=dict(data=2, fsdp=2, tensor=2))
    found = complaints([profiling.Collective(kind, shape, 1, "fsdp", "", depth)], mesh)
    assert [text.partition(":")[0] for text in found] == ([wrong] if wrong else [])


# --- --compile_only ----------------------------------------------------------------------------------


SMALL = dict(
    layers=1, width=16, heads=4, kv_heads=2, head_dim=4, hidden=16,
)  # fmt: skip


def compile_only(folder, *flags, devices=8):
    command = [sys.executable, "-m", "launch.train", "--config=experiments/countdown.py", "--compile_only", *flags]
    command += [f"--config.model.{k}={v}" for k, v in SMALL.items()] + [f"--config.data_dir={folder}", "--config.task.train_size=16"]
    command += ["--config.sampler.prompts=16", "--config.task.heldout_size=16", "--config.evaluation.batch=16"]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_COMPILATION_CACHE_DIR=f"{folder}/programs")
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_compile_only_tells_what_a_step_takes(tmp_path):
    run = compile_only(tmp_path, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["mesh"] == dict(data=2, fsdp=2, tensor=2) and found["devices"] == "8 x cpu"
    memory = found["memory"]
    assert memory["total"] == memory["arguments"] + memory["outputs"] + memory["temporaries"] - memory["aliased"]
    # float32 parameters and two moments: the embedding cut along fsdp; products along fsdp and tensor; norms whole
    embedding, products, norms = 21 * 16 / 2, (16 * 2 * 4 * 4 + 16 * 16 + 3 * 16 * 16) / 4, 16 * 3 + 4 * 2
    state = 3 * 4 * (embedding + products + norms)
    assert state < memory["arguments"] < state + 3000 and memory["limit"] is None  # and prompts and the config's numbers
    assert found["flops"] > 0 and found["bytes_accessed"] > found["flops"] / 100
    assert found["collectives"]["all-gather"][0] > 5 and found["largest"]["axes"]
    assert found["largest"]["bytes"] <= max(size for _, size in found["collectives"].values())
    table = run.stderr.splitlines()
    assert any(re.match(r"memory of a device +0.00 GB: arguments", line) for line in table)
    assert any(re.match(r"the largest +\S+ of \w+\[[\d,]+\] over ", line) for line in table)
    assert not list(tmp_path.glob("*.json"))
    stored = lambda: sorted(path.name for path in (tmp_path / "programs").iterdir() if path.name.endswith("-cache"))
    before = stored()
    again = compile_only(tmp_path, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert stored() == before and any("train_step" in name for name in before)  # another process finds what this one compiled
    assert json.loads(again.stdout) == found


def test_a_topology_without_libtpu_or_unknown(monkeypatch):
    def describe(**_):
        raise RuntimeError("libtpu is missing\nmore")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", describe)
    with pytest.raises(UserError) as error:
        plan.described("v5e:3x7")
    assert str(error.value) == (
        "--topology=v5e:3x7 cannot be described (libtpu is missing); write GENERATION:SHAPE such as v5e:8x8, and install "
        "the extra `tpu`, which brings libtpu."
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu, of the extra `tpu`")
def test_compile_for_tpus_that_are_not_there(tmp_path):
    run = compile_only(tmp_path, "--topology=v5e:2x4", "--config.mesh.fsdp=2", devices=1)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["devices"] == "8 x TPU v5 lite" and found["mesh"] == dict(data=4, fsdp=2, tensor=1)
    assert found["memory"]["limit"] == 16 * 2**30 and found["collectives"]


def test_presets_give_sizes():
    from treerl import functions
    from treerl.config import default

    config = default().model
    config.preset = "qwen3-8b"
    made = functools.partial(functions.make_model, task=tiny_task())
    assert made(config, folder=None).config.width == 4096
    config.preset = "tiny"
    wide = types.SimpleNamespace(tokenizer=types.SimpleNamespace(vocab_size=22))
    with pytest.raises(UserError) as error:
        functions.make_model(config, wide, None)
    assert str(error.value) == "model.preset='tiny' has 21 tokens and the task's tokenizer 22; choose a larger preset."
    config.preset = "qwen"
    with pytest.raises(UserError, match="model.preset='qwen' is unknown; known are tiny, smollm2-135m, "):
        made(config, folder=None)
    with pytest.raises(UserError, match="model.source='' and model.preset='qwen' both give sizes; set one to ''."):
        made(config, folder="somewhere")


if __name__ == "__main__":
    main(sys.argv[1])
