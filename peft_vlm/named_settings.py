"""Settings that come as words: `name=value`, given to whatever has parameters of these names."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from peft_vlm.errors import PeftVLMError


def named_values(words: Sequence[str], name: str) -> dict[str, Any]:
    """`["depth=3", "init=a photo"]` as `{"depth": 3, "init": "a photo"}`: values are JSON, else text.

    Args:
        words: Words of the command line.
        name: Flag that they belong to.

    Raises:
        PeftVLMError: If a word has no `=`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise PeftVLMError(f"Expected `{name}` as name=value, got {word!r}.")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def accepted(target: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """What of an offer a function or class has a parameter for.

    Args:
        target: Function or class.
        offered: Values by name.
    """
    parameters = inspect.signature(target).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def build(
    target: Callable[..., Any], settings: dict[str, Any], *given: Any, name: str, hidden: type | None = None
) -> Any:
    """Call with named settings; unknown and missing ones are errors that list what there is.

    Args:
        target: Function or class.
        settings: Keyword arguments.
        *given: Positional arguments.
        name: Flag that the settings come from, for the messages.
        hidden: Class whose parameters are not listed, such as a base class.

    Raises:
        PeftVLMError: If a setting is unknown or missing.
    """
    parameters = list(inspect.signature(target).parameters.values())[len(given) :]
    unknown = sorted(set(settings) - {p.name for p in parameters})
    if unknown:
        shared = inspect.signature(hidden).parameters if hidden else {}
        own = ", ".join(p.name for p in parameters if p.name not in shared)
        raise PeftVLMError(f"`{name}` has no setting {', '.join(unknown)}. It has: {own}.")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in settings]
    if missing:
        raise PeftVLMError(f"The method needs {', '.join(missing)}: pass `--{missing[0]}`, or set it in `{name}`.")
    return target(*given, **settings)
