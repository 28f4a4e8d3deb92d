"""The rows of the design: who may import whom, who may read the config, what lies where."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A module imports from rows above its own, never from its own; a package may import inside itself.
ROWS = [
    {"errors"},
    {"options"},
    {"types", "kernels", "masked", "config", "sharding", "tokenizers", "graders", "processes", "files", "progress"},
    {"games"},
    {"environments"},
    {"tree", "attention", "optimizer", "checkpoint", "tasks", "workdir", "supervision"},
    {"models", "prompts", "branching", "pruning", "survival", "compaction", "nucleus"},
    {"episodes"},
    {"sampler", "rewards", "advantages", "thinning", "packing", "losses", "metrics", "events", "profiling", "draw"},
    {"functions", "report", "learner", "evaluate", "reprompt"},
    {"step"},
    {"experiment"},
    {"warm_start", "plan", "sweep", "bench"},
    {"train", "seeds"},
]
ROW_OF = {unit: number for number, row in enumerate(ROWS) for unit in row}
READS_CONFIG = {"config", "workdir", "functions", "experiment", "warm_start", "plan", "sweep", "train", "seeds", "bench"}
TOP_LEVEL = {"setup.py", "README.md", "LICENSE", "treerl", "experiments", "launch", "notebooks", "tests"}
FORBIDDEN = ("tensorflow", "torch")


def sources(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, ast.Module]]:
    """Dotted module name -> (file, syntax tree) of every Python file below a package's folder."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (file, ast.parse(file.read_text(encoding="utf-8"), str(file)))
    return found


def imports(file: pathlib.Path, name: str, code: ast.Module, modules) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of a file, late ones and relative ones included.

    `from treerl import tree` names the module treerl.tree; `from treerl.types import Prompts`
    names treerl.types.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(up + [node.module] * bool(node.module))
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, n if n in modules or base == "treerl" else base) for n in inner]
    return found


def unit(name: str) -> str | None:
    """The design's name of a dotted module of treerl: 'treerl.models.policy' -> 'models'."""
    parts = name.split(".")
    return parts[1] if parts[0] == "treerl" and len(parts) > 1 else None


def complaints(folder: pathlib.Path) -> list[str]:
    """What breaks the rows in the package at `folder`, one line each."""
    modules, found = sources(folder), []
    for name, (file, code) in modules.items():
        mine = unit(name)
        if mine is not None and mine not in ROW_OF:
            found.append(f"{name}: is in no row; add it to DESIGN's rows and to this test")
            continue
        for line, target in imports(file, name, code, modules):
            other = unit(target)
            if target.split(".")[0] != "treerl" or (mine is not None and other == mine):
                continue
            if other not in ROW_OF:
                found.append(f"{name}:{line}: imports {target}, which is in no row")
            elif mine is None or ROW_OF[other] >= ROW_OF[mine]:
                found.append(f"{name}:{line}: imports {target} of row {ROW_OF[other]}")
    return found


def config_readers(folder: pathlib.Path, sections: set[str]) -> list[str]:
    """Modules that import treerl.config, or read a section as in `config.sampler`."""
    modules, found = sources(folder), []
    for name, (file, code) in modules.items():
        if unit(name) in READS_CONFIG:
            continue
        found += [
            f"{name}:{line}: imports treerl.config" for line, target in imports(file, name, code, modules) if unit(target) == "config"
        ]
        for node in ast.walk(code):
            if isinstance(node, ast.Attribute) and node.attr in sections:
                base = node.value
                owner = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
                if owner == "config":
                    found.append(f"{name}:{node.lineno}: reads config.{node.attr}")
    return found


def sections() -> set[str]:
    from ml_collections import ConfigDict

    from treerl.config import default

    return {name for name, value in default().items() if isinstance(value, ConfigDict)}


def test_modules_import_only_from_rows_above():
    assert complaints(ROOT / "treerl") == []


def test_every_row_names_what_exists():
    """No two rows share a name, and the core of each row is there."""
    assert len(ROW_OF) == sum(map(len, ROWS))
    there = {unit(name) for name in sources(ROOT / "treerl")} - {None}
    assert set(ROW_OF) - {"bench"} <= there


def test_only_the_rooms_named_above_read_the_config():
    assert config_readers(ROOT / "treerl", sections()) == []


