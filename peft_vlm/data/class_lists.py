"""Class lists of thousands of names: text files, WordNet ids with their words, and WordNet's own noun file."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from peft_vlm.data.sources import read_class_names

logger = logging.getLogger(__name__)

_ID_LINE = re.compile(r"(n\d{8})[\t ]+(.+)")
_NOUN_LINE = re.compile(r"(\d{8}) \d{2} n ([0-9a-f]{2}) (.+)")


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
    if path.suffix == ".json":
        return read_class_names(path)
    lines = [line.rstrip() for line in path.read_text(encoding="utf-8-sig").splitlines()] if path.is_file() else []
    words = _noun_words(lines) or _id_words(lines)
    return distinct_names(words) if words else read_class_names(path)


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


def distinct_names(words: Mapping[str, list[str]]) -> dict[str, str]:
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
