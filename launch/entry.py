"""What the entry points share: a user's mistake ends in one sentence, a bug in its traceback."""
import logging as standard_logging
import os
import re
import sys

from absl import app, flags, logging

from treerl.config import default, fields, unknown
from treerl.errors import UserError


def run(main) -> None:
    """Parses the flags and calls main(); a UserError is printed and ends with exit status 1.

    --verbosity=1 shows its traceback, and what libraries log.
    """

    def quiet_main(_):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            for name in ("absl", "asyncio"):  # Orbax logs every step, and tracebacks of what it also raises
                standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
        main()

    try:
        app.run(quiet_main, flags_parser=parse)
    except UserError as error:
        if logging.level_debug():
            raise
        sys.unraisablehook = lambda _: None  # what Orbax left half done may complain as it goes
        sys.exit(str(error))  # to standard error, exit status 1


def parse(argv: list[str]) -> list[str]:
    """Parses a command line as absl does, but raises a UserError for every mistake in it."""
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and "config" in flags.FLAGS:
            file = (value if equals else following).partition(":")[0]
            if not os.path.isfile(file):
                raise UserError(f"--config={file} is no file; give an experiment, such as experiments/countdown.py.")
        elif (field := re.match(r"(?:no)?config\.(.+)", name)) and "config" in flags.FLAGS:
            _check_field(field[1])
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
    if name.startswith("advantage.options."):
        option = name.rpartition(".")[2]
        raise UserError(f"--config.{name} cannot be set alone; write --config.advantage.options=\"{{'{option}': VALUE}}\".")
    if name not in known and not any(field.startswith(name + ".") for field in known):
        raise unknown(name, known)


def _mistake(error: flags.Error) -> Exception:
    """The sentence for a command line that absl refused; the error itself for a bug in an experiment."""
    text, cause, mine = str(error), error, None
    while cause := cause.__context__:  # ml_collections wraps what get_config raises in its traceback
        mine = cause if isinstance(cause, UserError) else mine
    if mine or "Error whilst parsing config file" in text:
        return mine or error
    if missing := re.match(r"flag --(\w+)=None: ", text):
        return UserError(f"--{missing[1]} is missing; add --{missing[1]}=VALUE, see --help.")
    if field := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        like = dict(fields(default())).get(field[1])
        if like is not None:
            return UserError(f"{field[1]}={field[2]} is no {type(like).__name__}; set one such as {like!r}.")
    return UserError(" ".join(text.split()))
