"""Configs: arguments of experiments, what every file of experiments/ promises, and wrong fields."""

import importlib
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from treerl import config as C

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")


# --- parse_arg ------------------------------------------------------------------------------------

KNOWN = dict(variant="tree", seed=0, rate=0.5, fast=False, greedy=True)


@pytest.mark.parametrize(
    "arg, changed",
    [
        (None, {}),
        ("", {}),
        ("seed=3", dict(seed=3)),
        ("flat", dict(variant="flat")),
        ("variant=flat", dict(variant="flat")),
        ("fast", dict(fast=True)),
        ("fast=True,greedy=false", dict(fast=True, greedy=False)),
        ("flat,seed=-1,rate=1e-3,fast", dict(variant="flat", seed=-1, rate=1e-3, fast=True)),
        ("rate=2", dict(rate=2.0)),
        ("variant=a=b", dict(variant="a=b")),
        ("seed=1,,seed=2,", dict(seed=2)),
    ],
)
def test_parse_arg(arg, changed):
    parsed = C.parse_arg(arg, **KNOWN)
    assert parsed == dict(KNOWN, **changed)
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in KNOWN.items()}


@pytest.mark.parametrize(
    "arg, known, message",
    [
        ("sed=3", dict(seed=0, rate=0.5), "config argument 'sed' is unknown; known are seed, rate."),
        ("flat", dict(seed=0), "config argument 'flat' is unknown; known are seed."),
        ("seed=1,Seed=2", dict(seed=0), "config argument 'Seed' is unknown; known are seed."),
        ("seed=x", dict(seed=0), "config argument seed='x' is no int."),
        ("seed=1.5", dict(seed=0), "config argument seed='1.5' is no int."),
        ("seed", dict(seed=0), "config argument seed='' is no int."),
        ("rate=fast", dict(rate=0.5), "config argument rate='fast' is no float."),
        ("fast=maybe", dict(fast=False), "config argument fast='maybe' is no bool."),
    ],
)
def test_parse_arg_errors(arg, known, message):
    with pytest.raises(ValueError) as error:
        C.parse_arg(arg, **known)
    assert str(error.value) == message


# --- the fields -------------------------------------------------------------------------------------


# --- experiments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_set_known_fields(name):
    module = importlib.import_module(f"experiments.{name}")
    assert module.__doc__
    known, config = dict(C.fields(C.default())), module.get_config()
    found = dict(C.fields(config))
    assert set(found) == set(known)
    for path, value in found.items():
        assert isinstance(value, type(known[path])), f"{path}={value!r}"
    assert dict(C.fields(module.get_config())) == found
    with pytest.raises(ValueError, match="config argument 'nonsense' is unknown; known are "):
        module.get_config("nonsense=1")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_take_a_seed(name):
    module = importlib.import_module(f"experiments.{name}")
    other = dict(C.fields(module.get_config("seed=7")))
    assert other.pop("seed") == 7
    assert other == {k: v for k, v in C.fields(module.get_config()) if k != "seed"}


def test_default_is_new_each_time():
    one = C.default()
    one.sampler.slots = 99
    one.advantage.options.anything = 1
    assert C.default().sampler.slots != 99 and "anything" not in C.default().advantage.options


# --- flags, as launch.train defines them ----------------------------------------------------------


@pytest.fixture
def parse(monkeypatch):
    def parsed(arg: str, *overrides) -> ConfigDict:
        """The config of a command line, parsed as `launch.train` does."""
        line = ["train", f"--config={ROOT}/experiments/countdown.py{arg}", *overrides]
        monkeypatch.setattr(sys, "argv", line)  # config_flags looks there for overrides
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", None, "help", flag_values=values)
        values(line)
        return holder.value

    return parsed


def test_flags_override_fields(parse):
    config = parse(":seed=4", "--config.sampler.slots=3", "--config.steps=7", "--config.learner.kl=1")
    assert (config.seed, config.sampler.slots, config.steps) == (4, 3, 7)
    assert config.learner.kl == 1.0 and isinstance(config.learner.kl, float)


def test_every_field_is_explained():
    said = C.comments()
    assert all(said[name] for name, _ in C.fields(C.default()))
    assert said["learner.epochs"].startswith("updates") and said["text"].startswith("what text tasks read")
    assert said["environment.memory"].endswith("with the goal ...")  # a comment of two lines
    assert said["mesh.data"] == said["mesh.tensor"] == "devices along each axis, -1: the rest"
    given = C.default()
    given.steps, given.text.graders = 7, ConfigDict(dict(number=1.0))
    text = C.explain(given)
    lines = text.splitlines()
    assert lines[1] == "steps = 7 (default 400)  updates of the policy by reinforcement learning"
    assert "  text.graders = {'number': 1.0} (default {'exact': 1.0})  name -> weight" in text
    names = [line.split(" = ")[0].strip() for line in lines if " = " in line.split("  #")[0] and not line.startswith(" " * 8)]
    assert names == [name for name in said if name in dict(C.fields(given))]


def test_the_trainer_lists_the_fields_of_an_experiment():
    command = [sys.executable, "-m", "launch.train", "--config=experiments/countdown.py:grpo", "--config.steps=7", "--help_config"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    wanted = importlib.import_module("experiments.countdown").get_config("grpo")
    wanted.steps = 7
    assert run.stdout == C.explain(wanted) + "\n"
