"""Weights of published models: safetensors folders to sharded parameters, and back.

Nothing holds the model twice: `load` reads a layer of a leaf at a time, and of it what each device keeps; `save`
gathers one file's tensors at a time.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from treerl import sharding
from treerl.errors import UserError, writing
from treerl.models import families, layout
from treerl.models.transformer import Model, TransformerConfig
from treerl.types import Params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def load(folder: str, model: Model, mesh: Mesh | None = None) -> Params:
    """Reads a model's parameters, cast to its param_dtype, into the shardings that the mesh and the rules say.

    Args:
      folder: config.json beside model.safetensors, or its shards and their index.
      model: of the folder's config, see `families.from_folder`.
      mesh: None is the first device.

    Raises:
      UserError: the config is another model's; a file is missing or damaged; a tensor is missing, unexpected, of
        another shape or no float.
    """
    mesh = mesh or Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    shapes, config = model.shapes(), model.config
    placed = sharding.parameter_shardings(mesh, model.axes(), shapes)
    with contextlib.ExitStack() as files:
        stored = _checked(folder, model, files)
        params = jax.tree.map(lambda x: None, shapes)
        for path, parts in layout.pieces(config).items():
            leaf, where = layout.at(shapes, path), layout.at(placed, path)
            make = _stacked if path[0] == "blocks" else _whole
            layout.at(params, path[:-1])[path[-1]] = make(stored, parts, leaf, where)
    return params


def check(folder: str, model: Model) -> None:
    """Raises what `load` would of these files and this model; reads little more than the files' heads."""
    with contextlib.ExitStack() as files:
        _checked(folder, model, files)


def save(
    folder: str, params: Params, model: Model, source: str | None = None, *, dtype: str | None = None,
    file_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Writes a folder that `load` and transformers read; it appears under its name when it is complete.

    Args:
      folder: new, or empty.
      source: folder that the model came from; its config.json (with the ids of special tokens and the longest
        context, which the model does not know), tokenizer and generation config are handed on.
      dtype: of the stored tensors; None is the source's, else param_dtype. A narrower one than param_dtype rounds.
      file_bytes: of one file, at most, unless a single tensor is larger.

    Raises:
      UserError: the folder is in use or cannot be written, or the source is another model's.
    """
    config, shapes = model.config, model.shapes()
    hf = families.to_hf(config) if source is None else families.read(source)
    _same_model(source, hf, config)
    dtype = dtype or hf.get("dtype") or hf.get("torch_dtype") or config.param_dtype
    if dtype not in FLOATS.values():
        raise UserError(f"dtype={dtype!r} of the weights to write is unknown; use {', '.join(FLOATS.values())}.")
    hf = {key: value for key, value in hf.items() if key != "dtype"} | {"torch_dtype": dtype}
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder} is not empty; name a new folder for the model.")
    files = split(list(layout.tensors(config, shapes)), np.dtype(dtype).itemsize, file_bytes)
    mine, partial = jax.process_index() == 0, f"{folder.rstrip('/')}.partial"
    with writing(f"model {folder}", "free some space, or name another folder."):
        if mine:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
        gather = _gatherer(params, dtype)
        for name, tensors in files.items():
            values = {}
            for tensor, path, i, piece, _ in tensors:
                leaf = gather(path, i)
                if mine:
                    values[tensor] = piece.take(leaf)
            if mine:
                write_tensors(os.path.join(partial, name), values)
        if mine:
            if len(files) > 1:
                write_index(partial, files, np.dtype(dtype).itemsize)
            write_json(os.path.join(partial, "config.json"), hf)
            for name in COPIED if source else ():
                if os.path.exists(os.path.join(source, name)):
                    shutil.copy(os.path.join(source, name), os.path.join(partial, name))
            os.replace(partial, folder)


def _same_model(folder, hf: dict, config: TransformerConfig) -> None:
    """Raises UserError at the first field in which a config.json and a model's config differ."""
    mine, theirs = _numbers(config), _numbers(TransformerConfig(**families.fields(hf)))
    for field, value in theirs.items():
        if mine[field] != value:
            raise UserError(
                f"model.{field}={mine[field]!r}, but the config.json of {folder} says {value!r}; make the config with families.from_folder."
            )


def _numbers(config: TransformerConfig) -> dict:
    """What decides a model's numbers in exact arithmetic, in one form each."""
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("dtype", "param_dtype", "lora_rank", "lora_alpha"):
        del found[name]
    found["query_scalar"] = config.query_scalar or config.head_dim
    if not any(config.local):
        found |= dict(local=(), window=0, local_rope_theta=0)
    return found


# --- reading --------------------------------------------------------------------------------------


def _checked(folder: str, model: Model, files: contextlib.ExitStack) -> dict:
    """Name of every stored tensor -> its slice, where all of them fit the model."""
    _same_model(folder, families.read(folder), model.config)
    stored = _open(folder, files)
    _check(folder, stored, model)
    return stored


def _open(folder: str, files: contextlib.ExitStack) -> dict:
    """Name of every stored tensor -> its slice; nothing is read yet."""
    names, listed = [SINGLE], None
    if not os.path.exists(os.path.join(folder, SINGLE)):
        index = os.path.join(folder, INDEX)
        try:
            with open(index, encoding="utf-8") as file:
                listed = json.load(file)["weight_map"]
            names = sorted(set(listed.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder} has no {SINGLE}, and {INDEX} cannot be read ({error}); copy the model's folder again, with weights "
                "in safetensors files."
            ) from error
    stored = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise UserError(f"{path}, which {INDEX} names, is missing; copy the model's folder again.")
        try:
            file = files.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); copy the file again.") from error
        stored |= {key: file.get_slice(key) for key in file.keys() if listed is None or listed.get(key) == name}
    return stored


