"""What the entry points share: several processes, and a user's mistake ends in one sentence, a bug in its traceback."""

import logging as standard_logging
import sys
import traceback

from absl import app, flags, logging

from launch.command_line import parse
from treerl.errors import UserError

_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None,
    "HOST:PORT of the first of several processes. This and the next two are for plain machines: Slurm, Open MPI and TPU "
    "VMs say it themselves.",
)  # fmt: skip
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes run this command together.", lower_bound=1)
_NUMBER = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait until all of them are there.", lower_bound=1)
_TOGETHER = tuple(flag.name for flag in (_ADDRESS, _COUNT, _NUMBER, _TIMEOUT))


def run(main, *, together: bool = False) -> None:
    """Parses the flags and calls main(); a UserError is printed and ends with exit status 1.

    --verbosity=1 shows its traceback, and what libraries log.

    Args:
      together: the command can run in several processes, one a machine.
    """

    def quiet_main(_):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            standard_logging.captureWarnings(True)
            for name in ("absl", "asyncio", "py.warnings"):  # Orbax tells every step, and what it also raises or has left half done
                standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
            sys.unraisablehook = lambda _: None
        if not together:
            if any(flag.present for flag in (_ADDRESS, _COUNT, _NUMBER)):
                raise UserError("this command runs in one process; leave out --coordinator_address, --num_processes and --process_id.")
            return main()
        from treerl import processes  # after the flags: a wrong one must not cost the import of jax

        processes.start(_ADDRESS.value, _COUNT.value, _NUMBER.value, seconds=_TIMEOUT.value)
        try:
            main()
        except Exception as error:
            if processes.several():  # they would wait for this one, and a normal exit for them
                expected = isinstance(error, UserError) and not logging.level_debug()
                print(error if expected else traceback.format_exc(), file=sys.stderr)
                processes.stop_hard(1)
            raise

    try:
        app.run(quiet_main, flags_parser=lambda argv: parse(argv, _TOGETHER * together))
    except UserError as error:
        if logging.level_debug():
            raise
        sys.exit(str(error))  # to standard error, exit status 1
