"""GGUF files of llama.cpp to Hugging Face folders: float32 weights, tokenizer, chat template.

Models of the llama architecture with the tokenizer of SmolLM; what else a file asks for is refused by name.
"""

import contextlib
import os
import shutil

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from treerl.errors import UserError, writing
from treerl.models import families, layout, weights
from treerl.models.transformer import Model, TransformerConfig

ARCHITECTURE, PRE_TOKENIZER = "llama", "smollm"
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_TOP = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def convert(path: str, folder: str, *, file_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that `weights.load` and transformers read; it appears under its name when it is complete.

    Args:
      path: of the file.
      folder: new, or empty.
      file_bytes: of one file of weights, at most, unless a single tensor is larger.

    Raises:
      UserError: the file is missing, damaged or of another architecture; the folder is in use or cannot be written.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder} is not empty; name a new folder for the model.")
    file = _File(path)
    config = _config(file)
    stored, tokenizer, settings = _tensors(file, config), _tokenizer(file), _settings(file, config)
    files = weights.split([row for row, _ in stored.values()], 4, file_bytes)
    partial = f"{folder.rstrip('/')}.partial"
    with writing(f"model {folder}", "free some space, or name another folder."):
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for name, rows in files.items():
            values = {row[0]: _values(file, row[0], stored[row[0]][1], config) for row in rows}
            weights.write_tensors(os.path.join(partial, name), values)
        if len(files) > 1:
            weights.write_index(partial, files, 4)
        tokenizer.save(os.path.join(partial, "tokenizer.json"))
        for name, value in settings.items():
            weights.write_json(os.path.join(partial, name), value)
        os.replace(partial, folder)


