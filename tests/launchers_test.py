"""Launchers against stand-ins for gcloud, srun, ssh and the trainer: what they run, and what they make of failures."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from treerl import sweep
from treerl.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["--config=experiments/countdown.py", "--workdir=/shared/a run"]
POD = ["--name=pod", "--zone=us-west4-a"]
TPU = "gcloud compute tpus"
AT = "pod --zone=us-west4-a"


TOOLS = "bash cat dirname env git grep gzip head mktemp paste printf rm sed sleep sort tar tr wc".split()


@pytest.fixture
def place(tmp_path):
    """A checkout of the launchers alone, whose local.sh logs, and an empty folder of commands in front of PATH."""
    (tmp_path / "launch").mkdir()
    for name in ("gpu.sh", "tpu_pod.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    environment = (ROOT / "launch/environment.sh").read_text() + "\nprepare_environment() { echo prepared >>log; }\n"
    (tmp_path / "launch/environment.sh").write_text(environment)
    for folder in ("bin", "tools"):
        (tmp_path / folder).mkdir()
    for name in TOOLS:  # of this machine no others: it may have a gcloud of its own
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))
    return tmp_path


def command(place: pathlib.Path, name: str, body: str = "") -> None:
    """Puts a script on PATH that logs how it was called, then does `body`."""
    file = place / "bin" / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{place}/log\n{body}\n')
    file.chmod(0o755)


def launch(place: pathlib.Path, name: str, *arguments: str, start=False, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environment |= {"PATH": f"{place}/bin:{place}/tools", "POLL_SECONDS": "0", **variables}
    run = subprocess.Popen(
        ["bash", str(place / "launch" / name), *arguments], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if start:
        return run
    output, errors = run.communicate(timeout=120)
    return run.returncode, output, errors


def log(place: pathlib.Path) -> list[str]:
    return (place / "log").read_text().splitlines() if (place / "log").exists() else []


# --- gpu.sh -------------------------------------------------------------------------------------


def test_gpu_alone_dry(place):
    status, output, _ = launch(place, "gpu.sh", *FLAGS, "--dry_run")
    assert (status, output) == (0, "bash launch/local.sh --config=experiments/countdown.py --workdir=/shared/a\\ run\n")
    assert not log(place)


def test_gpu_over_ssh_dry(place):
    status, output, _ = launch(place, "gpu.sh", "--dry_run", *FLAGS, HOSTS="one two", PORT="1234")
    assert status == 0 and not log(place)
    lines = [line.replace("\\", "") for line in output.splitlines()]
    assert len(lines) == 2
    for i, (line, host) in enumerate(zip(lines, ("one", "two"))):
        assert line.startswith(f"ssh -o BatchMode=yes {host} cd {place} && echo $$ >/tmp/treerl.")
        assert line.endswith(
            f"&& exec bash launch/local.sh --coordinator_address=one:1234 --num_processes=2 --process_id={i} "
            "--config=experiments/countdown.py --workdir=/shared/a run"
        )


SLURM = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="3")
SRUN = "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1 bash launch/local.sh --config=experiments/countdown.py"


def test_gpu_on_slurm_dry(place):
    command(place, "srun")
    status, output, _ = launch(place, "gpu.sh", *FLAGS, "--dry_run", **SLURM)
    assert (status, output) == (0, SRUN + " --workdir=/shared/a\\ run\n")


def test_gpu_on_slurm_from_a_copy_of_the_script(place, tmp_path):
    """Slurm runs the script from its own folder."""
    command(place, "srun")
    (place / "spool").mkdir()
    shutil.copy(place / "launch/gpu.sh", place / "spool/slurm_script")
    environment = dict(os.environ, PATH=f"{place}/bin:{place}/tools", SLURM_SUBMIT_DIR=str(place), **SLURM)
    run = subprocess.run(["bash", place / "spool/slurm_script", *FLAGS], env=environment, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert log(place) == ["prepared", SRUN + " --workdir=/shared/a run"]


@pytest.mark.parametrize("ends, requeued", [(0, False), (3, False), (75, True)])
def test_gpu_on_slurm_requeues_what_has_saved(ends, requeued, place):
    command(place, "srun", f"exit {ends}")
    command(place, "scontrol")
    status, _, errors = launch(place, "gpu.sh", *FLAGS, **SLURM)
    assert status == ends
    assert (log(place)[2:] == ["scontrol requeue 7"]) == requeued
    assert ("the run has saved; job 7 goes back into the queue." in errors) == requeued


def test_gpu_on_slurm_without_srun(place):
    status, output, errors = launch(place, "gpu.sh", *FLAGS, **SLURM)
    assert (status, output) == (1, "")
    assert errors == "treerl: this is a Slurm job, but there is no srun: load Slurm's module, or unset SLURM_JOB_ID.\n"


# ssh HOST COMMAND as `bash -c COMMAND` here; local.sh is what the test says
SSH = 'shift 2; HOST=$1; shift; export HOST; exec bash -c "${{1//\\/tmp\\/treerl/{place}/$HOST}}"'


def local(place: pathlib.Path, body: str) -> None:
    """What each host runs."""
    (place / "launch/local.sh").write_text(f'echo "local on $HOST: $*" >>{place}/log\n{body}\n')
    command(place, "ssh", SSH.format(place=str(place).replace("/", "\\/")))


def test_gpu_over_ssh(place):
    local(place, "echo out of $HOST; echo told by $HOST >&2")
    status, output, errors = launch(place, "gpu.sh", *FLAGS, HOSTS="one two")
    assert status == 0, errors
    assert sorted(output.splitlines()) == ["[one] out of one", "[two] out of two"]
    assert sorted(errors.splitlines()) == ["[one] told by one", "[two] told by two"]
    for i, host in enumerate(("one", "two")):
        flags = f"--coordinator_address=one:9876 --num_processes=2 --process_id={i} --config=experiments/countdown.py"
        assert f"local on {host}: {flags} --workdir=/shared/a run" in log(place)


def test_gpu_over_ssh_with_a_process_that_fails(place):
    """The others are told to end, and the failed one's status and host are given."""
    local(
        place,
        'if [[ $HOST == two ]]; then sleep 0.5; exit 3; fi; trap "echo ended $HOST >>'
        + str(place)
        + '/log; exit 1" TERM; for i in {1..600}; do sleep 0.1; done',
    )
    status, _, errors = launch(place, "gpu.sh", *FLAGS, HOSTS="one two three")
    assert status == 3
    assert "treerl: the process on two ended with status 3; the others are ended too." in errors
    assert {"ended one", "ended three"} <= set(log(place))


