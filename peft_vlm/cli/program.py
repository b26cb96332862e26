"""`peft-vlm <command>`: finds the command, runs it, and turns what happened into an exit code.

Exit codes: 0 done, 2 wrong input (one line on stderr says what), 1 anything unexpected (with traceback).

A new command is a file of this folder with a function `register(commands)`, and an entry of `COMMANDS`.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

import peft_vlm  # noqa: F401 - registers the methods
from peft_vlm.adapters.config import installed_version
from peft_vlm.cli import convert, evaluate, export, info, predict, publish, train
from peft_vlm.errors import PeftVLMError

#: In the order of the help text.
COMMANDS = (train, evaluate, predict, convert, publish, export, info)


DESCRIPTION = """\
Prompts and selective tuning for vision-language models: train an adapter, measure it, use it, share it, export it.

Begin with `peft-vlm info` (what is installed), `peft-vlm info METHOD` (the settings of a method) and the examples of
`peft-vlm COMMAND --help`. With --json a command prints one JSON value on standard output and nothing else there.
Exit codes: 0 done, 2 wrong input (one line on standard error says what), 1 anything unexpected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words of the command line; those of the process by default.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="peft-vlm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        with _quiet():
            arguments.run(arguments)
    except (PeftVLMError, ValueError) as error:
        print(f"peft-vlm {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the libraries below that a user of the command can do nothing about."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
