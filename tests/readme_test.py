"""What the README shows can be run, and what can be chosen stands in it."""

import ast
import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from agents_test import experiment as agents
from host_test import GRADERS, tiny
from ml_collections import ConfigDict
from sharding_test import Tiny, one_device

from treerl import config as C, functions as F, report, step as S
from treerl.advantages import ESTIMATORS, MULTIPLIERS
from treerl.experiment import Experiment, named
from treerl.graders import FAULTS
from treerl.losses import KL, OBJECTIVES

TEXT = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "import" in block]
LINES = sorted(set(re.findall(r"`((?:advantage|learner|optimizer)\.\w+)=(\"?[^`]*)`", TEXT)))


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_choice_has_its_line():
    of_a_paper = [name for name, function in ESTIMATORS.items() if "arXiv" in function.__doc__]
    names = [f"| `{name}` |" for name in (*of_a_paper, *MULTIPLIERS)]
    assert len(of_a_paper) >= 14
    assert [name for name in names if name not in TEXT] == []
    assert all(name in TEXT for name in (*OBJECTIVES, *KL, *F.AGGREGATIONS, *F.FORCED, *F.PROXIMAL))


@pytest.mark.parametrize("field, value", LINES)
def test_config_lines_are_fields_with_values_that_work(field, value):
    config = C.default()
    section, name = field.split(".")
    like = config[section][name]
    if isinstance(like, ConfigDict):
        options = ast.literal_eval(value.strip('"'))
        row = next(line for line in TEXT.splitlines() if f"`{field}={value}`" in line)
        if name == "options":
            config.advantage.name = re.search(r"advantage\.name=(\w+)", row)[1]
        if "novelty" in options:
            config.advantage.name = "grpo"
        config.advantage[name] = ConfigDict(options)
    else:
        config[section][name] = type(like)(value) if value not in ("True", "False") else value == "True"
    C.check(config)
    F.make_advantage(config.advantage)


def test_there_are_examples_and_lines():
    assert len(EXAMPLES) == 1 and len(LINES) >= 25


# --- the table of metrics ---------------------------------------------------------------------------

METRICS = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", TEXT.partition("\n### Metrics\n")[2].partition("\n### ")[0], re.M)


def rows_of(metric: str) -> list[str]:
    """The rows of the table that a metric's name matches."""
    parts = dict(NAME=".+", KIND="(" + "|".join(FAULTS[1:]) + ")", K="[0-9]+", N="[0-9]+")
    pattern = lambda row: re.sub(r"(NAME|KIND|K$|N$)", lambda word: parts[word[0]], re.escape(row))
    return [row for row, *_ in METRICS if re.fullmatch(pattern(row), metric)]


@pytest.mark.slow
def test_every_metric_has_its_row_and_every_row_a_metric():
    """Of the default rules with graders on the host, a quality head with a KL, and an agent; in the report each has its panel."""
    names = {"seconds", "tokens_per_second"} | {f"games_{kind}" for kind in FAULTS[1:]}  # what the loop adds
    made = lambda built, *arguments: set(jax.eval_shape(functools.partial(S.train_step, built.fns), *arguments)[1])
    scored = Tiny(one_device(), kl=0.1, pruning=dict(rule="balance", detection=4), branching=dict(rule="stochastic"))
    names |= made(scored, scored.state(), scored.prompts(), scored.knobs)
    found = dict(reward=np.ones((4, 8)), valid=np.ones((4, 8), bool), answer=np.ones((4, 8), np.int32), score=np.ones((4, 8)))
    found["parts"] = np.ones((4, 8, len(GRADERS)))
    for built in (agents(), Experiment(tiny(grading="callback"))):
        names |= made(built, built.state_shape(), built.prompts_shape(), built.knobs)
        scores = built.summarise(found)
        names |= set(scores) | set(named("novel/", scores))
    names -= {"samples"}  # no number
    assert {name: rows_of(name) for name in names if len(rows_of(name)) != 1} == {}
    assert {row for row, *_ in METRICS} - {rows_of(name)[0] for name in names} == set()
    assert [name for name in names if report._group(name) == "other"] == []
    assert len(METRICS) == len({row for row, *_ in METRICS}) > 35
