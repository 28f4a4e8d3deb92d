"""Command lines: parsed as absl does, but every mistake in one is a UserError."""

import os
import re

from absl import flags

from launch.usage import help_if_asked
from treerl.config import OPTIONS, default, fields, misfit, unknown
from treerl.errors import UserError


def parse(argv: list[str], shared=()) -> list[str]:
    """Parses the flags of a command line; returns what is left, the program's name. Exits after --help."""
    help_if_asked(argv, shared)
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or "config" not in flags.FLAGS:
            continue
        if name == "config":
            file = (value if equals else following).partition(":")[0]
            if not os.path.isfile(file):
                raise UserError(f"--config={file} is no file; give an experiment, such as experiments/countdown.py.")
        elif field := re.match(r"(?:no)?config\.(.+)", name):
            _check_field(field[1])
        elif name not in flags.FLAGS and name in dict(fields(default())):
            raise UserError(f"--{name} is no flag but a field of the experiment; write --config.{name}={value or 'VALUE'}.")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise _mistake(error) from error
    if rest[1:]:
        raise UserError(f"argument {rest[1]!r} is no flag; write flags as --name=value.")
    return rest


def _check_field(name: str) -> None:
    """Raises UserError for the name of no field and no section."""
    known = dict(fields(default()))
    if section := next((s for s in OPTIONS if name.startswith(s + ".")), None):
        option = name[len(section) + 1 :].partition(".")[0]
        raise UserError(f"--config.{name} cannot be set alone; write --config.{section}=\"{{'{option}': VALUE}}\".")
    if name not in known and not any(field.startswith(name + ".") for field in known):
        raise unknown(name, known)


def _mistake(error: flags.Error) -> Exception:
    """The sentence for a command line that absl refused; the error itself for a bug in an experiment."""
    text, cause, mine = str(error), error, None
    while cause := cause.__context__:  # ml_collections wraps what get_config raises in its traceback
        mine = cause if isinstance(cause, UserError) else mine
    if mine or "Error whilst parsing config file" in text:
        return mine or error
    if missing := re.search(r"flag --(\w+)=None: ", text):
        return UserError(f"--{missing[1]} is missing; add --{missing[1]}=VALUE, see --help.")
    if dotted := re.match(r"flag --config\.([\w.]+)=.*does not accept dots", text):
        return UserError(f"{dotted[1]} has a name with a dot, which a config cannot hold; write package/module:function.")
    if field := re.match(r"flag --config\.([\w.]+)=(.*?): (?:Failed|invalid|could|Error|\()", text):
        return misfit(field[1], field[2].strip())
    return UserError(" ".join(text.split()))
