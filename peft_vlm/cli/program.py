"""`peft-vlm <command>`: run the command and return an exit code.

Exit codes: 0 done, 2 wrong input, 130 Ctrl-C (both in one line on stderr), 1 anything unexpected (with traceback).

A new command is a file of this folder with a function `register(commands)`, and an entry of `COMMANDS`. What it needs
of torch, PEFT and transformers it imports where it does its work: help, version and wrong flags answer at once.
"""

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from peft_vlm.cli import app, convert, evaluate, export, info, optimize_template, predict, publish, reproduce, train
from peft_vlm.cli.command import file_as_flags, part_flags
from peft_vlm.cli.console import console
from peft_vlm.errors import PeftVLMError, PeftVLMWarning
from peft_vlm.files import installed_version
from peft_vlm.serving.escape import one_line, printable

#: In the order of the help text.
COMMANDS = (train, evaluate, reproduce, predict, app, convert, publish, export, optimize_template, info)


DESCRIPTION = """\
Prompts and selective tuning for vision-language models: train an adapter, measure it, use it, share it, export it.

Begin with `peft-vlm info` (what is installed), `peft-vlm info METHOD` (the settings of a method) and the examples of
`peft-vlm COMMAND --help`. With --json a command prints one JSON value on standard output and nothing else there.
Exit codes: 0 done, 2 wrong input (explained in one line on standard error), 130 Ctrl-C, 1 anything unexpected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words of the command line; those of the process by default.

    Returns:
        Exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks end no command
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="peft-vlm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"peft-vlm {installed_version()}")
    names = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(names))
    for command in COMMANDS:
        command.register(commands)
    try:
        words, more = _expanded(words, commands.choices)
        arguments, rest = parser.parse_known_args(words)
        if rest:
            commands.choices[arguments.command].error(printable(f"unrecognized arguments: {' '.join(rest)}"))
        arguments.more = more
        quiet = _quiet(lambda text: _in_flags(text, commands.choices[arguments.command]), verbose=arguments.verbose)
        with console(quiet=arguments.quiet, verbose=arguments.verbose), quiet:
            arguments.run(arguments)
    except (PeftVLMError, ValueError, OSError) as error:
        message = _in_flags(str(error), commands.choices.get(words[0]))
        print(one_line(f"peft-vlm {words[0]}: {message}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        message = _in_flags(str(stop) or "interrupted", commands.choices.get(words[0]))
        print("\n" + one_line(f"peft-vlm {words[0]}: {message}"), file=sys.stderr)
        return 130
    return 0


def _expanded(words: list[str], parsers: Mapping[str, argparse.ArgumentParser]) -> tuple[list[str], list[str]]:
    """The words with a file's settings as flags, and the flags among them that the command itself does not know."""
    command = parsers.get(words[0]) if words else None
    settings = command.get_default("settings") if command else None
    if command is None or settings is None:
        return words, []
    words = [words[0], *file_as_flags(words[1:])]
    if not command.get_default("takes_more"):
        return words, []
    switches: set[str] = set()
    if any(not action.option_strings for action in command._actions):
        switches |= {setting.name for setting in fields(settings) if setting.type is bool}
        switches |= set(train.training_settings("bool"))
    own, more = part_flags(words[1:], settings, switches=switches)
    return [words[0], *own], more


def _in_flags(text: str, command: argparse.ArgumentParser | None) -> str:
    """A message of the library with the flags of the command in place of settings: `name=value` as `--name value`."""
    if command is None:
        return text
    known = {action.dest for action in command._actions if action.option_strings}
    if command.get_default("takes_more"):
        known |= set(train.training_settings())

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], re.sub("[][(){},'\"]", "", match["value"] or "")
        if name not in known:
            return match[0]
        return f"`--{name}`" if value in ("", "True") else f"`--{name} {value}`"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]*))?`", flag, text)


@contextmanager
def _quiet(as_said: Callable[[str], str], *, verbose: bool = False) -> Iterator[None]:
    """Silence messages of other libraries that a user of the command cannot act on; our warnings take a line each.

    Args:
        as_said: Makes the command's own words of a message.
        verbose: Silence nothing.
    """
    format_before = warnings.formatwarning

    def as_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        is_ours = issubclass(category, PeftVLMWarning)
        return f"Warning: {as_said(str(message))}\n" if is_ours else format_before(message, category, *place, **line)

    if verbose:
        yield
        return
    before = os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # for when it is imported within this
    logging = sys.modules.get("transformers.utils.logging")
    verbosity = logging.get_verbosity() if logging else None
    try:
        if logging:
            logging.set_verbosity_error()
        warnings.formatwarning = as_line
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            yield
    finally:
        warnings.formatwarning = format_before
        os.environ.pop("TRANSFORMERS_VERBOSITY")
        if before is not None:
            os.environ["TRANSFORMERS_VERBOSITY"] = before
        if logging:
            logging.set_verbosity(verbosity)
