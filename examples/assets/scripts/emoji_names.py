"""CLDR names, keywords and subgroups of emoji, and which concepts are kept out of pretraining."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from icon_names import CLASS_OF_NAME

HELD_OUT_SHARE = 0.14
_EXCLUDED_SUBGROUPS = frozenset({"flag", "country-flag", "subdivision-flag", "hair-style", "skin-tone"})


@dataclass(frozen=True)
class Emoji:
    """One emoji concept: CLDR short name in lower case, hex code, keywords, CLDR subgroup, and side of the split."""

    name: str
    hexcode: str
    keywords: tuple[str, ...]
    subgroup: str
    held_out: bool


def slug(label: str) -> str:
    """Name of an emoji as icon collections spell it."""
    text = label.lower().replace("&", "and").replace("\u2019", "").replace("'", "")
    for accented, plain in (("\u00f1", "n"), ("\u00e3", "a"), ("\u00e9", "e"), ("\u00f4", "o"), ("\u00e7", "c")):
        text = text.replace(accented, plain)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _is_held_out(name: str) -> bool:
    """Fixed choice of about 14 % of the concepts; never a word that names a class of the icon set."""
    draw = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return draw < HELD_OUT_SHARE and name not in CLASS_OF_NAME


def read_emoji(package: Path) -> dict[str, Emoji]:
    """All emoji without skin tones and flags, by slug."""
    groups = json.loads((package / "meta/groups.json").read_text())
    emoji = {}
    for entry in json.loads((package / "en/data.json").read_text()):
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")))
        if subgroup is None or subgroup in _EXCLUDED_SUBGROUPS:
            continue
        key = slug(entry["label"])
        name = key.replace("-", " ")
        keywords = tuple(slug(tag).replace("-", " ") for tag in entry.get("tags", ()))
        keywords = tuple(word for word in keywords if len(word) > 2)
        emoji[key] = Emoji(name, entry["hexcode"].lower(), keywords, subgroup, _is_held_out(name))
    return emoji
