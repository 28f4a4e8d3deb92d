"""The Countdown grader in plain Python: recursive descent with exact fractions."""

import re
from fractions import Fraction

TOKEN = re.compile(r" *(?:([1-9][0-9]*)|([-+*/()]))")


class _Wrong(Exception):
    pass


def _split(text: str) -> list[str]:
    tokens, position = [], 0
    text = text.rstrip(" ")
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise _Wrong
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
    return tokens


def _expr(tokens: list[str], used: list[int]) -> Fraction:
    value = _term(tokens, used)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens.pop(0) == "+" else -1
        value += sign * _term(tokens, used)
    return value


def _term(tokens: list[str], used: list[int]) -> Fraction:
    value = _factor(tokens, used)
    while tokens and tokens[0] in "*/":
        operator, factor = tokens.pop(0), _factor(tokens, used)
        if operator == "*":
            value *= factor
        elif factor == 0:
            raise _Wrong
        else:
            value /= factor
    return value


def _factor(tokens: list[str], used: list[int]) -> Fraction:
    token = tokens.pop(0) if tokens else ""
    if token.isdigit():
        used.append(int(token))
        return Fraction(int(token))
    if token != "(":
        raise _Wrong
    value = _expr(tokens, used)
    if not tokens or tokens.pop(0) != ")":
        raise _Wrong
    return value


def countdown_value(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers in it, in order; None where it is none."""
    try:
        tokens, used = _split(text), []
        value = _expr(tokens, used)
    except _Wrong:
        return None
    return None if tokens else (value, used)


def countdown_grade(text: str, numbers: list[int], target: int) -> bool:
    """Whether the text (without EOS) makes the target from the numbers, each used once."""
    result = countdown_value(text)
    return result is not None and result[0] == target and sorted(result[1]) == sorted(numbers)
