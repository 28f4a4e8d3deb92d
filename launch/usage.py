"""What --help prints."""

import sys
import textwrap

from absl import flags


def help_if_asked(argv: list[str], shared=()) -> None:
    """Prints `usage` and exits with status 0 if a command line asks for help."""
    if {"--help", "-help", "--helpshort", "-h"} & set(argv[1:]):
        print(usage(shared))
        sys.exit(0)


def usage(shared=()) -> str:
    """The docstring of the program, then its own flags in the order that it defines them, and `shared`, those of others by name."""
    own = [flag.name for flag in flags.FLAGS.get_flags_for_module(sys.argv[0])]
    lines = []
    for name in (*own, *shared):
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "", []) or flag.default is False else f" The default is {flag.default}."
        text = " ".join(flag.help.replace(".;", ";").split())  # absl's words behind those of a flag that may be given again
        lines.append((f"--[no]{name}" if flag.boolean and flag.default else f"--{name}", text + default))
        if name == "config" and "workdir" in own:
            lines.append(("--config.FIELD", "A field of it that is to differ; launch.train --config=... --help_config lists them."))
    lines.append(("--verbosity=1", "The traceback of a mistake, and what libraries log."))
    width = 2 + max(len(name) for name, _ in lines)
    body = [textwrap.fill(text, 120, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2)) for name, text in lines]
    return "\n".join([sys.modules["__main__"].__doc__.strip(), "", "Flags:", *body, "", "--helpfull lists those of libraries, too."])
