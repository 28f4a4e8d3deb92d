"""Every family against transformers: recorded logits always, transformers itself where it is installed."""

import dataclasses
import functools
import json

import families_oracle as O
import jax
import jax.numpy as jnp
import numpy as np
import paths_oracle
import pytest

from treerl import attention
from treerl.errors import UserError
from treerl.models import families, weights
from treerl.models.policy import packed_hidden
from treerl.models.presets import PRESETS
from treerl.models.transformer import Llama3Scaling, Model, TransformerConfig

FAMILIES = list(O.CONFIGS)
ROWS = O.TOKENS.shape[1] - O.PROMPT


@functools.cache
def model_of(name, seed=0):
    """(model, parameters) of a tiny model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        O.write(folder, name, seed)
        model = Model(families.from_folder(folder))
        return model, weights.load(folder, model)


def on_tokens(run):
    return lambda model, params: run(model, params, O.TOKENS, O.PROMPT, O.SHARED)


forward, stepped, packed = map(on_tokens, (paths_oracle.forward, paths_oracle.stepped, paths_oracle.packed))
PATHS = dict(forward=(forward, 0), stepped=(stepped, O.PROMPT - 1), packed=(packed, 0))


def difference(name, path, seed, want):
    run, start = PATHS[path]
    got = jax.jit(functools.partial(run, model_of(name, seed)[0]))(model_of(name, seed)[1])
    return float(np.max(np.abs(np.asarray(got) - want[:, start:])))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_recorded_ones(name, path):
    worst = difference(name, path, 0, O.golden(name))
    assert worst <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    """Other weights than the recorded ones; what was recorded is still what transformers gives."""
    pytest.importorskip("torch", reason="torch is not installed: only recorded logits are compared")
    pytest.importorskip("transformers", reason="transformers is not installed: only recorded logits are compared")
    O.write(tmp_path, name, seed=1)
    want = O.transformers_logits(tmp_path)
    worst = {path: difference(name, path, 1, want) for path in PATHS}
    assert max(worst.values()) <= 1e-4
    O.write(tmp_path, name)
    np.testing.assert_allclose(O.transformers_logits(tmp_path), O.golden(name), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, mean, most", [("float32", 1e-6, 1e-5), ("bfloat16", 0.02, 0.1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_and_learner_agree_on_log_probs(name, dtype, mean, most):
    """The bound that README states: nats by which log-probs of the same tokens differ, of models with random weights."""
    model, params = model_of(name)
    model = Model(dataclasses.replace(model.config, dtype=dtype))
    token, found = jnp.asarray(O.TOKENS)[:, O.PROMPT :, None], []
    for path in ("stepped", "packed"):
        run, start = PATHS[path]
        logits = run(model, params)[:, O.PROMPT - 1 - start : -1]
        found.append(np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), token, -1)))
    apart = np.abs(found[0] - found[1])
    assert apart.mean() <= mean and apart.max() <= most
    assert dtype == "float32" or apart.max() > 1e-4  # bfloat16 it was


def test_a_window_hides_and_a_longer_one_does_not():
    """The recorded model's window is shorter than its rollouts: without it the logits are others."""
    model, params = model_of("gemma3")
    wide = Model(dataclasses.replace(model.config, window=O.TOKENS.shape[1]))
    for run, start in PATHS.values():
        apart = np.abs(np.asarray(run(wide, params)) - O.golden("gemma3")[:, start:]).max(-1)  # [2, T]
        assert np.all(apart[:, -1] > 1e-2)
    assert np.all(np.abs(np.asarray(forward(wide, params)) - O.golden("gemma3"))[:, : model.config.window] < 1e-4)


def test_gradients_through_a_window_are_the_same_with_remat():
    model, params = model_of("gemma3")

    def loss(params, remat):
        module, hidden = packed_hidden(model, params, *jnp.split(bins, 3), remat=remat)
        return jnp.sum(module.logits(hidden) ** 2)

    index = np.arange(12)
    bins = jnp.asarray(np.stack([O.TOKENS[0], index, np.full(12, 12)]), jnp.int32)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for remat in ("products", "layers"):
        jax.tree.map(close, grad(params, "none"), grad(params, remat))


def test_the_kernel_is_used_unless_a_window_hides_something(monkeypatch):
    used = []
    recorded = lambda *tree: used.append("kernel") or attention.dense(*tree)
    monkeypatch.setattr(attention, "kernel", lambda head_dim, mesh: recorded)
    model, params = model_of("gemma3")
    stepped(model, params)
    assert used == []
    stepped(Model(dataclasses.replace(model.config, window=O.PROMPT + 2 + ROWS)), params)
    assert set(used) == {"kernel"}


def test_embeddings_are_scaled_in_the_dtype_of_activations():
    model, params = model_of("gemma3")
    half = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    got = half.merge(params).embed(jnp.asarray(O.TOKENS))
    factor = jnp.bfloat16(24**0.5)
    assert float(factor) != 24**0.5
    np.testing.assert_array_equal(got, jnp.asarray(params["embedding"], jnp.bfloat16)[O.TOKENS] * factor)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_survives_both_ways(name):
    config = TransformerConfig(**families.fields(O.CONFIGS[name]))
    assert TransformerConfig(**families.fields(families.to_hf(config))) == config


