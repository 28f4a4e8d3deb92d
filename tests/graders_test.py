"""Graders on the host: what they read, what they find right, and that nothing a grader does harms the others."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from treerl.errors import UserError
from treerl.graders import FAULTS, Graders, extract, last_number, normal
from treerl.graders.answers import FORMULA, LITERAL, load

pytestmark = pytest.mark.filterwarnings("ignore:grader")
ROOT = pathlib.Path(__file__).resolve().parent.parent
RAISED, HUNG, NOT_FINITE, DIED = map(FAULTS.index, ("raised", "hung", "not_finite", "died"))
EXAMPLE = {"row": 0, "prompt": "?", "answer": "4"}


def score(name: str, completion: str, answer: str | None, how: str = "text") -> float:
    [grader] = load((name,), how, None)
    return float(grader(completion, {"prompt": "?", "answer": answer}))


# --- the answer in a completion -------------------------------------------------------------------


@pytest.mark.parametrize("how, completion, answer", [
    ("text", "  a b\n", "a b"),
    ("text", "", ""),
    ("boxed", r"so \boxed{7}", "7"),
    ("boxed", r"\boxed{1} and \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("boxed", r"\boxed{\}}", r"\}"),
    ("boxed", r"\boxed{a{b}", ""),
    ("boxed", r"\boxed{1} then \boxed{2", ""),
    ("boxed", "7", ""),
    ("tag", "<answer>1</answer> no, <answer> 2\n</answer>!", "2"),
    ("tag", "<answer>1</answer> no, <answer>2", "1"),
    ("tag", "<answer> the <answer>3</answer>", "3"),
    ("tag", "</answer>4<answer>", ""),
    ("tag", "4", ""),
    ("number", "3 apples and 4.", "4"),
    ("number", "none", ""),
])  # fmt: skip
def test_extract(how, completion, answer):
    assert extract(completion, how) == answer


@pytest.mark.parametrize("text, number", [
    ("12", "12"), ("-12", "-12"), ("a = -3", "-3"), ("5-3", "3"), ("x-3", "3"), ("(5)-3", "3"), ("5 - 3", "3"), ("(-3)", "-3"),
    ("1,234", "1234"), ("-1,234,567.80", "-1234567.8"), ("1,2", "2"), ("1,2345", "2345"), ("12,34", "34"), ("1, 234", "234"),
    ("3.50", "3.5"), ("4.0", "4"), ("4.", "4"), (".5", "0.5"), ("-.5", "-0.5"), ("007", "7"), ("0", "0"), ("-0.0", "0"),
    ("$5", "5"), ("\u22127", "-7"), ("1/2", "2"), ("version 1.2.3", "0.3"), ("", ""), ("-", ""), ("\u0663", ""), ("9" * 5000, "9" * 5000),
])  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


def test_an_unknown_extraction():
    with pytest.raises(UserError, match="^text.extract='last' is unknown; known are text, number, boxed, tag.$"):
        extract("1", "last")
    with pytest.raises(UserError, match="^text.extract='last' is unknown"):
        Graders({"exact": 1.0}, extract="last")


# --- built-in graders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, how, completion, answer, right", [
    ("exact", "text", " New\n  YORK ", "new york", True),
    ("exact", "text", "newyork", "new york", False),
    ("exact", "text", "it is 4", "4", False),
    ("exact", "text", "", "", False),
    ("exact", "text", "4", None, False),
    ("exact", "number", "it is 1,004.0", "1004", True),
    ("exact", "number", "4 or 5", "4", False),
    ("exact", "boxed", r"\boxed{5}", r"so it is \boxed{5}", True),
    ("exact", "boxed", "5", "5", False),
    ("exact", "tag", "4 <answer> Yes</answer>", "yes", True),
    ("number", "text", "so 3 + 4 = 7.0", "7", True),
    ("number", "text", "1,000", "1000.00", True),
    ("number", "text", "7 or 8", "7", False),
    ("number", "text", "-7", "7", False),
    ("number", "text", "seven", "seven", False),
    ("number", "text", "7", None, False),
    ("number", "tag", "<answer>7</answer> 8", "7", True),
    ("number", "tag", "7", "7", False),
])  # fmt: skip
def test_cheap_graders(name, how, completion, answer, right):
    assert score(name, completion, answer, how) == right


@pytest.mark.parametrize("how, completion, answer, right", [
    ("text", "so it is $0.5$", r"\frac{1}{2}", True),
    ("text", r"\boxed{1+x^2}", "x^2 + 1", True),
    ("text", "it is 1", "x^2 + 1", False),
    ("text", r"$\frac{2}{4}$", r"Half, so \boxed{\frac{1}{2}}.", True),
    ("text", "the answer is 72", "72", True),
    ("text", "the answer is 73", "72", False),
    ("text", "", "72", False),
    ("text", "no idea", "72", False),
    ("text", "72", None, False),
    ("boxed", r"\boxed{\frac{1}{2}} or 3", "0.5", True),
    ("boxed", "0.5", "0.5", False),
    ("tag", "<answer>x(x+1)</answer>", "x^2+x", True),
])  # fmt: skip
def test_math(how, completion, answer, right):
    assert score("math", completion, answer, how) == right


def test_reasoning_gym_scores_with_its_own_dataset():
    import reasoning_gym

    made = reasoning_gym.create_dataset("countdown", seed=3, size=1)
    entry = made[0]
    assert made.score_answer(entry["metadata"]["expression"], entry) == 1
    [grader] = load(("reasoning_gym",), "tag", ("countdown", {}))
    expression = entry["metadata"]["expression"]
    assert grader(f"1+1 <answer>{expression}</answer>", {"entry": entry}) == 1
    assert grader(f"<answer>{expression}+1</answer>", {"entry": entry}) == 0.05
    assert grader(expression, {"entry": entry}) == 0.01  # the dataset's own score of no answer


@pytest.mark.parametrize("name", LITERAL + FORMULA)
def test_text_of_a_model_is_never_run(name, tmp_path):
    """Not even by the scorers of reasoning-gym that evaluate it; their right answers still count."""
    import reasoning_gym

    entry = reasoning_gym.create_dataset(name, seed=3, size=1)[0]
    mark = tmp_path / "run"
    writes = f"open({str(mark)!r}, 'w')"
    [grader] = load(("reasoning_gym",), "text", (name, {}))
    for text in (writes, f"[{writes}]", f"1+{writes}.close()", f"__import__('pathlib').Path({str(mark)!r}).touch()"):
        assert grader(text, {"entry": entry}) == 0
        assert not mark.exists()
    assert grader(entry["answer"], {"entry": entry}) == 1


def test_formulas_take_no_time_to_read():
    [grader] = load(("reasoning_gym",), "text", ("countdown", {}))
    assert grader("1" * 3000 + "!", {"entry": None}) == 0  # a pattern that backtracks would not end


def test_math_runs_nothing(tmp_path):
    mark = tmp_path / "run"
    for text in (f"$open({str(mark)!r}, 'w')$", f"1+open({str(mark)!r}, 'w')", f"\\boxed{{__import__('os').mkdir('{mark}')}}"):
        score("math", text, "1")
    assert not mark.exists()


# --- faults ---------------------------------------------------------------------------------------


def test_faults_reach_no_other_answer(capfd):
    """Every fault among good answers, in their order, with a grader beside that has none; and again after it."""
    cases = dict(
        good=(1, 0), sleep=(0, HUNG), nan=(0, NOT_FINITE), bool=(1, 0), spin=(0, HUNG), end=(0, DIED), numpy=(0.25, 0),
        kill=(0, DIED), none=(0, NOT_FINITE), text=(0, NOT_FINITE), leave=(0, RAISED), array=(0.5, 0), inf=(0, NOT_FINITE),
        complex=(0, NOT_FINITE), huge=(0, NOT_FINITE), big=(0, NOT_FINITE), list=(0, NOT_FINITE), integer=(2, 0), truth=(1, 0),
        other=(1, 0),
    )  # fmt: skip
    cases["raise"] = (0, RAISED)
    with Graders({"sample_graders:told": 1.0, "exact": 2.0, "sample_graders:half": 0.0}, seconds=2.0, workers=2) as graders:
        assert graders.names == ("sample_graders:told", "exact", "sample_graders:half") and graders.weights == (1, 2, 0)
        for _ in range(2):
            scores, fault = graders.grade(list(cases), [dict(EXAMPLE, answer="sleep")] * len(cases))
            assert (scores.dtype, fault.dtype) == (np.float32, np.int8)
            assert dict(zip(cases, zip(scores[:, 0].tolist(), fault.tolist()))) == cases
            assert scores[:, 1].tolist() == [case == "sleep" for case in cases]
            assert (scores[:, 2] == 0.5).all()
    assert capfd.readouterr().out == ""


def test_the_first_fault_of_each_kind_is_told():
    with Graders({"sample_graders:told": 1.0}, workers=1) as graders, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for completion in ("raise", "good", "raise", "nan"):
            graders.grade([completion], [EXAMPLE])
    assert [str(w.message) for w in caught] == [
        "grader 'sample_graders:told' raised ValueError: no answer; such answers are worth 0.",
        "grader 'sample_graders:told' returned nan; such answers are worth 0.",
    ]


def test_many_answers_keep_their_order():
    completions = ["x" * (i % 97) for i in range(300)]
    with Graders({"sample_graders:length": 1.0}, workers=3) as graders:
        scores, fault = graders.grade(completions, [EXAMPLE] * 300)
    assert scores[:, 0].tolist() == [len(c) for c in completions] and not fault.any()


def test_equal_pairs_are_graded_once(tmp_path):
    """Equal by value: the same text of another example is another pair."""
    one, two = ({"answer": "4", "row": row, "file": str(tmp_path / "calls")} for row in (0, 1))
    with Graders({"sample_graders:counted": 1.0}) as graders:
        scores, _ = graders.grade(["a", "b", "a", "a", "a"], [one, one, dict(one), two, one])
    assert scores.tolist() == [[1.0]] * 5
    assert sorted((tmp_path / "calls").read_text().split()) == ["a", "a", "b"]


def test_threshold():
    make = lambda threshold: Graders({"sample_graders:half": 1.0, "exact": 1.0}, threshold=threshold, workers=1)
    for threshold, expected in ((0.0, [0.5, 1.0]), (0.5, [1.0, 1.0]), (0.6, [0.0, 1.0])):
        with make(threshold) as graders:
            assert graders.grade(["4"], [EXAMPLE])[0].tolist() == [expected]


def test_nothing_to_grade():
    scores, fault = Graders({"exact": 1.0, "sample_graders:half": 1.0}).grade([], [])
    assert scores.shape == (0, 2) and fault.shape == (0,)


def test_cheap_graders_need_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert Graders({"exact": 1.0, "number": 1.0}).grade(["4", "a 4"], [EXAMPLE] * 2)[0].tolist() == [[1, 1], [0, 1]]


# --- processes ------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether a process runs, or a thread of it; one that ended and waits for its parent does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def ends(pid: int) -> bool:
    for _ in range(1000):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


def test_a_process_serves_until_it_is_closed_and_starts_again():
    graders = Graders({"sample_graders:pid": 1.0}, workers=1)
    pid = lambda: int(graders.grade(["a"], [EXAMPLE])[0][0, 0])  # noqa: F821 (deleted below)
    first = pid()
    assert first != os.getpid() and pid() == first
    os.kill(first, signal.SIGKILL)  # as the system does when memory runs out
    assert ends(first)
    second = pid()
    assert second not in (first, os.getpid()) and alive(second)
    graders.close()
    assert ends(second)
    third = pid()
    del graders
    assert ends(third)


def test_what_a_hanging_grader_started_ends_with_it(tmp_path):
    with Graders({"sample_graders:told": 1.0}, seconds=2.0) as graders:
        _, fault = graders.grade(["child"], [{"file": str(tmp_path / "pid")}])
    assert fault.tolist() == [HUNG] and ends(int((tmp_path / "pid").read_text()))


SCRIPT = """
import sys
import threading
from treerl.graders import Graders
print("main")
graders = Graders({"sample_graders:pid": 1.0, "sample_graders:told": 1.0}, workers=1, seconds=600.0)
def grade(text):
    print(int(graders.grade([text], [{"file": sys.argv[-1]}])[0][0, 0]), flush=True)
