"""Tiny models of every family as Hugging Face folders, and the logits that transformers gives for them.

The names and shapes of tensors are written down here once more, not taken from `treerl.models.layout`.
`python tests/families_oracle.py` (needs torch and transformers) records the logits into families_golden.npz.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).with_name("families_golden.npz")
# two rollouts of one tree: a prompt of 5 tokens, 3 that they share, then 4 of each one's own
PROMPT, SHARED = 5, 3
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 11, 8], [3, 1, 4, 1, 5, 9, 2, 6, 7, 12, 0, 13]], np.int32)

_common = dict(
    vocab_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=32, rms_norm_eps=1e-5, max_position_embeddings=64, torch_dtype="float32",
    bos_token_id=0, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
_llama = dict(_common, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
_qwen = lambda n, **more: dict(
    _common, architectures=[f"Qwen{n}ForCausalLM"], model_type=f"qwen{n}", hidden_act="silu", rope_theta=300.0,
    use_sliding_window=False, sliding_window=4, max_window_layers=1, **more,
)  # fmt: skip
_gemma = dict(
    _common, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh",
    head_dim=8, query_pre_attn_scalar=5, sliding_window=4, rope_theta=800.0, rope_local_base_freq=20.0,
    attn_logit_softcapping=None, final_logit_softcapping=None,
)  # fmt: skip
CONFIGS = {
    "qwen2": _qwen(2, tie_word_embeddings=True),
    "qwen2, untied": _qwen(2, tie_word_embeddings=False),
    "qwen3": _qwen(3, head_dim=8, tie_word_embeddings=False),
    "llama3": dict(
        _llama, rope_theta=500.0, tie_word_embeddings=False, head_dim=8,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "smollm2": dict(_llama, num_attention_heads=3, num_key_value_heads=1, rope_theta=100.0, tie_word_embeddings=True),
    "gemma3": dict(
        _gemma, num_hidden_layers=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3, rope_parameters": {
        **{k: v for k, v in _gemma.items() if not k.startswith("rope")},
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": dict(rope_type="default", rope_theta=800.0),
            "sliding_attention": dict(rope_type="default", rope_theta=20.0),
        },
    },
}  # fmt: skip


def shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model."""
    d, f = hf["hidden_size"], hf["intermediate_size"]
    size = hf.get("head_dim", d // hf["num_attention_heads"])
    q, kv = hf["num_attention_heads"] * size, hf["num_key_value_heads"] * size
    gemma = hf["model_type"] == "gemma3_text"
    found = {"model.embed_tokens.weight": (hf["vocab_size"], d), "model.norm.weight": (d,)}
    if not hf.get("tie_word_embeddings", gemma):
        found["lm_head.weight"] = (hf["vocab_size"], d)
    for i in range(hf["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        layer |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        if gemma:
            layer |= {"pre_feedforward_layernorm": (d,), "post_feedforward_layernorm": (d,)}
        if gemma or hf["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if hf["model_type"] == "qwen2":
            found |= {f"model.layers.{i}.self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
    return found


def weights(hf: dict, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors of a model; norms near 1, of Gemma near 0."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes(hf).items():
        value = rng.normal(size=shape) * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        value += name.endswith("norm.weight") and hf["model_type"] != "gemma3_text"
        found[name] = value.astype(dtype)
    return found


def write(folder, name: str, seed: int = 0, dtype: str = "float32", **changes) -> dict[str, np.ndarray]:
    """Writes a tiny model's folder; returns its tensors."""
    hf = {**CONFIGS[name], "torch_dtype": dtype, **changes}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = weights(hf, seed, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def transformers_logits(folder) -> np.ndarray:
    """Logits [2, 12, V] of TOKENS by transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def golden(name: str) -> np.ndarray:
    """The recorded logits of a tiny model. Raises ValueError if its config has changed since."""
    with np.load(GOLDEN) as stored:
        if json.loads(str(stored[f"{name}/config"])) != CONFIGS[name]:
            raise ValueError(f"the config of {name} is not the recorded one; record the logits again.")
        return stored[f"{name}/logits"]


def main():
    import tempfile

    found = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write(folder, name)
            found[f"{name}/config"], found[f"{name}/logits"] = json.dumps(CONFIGS[name]), transformers_logits(folder)
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
