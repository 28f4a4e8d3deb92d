"""What the entry points share: a user's mistake ends in one sentence, a bug in its traceback."""
import logging as standard_logging
import sys

from absl import app, flags, logging

from launch.command_line import parse
from treerl.errors import UserError


def run(main) -> None:
    """Parses the flags and calls main(); a UserError is printed and ends with exit status 1.

    --verbosity=1 shows its traceback, and what libraries log.
    """

    def quiet_main(_):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            # Orbax logs every step, and tracebacks of what it also raises or has left half done.
            for name in ("absl", "asyncio"):
                standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
            sys.unraisablehook = lambda _: None
        main()

    try:
        app.run(quiet_main, flags_parser=parse)
    except UserError as error:
        if logging.level_debug():
            raise
        sys.exit(str(error))  # to standard error, exit status 1
