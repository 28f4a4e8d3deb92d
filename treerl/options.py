"""Names and options that users give: what they may choose, and one sentence where they cannot."""

import functools
import inspect
import typing
from collections.abc import Callable

from treerl.errors import UserError


def fits(value, like) -> bool:
    """Whether a value has the type of a default; an int is a float too, and a list, as of JSON, a tuple."""
    allowed = {float: (float, int), tuple: (tuple, list)}.get(type(like), type(like))
    return isinstance(value, allowed) and isinstance(value, bool) == isinstance(like, bool)


def known(name: str, table, field: str):
    """The entry of a table (or the name itself, of a tuple of names) that a field chooses."""
    if name not in table:
        raise UserError(f"{field}={name!r} is unknown; known are {', '.join(sorted(table))}.")
    return table[name] if isinstance(table, dict) else name


def bind(function: Callable, options, field: str, chosen: str, given: tuple[str, ...] = ()) -> Callable:
    """A function with options, its keyword-only arguments but those given elsewhere, checked against the types of their defaults."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.items()
    keywords = {k: p.default for k, p in parameters if p.kind is p.KEYWORD_ONLY and k not in given}
    for option, value in options.items():
        if option not in keywords:
            names = ", ".join(sorted(keywords)) or "none"
            raise UserError(f"{field} has no {option!r} for {chosen}; known are {names}.")
        like, choices = keywords[option], typing.get_args(hints.get(option)) if isinstance(keywords[option], str) else ()
        if not fits(value, like):
            kind = type(like).__name__
            raise UserError(f"{field}.{option}={value!r} is no {kind}; set one such as {like!r}.")
        if choices:
            known(value, choices, f"{field}.{option}")
        if isinstance(like, int) and not isinstance(like, bool) and value < 0:
            raise UserError(f"{field}.{option}={value!r} cannot work; set it to 0 or more.")
    return functools.partial(function, **options)
