"""Weights in and out of Hugging Face folders: bytes, shardings, dtypes, and what is wrong with a folder."""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import families_oracle as O
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treerl import sharding
from treerl.errors import UserError
from treerl.models import families, weights
from treerl.models.presets import PRESETS
from treerl.models.transformer import Model, TransformerConfig


def model_in(folder, **others) -> Model:
    return Model(families.from_folder(str(folder), **others))


def stored(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    found = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bytes(got: dict, want: dict):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2, untied", "qwen3", "gemma3"])
def test_untouched_weights_come_out_byte_for_byte(tmp_path, name, dtype):
    tensors = O.write(tmp_path / "in", name, dtype=dtype)
    model = model_in(tmp_path / "in", param_dtype=dtype)
    params = weights.load(str(tmp_path / "in"), model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes())
    weights.save(str(tmp_path / "out"), params, model)
    assert_same_bytes(stored(tmp_path / "out"), tensors)
    assert families.from_folder(str(tmp_path / "out"), param_dtype=dtype) == model.config


def test_float32_parameters_of_bfloat16_weights_go_back_to_their_bytes(tmp_path):
    tensors = O.write(tmp_path / "in", "llama3", dtype="bfloat16")
    model = model_in(tmp_path / "in")
    params = weights.load(str(tmp_path / "in"), model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    weights.save(str(tmp_path / "out"), params, model, str(tmp_path / "in"))
    assert_same_bytes(stored(tmp_path / "out"), tensors)
    weights.save(str(tmp_path / "wide"), params, model, str(tmp_path / "in"), dtype="float32")
    assert_same_bytes(stored(tmp_path / "wide"), {k: v.astype("float32") for k, v in tensors.items()})
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"


def test_shards_are_written_and_read(tmp_path):
    tensors = O.write(tmp_path / "in", "gemma3")
    model = model_in(tmp_path / "in")
    params = weights.load(str(tmp_path / "in"), model)
    weights.save(str(tmp_path / "out"), params, model, file_bytes=10_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1  # whoever reads the one reads the other
    assert count > 3 and files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for file in files:
        assert sum(x.nbytes for x in load_file(tmp_path / "out" / file).values()) <= 10_000
    assert_same_bytes(stored(tmp_path / "out"), tensors)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    again = weights.load(str(tmp_path / "out"), model)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_source_hands_on_what_the_model_does_not_know(tmp_path):
    O.write(tmp_path / "in", "qwen2", extra_key="kept")
    for name in ("tokenizer.json", "generation_config.json", "notes.txt"):
        (tmp_path / "in" / name).write_text(f"{name} of the source")
    model = model_in(tmp_path / "in")
    weights.save(str(tmp_path / "out"), weights.load(str(tmp_path / "in"), model), model, str(tmp_path / "in"))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json of the source"
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("in", "out"))
    assert after == before and after["extra_key"] == "kept"


@pytest.mark.parametrize("name", list(O.CONFIGS))
@pytest.mark.parametrize("with_source", [True, False])
def test_transformers_reads_what_is_saved(tmp_path, name, with_source):
    pytest.importorskip("torch", reason="torch is not installed: what is saved is not read by transformers")
    pytest.importorskip("transformers", reason="transformers is not installed: it does not read what is saved")
    O.write(tmp_path / "in", name)
    model = model_in(tmp_path / "in")
    params = weights.load(str(tmp_path / "in"), model)
    weights.save(str(tmp_path / "out"), params, model, str(tmp_path / "in") if with_source else None, file_bytes=10_000)
    np.testing.assert_array_equal(O.transformers_logits(tmp_path / "out"), O.transformers_logits(tmp_path / "in"))


def test_a_model_of_our_own_is_saved_and_read(tmp_path):
    model = Model(TransformerConfig(**PRESETS["tiny"]))
    params = model.init(jax.random.key(0))
    weights.save(str(tmp_path / "out"), params, model)
    assert model_in(tmp_path / "out").config == model.config
    jax.tree.map(np.testing.assert_array_equal, weights.load(str(tmp_path / "out"), model), params)


def test_an_equal_copy_of_the_embedding_and_old_buffers_do_no_harm(tmp_path):
    tensors = O.write(tmp_path, "smollm2")
    model = model_in(tmp_path)
    want = weights.load(str(tmp_path), model)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    copy["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file({**tensors, **copy}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, weights.load(str(tmp_path), model), want)
    save_file({**tensors, "lm_head.weight": copy["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has a tensor lm_head.weight, which the model has not"):
        weights.load(str(tmp_path), model)


# --- shardings ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2, untied", "gemma3"])
def test_eight_devices_hold_the_same(tmp_path, name):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    O.write(tmp_path / "in", name)
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    command = [sys.executable, __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_bytes(stored(tmp_path / "out"), stored(tmp_path / "in"))


def main(folder: pathlib.Path):
    model = model_in(folder / "in")
    want = weights.load(str(folder / "in"), model)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    whole, part = {}, {}  # elements of each layer of a leaf, and of what one device has read of it

    def read(stored, parts, leaf, *args):
        got = read_of(stored, parts, leaf, *args)
        whole[parts[0].name], part[parts[0].name] = got.size, got.addressable_shards[0].data.size
        return got

    read_of = weights._read
    with mock.patch.object(weights, "_read", read):
        params = weights.load(str(folder / "in"), model, mesh)
    assert all(whole[name] == 4 * part[name] for name in whole if "_proj.weight" in name), part
    placed = sharding.parameter_shardings(mesh, model.axes(), model.shapes())

    def check(path, got, want, where):
        assert got.sharding.is_equivalent_to(where, got.ndim), path
        np.testing.assert_array_equal(got, want, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, params, want, placed)
    layers, width, heads, group, size = params["blocks"]["qkv"].shape
    part = params["blocks"]["qkv"].addressable_shards[0].data.shape
    assert part == (layers, width // 2, heads // 2, group, size), part
    weights.save(str(folder / "out"), params, model, file_bytes=10_000)


def test_a_device_reads_its_own_part_alone():
    """What `Piece.read` asks a file for, of the part of qkv that one of four devices holds."""
    from treerl.models import layout

    model = Model(TransformerConfig(**families.fields(O.CONFIGS["qwen3"])))
    asked = {}

    class Slice:
        def __init__(self, value, name):
            self.value, self.name = value, name

        def __getitem__(self, index):
            asked[self.name] = self.value[index].size
            return self.value[index]

    leaf = model.shapes()["blocks"]["qkv"].shape[1:]  # [24, 2, 4, 8]
    for piece in layout.pieces(model.config)["blocks", "qkv"]:
        whole = np.arange(np.prod(piece.shape(leaf))).reshape(piece.shape(leaf))
        where, values = piece.read(Slice(whole, piece.name), leaf, (range(12, 24), range(1, 2), range(4), range(8)))
        full = np.full(leaf, -1)
        full[:, :, piece.start : piece.stop] = piece.read(whole, leaf, tuple(map(range, leaf)))[1]
        np.testing.assert_array_equal(values, full[12:24, 1:2, piece.start : piece.stop])
        np.testing.assert_array_equal(piece.take(full), whole)
        assert asked[piece.name] == whole.size // 4 and where[2] == slice(piece.start, piece.stop)


# --- what is wrong with a folder --------------------------------------------------------------------


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def index(text):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def lose_a_shard(folder):
    names = list(load_file(folder / "model.safetensors"))
    index(json.dumps({"weight_map": {n: f"model-{i % 2 + 1}.safetensors" for i, n in enumerate(names)}}))(folder)


K, NORM = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "/model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors, and model.safetensors.index.json cannot be read"),
        (index("{"), "has no model.safetensors, and model.safetensors.index.json cannot be read"),
        (index('{"weight_map": 3}'), "has no model.safetensors, and model.safetensors.index.json cannot be read"),
        (lose_a_shard, "/model-2.safetensors, which model.safetensors.index.json names, is missing; copy the model's folder again."),
        (rewrite(lambda t: t.pop(K)), f"has no tensor {K}, which the model has"),
        (rewrite(lambda t: t.update(extra=np.ones(2, np.float32))), "has a tensor extra, which the model has not"),
        (rewrite(lambda t: t.update({K: t[K][:8]})), f"tensor {K} of FOLDER has shape [8, 24], the model's is [16, 24]"),
        (rewrite(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), f"tensor {NORM} of FOLDER is I8, where only F32, BF16, F16 can be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: O.write(folder, "qwen3", num_hidden_layers=1), "model.layers=2, but the config.json of FOLDER says 1"),
        (lambda folder: O.write(folder, "llama3"), "model.rope_theta=300.0, but the config.json of FOLDER says 500.0"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_sentence(tmp_path, damage, message):
    O.write(tmp_path, "qwen3")
    model = model_in(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        weights.load(str(tmp_path), model)
    assert message.replace("FOLDER", str(tmp_path)) in str(error.value)


def test_saving_refuses_a_folder_in_use_another_source_and_an_unknown_dtype(tmp_path):
    O.write(tmp_path / "in", "qwen3")
    O.write(tmp_path / "other", "gemma3")
    model = model_in(tmp_path / "in")
    params = weights.load(str(tmp_path / "in"), model)
    with pytest.raises(UserError, match="in is not empty; name a new folder for the model."):
        weights.save(str(tmp_path / "in"), params, model)
    with pytest.raises(UserError, match="model.layers=2, but the config.json of .*other says 4"):
        weights.save(str(tmp_path / "out"), params, model, str(tmp_path / "other"))
    with pytest.raises(UserError, match="dtype='int8' of the weights to write is unknown; use float32, bfloat16, float16."):
        weights.save(str(tmp_path / "out"), params, model, dtype="int8")
    assert not (tmp_path / "out").exists()


def test_a_folder_cut_short_by_a_kill_is_written_anew(tmp_path):
    model = Model(TransformerConfig(**PRESETS["tiny"]))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model.safetensors").write_text("half")
    (tmp_path / "out").mkdir()  # empty: allowed
    weights.save(str(tmp_path / "out"), model.init(jax.random.key(0)), model)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(weights, "save_file", full)
    model = Model(TransformerConfig(**PRESETS["tiny"]))
    with pytest.raises(UserError, match="out cannot be written .No space left on device.; free some space"):
        weights.save(str(tmp_path / "out"), model.init(jax.random.key(0)), model)
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
