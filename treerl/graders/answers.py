"""What a completion answers, and the built-in graders of it: (completion, example) -> score.

Text of a model is data: nothing here evaluates it, and what would in libraries is kept from doing so.
"""

import ast
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable

from treerl.errors import UserError

EXTRACTS = ("text", "number", "boxed", "tag")
CHEAP = ("exact", "number")  # bounded by the length of the text, and need no process of their own
BUILT_IN = (*CHEAP, "math", "reasoning_gym")
# A minus behind a digit, a letter or a bracket subtracts.
_NUMBER = re.compile(r"(?:(?<![\w)\]}.])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def extract(completion: str, how: str) -> str:
    """The answer in a completion, "" where there is none.

    Args:
      how: text, all of it; number, the last one, see `last_number`; boxed, what the last \\boxed{} holds; tag, what the
        last <answer></answer> does.
    """
    if how == "text":
        return completion.strip()
    if how == "number":
        return last_number(completion)
    if how == "boxed":
        start = completion.rfind("\\boxed{")
        return _braced(completion[start + len("\\boxed{") :]).strip() if start >= 0 else ""
    if how == "tag":
        end = completion.rfind("</answer>")
        start = completion.rfind("<answer>", 0, max(end, 0))
        return completion[start + len("<answer>") : end].strip() if start >= 0 else ""
    raise UserError(f"text.extract={how!r} is unknown; known are {', '.join(EXTRACTS)}.")


def _braced(text: str) -> str:
    """What comes before the brace that closes one opened in front of the text; "" where none does."""
    depth, at = 1, 0
    while at < len(text):
        if text[at] == "\\":
            at += 1  # \{ and \} open and close nothing
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if not depth:
                return text[:at]
        at += 1
    return ""


def last_number(text: str) -> str:
    """The last number of a text, written in one way: "-1,234.50" is "-1234.5"; "" where there is none."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return ""
    whole, _, part = found[-1].replace(",", "").lstrip("-").partition(".")
    part = part.rstrip("0")
    value = (whole.lstrip("0") or "0") + ("." + part if part else "")
    return "-" + value if found[-1].startswith("-") and value != "0" else value


def normal(text: str) -> str:
    """A text without what does not count: case, and how much white space."""
    return " ".join(text.split()).casefold()


def _reference(example: dict, how: str) -> str:
    """The reference answer, read like a completion where that finds something."""
    return extract(example["answer"], how) or example["answer"].strip()


def exact(completion: str, example: dict, how: str) -> bool:
    """Whether the answer is the reference, case and white space aside."""
    if example["answer"] is None:
        return False
    return normal(extract(completion, how)) == normal(_reference(example, how)) != ""


def number(completion: str, example: dict, how: str) -> bool:
    """Whether the last number of the answer equals that of the reference."""
    if example["answer"] is None:
        return False
    return last_number(extract(completion, how)) == last_number(_reference(example, how)) != ""


def _math(how: str) -> Callable:
    """Whether the answer is mathematically the reference, by math-verify."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it keeps no time; `workers` does

    def read(text: str, whole: bool) -> list:
        """Expressions in a text; `whole`: all of it is one, perhaps without its dollars."""
        bare = whole and not any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
        return (bare and parse(f"${text}$", parsing_timeout=None)) or parse(text, parsing_timeout=None)

    gold = functools.lru_cache(maxsize=1024)(functools.partial(read, whole=True))

    def grade(completion: str, example: dict) -> bool:
        if example["answer"] is None:
            return False
        return verify(gold(_reference(example, how)), read(extract(completion, how), how != "text"), timeout_seconds=None)

    verify(read("$1$", True), read("1", True), timeout_seconds=None)  # the first call takes longer
    return grade


# Scorers of reasoning-gym that evaluate an answer as Python: these as a list ...
LITERAL = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")
# ... and these as a formula, by sympy, which ends in Python's eval.
FORMULA = ("countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication")
_NAMES = "sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|[A-Za-z]"
_FORMULA = re.compile(rf"(?:[0-9]+(?:\.[0-9]+)?|(?:{_NAMES})(?![A-Za-z0-9_])|[-+*/^()\s])*+")


def _reasoning_gym(how: str, source: tuple[str, dict]) -> Callable:
    """The score that the dataset itself gives, from 0 to 1.

    Args:
      source: name and arguments of the dataset.
    """
    import reasoning_gym

    name, options = source
    dataset = reasoning_gym.create_dataset(name, **options)
    if name in LITERAL:
        sys.modules[type(dataset).__module__].eval = ast.literal_eval  # in place of the one built in

    def grade(completion: str, example: dict) -> float:
        answer = extract(completion, how)
        if name in FORMULA and not _FORMULA.fullmatch(answer):
            return 0.0
        return dataset.score_answer(answer, example["entry"])

    return grade


def load(names: tuple[str, ...], how: str, source: tuple[str, dict] | None) -> list[Callable]:
    """The graders of these names; imports what they need.

    Args:
      names: built-in ones, or module:function. how: see `extract`; functions of a module get the whole completion.
      source: what `reasoning_gym` asks for.

    Raises:
      UserError: a name is unknown, or what it needs is not there.
    """
    made = {
        "exact": lambda: functools.partial(exact, how=how),
        "number": lambda: functools.partial(number, how=how),
        "math": lambda: _math(how),
        "reasoning_gym": lambda: _reasoning_gym(how, source),
    }
    return [made[name]() if name in made else _imported(name) for name in names]


def check(name: str, source: tuple[str, dict] | None) -> None:
    """Raises UserError where `load` cannot find a grader; imports a module of the user, and no library."""
    package = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"text.graders: {name} needs a package that is missing; pip install {package.replace('_', '-')}.")
    if name == "reasoning_gym" and source is None:
        raise UserError("text.graders: reasoning_gym scores answers to its own tasks alone; set task.name=reasoning_gym.")
    if name not in BUILT_IN:
        _imported(name)


def _imported(name: str) -> Callable:
    """The function of "module:function"; in a package "package.module:function", or with a slash for the dot."""
    path, colon, function = name.partition(":")
    path = path.removesuffix(".py").replace("/", ".")
    if not colon or not path or not function:
        raise UserError(f"text.graders: {name!r} is unknown; known are {', '.join(BUILT_IN)}, and module:function of your own.")
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{path}.".startswith(f"{missing}."):
            raise UserError(
                f"text.graders: {name!r} names no module; start where {path.replace('.', '/')}.py is, or add that folder to PYTHONPATH."
            ) from None
        raise UserError(f"text.graders: {name!r} cannot be imported ({type(error).__name__}: {error}); mend the module.") from error
    found = getattr(module, function, None)
    if not callable(found):
        what = "is no function" if hasattr(module, function) else "is not there"
        raise UserError(f"text.graders: {name!r} cannot work, {function} {what}; name a function of {module.__file__ or path}.")
    return found
