"""Families of published models: a Hugging Face config.json to the fields of `TransformerConfig`, and back.

Everything comes from the file. What the transformer cannot do is refused by name, never ignored; keys that change
no number of a forward pass (dropout, ids of special tokens, the longest context) are left alone.
"""

import json
import os
from typing import NamedTuple

from treerl.errors import UserError
from treerl.models.transformer import Llama3Scaling, TransformerConfig


class Family(NamedTuple):
    """One architecture: what its code fixes, and what it takes for granted where a config.json is silent."""

    model_type: str
    switches: dict  # fields of TransformerConfig
    tied: bool = False  # tie_word_embeddings
    head_dim: int | None = None  # None: width / heads
    rope_theta: float = 10_000.0
    only: dict = {}  # keys of config.json with one supported value beside null, further to those of all


FAMILIES = {
    "LlamaForCausalLM": Family("llama", {}),  # Llama 3.x, SmolLM2
    "Qwen2ForCausalLM": Family("qwen2", dict(qkv_bias=True)),  # Qwen2.5 too
    "Qwen3ForCausalLM": Family("qwen3", dict(qk_norm=True), head_dim=128),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", dict(qk_norm=True, embed_scale=True, norm_plus_one=True, post_norms=True),
        tied=True, head_dim=256, rope_theta=1e6,
    ),
}  # fmt: skip
_SWITCHES = ("qkv_bias", "qk_norm", "embed_scale", "norm_plus_one", "post_norms")
_GEMMA = "Gemma3ForCausalLM"

