"""The host loop on text: samples.jsonl, runs killed and resumed, the other entry points, memory, and bad input end to end."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import families_oracle
import jax
import numpy as np
import pytest
import tokenizers_oracle
from host_test import tiny
from ml_collections import ConfigDict
from train_test import environment, kill, wait_until

from treerl import draw, metrics, profiling, warm_start
from treerl.errors import UserError
from treerl.experiment import load
from treerl.train import begin_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY = 8, 3  # steps of a run, and between checkpoints
WEIGHTS = {"exact": 1.0, "sample_graders:lower": 0.5}
LINES = [dict(prompt=f"{i} + {i} =", answer=str(2 * i)) for i in range(16)]


def experiment(folder: pathlib.Path, name: str, **changes) -> str:
    """Writes folder/name.py, an experiment on the lines of a file."""
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = tiny(graders=WEIGHTS)
    config.update(steps=STEPS, checkpoint_every=EVERY, samples_every=2, data_dir=str(folder / "data"))
    config.task.update(name="jsonl", heldout_size=4)
    config.text.source = str(folder / "lines.jsonl")
    config.text.options = ConfigDict()
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.evaluation.update(every=100, batch=4, examples=4)
    for field, value in changes.items():
        section, _, field = field.rpartition("__")
        (config[section] if section else config)[field] = ConfigDict(value) if isinstance(value, dict) else value
    path = folder / f"{name}.py"
    path.write_text(
        f"import json\nfrom ml_collections import ConfigDict\nTEXT = {config.to_json()!r}\n\n\n"
        "def get_config():\n    return ConfigDict(json.loads(TEXT))\n"
    )
    return str(path)


def launch(folder: pathlib.Path, entry: str, *flags: str) -> subprocess.Popen:
    """Starts an entry point, which finds modules of graders here and in the folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{entry}", *flags], cwd=ROOT, env=environment(folder) | dict(PYTHONPATH=path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(run: subprocess.Popen) -> tuple[dict, str]:
    """(JSON of the last line of standard output, standard error) of a run that ends well."""
    output, log = run.communicate(timeout=300)
    assert run.returncode == 0, log[-4000:]
    return json.loads(output.splitlines()[-1]), log


def train(folder, name, workdir=None, **changes) -> subprocess.Popen:
    workdir = folder / (workdir or name)
    return launch(folder, "train", f"--config={experiment(folder, name, **changes)}", f"--workdir={workdir}")


