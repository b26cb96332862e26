"""`peft-vlm <command>`: finds the command, runs it, and turns what happened into an exit code.

Exit codes: 0 done, 2 wrong input (one line on stderr says what), 1 anything unexpected (with traceback).

A new command is a file of this folder with a function `register(commands)`, and an entry of `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Sequence

import peft_vlm  # noqa: F401 - registers the methods
from peft_vlm.cli import evaluate, info, predict, publish
from peft_vlm.errors import PeftVLMError
from peft_vlm.prompting.config import installed_version

#: In the order of the help text.
COMMANDS = (evaluate, predict, publish, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words of the command line; those of the process by default.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(prog="peft-vlm", description="Prompted vision-language models: use and evaluate.")
    parser.add_argument("--version", action="version", version=f"peft-vlm {installed_version()}")
    names = " | ".join(command.__name__.rpartition(".")[2] for command in COMMANDS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for command in COMMANDS:
        command.register(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.settings = rest
    try:
        arguments.run(arguments)
    except (PeftVLMError, ValueError) as error:
        print(f"peft-vlm {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0
