"""Peers of the benchmarks: what is missing or fails costs a line; the rest needs their packages and is skipped without them."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from bench_test import TINY, TOY

from treerl import bench
from treerl.bench import learner, measure, peers, sampler
from treerl.models.presets import PRESETS
from treerl.models.transformer import Model, TransformerConfig

SIZES = dict(vocab=50, layers=1, width=16, heads=4, kv_heads=2, head_dim=8, hidden=16)
CONFIGS = {"qwen2": TransformerConfig(**SIZES, qkv_bias=True), "qwen3": TransformerConfig(**SIZES, qk_norm=True, tied=False)}
PROMPTS = np.random.default_rng(0).integers(0, 50, (2, 6))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)


@pytest.mark.parametrize("name", CONFIGS)
def test_families(name):
    assert peers.family(CONFIGS[name]) == name
    assert {peers.family(measure.model_config(shape["preset"])) for shape in bench.SHAPES.values()} == {"qwen2", "qwen3"}


@pytest.mark.parametrize("preset", ["gemma3-1b", "llama3.2-1b", "smollm2-135m"])
def test_a_shape_that_no_peer_has(preset, capsys):
    assert peers.tunix(measure.model_config(preset), PROMPTS, slots=2, rows=3) is None
    assert capsys.readouterr().err == "bench: tunix is left out: it has no model of this shape\n"


def test_missing_packages_cost_a_line_each(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tunix", None)  # an import of it fails
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.tunix(CONFIGS["qwen2"], PROMPTS, slots=2, rows=3) is None
    assert peers.outside("sampler", None) == peers.outside("learner", "A") == {}
    assert capsys.readouterr().err.splitlines() == [
        "bench: tunix is left out: No module named 'tunix.generate'; 'tunix' is not a package",
        "bench: transformers_static is left out: no package torch",
        "bench: transformers_update is left out: no package torch",
    ]


def test_a_suite_goes_on_without_its_peers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tunix", None)
    rows = {row["name"] for row in sampler.rows(rules=("stochastic",), beside=True, **TOY["sampler"])}
    assert "stochastic.call" in rows and not any(name.startswith("tunix") for name in rows)
    assert capsys.readouterr().err.count("\n") == 1


def test_prompts_are_halved_until_they_fit(monkeypatch, capsys):
    tried = []

    def make(config, prompts, *, slots, rows):
        tried.append(prompts.shape[1])
        if prompts.shape[1] > 64:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nand more")
        return lambda: np.zeros(3)

    monkeypatch.setattr(peers, "tunix_call", make)
    found = peers.tunix(CONFIGS["qwen2"], np.zeros((2, 256), int), slots=2, rows=3)
    assert tried == [256, 128, 64] and found.prompt == 64
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("256 tokens is left out: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    assert "128 tokens" in second
    assert peers.tunix(CONFIGS["qwen2"], np.zeros((2, 127), int), slots=2, rows=3) is None


def outside(suite: str, **changes) -> dict:
    times = dict(first_seconds=9.0, seconds=[3.0, 1.0, 2.0], peak_bytes=77)
    return {peers.OUTSIDE[suite].__name__: times, "sizes": {k: TOY[suite][k] for k in peers.SAME} | changes}


def test_rows_of_peers_say_what_they_are_compared_with(monkeypatch):
    """A peer in the same turns that holds two tokens of each prompt, and one that ran before, elsewhere."""
    calls = []
    monkeypatch.setattr(peers, "tunix", lambda *_, **__: peers.Peer(lambda: calls.append(1) or np.zeros(1), 5.0, 2))
    found = sampler.rows(rules=("stochastic",), beside=True, outside=outside("sampler"), **TOY["sampler"])
    rows = {row["name"]: row for row in found}
    assert rows["tunix.call"]["versus"] == "stochastic_prompt_2.call" and len(calls) == 1 + TOY["sampler"]["repeats"]
    assert rows["tunix.first_call"]["value"] == 5 and "tunix.peak_memory" not in rows
    other = rows["transformers_static.call"]
    assert other["versus"] == "stochastic.call" and other["value"] == pytest.approx(1e3 * 2 / 8)
    assert other["ratio"] == pytest.approx(other["value"] / rows["stochastic.call"]["value"])
    assert rows["transformers_static.tokens"]["value"] == 2 * 4 * 8 / 2
    assert rows["transformers_static.peak_memory"]["value"] == 77


@pytest.mark.slow
def test_the_update_is_compared_with_the_fastest_bins():
    found = learner.rows(outside=outside("learner"), **dict(TOY["learner"], bin_tokens=(16, 32)))
    rows = {row["name"]: row for row in found}
    fastest = min(("packed_16", "packed_32"), key=lambda name: rows[name]["value"])
    update = rows["transformers_update"]
    assert update["versus"] == fastest and update["ratio"] == pytest.approx(2 / rows[fastest]["value"])
    assert rows["transformers_update.tokens"]["value"] == rows["flattened_tokens"]["value"] / 2
    flops = measure.learning_flops(measure.model_config("toy"), rows["flattened_tokens"]["value"])
    assert rows["transformers_update.utilisation"]["value"] == pytest.approx(flops / 2 / rows["matrix_peak"]["value"] / 1e12)


def test_what_was_measured_at_other_sizes_is_left_out(capsys):
    assert peers.matching(None, TOY["sampler"]) == peers.matching({}, TOY["sampler"]) == {}
    assert list(peers.matching(outside("sampler"), TOY["sampler"])) == ["transformers_static"]
    assert peers.matching(outside("sampler", rows=9), TOY["sampler"]) == {}
    assert "transformers_static is left out: measured at {'preset': 'toy'" in capsys.readouterr().err


def test_a_child_that_fails_costs_a_line(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    asked = []

    def ends(returncode, stdout="", stderr=""):
        def run(command, *, env, **_):
            asked.append((command[1:], env["JAX_PLATFORMS"]))
            if returncode is None:
                raise subprocess.TimeoutExpired(command, peers.SECONDS)
            return types.SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)

        monkeypatch.setattr(peers.subprocess, "run", run)

    ends(1, stderr="Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    assert peers.outside("sampler", "B") == {}
    ends(None)
    assert peers.outside("learner", None) == {}
    ends(-9)
    assert peers.outside("learner", None) == {}
    ends(0, stdout=json.dumps(outside("learner")) + "\n")
    assert peers.outside("learner", None) == outside("learner")
    assert capsys.readouterr().err.splitlines() == [
        "bench: transformers_static is left out: torch.OutOfMemoryError: CUDA out of memory.",
        "bench: transformers_update is left out: more than 420 s",
        "bench: transformers_update is left out: exit status -9",
    ]
    assert asked[0] == (["-m", "treerl.bench.peers", "sampler", "B"], "cpu") and asked[1][0][2:] == ["learner"]


def test_torch_goes_first_and_only_where_it_is_asked_for(monkeypatch):
    order = []

    def suite(name):
        def rows(**arguments):
            order.append((name, arguments))
            yield {}

        return rows

    monkeypatch.setattr(bench, "SUITES", {name: suite(name) for name in bench.SUITES})
    monkeypatch.setattr(peers, "outside", lambda suite, shape: order.append((suite, shape)) or {"found": shape})
    list(bench.run("sampler", ["A", "B"], beside=True))
    assert order == [
        ("sampler", "A"), ("sampler", "B"),
        ("sampler", dict(shape="A", beside=True, outside={"found": "A"})),
        ("sampler", dict(shape="B", beside=True, outside={"found": "B"})),
    ]  # fmt: skip
    order.clear()
    for name in ("learner", "step", "growth"):
        list(bench.run(name))
    assert order == [("learner", dict(shape=None, beside=False, outside=None)), ("step", dict(shape=None)), ("growth", {})]


def test_torch_finds_a_device_that_jax_has_not_taken():
    """Importing the suites must not start JAX: on a GPU it takes most of the memory at once."""
    code = "from jax._src import xla_bridge; from treerl import bench; print(xla_bridge.backends_are_initialized())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# --- with the packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_tunix_draws_every_line_to_its_end(name):
    pytest.importorskip("tunix")
    found = peers.tunix(CONFIGS[name], PROMPTS, slots=3, rows=7)
    lines = np.stack(found.call())
    assert lines.shape == (6, 7) and found.prompt == 6 and 0 <= lines.min() and lines.max() < 50


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_peers_run(name):
    pytest.importorskip("torch")
    config, sizes = CONFIGS[name], dict(slots=3, rows=7)
    for program in (peers.transformers_static, peers.transformers_update):
        found = program(config, PROMPTS, sizes, repeats=1)
        assert found["first_seconds"] > 0 and len(found["seconds"]) == 1 and found["peak_bytes"] == 0
    model = peers.torch_model(config)
    assert (model.config.model_type, model.config.tie_word_embeddings) == (name, config.tied)
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in jax.tree.leaves(Model(config).shapes()))


def test_log_probs_of_answers_are_those_of_all_logits():
    torch = pytest.importorskip("torch")
    model, token = peers.torch_model(CONFIGS["qwen3"]).eval(), torch.randint(50, (2, 9))
    with torch.no_grad():
        got = peers.answer_logps(model, token, 4)
        want = torch.log_softmax(model(input_ids=token).logits[:, 4:8], -1).gather(-1, token[:, 5:, None])[..., 0]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_adapters_of_peft_are_trained():
    pytest.importorskip("peft")
    found = peers.transformers_update(CONFIGS["qwen3"], PROMPTS, dict(slots=3, rows=7, lora_rank=2), repeats=1)
    assert found["first_seconds"] > 0


def test_the_child_measures_the_suite_s_sizes(monkeypatch, capsys):
    pytest.importorskip("torch")
    preset = dict(TINY, qk_norm=True)
    monkeypatch.setitem(PRESETS, "toy", preset)
    for name, module in dict(sampler=sampler, learner=learner).items():
        monkeypatch.setattr(module, "defaults", lambda shape, name=name: TOY[name])
        peers.main([name])
        found = json.loads(capsys.readouterr().out)
        assert list(peers.matching(found, TOY[name])) == [peers.OUTSIDE[name].__name__]