# keys that have one supported value beside null
_ONLY = {
    "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "use_bidirectional_attention": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "quantization_config": None,
    "partial_rotary_factor": 1.0, "rope_interleaved": False,
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_NAME_ONE = "name a folder with a model in Hugging Face's format."
_SIZES = dict(
    vocab="vocab_size", layers="num_hidden_layers", width="hidden_size", heads="num_attention_heads",
    hidden="intermediate_size",
)  # fmt: skip


def read(folder: str) -> dict:
    """The config.json of a folder. Raises UserError where it is missing or no JSON object."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_NAME_ONE}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; {_NAME_ONE}")
    return found


def from_folder(folder: str, **others) -> TransformerConfig:
    """The config of the model in a folder; `others` are fields that no config.json decides, such as dtype."""
    return TransformerConfig(**fields(read(folder)), **others)


def fields(hf: dict) -> dict:
    """Keyword arguments of `TransformerConfig` from a config.json.

    Raises:
      UserError: for an architecture or a feature that is not supported, or a key that is missing or of a wrong type.
    """
    name = _architecture(hf)
    family = FAMILIES[name]
    for key, only in (_ONLY | family.only).items():
        if hf.get(key) not in (None, only):
            raise _refused(key, hf[key])
    act = "hidden_activation" if name == _GEMMA else "hidden_act"
    activation = hf.get(act, "gelu_pytorch_tanh" if name == _GEMMA else "silu")
    if activation not in _ACTIVATIONS:
        raise _refused(act, activation)
    found = {field: _number(hf, key, int) for field, key in _SIZES.items()}
    found |= dict(
        kv_heads=_number(hf, "num_key_value_heads", int, found["heads"]),
        head_dim=_number(hf, "head_dim", int, family.head_dim or found["width"] // found["heads"]),
        norm_eps=_number(hf, "rms_norm_eps", float, 1e-6),
        activation=_ACTIVATIONS[activation],
        tied=bool(hf.get("tie_word_embeddings", family.tied)),
        **family.switches,
    )
    kinds = _layer_types(hf, name, found["layers"])
    found["rope_theta"], found["rope_scaling"] = _rope(hf, "full_attention", "rope_theta", family.rope_theta)
    if name == _GEMMA:
        found["query_scalar"] = _number(hf, "query_pre_attn_scalar", float, 256.0)
    if "sliding_attention" in kinds:
        theta, scaling = _rope(hf, "sliding_attention", "rope_local_base_freq", 10_000.0)
        if scaling is not None:
            raise _refused("rope_parameters.sliding_attention.rope_type", "llama3")
        found |= dict(
            local=tuple(kind == "sliding_attention" for kind in kinds),
            window=_number(hf, "sliding_window", int), local_rope_theta=theta,
        )  # fmt: skip
    return found


def to_hf(config: TransformerConfig) -> dict:
    """The config.json of a model, in the keys that every version of transformers reads.

    Raises:
      UserError: if no architecture of Hugging Face's has this set of switches.
    """
    switches = {key: True for key in _SWITCHES if getattr(config, key)}
    name = next((name for name, family in FAMILIES.items() if family.switches == switches), None)
    odd = name != _GEMMA and (any(config.local) or config.query_scalar not in (None, config.head_dim))
    if name is None or odd:
        given = ", ".join([*switches, *(("local or query_scalar",) if odd else ())])
        raise UserError(f"no known architecture has this model's {given} alone; known are {', '.join(FAMILIES)}.")
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation]
    found = {key: getattr(config, field) for field, key in _SIZES.items()} | dict(
        architectures=[name], model_type=FAMILIES[name].model_type, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied,
        rope_theta=config.rope_theta, torch_dtype=config.param_dtype,
    )  # fmt: skip
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        found["rope_scaling"] = dict(
            rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
            original_max_position_embeddings=original,
        )  # fmt: skip
        found["max_position_embeddings"] = int(factor * original)
    if name != _GEMMA:
        return found | dict(hidden_act=act)
    local, scalar = config.local or (False,) * config.layers, config.query_scalar or config.head_dim
    return found | dict(
        hidden_activation=act, query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
        layer_types=["sliding_attention" if x else "full_attention" for x in local],
        sliding_window=config.window, rope_local_base_freq=config.local_rope_theta,
    )  # fmt: skip


def _architecture(hf: dict) -> str:
    kind = hf.get("model_type")
    names = hf.get("architectures") or [name for name, family in FAMILIES.items() if family.model_type == kind]
    name = names[0] if isinstance(names, list) and names else None
    if name not in FAMILIES:
        raise UserError(f"architecture {name or kind!r} of config.json is unknown; known are {', '.join(FAMILIES)}.")
    return name


def _refused(key: str, value) -> UserError:
    return UserError(f"config.json sets {key}={value!r}, which is not supported; use a model without it.")


def _number(hf: dict, key: str, kind: type, default=None):
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json has no {key}; add it.")
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise UserError(f"config.json sets {key}={value!r}; it must be a{' whole' * (kind is int)} number above 0.")
    return kind(value)


def _layer_types(hf: dict, name: str, layers: int) -> list[str]:
    kinds = hf.get("layer_types")
    if kinds is None and name == _GEMMA:  # files from before layer_types: every n-th layer is global
        every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    kinds = kinds or ["full_attention"] * layers
    known = {"full_attention", "sliding_attention"} if name == _GEMMA else {"full_attention"}
    for kind in kinds:
        if kind not in known:
            raise _refused("layer_types", kind)
    if len(kinds) != layers:
        raise UserError(f"config.json has {len(kinds)} layer_types for num_hidden_layers={layers}; give one a layer.")
    return kinds


def _rope(hf: dict, kind: str, key: str, theta: float) -> tuple[float, Llama3Scaling | None]:
    """(theta, scaling) of one kind of layer.

    From `rope_parameters` (transformers 5; per kind of layer in Gemma's), else from the older `key` and `rope_scaling`.
    """
    new = hf.get("rope_parameters") or {}
    new = new.get(kind) or {} if "full_attention" in new or "sliding_attention" in new else new
    old = hf.get("rope_scaling") or {} if kind == "full_attention" else {}
    given = new or dict(old)
    style = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor", given["partial_rotary_factor"])
    theta = _number(given if "rope_theta" in given else {"rope_theta": hf.get(key)}, "rope_theta", float, theta)
    if style == "default":
        return theta, None
    if style != "llama3":
        raise _refused("rope_scaling type", style)
    return theta, Llama3Scaling(
        *(_number(given, key, float) for key in ("factor", "low_freq_factor", "high_freq_factor")),
        _number(given, "original_max_position_embeddings", int, hf.get("max_position_embeddings")),
    )
