"""Class names: read from files, matched by name with the labels that a source knows, told from codes."""

import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_vlm.errors import DataError, PeftVLMWarning
from peft_vlm.files import read_text
from peft_vlm.text.prompts import check_class_names, readable

logger = logging.getLogger(__name__)

ClassNames = Sequence[str] | Mapping[Any, str] | str | Path

_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")
_CODE = re.compile(r"n\d{8}|([a-z]{0,2}|class|label|category|cls|id)[-_ ]?\d+", re.IGNORECASE)
_ID_LINE = re.compile(r"(n\d{8})[\t ]+(.+)")
_NOUN_LINE = re.compile(r"(\d{8}) \d{2} n ([0-9a-f]{2}) (.+)")


def are_numbers(labels: Iterable[str]) -> bool:
    """True if all labels are whole numbers, such as "3" and "1.0"."""
    return all(_NUMBER.fullmatch(label) for label in labels)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their ids: numerically when all are numbers (as ImageNet-V2's folders), else as text."""
    labels = set(labels)
    return sorted(labels, key=(lambda label: (float(label), label)) if are_numbers(labels) else None)


def match_labels(
    raw_labels: Sequence[str], names: Sequence[str] | Mapping[Any, str] | None, *, where: str = "The labels"
) -> tuple[dict[str, int], list[str]]:
    """Label id of each raw label, and the class names.

    By name wherever the names are known: a list that holds all raw labels, `_` and case aside, gives the order. Else
    numbers are ids, and other labels (codes) are renamed one by one if the list has as many, which is logged.

    Args:
        raw_labels: Folder names, cells, or the names of a `ClassLabel`, in the order of their ids.
        names: A list in the order of the ids, or a mapping from raw labels to names; None: the raw labels themselves.
        where: Beginning of the message about numbers.

    Raises:
        DataError: If numbers have no names, or the names do not fit the labels.
    """
    in_order = {raw: index for index, raw in enumerate(raw_labels)}
    if names is None:
        if are_numbers(raw_labels):
            raise DataError(
                f"{where} are numbers without names. Pass `class_names` as a list in label order, or as a mapping."
            )
        return in_order, list(raw_labels)
    if isinstance(names, Mapping):
        by_raw = {str(key): name for key, name in names.items()}
        missing = [raw for raw in raw_labels if raw not in by_raw]
        if missing:
            raise DataError(f"The mapping of class names lacks {len(missing)} labels, the first is {missing[0]!r}.")
        return in_order, [by_raw[raw] for raw in raw_labels]
    places = _places(names)
    found = {raw: places.get(raw, places.get(_spelling(raw))) for raw in raw_labels}
    by_name = {raw: place for raw, place in found.items() if place is not None}
    unknown = [raw for raw in raw_labels if raw not in by_name]
    if not unknown:
        return by_name, list(names)
    if are_numbers(raw_labels):
        return {raw: int(float(raw)) for raw in raw_labels}, list(names)
    if len(unknown) == len(raw_labels) == len(names):
        _log_renaming(raw_labels, names)
        return in_order, list(names)
    if len(names) != len(raw_labels) and len(unknown) == len(raw_labels):
        raise DataError(
            f"Expected {len(raw_labels)} class names, one per label of the dataset, got {len(names)}: "
            f"{_count(unknown, raw_labels)} are not among the {len(names)} class names, the first is {unknown[0]!r}."
        )
    raise DataError(
        f"{_count(unknown, raw_labels)} are not among the {len(names)} class names, the first is "
        f"{unknown[0]!r}. Pass a mapping from label to class name, or a list with all labels."
    )


def warn_of_codes(class_names: Sequence[str]) -> None:
    """Warn where all class names are codes, of which a text encoder knows nothing.

    Args:
        class_names: What the prompts will say.
    """
    if class_names and all(_CODE.fullmatch(name) for name in class_names):
        warnings.warn(
            f"The class names are codes, such as {class_names[0]!r}, which mean nothing to a text encoder. Pass "
            "`class_names`: a mapping from code to name, or a file with one.",
            PeftVLMWarning,
            stacklevel=3,
        )


def _places(names: Sequence[str]) -> dict[str, int]:
    """Place of each name, and of each spelling that only one name has."""
    spellings = [_spelling(name) for name in check_class_names(names)]
    counts = Counter(spellings)
    unique = {spelling: place for place, spelling in enumerate(spellings) if counts[spelling] == 1}
    return unique | {name: place for place, name in enumerate(names)}


def _spelling(name: str) -> str:
    return readable(name).casefold()


def _count(unknown: Sequence[str], raw_labels: Sequence[str]) -> str:
    return f"{len(unknown)} of {len(raw_labels)} labels"


def _log_renaming(raw_labels: Sequence[str], names: Sequence[str]) -> None:
    pairs = [f"{raw!r} is {name!r}" for raw, name in zip(raw_labels, names, strict=True) if raw != name]
    shown = ", ".join(pairs[:10]) + (", ..." if len(pairs) > 10 else "")
    logger.warning("None of the labels is among the class names, so they are renamed by place: %s.", shown)


def read_class_names(path: str | Path) -> list[str] | dict[str, str]:
    """Class names from a file.

    Args:
        path: A `.json` file with a list of names or a mapping from raw labels to names; or a text file with one name
            per line, or with lines `n01440764 tench` (as CoOp's `classnames.txt`), which make a mapping.

    Raises:
        DataError: If the file is not there or holds something else.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        lines = [line.strip() for line in _lines(path) if line.strip()]
        pairs = [re.fullmatch(r"(n\d{8}) (.+)", line) for line in lines]
        return {pair[1]: pair[2] for pair in pairs if pair} if lines and all(pairs) else lines
    try:
        names = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is no JSON: {error}.") from error
    values = names.values() if isinstance(names, dict) else names
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in values):
        raise DataError(f"Expected {str(path)!r} to hold a list of names, or a mapping from labels to names.")
    return names


def _text(path: Path) -> str:
    check_exists(path)
    return read_text(path)


def _lines(path: Path) -> list[str]:
    """Lines of a text. Not `splitlines`: a name may hold what that takes for the end of a line, such as U+2028."""
    return _text(path).split("\n")


def check_exists(path: Path) -> None:
    """Refuse a path that leads nowhere.

    Args:
        path: File or folder.

    Raises:
        DataError: If there is none.
    """
    if not path.exists():
        raise DataError(f"There is no {str(path)!r}. Relative paths start from {str(Path.cwd())!r}.")


def read_class_list(path: str | Path) -> list[str] | dict[str, str]:
    """Names in label order, or by WordNet id, all different.

    Args:
        path: A file that `read_class_names` reads; lines `n01440764<tab or space>tench, Tinca tinca` (ImageNet's
            `words.txt`), of which the first word counts; or WordNet's `data.noun`.

    Returns:
        A list, or a mapping from WordNet id to name. Of several classes with one name, such as the bird and the
        machine called crane, each gets its second word in brackets, or its id where it has no other word.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return read_class_names(path)
    lines = [line.rstrip() for line in _lines(path)]
    words = _noun_words(lines) or _id_words(lines)
    return _distinct_names(words) if words else read_class_names(path)


def _id_words(lines: list[str]) -> dict[str, list[str]]:
    """Words by id where every line is `id words`; empty otherwise."""
    pairs = [_ID_LINE.fullmatch(line) for line in lines if line]
    if not pairs or not all(pairs):
        return {}
    return {pair[1]: [word.strip().replace("_", " ") for word in pair[2].split(",")] for pair in pairs if pair}


def _noun_words(lines: list[str]) -> dict[str, list[str]]:
    """Words by id from WordNet's `data.noun`: empty for other files.

    A line is offset, file number, type, number of words in hex, words; the licence text in front is indented.
    """
    entries = [_NOUN_LINE.match(line) for line in lines if line and not line.startswith("  ")]
    if not entries or not all(entries):
        return {}
    words = {}
    for entry in entries:
        if entry is not None:
            cells = entry[3].split(" ")[: 2 * int(entry[2], 16) : 2]
            words[f"n{entry[1]}"] = [cell.replace("_", " ") for cell in cells]
    return words


def _distinct_names(words: Mapping[str, list[str]]) -> dict[str, str]:
    """A different name for each class, the first of its words where no other class has it.

    Args:
        words: Words of each class by its id, the commonest first.
    """
    first = Counter(entry[0].lower() for entry in words.values())
    names, changed = {}, 0
    for key, entry in words.items():
        name = entry[0]
        if first[name.lower()] > 1:
            changed += 1
            name = f"{name} ({entry[1] if len(entry) > 1 else key})"
        names[key] = name
    taken = Counter(name.lower() for name in names.values())
    for key, name in names.items():
        if taken[name.lower()] > 1:
            names[key] = f"{name} ({key})"
    if changed:
        logger.info("%d of %d classes share their first word and got a second in brackets.", changed, len(words))
    return names