def test_gpu_over_ssh_hands_signals_on(place):
    local(place, f'trap "exit 75" TERM; echo ready >>{place}/log; for i in {{1..600}}; do sleep 0.1; done')
    run = launch(place, "gpu.sh", *FLAGS, HOSTS="one two", start=True)
    while log(place).count("ready") < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors


# --- tpu_pod.sh ---------------------------------------------------------------------------------------


def pod(place, command, *arguments, **variables):
    return launch(place, "tpu_pod.sh", command, *POD, *arguments, **variables)


RUN = ["--", "--config=experiments/countdown.py", "--workdir=gs://bucket/a run"]


def test_pod_dry(place):
    """Every command, as it would be run, without gcloud."""
    status, output, errors = pod(place, "all", "--type=v5litepod-64", "--spot", "--project=mine", "--dry_run", *RUN)
    assert (status, errors) == (0, "")
    lines = [line.replace("\\", "") for line in output.splitlines()]
    at = AT + " --project=mine"
    assert lines[:4] == [
        f"{TPU} queued-resources create {at} --node-id=pod --accelerator-type=v5litepod-64 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --quiet",
        f"{TPU} queued-resources describe {at} --format=value(state.state)",
        f"{TPU} tpu-vm scp treerl.tgz pod:treerl.tgz --zone=us-west4-a --project=mine --worker=all",
        f"{TPU} tpu-vm ssh {at} --worker=all --command=mkdir -p treerl && tar xzf treerl.tgz -C treerl && cd treerl && "
        "TREERL_ACCELERATOR=tpu bash -c 'source launch/environment.sh && prepare_environment'",
    ]
    assert lines[4].startswith(f"{TPU} tpu-vm ssh {at} --worker=all --command=cd treerl && rm -f ../treerl.status && (setsid nohup")
    assert "bash launch/local.sh --config=experiments/countdown.py --workdir=gs://bucket/a run" in lines[4]
    assert lines[5].startswith(f"{TPU} tpu-vm ssh {at} --worker=0 --command=tail -n +1 -F treerl.log & while")
    assert len(lines) == 6 and not log(place)
    others = {
        "status": ["queued-resources describe", "tpu-vm ssh"], "stop": ["tpu-vm ssh"], "delete": ["queued-resources delete"],
    }  # fmt: skip
    for name, starts in others.items():
        _, output, _ = pod(place, name, "--dry_run")
        assert [" ".join(line.split()[3:5]) for line in output.splitlines()] == starts