def test_what_a_config_json_says():
    llama, gemma = (families.fields(O.CONFIGS[name]) for name in ("llama3", "gemma3"))
    assert llama["rope_scaling"] == Llama3Scaling(8.0, 1.0, 4.0, 32) and llama["rope_theta"] == 500.0 and not llama["tied"]
    assert gemma["local"] == (True, True, False, True) and gemma["window"] == 4 and gemma["tied"]
    assert (gemma["rope_theta"], gemma["local_rope_theta"], gemma["query_scalar"]) == (800.0, 20.0, 5.0)
    older = {k: v for k, v in O.CONFIGS["gemma3"].items() if k != "layer_types"} | {"sliding_window_pattern": 2}
    assert families.fields(older)["local"] == (True, False, True, False)
    new = {k: v for k, v in O.CONFIGS["llama3"].items() if not k.startswith("rope")}
    new["rope_parameters"] = dict(O.CONFIGS["llama3"]["rope_scaling"], rope_theta=500.0)
    assert families.fields(new) == llama
    # the extended context, which only the scaling tells of a model without a source
    assert families.to_hf(TransformerConfig(**llama))["max_position_embeddings"] == 8 * 32


MILLIONS = {  # of parameters, as the model cards say
    "smollm2-135m": 134.5, "smollm2-360m": 361.8, "smollm2-1.7b": 1711, "gemma3-270m": 268.1, "gemma3-1b": 999.9,
    "qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "qwen3-8b": 8191, "llama3.2-1b": 1236, "llama3.2-3b": 3213,
    "llama3.1-8b": 8030, "qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1544, "qwen2.5-3b": 3086, "qwen2.5-7b": 7616,
}  # fmt: skip


def test_presets_have_the_published_number_of_parameters():
    assert set(MILLIONS) == set(PRESETS) - {"tiny"}
    for name, millions in MILLIONS.items():
        shapes = jax.tree.leaves(Model(TransformerConfig(**PRESETS[name])).shapes())
        assert abs(sum(x.size for x in shapes) / 1e6 / millions - 1) < 1e-3, name


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_an_architecture(preset):
    config = TransformerConfig(**PRESETS[preset])
    assert TransformerConfig(**families.fields(families.to_hf(config))) == config


def test_a_model_without_an_architecture_is_refused():
    config = TransformerConfig(**PRESETS["tiny"])
    for changes in (dict(qkv_bias=True), dict(embed_scale=True), dict(query_scalar=3.0), dict(local=(True,) * 3, window=2)):
        with pytest.raises(UserError, match="no known architecture has this model's .*; known are LlamaForCausalLM, "):
            families.to_hf(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama3", dict(architectures=["MixtralForCausalLM"]), f"architecture 'MixtralForCausalLM' of config.json is unknown; known are {', '.join(families.FAMILIES)}."),
        ("llama3", dict(architectures=None, model_type="gpt2"), "architecture 'gpt2' of config.json is unknown"),
        ("llama3", dict(attention_bias=True), "sets attention_bias=True, which is not supported"),
        ("llama3", dict(mlp_bias=True), "sets mlp_bias=True, which"),
        ("llama3", dict(rope_scaling=dict(type="yarn", factor=4.0)), "sets rope_scaling type='yarn', which"),
        ("gemma3", dict(rope_scaling=dict(rope_type="linear", factor=8.0)), "sets rope_scaling type='linear', which"),
        ("llama3", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "config.json has no low_freq_factor; add it."),
        ("qwen2", dict(use_sliding_window=True), "sets use_sliding_window=True, which"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sets layer_types='sliding_attention', which"),
        ("gemma3", dict(attn_logit_softcapping=50.0), "sets attn_logit_softcapping=50.0, which"),
        ("gemma3", dict(final_logit_softcapping=30.0), "sets final_logit_softcapping=30.0, which"),
        ("gemma3", dict(use_bidirectional_attention=True), "sets use_bidirectional_attention=True, which"),
        ("gemma3", dict(layer_types=["full_attention"]), "has 1 layer_types for num_hidden_layers=4; give one a layer."),
        ("gemma3", dict(layer_types=["chunked_attention"] * 4), "sets layer_types='chunked_attention', which"),
        ("gemma3", dict(sliding_window=None), "config.json has no sliding_window; add it."),
        ("smollm2", dict(hidden_act="relu"), "sets hidden_act='relu', which"),
        ("smollm2", dict(partial_rotary_factor=0.5), "sets partial_rotary_factor=0.5, which"),
        ("smollm2", dict(quantization_config=dict(bits=4)), "sets quantization_config="),
        ("smollm2", dict(hidden_size=None), "config.json has no hidden_size; add it."),
        ("smollm2", dict(hidden_size="24"), "sets hidden_size='24'; it must be a whole number above 0."),
        ("smollm2", dict(num_hidden_layers=2.5), "sets num_hidden_layers=2.5; it must be a whole number above 0."),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(name, changes, message):
    with pytest.raises(UserError) as error:
        families.fields({**O.CONFIGS[name], **changes})
    assert message in str(error.value)


@pytest.mark.parametrize("text, message", [(None, "config.json cannot be read"), ("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_an_unreadable_config_is_one_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        families.from_folder(str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(activation="relu"), "model.activation='relu' is unknown; known are silu, gelu_tanh"),
        (dict(local=(True,)), "model.local says which of 1 layers are local, model.layers=3"),
        (dict(local=(True,) * 3), "model.window=0 cannot work with local layers"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**PRESETS["tiny"], **changes)


def test_config_is_hashable_and_json_is_plain():
    config = TransformerConfig(**families.fields(O.CONFIGS["gemma3"]))
    assert hash(config) == hash(dataclasses.replace(config))
    assert json.loads(json.dumps(families.to_hf(config))) == families.to_hf(config)
