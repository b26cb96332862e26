"""The `icons` set: what does a UI icon of an unseen design family show?"""

from pathlib import Path

import numpy as np
import pandas as pd

from duplicates import drop_twins, fingerprints
from icon_names import CLASS_OF_NAME
from parquet_files import png_bytes, write_split

# Share of the images that the families of each split hold; families are given away whole, biggest first.
TARGET_SHARES = {"train": 0.46, "val": 0.09, "test": 0.45}
# Families with pixel art or hand drawings are test families: those domains have no shots.
TEST_FAMILIES = frozenset({"streamline", "halfmann", "pixel", "dinkie-icons"})
MIN_TRAIN, MIN_TEST, MIN_TOTAL = 8, 10, 32
COLUMNS = ("domain", "family", "set", "icon", "licence", "author", "pretraining_correlation", "nearest_in_pretraining")


def assign_families(sizes: pd.Series) -> dict[str, str]:
    """Split of each family: the biggest first, each to the split that lacks most of its share."""
    held = dict.fromkeys(TARGET_SHARES, 0)
    split_of = {}
    for family, size in sorted(sizes.items(), key=lambda item: (item[0] not in TEST_FAMILIES, -item[1], item[0])):
        missing = {name: share * sizes.sum() - held[name] for name, share in TARGET_SHARES.items()}
        split_of[family] = "test" if family in TEST_FAMILIES else max(missing, key=missing.__getitem__)
        held[split_of[family]] += size
    return split_of


def choose_classes(table: pd.DataFrame) -> list[str]:
    """Classes with enough images in the training and test families, in alphabetical order."""
    plain = table[table["domain"] == "plain"]
    counts = plain.groupby(["label", "split"]).size().unstack(fill_value=0)
    enough = (counts["train"] >= MIN_TRAIN) & (counts["test"] >= MIN_TEST) & (counts["val"] >= 1)
    return sorted(counts.index[enough & (counts.sum(axis=1) >= MIN_TOTAL)])


def build_icons(candidates: pd.DataFrame, images: np.ndarray, folder: Path) -> None:
    """Write `train.parquet`, `val.parquet` and `test.parquet`."""
    chosen = np.flatnonzero((candidates["kind"] == "icon") & candidates["name"].isin(CLASS_OF_NAME))
    table = candidates.iloc[chosen].reset_index(drop=True)
    table["label"] = table["name"].map(CLASS_OF_NAME)
    table["split"] = table["family"].map(assign_families(table.groupby("family").size()))
    # Of twins the test image stays, so that test classes stay full.
    order = table["split"].map({"test": 0, "train": 1, "val": 2}).sort_values(kind="stable").index.to_numpy()
    kept = np.sort(order[drop_twins(fingerprints(images[chosen[order]]))])
    table, chosen = table.iloc[kept], chosen[kept]
    classes = choose_classes(table)
    for split in TARGET_SHARES:
        rows = np.flatnonzero((table["split"] == split) & table["label"].isin(classes))
        part = table.iloc[rows]
        pngs = [png_bytes(images[chosen[row]], grey=bool(table["monochrome"].iloc[row])) for row in rows]
        write_split(folder / f"{split}.parquet", pngs, {"label": (list(part["label"]), classes)}, part[list(COLUMNS)])
        per_class = part[part["domain"] == "plain"].groupby("label").size()
        print(
            f"icons {split}: {len(part)} images, {part['family'].nunique()} families, per class "
            f"{per_class.min()} to {per_class.max()} (median {per_class.median():.0f}), "
            f"{(per_class >= 16).mean():.0%} of {len(classes)} classes with 16 or more; "
            f"domains {part['domain'].value_counts().to_dict()}"
        )
