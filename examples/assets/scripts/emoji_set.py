"""The `emoji` set: CLDR subgroups and single concepts, drawn by a vendor that pretraining never saw."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from duplicates import drop_twins, fingerprints
from parquet_files import png_bytes, write_split

STYLES = ("flat", "3d", "high_contrast")
# Concepts are dealt out one by one within each subgroup: shots and test show different things.
DEAL = ("train", "test", "train", "test", "train", "val", "test", "train", "test", "train")
MIN_CONCEPTS = 18
# Plain shapes, signs and pictures of text: a class name says little about how they look.
EXCLUDED_GROUPS = frozenset(
    "geometric alphanum keycap math punctuation other-symbol av-symbol arrow religion zodiac warning gender "
    "transport-sign currency time heart".split()
)
COLUMNS = ("style", "seen", "set", "icon", "licence", "author", "pretraining_correlation", "nearest_in_pretraining")


def _shuffled(names: list[str]) -> list[str]:
    """Fixed arbitrary order of names."""
    return sorted(names, key=lambda name: hashlib.sha256(f"deal {name}".encode()).hexdigest())


def deal_concepts(table: pd.DataFrame) -> dict[str, str]:
    """Split of each concept; a concept has the same split in every style."""
    split_of = {}
    for _, group in table.groupby("subgroup"):
        for position, name in enumerate(_shuffled(sorted(group["name"].unique()))):
            split_of[name] = DEAL[position % len(DEAL)]
    return split_of


def choose_emoji(candidates: pd.DataFrame, images: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of the set and the row of each one's image: subgroups with enough concepts, without twins."""
    chosen = np.flatnonzero((candidates["kind"] == "emoji") & ~candidates["subgroup"].isin(EXCLUDED_GROUPS))
    # Styles are drawn from one another, so twins are looked for within each style.
    kept = []
    for style in STYLES:
        rows = chosen[(candidates["domain"].iloc[chosen] == style).to_numpy()]
        kept.append(rows[drop_twins(fingerprints(images[rows]))])
    chosen = np.concatenate(kept)
    table = candidates.iloc[chosen].rename(columns={"domain": "style", "seen_concept": "seen"}).reset_index(drop=True)
    flat = table[table["style"] == "flat"]
    sizes = flat.groupby("subgroup").size()
    usable = table["subgroup"].isin(sizes.index[sizes >= MIN_CONCEPTS]) & table["name"].isin(flat["name"])
    return table[usable], chosen[usable.to_numpy()]


def build_emoji(candidates: pd.DataFrame, images: np.ndarray, folder: Path) -> None:
    """Write `<split>.parquet` (flat), `<split>_3d.parquet` and `<split>_high_contrast.parquet` for each split."""
    table, image_rows = choose_emoji(candidates, images)
    split_of = deal_concepts(table)
    class_of = {group: group.replace("-", " ") for group in sorted(table["subgroup"].unique())}
    for style in STYLES:
        for split in ("train", "val", "test"):
            rows = np.flatnonzero((table["style"] == style) & (table["name"].map(split_of) == split))
            part = table.iloc[rows]
            labels = {
                "label": (list(part["subgroup"].map(class_of)), list(class_of.values())),
                "concept": (list(part["name"]), sorted(split_of)),
            }
            pngs = [png_bytes(images[image_rows[row]], grey=style == "high_contrast") for row in rows]
            suffix = "" if style == "flat" else f"_{style}"
            write_split(folder / f"{split}{suffix}.parquet", pngs, labels, part[list(COLUMNS)])
            per_class = part.groupby("subgroup").size()
            print(
                f"emoji {split} {style}: {len(part)} images, per class {per_class.min()} to {per_class.max()} "
                f"(median {per_class.median():.0f}), {int((~part['seen']).sum())} of concepts not in pretraining"
            )