@pytest.mark.parametrize(
    "file, text, complaint",
    [
        ("masked.py", "from treerl import tree as T", "treerl.masked:1: imports treerl.tree of row 5"),
        ("tree.py", "from treerl.attention import dense", "treerl.tree:1: imports treerl.attention of row 5"),
        ("tree.py", "def f():\n    import treerl.step", "treerl.tree:2: imports treerl.step of row 10"),
        ("losses.py", "from . import packing", "treerl.losses:1: imports treerl.packing of row 8"),
        ("models/a.py", "from ..models import b\nfrom .. import prompts", "treerl.models.a:2: imports treerl.prompts of row 6"),
        ("experiment.py", "from treerl.train import train", "treerl.experiment:1: imports treerl.train of row 13"),
        ("novel.py", "", "treerl.novel: is in no row; add it to DESIGN's rows and to this test"),
        ("novel/inner.py", "", "treerl.novel.inner: is in no row; add it to DESIGN's rows and to this test"),
        ("step.py", "from treerl import novel", "treerl.step:1: imports treerl.novel, which is in no row"),
        ("errors.py", "from treerl.masked import mean", "treerl.errors:1: imports treerl.masked of row 2"),
        ("__init__.py", "from treerl.types import Tree", "treerl:1: imports treerl.types of row 2"),
    ],
)  # fmt: skip
def test_the_rule_catches(tmp_path, file, text, complaint):
    path = tmp_path / "treerl" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for name in ("tree", "packing", "prompts", "types"):  # what `from . import` may name
        other = tmp_path / "treerl" / f"{name}.py"
        if not other.exists():
            other.write_text("")
    assert complaints(tmp_path / "treerl") == [complaint]


@pytest.mark.parametrize("text", ["from treerl.config import default", "x = lambda config: config.sampler.slots", "x = self.config.mesh"])
def test_the_config_rule_catches(tmp_path, text):
    (tmp_path / "treerl").mkdir()
    (tmp_path / "treerl" / "losses.py").write_text(text)
    (tmp_path / "treerl" / "functions.py").write_text(text)  # may read it
    [found] = config_readers(tmp_path / "treerl", sections())
    assert found.startswith("treerl.losses:1: ")


def test_training_never_imports_tensorflow_or_torch():
    code = f"import sys, treerl.train, treerl.tasks.countdown\nprint(sorted(set(m.split('.')[0] for m in sys.modules) & set({FORBIDDEN})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == "[]"


def test_no_source_imports_tensorflow():
    """Late imports too, which the test above does not reach."""
    for folder in ("treerl", "experiments", "launch"):
        modules = sources(ROOT / folder)
        for name, (file, code) in modules.items():
            tops = {target.split(".")[0] for _, target in imports(file, name, code, modules)}
            assert "tensorflow" not in tops, name


def test_launch_entries_are_short():
    long = {f.name: n for f in (ROOT / "launch").glob("*.py") if (n := len(f.read_text().splitlines())) > 60}
    assert long == {}


def test_experiments_define_a_config_and_nothing_else():
    for file in (ROOT / "experiments").glob("*.py"):
        if file.name == "__init__.py":
            continue
        code = ast.parse(file.read_text(encoding="utf-8"))
        defined = [n.name for n in ast.walk(code) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert defined == ["get_config"], file.name
        assert ast.get_docstring(code), f"{file.name} needs a docstring: command, time, measured result"


def git(*arguments) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    run = subprocess.run(["git", *arguments, "-z"], cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        pytest.skip("no git checkout")
    return [path for path in run.stdout.split("\0") if path]


def test_top_level_holds_only_what_was_agreed():
    """Of files under version control and new ones; what .gitignore names may lie about."""
    files = git("ls-files") + git("ls-files", "--others", "--exclude-standard")
    tops = {path.split("/")[0] for path in files}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    ruff = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


TYPED = "config countdown draw files gguf masked metrics report tree why".split()  # whose tests hand over nothing wrong but on purpose


@pytest.mark.slow
def test_annotations_are_true():
    """Functions are given, and give, what their annotations say, while these tests call them."""
    files = [f"tests/{name}_test.py" for name in TYPED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--typeguard-packages=treerl", *files]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-4000:]