def test_pod_commands_do_what_they_say_on_a_worker(place):
    """Flags with blanks and quotes arrive whole; the run's status ends up where tail and status look for it."""
    worker = place / "worker"
    shutil.copytree(place / "launch", worker / "treerl/launch")
    (worker / "treerl/launch/local.sh").write_text('printf "<%s>" "$JAX_COMPILATION_CACHE_DIR" "$@"; exit 75\n')

    def on_worker(verb, *flags):
        _, output, _ = pod(place, verb, "--dry_run", *flags)
        words = shlex.split(output.splitlines()[-1])
        sent = next(word for word in words if word.startswith("--command="))[len("--command=") :]
        return subprocess.run(["bash", "-c", sent], cwd=worker, capture_output=True, text=True, timeout=60)

    assert on_worker("run", *RUN, "--config.text.options={'digits': 2}").returncode == 0
    told = on_worker("tail")
    assert told.returncode == 75 and told.stdout == (
        "<gs://bucket/a run/programs><--config=experiments/countdown.py><--workdir=gs://bucket/a run><--config.text.options={'digits': 2}>"
    )
    assert on_worker("status").stdout.endswith(": 75\n")


@pytest.mark.parametrize(
    "type_, version",
    [("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_pod_reserved_and_versions(type_, version, place):
    _, output, _ = pod(place, "create", f"--type={type_}", "--reserved", "--dry_run")
    assert output == (
        f"{TPU} queued-resources create {AT} --node-id=pod --accelerator-type={type_} --runtime-version={version} --reserved --quiet\n"
    )


def gcloud(place, states: list[str], ssh: list[int] = (), wanted: int = 0) -> None:
    """A gcloud whose resource goes through states, one a look, and whose ssh calls end with these, then with 0."""
    (place / "states").write_text("".join(f"{s}\n" for s in states))
    (place / "ssh").write_text("".join(f"{s}\n" for s in ssh))
    next_line = 'head -1 {0} && if [ "$(wc -l <{0})" -gt 1 ]; then sed -i 1d {0}; fi'
    command(
        place, "gcloud",
        f'cd {place}\ncase "$*" in *describe*) s=$({next_line.format("states")}); [ "$s" = NONE ] && exit 1; echo "$s" ;;\n'
        f'*ssh*) s=$({next_line.format("ssh")}); exit "${{s:-0}}" ;; esac',
    )  # fmt: skip


def verbs(place) -> list[str]:
    """What gcloud was asked to do, looks aside."""
    calls = [line.split() for line in log(place) if "describe" not in line]
    return [c[4] if c[3] == "queued-resources" else f"{c[4]} {next((a for a in c if a.startswith('--worker')), '')[9:]}" for c in calls]


def test_pod_that_comes_after_a_while(place):
    gcloud(place, ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"])
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    status, _, errors = pod(place, "all", "--type=v5litepod-64", *RUN)
    assert status == 0, errors
    assert verbs(place) == ["create", "scp all", "ssh all", "ssh all", "ssh 0"]
    assert errors.count("pod is PROVISIONING") == 1 and "pod is ACTIVE" in errors


def test_pod_that_fails(place):
    gcloud(place, ["NONE", "PROVISIONING", "FAILED"])
    status, _, errors = pod(place, "all", "--type=v5litepod-64", *RUN)
    assert status == 1 and verbs(place) == ["create"]
    assert errors.splitlines()[-1] == (
        "treerl: pod is FAILED and will not come: look at 'gcloud compute tpus queued-resources describe pod', delete it "
        "and create it again."
    )


def test_pod_that_is_preempted_is_made_again(place):
    """The second ssh to worker 0 breaks off; then the pod is gone, and the same command goes on."""
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    gcloud(place, ["NONE", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE"], ssh=[0, 0, 255, 0, 0, 0])
    status, _, errors = pod(place, "all", "--type=v5litepod-64", "--spot", "--retry=1", *RUN)
    assert status == 0, errors
    once = ["create", "scp all", "ssh all", "ssh all", "ssh 0"]
    assert verbs(place) == [*once, "delete", *once]
    assert "pod is SUSPENDED; it is made again (1 of 1)." in errors


def test_pod_whose_run_fails_is_not_made_again(place):
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    gcloud(place, ["NONE", "ACTIVE", "ACTIVE"], ssh=[0, 0, 1])
    status, *_ = pod(place, "all", "--type=v5litepod-64", "--retry=3", *RUN)
    assert status == 1 and verbs(place) == ["create", "scp all", "ssh all", "ssh all", "ssh 0"]


def test_pod_whose_workers_cannot_be_set_up(place):
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    gcloud(place, ["NONE", "ACTIVE", "ACTIVE"], ssh=[5])
    status, *_ = pod(place, "all", "--type=v5litepod-64", *RUN)
    assert status == 1 and verbs(place) == ["create", "scp all", "ssh all"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["create", *POD, "--type=v4-8"],
            "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, then gcloud auth login.",
        ),
        (["create", "--name=pod"], "--name and --zone are missing: give the pod's name and its zone."),
        (["create", *POD], "--type is missing: give an accelerator type, such as --type=v5litepod-64."),
        (["fly", *POD], "'fly' is no command: give create, wait, setup, run, tail, status, stop, delete or all."),
        (["run", *POD, "--fast"], "--fast is no setting: see the head of launch/tpu_pod.sh; flags of launch/train.py come after --."),
        (
            ["run", *POD, "--", "--workdir=runs/a"],
            "--workdir=runs/a is on one worker's disk: give a gs:// path behind --, such as -- --workdir=gs://BUCKET/runs/one.",
        ),
    ],
)
def test_pod_mistakes(arguments, sentence, place):
    status, output, errors = launch(place, "tpu_pod.sh", *arguments)
    assert (status, output, errors) == (1, "", f"treerl: {sentence}\n")
    assert not log(place)


# --- sweep ----------------------------------------------------------------------------------------------


TRAINER = """
import json, os, re, sys, time
flags = dict(f.lstrip("-").split("=", 1) for f in sys.argv[1:])
print("told", file=sys.stderr)
time.sleep(0.3)
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "calls"), "a") as file:
    file.write(json.dumps(flags | dict(gpu=os.environ.get("CUDA_VISIBLE_DEVICES"))) + "\\n")
status = os.path.join(here, "status" + flags["config.seed"])
if os.path.exists(status):
    sys.exit(int(open(status).read()))
print(json.dumps({"pass@1_after": int(flags["config.seed"]) / 10}))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Stands for launch.train: ends as statusSEED says; its calls."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def points(tmp_path, *grid):
    return sweep.runs(list(grid), ["--config=x.py"], str(tmp_path / "sweep"))


def test_sweep_names_and_flags(tmp_path):
    runs = points(tmp_path, "optimizer.learning_rate=1e-4,3e-4", "seed=0,1")
    assert [run.name for run in runs] == [f"learning_rate={r},seed={s}" for r in ("1e-4", "3e-4") for s in (0, 1)]
    assert runs[1].flags == [
        "--config=x.py", "--config.optimizer.learning_rate=1e-4", "--config.seed=1", f"--workdir={tmp_path}/sweep/learning_rate=1e-4,seed=1",
    ]  # fmt: skip
    names = [run.name for run in points(tmp_path, "optimizer.learning_rate=1", "warm_start.learning_rate=2", "data_dir=/a/b")]
    assert names == ["optimizer.learning_rate=1,warm_start.learning_rate=2,data_dir=_a_b"]


@pytest.mark.parametrize("parallel", [1, 2])
def test_sweep_goes_on_past_failures_and_does_what_is_missing(parallel, trainer, tmp_path, capsys):
    (tmp_path / "status1").write_text("3")
    (tmp_path / "status2").write_text("75")
    runs = points(tmp_path, "seed=0,1,2,3")
    found = sweep.train(runs, str(tmp_path / "sweep"), parallel)
    assert found == [{"pass@1_after": 0.0}, dict(status=3), dict(status=75), {"pass@1_after": 0.3}]
    assert sorted(call["config.seed"] for call in trainer()) == ["0", "1", "2", "3"]
    errors = capsys.readouterr().err
    assert f"seed=1 failed with status 3; see {tmp_path}/sweep/logs/seed=1.log\n  told\n" in errors
    assert "seed=2 was stopped; the same command goes on; see" in errors
    assert (tmp_path / "sweep/logs/seed=1.log").read_text() == "told\n"
    (tmp_path / "status1").unlink()
    (tmp_path / "status2").unlink()
    assert [x["pass@1_after"] for x in sweep.train(runs, str(tmp_path / "sweep"), parallel)] == [0.0, 0.1, 0.2, 0.3]
    assert sorted(call["config.seed"] for call in trainer()[4:]) == ["1", "2"]


def test_sweep_gives_each_process_its_own_gpu(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    sweep.train(points(tmp_path, "seed=0,1,2,3"), str(tmp_path / "sweep"), 2)
    assert {call["gpu"] for call in trainer()} == {"4", "7"}


@pytest.mark.parametrize(
    "grid, sentence",
    [
        ("seeds=0,1", "seeds"),
        ("seed=0,,1", "--grid=seed=0,,1 has an empty value; write FIELD=VALUE,VALUE,... without spaces."),
        ("seed", "--grid=seed has an empty value; write FIELD=VALUE,VALUE,... without spaces."),
    ],
)
def test_sweep_mistakes(grid, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        points(tmp_path, grid)
    assert sentence in str(error.value)
    with pytest.raises(UserError, match="--grid=seed=2 names seed a second time; put all its values into one flag."):
        points(tmp_path, "seed=1", "seed=2")


def launch_sweep(tmp_path, *flags):
    command = [sys.executable, "-m", "launch.sweep", "--config=experiments/countdown.py", f"--workdir={tmp_path}/sweep", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_sweep_submits_a_job_for_each(place):
    command(place, "take", 'case "$*" in *seed=1*) exit 4 ;; esac')
    submit = f"--submit={place}/bin/take job"
    dry = launch_sweep(place, "--grid=seed=0,1,2", "--config.steps=3", submit, "--dry_run")
    flags = lambda i: f"--config=experiments/countdown.py --config.steps=3 --config.seed={i} --workdir={place}/sweep/seed={i}"
    assert dry.stdout.splitlines() == [f"{place}/bin/take job {flags(i)}" for i in range(3)] and not log(place)
    run = launch_sweep(place, "--grid=seed=0,1,2", "--config.steps=3", submit)
    assert (run.returncode, run.stderr) == (4, "seed=1 was not taken: status 4.\n")
    assert log(place) == [f"take job {flags(i)}" for i in range(3)]
    run = launch_sweep(place, "--grid=seed=0", "--submit=no-such-command")
    assert (run.returncode, run.stderr) == (
        1, "--submit='no-such-command' cannot be run (No such file or directory); give a command of this machine.\n",
    )  # fmt: skip
