"""README's commands run, as they stand there, in a copy of the repository, one after the other; of what trains, a step or two.

The worked examples have a test of their own, `guides_test`.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import families_oracle
import pytest
import tokenizers_oracle
from guides_test import FOUND, SMALL, TEXT, copy_to

OF_GUIDES = [command for _, _, command in FOUND]


def commands() -> list[str]:
    """Of every block of bash, without comments and what is in brackets."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", TEXT, re.S | re.M):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found.append(re.sub(r"\s+#.*$|\s+\[.*?\]", "", line).strip())
    return [line for line in found if line and line not in OF_GUIDES]


FEW = ["--config.steps=2", *SMALL[1:]]
TEXTS = [flag for flag in FEW if not re.search("train_size|answer_length|segment|windows|heldout", flag)]
OWN = [flag for flag in TEXTS if "model" not in flag] + [
    "--config.sampler.answer_length=4",
    "--config.pruning.windows=(2,4)",
    "--config.task.heldout_size=2",
]
EPISODES = [flag for flag in TEXTS if "heldout" not in flag] + ["--config.environment.horizon=2"]
DRY = "prints what it would run"

# How a command is run: what its line contains -> flags behind it; the first that fits. A string is why it is not run as it stands.
HOW = [
    ("--profile=", ["--config.steps=5", *SMALL[1:]]),
    ("launch/test.sh", ["--collect-only", "tests/masked_test.py"]),
    ("household.py:gigpo", [*EPISODES, "--count=1"]),
    ("household.py", EPISODES),
    ("launch.seeds", [*FEW, "--count=2"]),
    ("shop.py", EPISODES),
    ("smollm2_addition.py", "trains a published model for minutes: smollm2_test and a notebook do"),
    ("experiments/jsonl.py", OWN),
    ("launch/gpu.sh", DRY),
    ("launch/tpu_pod.sh", DRY),
    ("launch.sweep", ["--dry_run"]),
    ("--topology", "needs libtpu: plan_test compiles for described devices"),
    ("--suite=sampler", "takes minutes: bench_test runs its suites at small sizes"),
    ("tensorboard", "a server of another package: events_test reads its files"),
    ("pip install", "fetches a package: launch/test.sh does"),
    ("gs://", "reads an object store: files_test has one"),
    ("launch/local.sh", FEW),
    ("launch.train", FEW),
    ("launch.", []),
]


def how(command: str):
    return next(flags for part, flags in HOW if part in command)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A copy with an environment that is installed, a model of one's own, and the runs that are compared."""
    folder = copy_to(tmp_path_factory.mktemp("commands") / "copy")
    (folder / ".venv").mkdir()
    for part in pathlib.Path(sys.prefix).iterdir():
        if part.name != "treerl.stamp":
            (folder / ".venv" / part.name).symlink_to(part)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    setup = subprocess.run("cksum <setup.py | tr ' ' -", shell=True, cwd=folder, capture_output=True, text=True).stdout.strip()
    (folder / ".venv/treerl.stamp").write_text(f"python {python}\nroot {folder}\nsetup {setup}\nextras test\n")
    families_oracle.write(folder / "FOLDER", "qwen2", vocab_size=268, eos_token_id=2)
    tokenizers_oracle.write(folder / "FOLDER")
    lines = [json.dumps(dict(prompt=f"What is {i} + {i}?", answer=str(2 * i))) for i in range(80)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def test_every_command_is_known():
    found = commands()
    assert len(found) > 25 and all(how(command) is not None for command in found)
    for part, flags in HOW:
        assert any(part in command and how(command) is flags for command in found), part  # no rule is for none


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands() if not isinstance(how(command), str) or how(command) is DRY])
def test_the_command_runs(command, place):
    flags = how(command)
    if flags is DRY:
        command = re.sub(r"^sbatch --\S+ --\S+ ", "HOSTS='a b' bash ", command).replace("--config=...", "--config=experiments/countdown.py")
        command = command.replace(" -- ", " --dry_run -- ") if " -- " in command else command + " --dry_run"
    elif "--run=A:runs/a0" in command:
        for name in ("a0", "a1", "b0", "b1"):
            shutil.copytree(place / "runs/countdown", place / "runs" / name)
    command = command.replace("--config=...", "--config=experiments/countdown.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "XLA_FLAGS"}
    environment |= dict(
        PYTHONPATH=str(place), JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1", TREERL_ACCELERATOR="none", WANDB_MODE="offline"
    )
    environment["PATH"] = f"{place}/.venv/bin:{environment['PATH']}"
    quoted = " ".join("'" + flag + "'" for flag in flags) if flags is not DRY else ""
    done = subprocess.run(["bash", "-c", f"{command} {quoted}"], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout or done.stderr
    for file in re.findall(r"--(?:out|folder)=(\S+)", command):
        assert (place / file).exists(), file
