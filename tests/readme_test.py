"""What the README shows can be run, and what can be chosen stands in it."""
import ast
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from treerl import config as C
from treerl import functions as F
from treerl.advantages import ESTIMATORS, MULTIPLIERS
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