def story(workdir) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in metrics.read(workdir / "metrics.jsonl")
        if line["step"]
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, log of `whole`, samples of `killed` when it was killed): one run left alone, one killed and resumed."""
    folder = tmp_path_factory.mktemp("loop")
    _, log = done(train(folder, "whole"))
    run = train(folder, "killed")
    lines = folder / "killed/metrics.jsonl"
    wait_until(run, lambda: lines.exists() and lines.read_bytes().count(b"\n") >= EVERY + 2)
    kill(run)
    before = metrics.read(folder / "killed/samples.jsonl")
    done(train(folder, "killed"))
    return folder, log, before


# --- what a run writes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_of_the_right_steps(runs):
    folder, *_ = runs
    lines = [json.loads(line) for line in (folder / "whole/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 4, 4, 6, 6, 8, 8]
    for line in lines:
        assert set(line) == {"step", "prompt", "answers"} and len(line["answers"]) >= 2
        assert line["prompt"] in {f"{one['prompt']}\n" for one in LINES[:-4]}
        for answer in line["answers"]:
            assert set(answer) == {"text", "reward", "scores"} and set(answer["scores"]) == set(WEIGHTS)
            assert answer["reward"] == pytest.approx(sum(WEIGHTS[k] * x for k, x in answer["scores"].items()), abs=1e-6)
            small = sum(c.islower() for c in answer["text"]) / max(len(answer["text"]), 1)
            assert answer["scores"]["sample_graders:lower"] == pytest.approx(small, abs=1e-6)
    assert len({line["prompt"] for line in lines}) > 2


@pytest.mark.slow
def test_a_killed_run_writes_the_same_samples_and_numbers(runs):
    folder, _, before = runs
    assert {line["step"] for line in before} >= {1, 2, 4}  # step 4 is done again from the checkpoint of step 3
    assert (folder / "killed/samples.jsonl").read_bytes() == (folder / "whole/samples.jsonl").read_bytes()
    assert story(folder / "killed") == story(folder / "whole")
    assert [line["step"] for line in story(folder / "whole")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_metrics_of_graders_reach_the_file_and_the_report(runs):
    folder, *_ = runs
    for line in story(folder / "whole"):
        parts = sum(weight * line[f"reward/{name}"] for name, weight in WEIGHTS.items())
        assert line["reward"] == pytest.approx(parts, abs=1e-6) and line["graders_raised"] == 0
    page = (folder / "whole/report.html").read_text()
    assert "scores of graders" in page and "sample_graders:lower" in page


@pytest.mark.slow
def test_the_memory_of_a_step_is_told_before_the_first(runs):
    _, log, _ = runs
    words = r"^memory of a step: [0-9.]+ GB on each device, [0-9.]+ GB of it temporaries$"
    [told] = re.finditer(words, log.replace("\r", "\n"), re.M)
    assert told.start() < re.search(rf"[1-9]/{STEPS} \[", log).start()


@pytest.mark.slow
def test_without_samples_the_file_stays_empty(runs):
    folder, *_ = runs
    done(train(folder, "quiet", steps=2, samples_every=0))
    assert (folder / "quiet/samples.jsonl").read_bytes() == b""
    first, wanted = (story(folder / name)[0] for name in ("quiet", "whole"))
    assert first["reward"] == pytest.approx(wanted["reward"], rel=1e-6)


@pytest.mark.slow
def test_evaluate(runs):
    folder, *_ = runs
    found, _ = done(launch(folder, "evaluate", f"--workdir={folder / 'killed'}"))
    last = story(folder / "whole")[-1]
    assert found == {"step": STEPS} | {k: v for k, v in last.items() if "@" in k or k.startswith("heldout/")}
    assert {"majority@3", "heldout/reward", "heldout/exact"} <= set(found)


@pytest.mark.slow
def test_generate(runs):
    folder, *_ = runs
    run = launch(folder, "generate", f"--workdir={folder / 'whole'}", "--prompt=20 + 20 =")
    output, log = run.communicate()
    assert run.returncode == 0, log[-4000:]
    lines = output.splitlines()
    assert lines[0] == "20 + 20 =" and "prompt" in lines[:4] and lines[-1] == draw.TEXT_LEGEND
    leaves = [line.split(None, 4) for line in lines if line[:1] in "✓✗" and line]
    assert len(leaves) == 4
    assert all(reward == "0.0" and float(credit) == 0 for _, reward, credit, *_ in leaves)  # nobody knows the answer
    for prompt, message in (
        (" ", "--prompt is empty; write a question."),
        ("1" * 20, f"--prompt={'1' * 20!r} has 21 tokens and this run reads at most 16; give a shorter --prompt."),
    ):
        run = launch(folder, "generate", f"--workdir={folder / 'whole'}", f"--prompt={prompt}")
        output, log = run.communicate()
        assert (run.returncode, output, log) == (1, "", message + "\n")


# --- a published model with adapters -------------------------------------------------------------


def model(folder: pathlib.Path, **changes) -> str:
    """A tiny published model with a tokenizer and a chat template."""
    families_oracle.write(folder, "qwen2", **dict(dict(vocab_size=268, eos_token_id=2), **changes))
    return tokenizers_oracle.write(folder)


LORA = dict(model__lora_rank=2, text__chat=True, sampler__prompt_length=96, learner__bin_tokens=112, evaluation__every=2)


@pytest.mark.slow
def test_a_run_of_adapters_on_a_published_model_resumes(runs):
    folder, *_ = runs
    changes = dict(LORA, model__source=model(folder / "model"))
    done(train(folder, "lora", steps=4, **changes))
    done(train(folder, "parts", steps=2, **changes))
    (folder / "model/model.safetensors").unlink()  # the checkpoint has all of it
    done(train(folder, "parts", steps=4, **changes))
    assert story(folder / "parts") == story(folder / "lora")
    (one, state, step), (_, other, _) = load(str(folder / "lora")), load(str(folder / "parts"))
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert step == 4
    trained, frozen = one.fns.model.split(state.params)
    assert any(np.any(x) for x in jax.tree.leaves([x["second"] for x in trained["blocks"].values()]))  # zeros at the start
    families_oracle.write(folder / "again", "qwen2", vocab_size=268, eos_token_id=2)
    from treerl.models import weights

    jax.tree.map(np.testing.assert_array_equal, frozen, weights.load(str(folder / "again"), one.fns.model.plain))
    sample = json.loads((folder / "lora/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("<s><user>") and sample["prompt"].endswith("<assistant>True")


# --- memory --------------------------------------------------------------------------------------


def test_a_run_begins_with_all_scores_of_the_warm_start_s_best_evaluation(tmp_path, monkeypatch):
    scores = [{"pass@1": 0.25, "heldout/exact": 0.5}, {"pass@1": 0.5, "heldout/exact": 0.75}, {"pass@1": 0.5, "heldout/exact": 1.0}]
    curve = [dict(step=10 * i, loss=1.0, **own) for i, own in enumerate(scores)]
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: ("state", curve))
    begin = lambda: begin_run(SimpleNamespace(evaluate=lambda state: {"pass@1": 0.125}), str(tmp_path), False, None)
    assert begin() == ("state", dict(before=scores[1])) and metrics.read(tmp_path / "warm_start.jsonl") == curve
    curve.clear()
    assert begin() == ("state", dict(before={"pass@1": 0.125}))


def test_the_memory_of_programs_is_the_greediest_ones():
    x = np.ones((256, 256), np.float32)
    small = jax.jit(lambda x: x @ x).lower(x).compile()
    chain = jax.jit(lambda x: (x @ x, (x @ x.T) @ x)).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert profiling.memory(small).total >= 2 * x.nbytes
    assert profiling.memory(chain).total >= profiling.memory(small).total + 2 * x.nbytes
    assert profiling.memory(small, chain) == profiling.memory(chain, small) == profiling.memory(chain)
    assert x.nbytes <= profiling.memory(donated).total < 2 * x.nbytes  # argument and result are one
    assert profiling.memory(chain).temporary >= x.nbytes


def test_a_step_that_will_not_fit():
    profiling.check_memory(profiling.Memory(10**12, 10, None))
    profiling.check_memory(profiling.Memory(10**10, 10, 10**10))
    with pytest.raises(UserError) as error:
        profiling.check_memory(profiling.Memory(12_345_000_000, 6_000_000_000, 10**10))
    assert str(error.value) == (
        "a step needs 12.35 of 10.0 GB on each device, 6.00 GB of it temporaries, which does not fit; lower "
        "learner.bins_per_step, learner.vocab_chunk, sampler.prompts or sampler.slots, set learner.remat=layers, "
        "model.dtype=bfloat16 or model.lora_rank=16, spread over more devices with mesh.fsdp, or, on a GPU that nothing else "
        "uses, set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
    )


def test_out_of_memory():
    with pytest.raises(UserError) as error, profiling.out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")
    told = "Out of memory while trying to allocate 8 bytes"
    assert str(error.value) == f"a device ran out of memory ({told}); {profiling.SAVE_MEMORY}"
    with pytest.raises(UserError, match="^a device ran out of memory; lower that.$"), profiling.out_of_memory("lower that."):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    for other in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as raised, profiling.out_of_memory():
            raise other
        assert raised.value is other


@pytest.mark.slow
def test_a_run_that_finds_no_memory(monkeypatch, tmp_path):
    """Wherever it is: here while held-out examples are scored."""
    from treerl import train as T

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(T.Experiment, "grade", full)
    monkeypatch.setattr(T.Experiment, "init", lambda *_: SimpleNamespace(params=None, quality=None, skipped=0))
    monkeypatch.setattr(T.Checkpoints, "restore_latest", lambda *_: None)
    config = tiny()
    with pytest.raises(UserError, match="^a device ran out of memory; lower evaluation.batch or evaluation.samples, or set"):
        prepared = T.Experiment
        monkeypatch.setattr(T, "Experiment", lambda config: no_sampling(prepared(config)))
        T.train(config, str(tmp_path / "run"), progress=False)
    monkeypatch.setattr(prepared, "init", full)
    with pytest.raises(UserError, match="^a device ran out of memory; lower learner.bins_per_step, "):
        T.train(config, str(tmp_path / "run"), progress=False)


def no_sampling(experiment):
    experiment._evaluate = lambda *_: (None, {})
    return experiment


# --- mistakes that end in one sentence -----------------------------------------------------------


def refused(folder, workdir, **changes) -> str:
    """The sentence of a run that cannot start and leaves nothing behind."""
    run = train(folder, "wrong", workdir, **changes)
    output, log = run.communicate(timeout=120)
    assert (run.returncode, output) == (1, ""), log[-4000:]
    assert log.count("\n") == 1, log
    assert not (folder / workdir).exists()
    return log.removesuffix("\n")


MODELS = {  # what is done to a model's folder -> the sentence, {} being the folder
    "missing": (shutil.rmtree, "model.source='{}' is no folder; name a model's folder, a .gguf file, 'smollm2-135m-instruct', or "
                "organisation/model of the hub."),
    "no weights": (lambda f: (f / "model.safetensors").unlink(),
                   "{0} has no model.safetensors, and model.safetensors.index.json cannot be read ([Errno 2] No such file or "
                   "directory: '{0}/model.safetensors.index.json'); copy the model's folder again, with weights in safetensors files."),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", os.path.getsize(f / "model.safetensors") - 100),
                  "{}/model.safetensors is damaged or cut short (Error while deserializing header: incomplete metadata, file not "
                  "fully covered); copy the file again."),
    "vocabulary": (lambda f: families_oracle.write(f, "qwen2", vocab_size=200, eos_token_id=2),
                   "the tokenizer of {} has ids up to 266, but vocab_size=200 in config.json; use the tokenizer that the model was "
                   "trained with."),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(),
                     "{}/tokenizer.json is missing; use a model that has one, or write it with transformers' save_pretrained."),
    "no template": (lambda f: (f / "tokenizer_config.json").unlink(),
                    "the model in {} has no chat template; set text.chat=False, or use another model."),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", MODELS)
def test_models_that_cannot_work(damage, tmp_path):
    source, (do, message) = pathlib.Path(model(tmp_path / "model")), MODELS[damage]
    do(source)
    assert refused(tmp_path, "run", model__source=str(source), **LORA) == message.format(source)


TEXTS = [
    (dict(text__chat=True),
     "text.chat=True renders prompts by a model's template and there is none; set text.chat=False, or model.source to a model "
     "that has one."),
    (dict(text__graders={"exat": 1.0}),
     "text.graders: 'exat' is unknown; known are exact, number, math, reasoning_gym, and module:function of your own."),
    (dict(text__graders={"nowhere:reward": 1.0}),
     "text.graders: 'nowhere:reward' names no module; start where nowhere.py is, or add that folder to PYTHONPATH."),
    (dict(text__graders={"sample_broken:reward": 1.0}),
     "text.graders: 'sample_broken:reward' cannot be imported (ZeroDivisionError: division by zero); mend the module."),
    (dict(text__graders={"sample_leaves:reward": 1.0}),
     "text.graders: 'sample_leaves:reward' cannot be imported (SystemExit: 3); mend the module."),
    (dict(evaluation__batch=3),
     "evaluation.batch=3 must divide over 1 shards and into the 4 held-out examples used; change evaluation.batch or "
     "evaluation.examples."),
    (dict(sampler__prompt_length=7), "a prompt of 10 tokens is longer than sampler.prompt_length=7; raise sampler.prompt_length."),
    (dict(sampler__answer_length=2, warm_start__steps=1, pruning__rule="none"),
     "a reference answer of 3 tokens is longer than sampler.answer_length=2; raise sampler.answer_length."),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes, message", TEXTS)
def test_texts_that_cannot_work(changes, message, tmp_path):
    (tmp_path / "sample_broken.py").write_text("1 / 0\n")
    (tmp_path / "sample_leaves.py").write_text("import sys\nsys.exit(3)\n")
    assert refused(tmp_path, "run", **changes) == message


@pytest.mark.parametrize("line, message", [
    ("{]", "is no JSON; mend or remove that line."),
    ('{"prompt": "1?"}', "has no 'answer'; set text.answer to one of 'prompt'."),
])  # fmt: skip
def test_lines_that_cannot_work(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in LINES[:7]) + line + "\n")
    words = refused(tmp_path, "run", text__source=str(path))
    assert words == f"{path}:8 {message}"


def test_a_long_prompt_far_behind(tmp_path):
    """A training prompt that the first step does not read."""
    first = np.random.default_rng([0, 0]).permutation(12)[:8]
    last = next(i for i in range(12) if i not in first)
    lines = [dict(one, prompt=one["prompt"].ljust(16 if i == last else 0)) for i, one in enumerate(LINES)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert refused(tmp_path, "run", text__source=str(path)) == (
        "a prompt of 17 tokens is longer than sampler.prompt_length=16; raise sampler.prompt_length."
    )