class _File:
    """Metadata and tensors of a GGUF file, still quantized."""

    def __init__(self, path: str):
        try:
            import gguf
        except ImportError as error:
            raise UserError(f"reading {path} needs the package gguf; pip install gguf.") from error
        self.path, self._dequantize = path, gguf.dequantize
        if not os.path.isfile(path):
            raise UserError(f"{path} is no file; name a GGUF file.")

        class Reader(gguf.GGUFReader):
            def _get(self, offset, dtype, count=1, **others):
                found = super()._get(offset, dtype, count, **others)
                if len(found) < count:  # or a damaged length would be counted up to
                    raise ValueError("it ends too early")
                return found

        with self.damage(), np.errstate(all="ignore"):
            reader = Reader(path)
            self._fields = reader.fields
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    @contextlib.contextmanager
    def damage(self):
        """Whatever goes wrong inside is the file's fault."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.path} is damaged or cut short ({reason}); copy the file again.") from error

    def refused(self, what: str) -> UserError:
        return UserError(f"{self.path} has {what}, which is not supported; convert it elsewhere, and give its folder.")

    def get(self, key: str, kind: type, default=None):
        """The value of a key; of no default, it must be there. Raises UserError where it is missing or no `kind`."""
        with self.damage():
            value = self._fields[key].contents() if key in self._fields else default
        if value is None:
            raise UserError(f"{self.path} has no {key}; use a file with all its metadata.")
        if type(value) is not kind:
            raise UserError(f"{self.path} has {key}={str(value)[:40]!r}, which is no {kind.__name__}; copy the file again.")
        return value

    def ids(self) -> dict[str, int]:
        """The ids of special tokens that the file names, such as {'eos': 2}."""
        keys = dict(bos="bos", eos="eos", pad="padding", unk="unknown", eot="eot")
        names = {ours: f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in keys.items()}
        return {ours: self.get(key, int) for ours, key in names.items() if key in self._fields}

    def values(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.tensors[name]
        if tensor.tensor_type.name in ("F64", "I8", "I16", "I32", "I64"):
            raise self.refused(f"tensor {name} of type {tensor.tensor_type.name}")
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                found = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise self.refused(f"tensor {name} of type {tensor.tensor_type.name}") from error
        if not np.all(np.isfinite(found)):
            raise UserError(f"{self.path} is damaged (tensor {name} is not finite); copy the file again.")
        return found


# --- the model ------------------------------------------------------------------------------------


def _config(file: _File) -> TransformerConfig:
    """The model's config. Raises UserError where the file is of another architecture or has a feature beyond it."""
    name = file.get("general.architecture", str)
    if name != ARCHITECTURE:
        raise file.refused(f"architecture {name!r}")
    get = lambda key, kind=int, default=None: file.get(f"{name}.{key}", kind, default)
    scaling = get("rope.scaling.type", str, "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise file.refused(f"rope scaling {scaling!r}" if scaling != "none" else "rope scaling (tensor rope_freqs.weight)")
    if get("expert_count", int, 0):
        raise file.refused("experts")
    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", int, width // max(heads, 1))
    decimal = lambda key, default=None: float(str(np.float32(get(key, float, default))))  # 1e-05, not 9.99999974e-06
    sizes = dict(
        vocab_size=get("vocab_size", int, len(file.get("tokenizer.ggml.tokens", list))),
        num_hidden_layers=get("block_count"), hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", int, heads), head_dim=head_dim,
        intermediate_size=get("feed_forward_length"), rope_theta=decimal("rope.freq_base", 10_000.0),
        rms_norm_eps=decimal("attention.layer_norm_rms_epsilon"), tie_word_embeddings="output.weight" not in file.tensors,
    )  # fmt: skip
    try:
        config = TransformerConfig(**families.fields(dict(sizes, architectures=["LlamaForCausalLM"])))
    except UserError as error:
        raise UserError(f"{file.path} is damaged ({str(error).rstrip('.')}); copy the file again.") from error
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise file.refused(f"{name}.{key}={get(key)} beside heads of {head_dim}")
    return config


def _tensors(file: _File, config: TransformerConfig) -> dict[str, tuple[tuple, str]]:
    """Name in the folder -> (row of `layout.tensors`, name in the file). Raises UserError where they do not fit."""
    found = {}
    for row in layout.tensors(config, Model(config).shapes()):
        name, shape = row[0], row[-1]
        theirs = _TOP.get(name)
        if theirs is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{layer}.{_LAYER[part]}"
        theirs += ".weight"
        if theirs not in file.tensors:
            raise UserError(f"{file.path} has no tensor {theirs}; copy the file again.")
        stored = tuple(int(n) for n in reversed(file.tensors[theirs].shape))
        if stored != shape:
            raise UserError(
                f"{file.path} is damaged (tensor {theirs} has shape {list(stored)}, its metadata say {list(shape)}); copy the file again."
            )
        found[name] = row, theirs
    if extra := sorted(file.tensors.keys() - {theirs for _, theirs in found.values()}):
        raise file.refused(f"a tensor {extra[0]}")
    return found


def _values(file: _File, name: str, theirs: str, config: TransformerConfig) -> np.ndarray:
    """A tensor as the folder has it.

    The rows of queries and keys stand in pairs (i, i + half) there, each pair turning by one angle; a folder has
    the first halves of a head before the second ones.
    """
    value = file.values(theirs)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        pairs = value.reshape(-1, config.head_dim // 2, 2, value.shape[-1])
        value = pairs.swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


# --- the tokenizer --------------------------------------------------------------------------------


def _tokenizer(file: _File) -> Tokenizer:
    """Byte-level BPE that splits digits singly; control tokens are special, user-defined ones are not."""
    for key, known in (("model", "gpt2"), ("pre", PRE_TOKENIZER)):
        if file.get(f"tokenizer.ggml.{key}", str) != known:
            raise file.refused(f"tokenizer.ggml.{key}={file.get(f'tokenizer.ggml.{key}', str)!r}")
    tokens, merges, kinds = (file.get(f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges", "token_type"))
    with file.damage():
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if wrong := [merge for merge, pair in zip(merges, pairs) if len(pair) != 2]:
            raise ValueError(f"merge {wrong[0]!r} is no pair")
        if not len(vocab) == len(tokens) == len(kinds):
            raise ValueError(f"{len(vocab)} distinct tokens of {len(tokens)}, {len(kinds)} types")
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        added = lambda kind: [AddedToken(t, special=kind == CONTROL, normalized=False) for t, k in zip(tokens, kinds) if k == kind]
        tokenizer.add_special_tokens(added(CONTROL))
        tokenizer.add_tokens(added(USER_DEFINED))
        if file.get("tokenizer.ggml.add_bos_token", bool, False):
            i = file.ids()["bos"]
            bos = tokens[i]
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, i)])
    return tokenizer


def _settings(file: _File, config: TransformerConfig) -> dict[str, dict]:
    """The JSON files beside weights and tokenizer."""
    ids, tokens = file.ids(), file.get("tokenizer.ggml.tokens", list)
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise UserError(f"{file.path} is damaged ({name} token {i} of {len(tokens)}); copy the file again.")
    if "eos" not in ids:
        raise UserError(f"{file.path} has no tokenizer.ggml.eos_token_id; use a file that says how answers end.")
    eos = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if name in ids))
    ids.pop("eot", None)
    special = {f"{name}_token_id": i for name, i in ids.items() if name != "unk"}
    special["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    context = file.get(f"{ARCHITECTURE}.context_length", int)
    hf = families.to_hf(config) | special | dict(max_position_embeddings=context, attention_bias=False, mlp_bias=False)
    words = {f"{name}_token": tokens[i] for name, i in ids.items()}
    words |= dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context, clean_up_tokenization_spaces=False)
    if template := file.get("tokenizer.chat_template", str, ""):
        words["chat_template"] = template
    return {"config.json": hf, "tokenizer_config.json": words, "generation_config.json": special}