def _check(folder: str, stored: dict, model: Model) -> None:
    """Raises UserError at the first stored tensor that does not fit the model."""
    expected = {name: shape for name, *_, shape in layout.tensors(model.config, model.shapes())}
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{folder} has no tensor {name}, which the model has; copy the model's folder again.")
        found = tuple(stored[name].get_shape())
        if found != shape:
            raise UserError(
                f"tensor {name} of {folder} has shape {list(found)}, the model's is {list(shape)}; "
                "mend config.json, or copy the model's folder again."
            )
        if stored[name].get_dtype() not in FLOATS:
            raise UserError(
                f"tensor {name} of {folder} is {stored[name].get_dtype()}, where only {', '.join(FLOATS)} can be read; "
                "use weights that are not quantized."
            )
    for name in stored:
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and not _tied_copy(name, stored, model):
            raise UserError(f"{folder} has a tensor {name}, which the model has not; use the config.json of these weights.")


def _tied_copy(name: str, stored: dict, model: Model) -> bool:
    """Whether a tensor is the output projection of a tied model, stored beside the embedding and equal to it."""
    if not (model.config.tied and name == "lm_head.weight"):
        return False
    one, other = stored[name], stored["model.embed_tokens.weight"]
    if one.get_shape() != other.get_shape():
        return False
    size = model.config.vocab
    blocks = [slice(i, min(i + 4096, size)) for i in range(0, size, 4096)]
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _read(stored: dict, parts: list, leaf: tuple[int, ...], where: NamedSharding, layer=None) -> jax.Array:
    """A leaf, or one layer of it, in the dtype it is stored in: [leaf], sharded."""
    slices = [(part, stored[part.name.format(layer)]) for part in parts]
    dtypes = {FLOATS[x.get_dtype()] for _, x in slices}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    seen = {}  # devices that hold the same part share one read

    def read(index):
        ranges = tuple(range(size)[cut] for size, cut in zip(leaf, index))
        if ranges not in seen:
            seen[ranges] = np.empty([len(r) for r in ranges], dtype)
            for part, x in slices:
                if (found := part.read(x, leaf, ranges)) is not None:
                    seen[ranges][found[0]] = found[1]
        return seen[ranges]

    return jax.make_array_from_callback(leaf, where, read)


def _whole(stored: dict, parts: list, leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.Array:
    return jax.jit(lambda x: x.astype(leaf.dtype), out_shardings=where)(_read(stored, parts, leaf.shape, where))


def _stacked(stored: dict, parts: list, leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.Array:
    """A leaf of all layers; the device holds it and one layer."""
    put = lambda whole, one, i: jax.lax.dynamic_update_index_in_dim(whole, one.astype(whole.dtype), i, 0)
    put = jax.jit(put, donate_argnums=0, out_shardings=where)
    one = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    whole = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=where)()
    for i in range(leaf.shape[0]):
        whole = put(whole, _read(stored, parts, leaf.shape[1:], one, i), i)
    return whole


# --- writing --------------------------------------------------------------------------------------


def split(tensors: list, itemsize: int, limit: int) -> dict[str, list]:
    """Name of each file -> its tensors, as `layout.tensors` gives them."""
    files, size = [[]], 0
    for tensor in tensors:
        own = int(np.prod(tensor[-1])) * itemsize
        if files[-1] and size + own > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += own
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": file for i, file in enumerate(files, 1)}


def _gatherer(params: Params, dtype: str):
    """A function (path, layer or None) -> the leaf or its layer on every process's host, cast to dtype."""

    @functools.cache
    def program(everywhere):  # compiled once for all layers of a leaf
        return jax.jit(lambda x, i: (x if i is None else x[i]).astype(dtype), out_shardings=everywhere)

    @functools.lru_cache(1)  # the pieces of a leaf follow each other
    def gather(path, i):
        leaf = layout.at(params, path)
        meshed = isinstance(leaf.sharding, NamedSharding)
        return np.asarray(program(sharding.replicated(leaf.sharding.mesh) if meshed else None)(leaf, i))

    return gather


def write_index(folder: str, files: dict[str, list], itemsize: int) -> None:
    total = sum(int(np.prod(tensor[-1])) for tensors in files.values() for tensor in tensors) * itemsize
    names = {tensor[0]: name for name, tensors in files.items() for tensor in tensors}
    write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": total}, "weight_map": names})


def write_tensors(path: str, tensors: dict) -> None:
    """One safetensors file, which others may read as far as the umask says; the library's own may only be read by its owner."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_json(path: str, value: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
