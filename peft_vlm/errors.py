"""Errors and warnings of peft_vlm.

All errors are `ValueError`s, so that callers who know nothing of us still catch them.
"""

import difflib
import math
import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_vlm.serving.errors import ExportedFileError, ImageError, PeftVLMError  # noqa: F401 - one place to look
from peft_vlm.serving.escape import one_line


class AdapterError(PeftVLMError):
    """An adapter folder, file or name does not fit: damaged, incomplete, made for another base model, stale."""


class CheckpointError(PeftVLMError):
    """A checkpoint could not be written, or is damaged or incomplete."""


class ClassNameError(PeftVLMError):
    """Class names or templates cannot be used: duplicates, empty names, prompts that are too long."""


class DataError(PeftVLMError):
    """A dataset, split, label or image cannot be used."""


class UnsupportedModelError(PeftVLMError):
    """The method does not work on this model family."""


class HubError(PeftVLMError):
    """A model hub refused, failed or could not be reached."""


class PeftVLMWarning(UserWarning):
    """Something the user asked for is not done, or not done as asked; its message is one line, as that of an error."""

    def __str__(self) -> str:
        """The message, in one line."""
        return one_line(super().__str__())


def check_choice(name: str, value: object, choices: Collection[str | None]) -> None:
    """Refuse a value that is not one of a setting's choices.

    Args:
        name: Name of the setting, for the message.
        value: Its value, of any type.
        choices: Allowed values, in the order the message lists them.

    Raises:
        ValueError: If the value is not among them.
    """
    allowed = tuple(choices)  # a tuple also compares values that cannot be hashed
    if value not in allowed:
        words = [choice for choice in allowed if isinstance(choice, str)]
        close = difflib.get_close_matches(str(value), words, n=1)
        advice = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected `{name}` to be one of {allowed!r}, got {value!r}.{advice}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | int | None = None,
    above: float | int | None = None,
    most: float | int | None = None,
) -> None:
    """Refuse what is no number, not finite, or outside of a range.

    Args:
        name: Name of the setting, for the message.
        value: Its value, of any type.
        least: Smallest allowed value.
        above: Value that it must be larger than.
        most: Largest allowed value, beside `least`.

    Raises:
        ValueError: If it is refused.
    """
    if isinstance(value, int | float) and math.isfinite(value):
        is_high_enough = (least is None or value >= least) and (above is None or value > above)
        if is_high_enough and (most is None or value <= most):
            return
    if above is not None:
        wanted = f"above {above}"
    elif least is None:
        wanted = "to be finite"
    else:
        wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise ValueError(f"Expected `{name}` {wanted}, got {shown(value)}.")


#: Longest class name or template. No text tower reads as much, and a tokenizer takes seconds for a million letters.
MAX_CHARACTERS = 5000


def check_template(template: str) -> None:
    """Refuse a template that does not have its place for the class name.

    Args:
        template: Text with `{}`.

    Raises:
        ClassNameError: If `{}` is not there exactly once, or the template is longer than any text tower reads.
    """
    if len(template) > MAX_CHARACTERS:
        raise ClassNameError(f"Expected a template of at most {MAX_CHARACTERS:,} characters, got {shown(template)}.")
    count = template.count("{}")
    if count != 1:
        raise ClassNameError(
            f"Expected `{{}}` exactly once in the template, got {template!r} with {count}. "
            "Write it where the class name goes, as in 'a photo of a {}.'."
        )


def check_list(name: str, value: object) -> None:
    """Refuse a text where a list of texts belongs, which would be read letter by letter.

    Args:
        name: Name of the argument, for the message.
        value: Its value, of any type.

    Raises:
        PeftVLMError: If it is a text.
    """
    if isinstance(value, str | bytes):
        raise PeftVLMError(f"Expected `{name}` to be a list, got the text {shown(value)}. Put it into brackets.")


def shown(value: object, limit: int = 120) -> str:
    """A value for a message: its `repr`, cut where it is long, without characters that change a terminal.

    Args:
        value: Anything, also from a stranger's file.
        limit: Longest text.
    """
    text = _short.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120

LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass `token=`"
BY_STATUS = {
    400: "the Hub found the request or the card invalid.",
    401: f"the Hub does not know you. {LOG_IN}.",
    403: "your token may not write there. Use a repository of your own, or a token with write permission.",
    404: "there is no such repository, or it is private and your token may not see it.",
    409: "something else is changing the repository, or a name is taken. Call again in a moment.",
    412: "the repository has changed in the meantime. Call again.",
    429: "the Hub asks for fewer requests. Wait some minutes, then call again.",
}


def explain(error: BaseException) -> str | None:
    """The reason of a failure in words, None if it has nothing to do with a hub.

    Args:
        error: The error as it reached us; its causes are looked through, and the first one that says something counts.
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    reason = next((text for text in map(_reason, reversed(causes)) if text), None)
    if reason is None and (failed := [cause for cause in causes if isinstance(cause, HTTPError)]):
        reason = f"the connection failed ({type(failed[-1]).__name__}). Call again."
    return reason


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE), and the file is not in the cache."
    if isinstance(error, HFValidationError):
        return f"this is no Hub id ({error})."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision (branch, tag or commit)."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private. {LOG_IN} if it is."
    if isinstance(error, LocalEntryNotFoundError):
        return "the file is not in the cache, and the Hub could not be reached."
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file."
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, (error.server_message or "").strip()
        advice = BY_STATUS.get(status, "the Hub has a problem. Call again later." if status >= 500 else "refused.")
        return f"{advice} ({status}{': ' + said if said else ''})"
    return None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn failures of requests to a hub into a `HubError` that says what to do; other errors pass unchanged.

    Args:
        what: Beginning of the message, for example "'user/adapter' was not published".

    Raises:
        HubError: If a request fails.
    """
    try:
        yield
    except PeftVLMError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = explain(error)
        if reason is None:
            raise
        raise HubError(f"{what}: {reason}") from error
