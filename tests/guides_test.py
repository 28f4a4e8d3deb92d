"""The worked examples of README's "Add your idea": each diff applies, its test passes and its command runs."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import families_oracle
import pytest
import tokenizers_oracle

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = re.findall(r"<summary>Example: (.*?)</summary>\n\n```diff\n(.*?)```\n\n```bash\n(.*?)\n```\n\n</details>", TEXT, re.S)
GUIDES = {name: diff for name, diff, _ in FOUND}
COMMANDS = {name: command for name, _, command in FOUND}
# behind a command: a step of a run that takes seconds
SMALL = """
    --config.steps=1 --config.data_dir=data --config.task.train_size=8 --config.task.heldout_size=2 --config.warm_start.steps=0
    --config.model.layers=1 --config.model.width=16 --config.model.hidden=16 --config.sampler.prompts=2 --config.sampler.slots=4
    --config.sampler.answer_length=48 --config.sampler.segment=8 --config.branching.fill_after=4 --config.pruning.windows=(4,)
    --config.evaluation.batch=2 --config.evaluation.examples=2 --config.evaluation.samples=2""".split()


def added(diff: str) -> list[str]:
    """The files that a diff makes."""
    return re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)$", diff, re.M)


def own_tests(diff: str) -> list[str]:
    return [file for file in added(diff) if file.startswith("tests/")]


def run(folder: pathlib.Path, *command: str, given: str = "") -> str:
    """Standard output of a command that ends well in a copy of the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "XLA_FLAGS"}
    environment |= dict(PYTHONPATH=str(folder), JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    environment |= dict(GIT_CEILING_DIRECTORIES=str(folder.parent))  # the copy is no part of a repository
    found = subprocess.run(command, cwd=folder, env=environment, input=given, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return found.stdout


def pytest_in(folder: pathlib.Path, *arguments: str) -> int:
    """How many tests pass; all that run do."""
    told = run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    return int(re.search(r"(\d+) passed", told)[1])


def copy_to(folder: pathlib.Path) -> pathlib.Path:
    """Copies the files under version control, new ones included."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    return copy_to(tmp_path / "copy")


def test_every_diff_is_a_guide_and_short():
    assert TEXT.count("```diff\n") == len(GUIDES) == 6
    for name, diff in GUIDES.items():
        assert len(diff.splitlines()) <= 40 and len(own_tests(diff)) == 1 and len(added(diff)) <= 2, name
        assert "\n" not in COMMANDS[name], name
        assert max(map(len, diff.splitlines())) <= 141, name


def test_diffs_apply_together(copy):
    for diff in GUIDES.values():
        run(copy, "git", "apply", "-", given=diff)
    assert all((copy / file).exists() for diff in GUIDES.values() for file in added(diff))


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_the_test_passes_and_the_command_runs(name, copy):
    run(copy, "git", "apply", "-", given=GUIDES[name])
    assert pytest_in(copy, *own_tests(GUIDES[name])) >= 1
    python, *command = shlex.split(COMMANDS[name])
    assert python == "python" and command[:2] == ["-m", "launch.train"]
    if "model=FOLDER" in COMMANDS[name]:
        of = dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None, vocab_size=268, eos_token_id=2)
        families_oracle.write(copy / "FOLDER", "smollm2", **of)
        tokenizers_oracle.write(copy / "FOLDER")
        lines = [json.dumps(dict(prompt=f"{i} + {i} =", answer=str(2 * i))) for i in range(12)]
        (copy / "train.jsonl").write_text("\n".join(lines))
    summary = json.loads(run(copy, sys.executable, *command, *SMALL).splitlines()[-1])
    assert summary["steps"] == 1
    [workdir] = (copy / "runs").iterdir()
    _, line = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(line["loss"]) and line["skipped"] == 0


@pytest.mark.slow
def test_what_a_new_name_must_satisfy(copy):
    """With all of them in: rows of imports, tests that run over tables of names, and sentences that list them."""
    for diff in GUIDES.values():
        run(copy, "git", "apply", "-", given=diff)
    assert pytest_in(copy, "tests/layers_test.py") > 20
    files = "advantages combinations countdown environments families input readme"
    chosen = "ranked or magic or chess or garden or every_choice or every_estimator_is_compared or every_function or novelty"
    assert pytest_in(copy, *(f"tests/{name}_test.py" for name in files.split()), "-k", chosen + " or unknown or refused_by_name") > 40