thread = threading.Thread(target=grade, args=("good",))  # as a callback of JAX does
thread.start()
thread.join()
if sys.argv[1:2] == ["hang"]:
    grade("child")
"""


@pytest.mark.parametrize("how", ["file", "module", "input"])
def test_a_script_without_a_main_guard(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = {"file": ["script.py"], "module": ["-m", "script"], "input": ["-"]}[how]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    run = subprocess.run([sys.executable, *command], input=SCRIPT, **options)
    assert run.returncode == 0, run.stderr
    main, pid = run.stdout.split()
    assert main == "main" and ends(int(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_their_parent(number, tmp_path):
    """With a call under way, and with what that started."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    command = [sys.executable, str(tmp_path / "script.py"), "hang", str(tmp_path / "pid")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout.readline() == "main\n"
        pid = int(parent.stdout.readline())
        while not (tmp_path / "pid").exists() or not (child := (tmp_path / "pid").read_text()):
            time.sleep(0.01)
        assert alive(pid) and alive(int(child))
        parent.send_signal(number)
    assert ends(pid) and ends(int(child))


def test_an_interrupt_leaves_no_answers_for_the_next_call(monkeypatch):
    from multiprocessing import connection

    wait, calls = connection.wait, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return wait(*args, **options)

    with Graders({"sample_graders:length": 1.0}, workers=1) as graders:
        graders.grade(["a"], [EXAMPLE])
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(connection, "wait", interrupted)
            graders.grade(["ab", "abcd"], [EXAMPLE] * 2)
        assert graders.grade(["abc"], [EXAMPLE])[0].tolist() == [[3.0]]


