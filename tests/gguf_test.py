"""GGUF files to folders: a tiny model written here, and what is wrong with a file."""

import json
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from treerl import attention
from treerl.errors import UserError
from treerl.models import families, gguf, weights
from treerl.models.transformer import Model
from treerl.tokenizers import TextTokenizer

G = pytest.importorskip("gguf", reason="pip install gguf to run this")
KINDS = G.GGMLQuantizationType
LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN = 2, 64, 4, 2, 16, 96
SPECIAL, ADDED = ["<unk>", "<s>", "</s>"], ["<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "1 2"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES] + ADDED
TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - len(ADDED)) + [4] * len(ADDED)
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
# of the folder and of the file
NAMES = {
    "self_attn.q_proj": ("attn_q", HEADS * SIZE, WIDTH), "self_attn.k_proj": ("attn_k", KV_HEADS * SIZE, WIDTH),
    "self_attn.v_proj": ("attn_v", KV_HEADS * SIZE, WIDTH), "self_attn.o_proj": ("attn_output", WIDTH, HEADS * SIZE),
    "mlp.gate_proj": ("ffn_gate", HIDDEN, WIDTH), "mlp.up_proj": ("ffn_up", HIDDEN, WIDTH),
    "mlp.down_proj": ("ffn_down", WIDTH, HIDDEN), "input_layernorm": ("attn_norm", WIDTH),
    "post_attention_layernorm": ("ffn_norm", WIDTH),
}  # fmt: skip
METADATA = {
    "llama.block_count": LAYERS, "llama.context_length": 128, "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 500.0, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(TOKENS),
    "llama.rope.dimension_count": SIZE, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES, "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip


def paired(rows, heads):
    """Rows of queries or keys as llama.cpp wants them: 0, half, 1, half + 1, ... of each head."""
    half = SIZE // 2
    order = [head * SIZE + i + part for head in range(heads) for i in range(half) for part in (0, half)]
    return rows[order]


def write(path, tied=False, architecture="llama", without=(), seed=0, tensors=None, **changes):
    """Writes a model's file; returns the tensors that its folder should have, dequantized."""
    rng, found, stored = np.random.default_rng(seed), {}, {}
    shapes = {"model.embed_tokens": ("token_embd", len(TOKENS), WIDTH), "model.norm": ("output_norm", WIDTH)}
    if not tied:
        shapes["lm_head"] = ("output", len(TOKENS), WIDTH)
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{k}": (f"blk.{i}.{name}", *shape) for k, (name, *shape) in NAMES.items()}
    for name, (theirs, *shape) in shapes.items():
        value = (rng.normal(size=shape) * shape[-1] ** -0.5 + (len(shape) == 1)).astype(np.float32)
        kind = KINDS.F32 if len(shape) == 1 else KINDS.Q8_0 if theirs == "token_embd" else KINDS.Q4_1
        found[f"{name}.weight"] = G.dequantize(G.quantize(value, kind), kind)
        heads = dict(attn_q=HEADS, attn_k=KV_HEADS).get(theirs.split(".")[-1])
        value = paired(value, heads) if heads else value
        stored[f"{theirs}.weight"] = G.quantize(value, kind), kind
    stored |= tensors or {}
    writer = G.GGUFWriter(path, architecture)
    put = {
        str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in (METADATA | {k.replace("__", "."): v for k, v in changes.items()}).items():
        if key not in without:
            put[type(value)](key, value)
    for name, (value, kind) in stored.items():
        if name not in without:
            writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def read_json(folder, name) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_the_file_dequantized_and_in_order(tmp_path, tied):
    want = write(tmp_path / "m.gguf", tied)
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == want.keys() and ("lm_head.weight" in got) == (not tied)
    for name, value in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "out"]


def test_the_folder_is_read_as_the_model_it_is(tmp_path):
    write(tmp_path / "m.gguf")
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    config = families.from_folder(str(tmp_path / "out"))
    assert (config.layers, config.width, config.heads, config.kv_heads) == (LAYERS, WIDTH, HEADS, KV_HEADS)
    assert (config.head_dim, config.hidden, config.vocab, config.tied) == (SIZE, HIDDEN, len(TOKENS), False)
    assert (config.rope_theta, config.norm_eps) == (500.0, 1e-5)  # the decimals, not the nearest float32
    model = Model(config)
    module = model.merge(weights.load(str(tmp_path / "out"), model))
    token = jnp.asarray([[5, 6, 7]])
    hidden, _ = module(token, jnp.arange(3)[None], attention.causal(jnp.array([3])))
    assert np.all(np.isfinite(module.logits(hidden)))
    hf = read_json(tmp_path / "out", "config.json")
    assert (hf["architectures"], hf["max_position_embeddings"]) == (["LlamaForCausalLM"], 128)
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    assert special.items() <= hf.items() and read_json(tmp_path / "out", "generation_config.json") == special


def test_large_models_are_written_in_shards(tmp_path):
    want = write(tmp_path / "m.gguf")
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"), file_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    got = {name: value for file in files for name, value in load_file(file).items()}
    assert got.keys() == want.keys() == read_json(tmp_path / "out", "model.safetensors.index.json")["weight_map"].keys()
    model = Model(families.from_folder(str(tmp_path / "out")))
    params = weights.load(str(tmp_path / "out"), model)
    np.testing.assert_array_equal(params["embedding"], want["model.embed_tokens.weight"])


def test_the_tokenizer_splits_digits_and_knows_added_tokens(tmp_path):
    write(tmp_path / "m.gguf")
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    tokenizer = TextTokenizer(str(tmp_path / "out"))
    words = lambda text: [TOKENS[i] for i in tokenizer.encode(text)]
    assert words("hello to") == ["hello", "Ġt", "o"]
    assert words("12") == ["1", "2"]  # the merge of both never comes to pass
    assert words("a  1") == ["a", "Ġ", "Ġ", "1"] and words("<s>hello</s><tool>") == ["<s>", "hello", "</s>", "<tool>"]
    for text in ("é日🙂\n\t 1,234", "a  1", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("<s>x<tool>y</s>z")) == "x<tool>y"  # special tokens go, others stay
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (len(TOKENS), (2,), 2)
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_a_file_may_ask_for_a_first_token_and_name_a_second_end(tmp_path):
    write(tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=True, tokenizer__ggml__eot_token_id=0)
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    assert read_json(tmp_path / "out", "generation_config.json")["eos_token_id"] == [2, 0]
    tokenizer = TextTokenizer(str(tmp_path / "out"))
    assert tokenizer.eos_ids == (2, 0) and tokenizer.encode("h") == [TOKENS.index("h")]
    whole = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert whole.encode("h").tokens == ["<s>", "h"] and whole.encode("h", add_special_tokens=False).tokens == ["h"]


def test_what_metadata_leave_out_has_its_usual_value(tmp_path):
    key = "llama.attention.key_length"
    left_out = ["llama.attention.head_count_kv", "llama.vocab_size", "llama.rope.freq_base", "tokenizer.chat_template"]
    same = {f"blk.{i}.attn_{x}.weight": (np.ones((WIDTH, WIDTH), np.float32), KINDS.F32) for i in range(LAYERS) for x in "kv"}
    write(tmp_path / "m.gguf", without=left_out, tensors=same, **{key: SIZE})
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    config = families.from_folder(str(tmp_path / "out"))
    assert (config.kv_heads, config.vocab, config.rope_theta) == (HEADS, len(TOKENS), 10_000.0)
    assert "chat_template" not in read_json(tmp_path / "out", "tokenizer_config.json")


ODD = {"blk.0.attn_q.bias": (np.ones(WIDTH, np.float32), KINDS.F32)}
SHORT = {"output_norm.weight": (np.ones(WIDTH - 1, np.float32), KINDS.F32)}
WIDE = {"output_norm.weight": (np.ones(WIDTH), KINDS.F64)}
NAN = {"output_norm.weight": (np.full(WIDTH, np.nan, np.float32), KINDS.F32)}
ROPE = {"rope_freqs.weight": (np.ones(SIZE // 2, np.float32), KINDS.F32)}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architecture="qwen2"), "m.gguf has architecture 'qwen2', which is not supported; convert it elsewhere, and give its folder."),
        (dict(tokenizer__ggml__pre="llama-bpe"), "has tokenizer.ggml.pre='llama-bpe', which is not supported"),
        (dict(tokenizer__ggml__model="llama"), "has tokenizer.ggml.model='llama', which is not supported"),
        (dict(llama__rope__scaling__type="yarn"), "has rope scaling 'yarn', which is not supported"),
        (dict(tensors=ROPE), "has rope scaling (tensor rope_freqs.weight), which is not supported"),
        (dict(llama__rope__dimension_count=8), "has llama.rope.dimension_count=8 beside heads of 16, which is not supported"),
        (dict(llama__expert_count=8), "has experts, which is not supported"),
        (dict(tensors=ODD), "has a tensor blk.0.attn_q.bias, which is not supported"),
        (dict(tensors=WIDE), "has tensor output_norm.weight of type F64, which is not supported"),
        (dict(tensors=SHORT), "is damaged (tensor output_norm.weight has shape [63], its metadata say [64]); copy the file again."),
        (dict(tensors=NAN), "is damaged (tensor output_norm.weight is not finite); copy the file again."),
        (dict(without=["blk.1.ffn_up.weight"]), "has no tensor blk.1.ffn_up.weight; copy the file again."),
        (dict(without=["llama.block_count"]), "has no llama.block_count; use a file with all its metadata."),
        (dict(without=["tokenizer.ggml.eos_token_id"]), "has no tokenizer.ggml.eos_token_id; use a file that says how answers end."),
        (dict(llama__block_count="two"), "has llama.block_count='two', which is no int; copy the file again."),
        (dict(llama__block_count=0), "is damaged (config.json sets num_hidden_layers=0; it must be a whole number above 0); copy"),
        (dict(llama__attention__head_count=0), "is damaged (config.json sets num_attention_heads=0;"),
        (dict(llama__vocab_size=100), "is damaged (tensor token_embd.weight has shape [266, 64], its metadata say [100, 64])"),
        (dict(tokenizer__ggml__eos_token_id=266), "is damaged (eos token 266 of 266); copy the file again."),
        (dict(tokenizer__ggml__tokens=TOKENS[:-1] + TOKENS[:1]), "is damaged or cut short (265 distinct tokens of 266, 266 types)"),
        (dict(tokenizer__ggml__merges=["h e", "q x z"]), "is damaged or cut short (merge 'q x z' is no pair)"),
        (dict(tokenizer__ggml__merges=["h q"]), "is damaged or cut short (Error while initializing BPE: Token `hq` out of vocabulary"),
    ],
)  # fmt: skip
def test_what_is_not_supported_or_wrong_is_one_sentence(tmp_path, changes, message):
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError) as error:
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_cut_anywhere_is_one_sentence(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in [0, 3, 4, 20, *range(100, len(whole), len(whole) // 40), len(whole) - 40]:
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="m.gguf is damaged or cut short .*; copy the file again."):
            gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8 + 6
    (tmp_path / "m.gguf").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])  # 2^55 types
    with pytest.raises(UserError, match="is damaged or cut short .it ends too early."):
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    (tmp_path / "m.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(UserError, match="is damaged or cut short .GGUF magic invalid."):
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_missing_file_a_folder_in_use_and_a_missing_library_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="m.gguf is no file; name a GGUF file."):
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    write(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="is not empty; name a new folder for the model."):
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="m.gguf needs the package gguf; pip install gguf."):
        gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))


def test_what_a_kill_left_behind_is_replaced_and_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/left").write_text("half")

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(gguf.weights, "write_tensors", full)
        with pytest.raises(UserError, match="out cannot be written .No space left on device.; free some space"):
            gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    gguf.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "out"] and not (tmp_path / "out/left").exists()
