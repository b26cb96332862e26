"""What every command has: help with examples, `--json`, and settings from flags or from one file."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from peft_vlm.errors import PeftVLMError
from peft_vlm.training.arguments import RETIRED_SETTINGS


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    examples: str,
    description: str | None = None,
    settings: Sequence[type] = (),
    more: str = "",
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
        more: Lines behind the list of these flags.

    Returns:
        The parser of the command, for further arguments.
    """
    flags = HfArgumentParser(settings, add_help=False).format_help().partition("options:")[2] if settings else ""
    command = commands.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=f"{flags}{more}\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
    command.set_defaults(run=run, takes_settings=bool(settings))
    return command


def read_settings(arguments: argparse.Namespace, *settings: type, defaults: Mapping[str, Any] | None = None) -> Any:
    """Dataclasses filled from flags, or from one YAML or JSON file whose values flags behind it replace.

    A file's values are read as if they had been typed, so both get the same types and the same messages.

    Args:
        arguments: What the program parsed: `settings` has the words that are left.
        *settings: The dataclasses of the command.
        defaults: Values of fields that stand neither in the file nor among the flags.

    Returns:
        A tuple with one object per dataclass.
    """
    words = list(arguments.settings)
    if words and Path(words[0]).suffix in (".yaml", ".yml", ".json"):
        words = [*as_flags(_read_file(Path(words[0]))), *words[1:]]
    parser = HfArgumentParser(settings, prog=f"peft-vlm {arguments.command}")
    parser.usage = f"peft-vlm {arguments.command} [FILE.yaml] [--flag value ...]   (all flags: --help)"
    return parser.parse_args_into_dataclasses([*as_flags(defaults or {}), *words])


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """`{"seed": 1, "split": ["a", "b"]}` as `["--seed=1", "--split", "a", "b"]`; None leaves the default.

    Args:
        values: Numbers, texts, and lists of them; a mapping becomes name=value words.
    """
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise PeftVLMError(f"Expected a file with settings, got {str(path)!r}: {error}") from error
    if not isinstance(values, Mapping):
        raise PeftVLMError(f"Expected `name: value` lines in {str(path)!r}, got {type(values).__name__}.")
    return {name: value for name, value in values.items() if name not in RETIRED_SETTINGS}


def print_json(value: Any) -> None:
    """Print a result for scripts: UTF-8, and text for whatever JSON has no type for.

    Args:
        value: Dictionaries, lists, numbers and text.
    """
    print(json.dumps(value, default=str, ensure_ascii=False, indent=2))