def test_processes_import_no_jax(tmp_path):
    (tmp_path / "look.py").write_text("import sys\ndef jax(c, e): return 'jax' in sys.modules\n")
    code = "import sys; from treerl.graders import Graders\nprint(Graders({'look:jax': 1.0}).grade(['a'], [{}])[0], 'jax' in sys.modules)"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "[[0.]] False\n"


# --- mistakes -------------------------------------------------------------------------------------


def mistake(weights, **options) -> str:
    with pytest.raises(UserError) as error:
        Graders(weights, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs.py").write_text("import not_there_either\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.py").write_text("def f(c, e): return 1\n")
    start = "text.graders: "
    assert mistake({"exac": 1.0}) == (
        start + "'exac' is unknown; known are exact, number, math, reasoning_gym, and module:function of your own."
    )
    assert mistake({"not_there:f": 1.0}) == (
        start + "'not_there:f' names no module; start where not_there.py is, or add that folder to PYTHONPATH."
    )
    assert mistake({"folder/none:f": 1.0}) == (
        start + "'folder/none:f' names no module; start where folder/none.py is, or add that folder to PYTHONPATH."
    )
    assert mistake({"needs:f": 1.0}) == (
        start + "'needs:f' cannot be imported (ModuleNotFoundError: No module named 'not_there_either'); mend the module."
    )
    assert mistake({"broken:f": 1.0}) == (start + "'broken:f' cannot be imported (ZeroDivisionError: division by zero); mend the module.")
    file = ROOT / "tests/sample_graders.py"
    assert mistake({"sample_graders:f": 1.0}) == (start + f"'sample_graders:f' cannot work, f is not there; name a function of {file}.")
    assert mistake({"sample_graders:NOT_CALLABLE": 1.0}) == (
        start + f"'sample_graders:NOT_CALLABLE' cannot work, NOT_CALLABLE is no function; name a function of {file}."
    )
    for name in ("folder.inner:f", "folder/inner:f", "folder/inner.py:f"):
        with Graders({name: 1.0}, workers=1) as graders:
            assert graders.grade(["a"], [EXAMPLE])[0] == 1


@pytest.mark.parametrize("weights, message", [
    ({}, "text.graders={} gives no weight to any grader; set one such as {'exact': 1.0}."),
    ({"exact": 0.0}, "text.graders={'exact': 0.0} gives no weight to any grader; set one such as {'exact': 1.0}."),
    ({"exact": "1"}, "text.graders: the weight '1' of exact is no number; set one such as 1.0."),
    ({"exact": True}, "text.graders: the weight True of exact is no number; set one such as 1.0."),
    ({"exact": float("nan")}, "text.graders: the weight nan of exact is no number; set one such as 1.0."),
    ({"reasoning_gym": 1.0}, "text.graders: reasoning_gym scores answers to its own tasks alone; set task.name=reasoning_gym."),
])  # fmt: skip
def test_weights_that_cannot_work(weights, message):
    assert mistake(weights) == message


def test_a_package_that_is_missing(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mistake({"math": 1.0}) == "text.graders: math needs a package that is missing; pip install math-verify."


def test_a_module_that_fails_in_the_process_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = f"import os\nif os.getpid() != {os.getpid()}: %s\ndef f(c, e): return 1\n"
    (tmp_path / "mine.py").write_text(module % "raise OSError('no licence')")
    (tmp_path / "ends.py").write_text(module % "os._exit(3)")
    for name, words in (("mine", "cannot be imported (OSError: no licence); mend the module."),
                        ("ends", "ended with exit status 3 before it was ready")):  # fmt: skip
        with Graders({f"{name}:f": 1.0}) as graders, pytest.raises(UserError, match="text.graders") as error:
            graders.grade(["a"], [EXAMPLE])
        assert words in str(error.value)


def test_normal():
    assert normal(" A\t b\n") == "a b"
