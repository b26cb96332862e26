"""What every command has: help with examples, `--json`, and settings from flags or from one file."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    examples: str,
    description: str | None = None,
    settings: Sequence[type] = (),
) -> argparse.ArgumentParser:
    """Add a command with `--json` to the program.

    Args:
        commands: What `add_subparsers` gave.
        name: Word of the command line.
        run: Does the work; wrong input is an error of class `ValueError`.
        summary: Line of `peft-vlm --help`.
        examples: Commands that end its own `--help`.
        description: Text that begins its own `--help`; None for the summary.
        settings: Dataclasses whose fields are flags as well; `run` reads them with `read_settings`.

    Returns:
        The parser of the command, for further arguments.
    """
    flags = HfArgumentParser(settings, add_help=False).format_help().partition("options:")[2] if settings else ""
    command = commands.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=f"{flags}\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
    command.set_defaults(run=run, takes_settings=bool(settings))
    return command


def read_settings(arguments: argparse.Namespace, *settings: type) -> tuple[Any, ...]:
    """Dataclasses filled from flags, or from one YAML or JSON file.

    Args:
        arguments: What the program parsed: `settings` has the words that are left.
        *settings: The dataclasses of the command.

    Returns:
        One object per dataclass.
    """
    parser = HfArgumentParser(settings, prog=f"peft-vlm {arguments.command}")
    words = arguments.settings
    if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml", ".json"):
        read = parser.parse_json_file if words[0].endswith(".json") else parser.parse_yaml_file
        return read(words[0])
    return parser.parse_args_into_dataclasses(words)


def print_json(value: Any) -> None:
    """Print a result for scripts: UTF-8, and text for whatever JSON has no type for.

    Args:
        value: Dictionaries, lists, numbers and text.
    """
    print(json.dumps(value, default=str, ensure_ascii=False, indent=2))
