"""`peft-vlm info`: what an adapter is, or what is installed."""

import argparse
from typing import Any

from peft import PeftConfig

from peft_vlm.cli.command import add_command, print_json
from peft_vlm.errors import PeftVLMError
from peft_vlm.registry import METHODS
from peft_vlm.training.artifacts import environment

EXAMPLES = """
  peft-vlm info                  versions and methods
  peft-vlm info outputs/readme   settings of an adapter
"""


def register(commands: Any) -> None:
    """Add the command to the program.

    Args:
        commands: What `add_subparsers` gave.
    """
    command = add_command(commands, "info", run, summary="what an adapter is, or what is installed", examples=EXAMPLES)
    command.add_argument("adapter", nargs="?", help="folder or Hub id; none: versions and methods")


def run(arguments: argparse.Namespace) -> None:
    """Print what an adapter's folder says, or what is installed.

    Args:
        arguments: Parsed words.

    Raises:
        PeftVLMError: If the adapter is of a method that is not ours.
    """
    if arguments.adapter is None:
        facts: dict[str, Any] = {**environment(), "methods": sorted(METHODS)}
    else:
        config = PeftConfig.from_pretrained(arguments.adapter)
        if config.peft_type.value.lower() not in METHODS:
            raise PeftVLMError(
                f"Expected an adapter of {sorted(METHODS)!r}, got one of PEFT's {config.peft_type.value!r}."
            )
        facts = {key: value for key, value in config.to_dict().items() if value is not None}
        facts.pop("target_modules", None)
    if arguments.json:
        print_json(facts)
        return
    for key, value in facts.items():
        text = str(value) if not isinstance(value, list) or len(value) <= 8 else f"{len(value)}: {value[:5]} ..."
        print(f"{key:24}{text}")
