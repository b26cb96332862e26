"""What every command has: help with examples, `--json`, and settings from flags or from one file.

Nothing here imports torch, PEFT or transformers: help and wrong flags answer at once.
"""

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from peft_vlm.cli.console import add_console_flags
from peft_vlm.errors import PeftVLMError
from peft_vlm.files import read_text
from peft_vlm.serving.escape import printable, printable_json
from peft_vlm.settings import RETIRED_SETTINGS

Settings = TypeVar("Settings")

#: What follows a flag that is on or off, where anything follows.
TRUTH = {"true": True, "t": True, "yes": True, "y": True, "1": True}
TRUTH |= {"false": False, "f": False, "no": False, "n": False, "0": False}


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    examples: str,
    description: str | None = None,
    settings: type | None = None,
    takes_more: bool = False,
    more: str = "",
) -> argparse.ArgumentParser:
    """Add a command with `--json` to the program.

    Args:
        commands: Result of `add_subparsers`.
        name: Word of the command line.
        run: Does the work; wrong input is an error of class `ValueError`.
        summary: Line of `peft-vlm --help`.
        examples: Commands that end its own `--help`.
        description: Text that begins its own `--help`; None for the summary.
        settings: Dataclass whose fields are flags, and may stand in one YAML or JSON file that is the first word;
            `run` reads them with `read_settings`.
        takes_more: Whether flags that are no fields of `settings` are left to `run`, as `arguments.more`.
        more: Lines behind the list of flags.

    Returns:
        The parser of the command, for further arguments.
    """
    usage = f"peft-vlm {name} [FILE.yaml] [--flag value ...]   (all flags: --help)" if settings else None
    command = commands.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=f"{more}\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=usage,
        allow_abbrev=not takes_more,  # `--eval` would be read as `--evaluate` though `--eval_steps` was meant
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
    add_console_flags(command)
    for setting in fields(settings) if settings else ():
        _add_flag(command, setting)
    command.set_defaults(run=run, takes_more=takes_more, settings=settings)
    return command


def _add_flag(command: argparse.ArgumentParser, setting: "Field[Any]") -> None:
    """A field of a dataclass as a flag: text, number, list, or on and off."""
    kind = next((part for part in get_args(setting.type) if part is not type(None)), setting.type)
    if get_origin(setting.type) is list:
        kind = setting.type
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    options: dict[str, Any] = {"help": setting.metadata["help"].replace("%", "%%")}
    options |= {"required": True} if default is MISSING else {"default": default}
    if default not in (MISSING, None, "", []):
        options["help"] += f" (default: {default if not isinstance(default, list) else ' '.join(map(str, default))})"
    if get_origin(kind) is list:
        options |= {"nargs": "+", "type": get_args(kind)[0]}
    elif kind is bool:
        options |= {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    else:
        options["type"] = kind
    command.add_argument(*_spellings(setting.name), **options)
    if default is True:
        command.add_argument(
            *_spellings(f"no_{setting.name}"), action="store_false", dest=setting.name, help=argparse.SUPPRESS
        )


def _spellings(name: str) -> list[str]:
    """A flag with underscores, and with hyphens where that differs."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def part_flags(words: Sequence[str], settings: type, *, switches: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Part flags, each with the words behind it, into those of a command and all others.

    Args:
        words: What stands behind the command.
        settings: Dataclass of the command.
        switches: Flags that are on or off, of a command that takes a word without a flag: that word may stand behind
            one of them, and is not its value.

    Returns:
        The command's own words, those without a flag first, and the rest.
    """
    own = {flag for setting in fields(settings) for flag in _spellings(setting.name)}
    own |= {
        flag for setting in fields(settings) if setting.default is True for flag in _spellings(f"no_{setting.name}")
    }
    alone: list[str] = []
    mine: list[str] = []
    rest: list[str] = []
    current, is_switch = alone, False
    for word in words:
        if word in ("-h", "--help", "--json", "--quiet", "--verbose"):
            mine.append(word)
            is_switch = bool(switches)
            continue
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            current = mine if name in own else rest
            is_switch = not equals and name[2:].replace("-", "_") in switches
            current.append(word)
        else:
            is_value = not is_switch or word.lower() in TRUTH
            (current if is_value else alone).append(word)
            current = alone if is_switch else current  # a switch has one value at most
    return [*alone, *mine], rest


def _truth(word: str) -> bool:
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return TRUTH[word.lower()]


def read_settings(arguments: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The settings of a command as its dataclass.

    Args:
        arguments: What the program parsed.
        kind: The dataclass that `add_command` was given.
    """
    return kind(**{setting.name: getattr(arguments, setting.name) for setting in fields(kind)})  # type: ignore[arg-type]


def file_as_flags(words: list[str]) -> list[str]:
    """Words of a command whose first may be a YAML or JSON file: its values as flags, which later flags replace.

    A file's values are read as if they had been typed, so both get the same types and the same messages.

    Args:
        words: What stands behind the command.
    """
    if not words or Path(words[0]).suffix not in (".yaml", ".yml", ".json"):
        return words
    values = _read_file(Path(words[0]))
    return [*as_flags({name: value for name, value in values.items() if name not in RETIRED_SETTINGS}), *words[1:]]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Write `{"seed": 1, "split": ["a", "b"]}` as `["--seed=1", "--split", "a", "b"]`; None leaves the default.

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
        values = yaml.safe_load(read_text(path))  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PeftVLMError(f"Expected a file with settings, got {str(path)!r}: {error}") from error
    if not isinstance(values, Mapping):
        raise PeftVLMError(f"Expected `name: value` lines in {str(path)!r}, got {type(values).__name__}.")
    return values


def print_json(value: Any) -> None:
    """Print a result for scripts: UTF-8, and text for whatever JSON has no type for.

    Args:
        value: Dictionaries, lists, numbers and text.
    """
    print(printable_json(json.dumps(value, default=str, ensure_ascii=False, indent=2)))


def print_line(text: object) -> None:
    """Print a line that may hold names of strangers.

    Args:
        text: Anything.
    """
    print(printable(text), flush=True)
