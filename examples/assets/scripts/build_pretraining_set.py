"""Write the pretraining corpus as sharded parquet files with a label per image: what RPP is pretrained on.

    python build_pretraining_set.py --corpus CORPUS --output PRETRAINING        # all names and images, 25 MB
    python build_pretraining_set.py --corpus CORPUS --committed                 # the subset in `../pretraining`

A class is a name. Equal drawings count once. The validation file holds one image of names with at least three; the
committed subset has two training images of each name with at least six, and only collections under MIT, Apache-2.0 or
ISC.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from parquet_files import write_split
from pixels import on_white

COMMITTED = Path(__file__).resolve().parent.parent / "pretraining"
COMMITTED_LICENCES = ("MIT", "Apache-2.0", "ISC")
COLUMNS = ["kind", "set", "icon", "licence"]


def webp_bytes(image: np.ndarray, *, grey: bool) -> bytes:
    """Lossless WebP file of an RGBA image over white; a quarter smaller than PNG at this size."""
    picture = Image.fromarray(on_white(image))
    buffer = io.BytesIO()
    (picture.convert("L").convert("RGB") if grey else picture).save(buffer, "WEBP", lossless=True, quality=100)
    return buffer.getvalue()


def assign_splits(table: pd.DataFrame, *, shots: int | None, least: int) -> pd.Series:
    """Split of each row: `validation` for one image of a name with three or more, `train`, or empty for none.

    Args:
        table: Rows with `name`, in random order.
        shots: Training images per name; None for all.
        least: Images that a name must have.
    """
    place = table.groupby("name").cumcount()
    size = table.groupby("name")["name"].transform("size")
    split = pd.Series("train", index=table.index)
    split[(place == 0) & (size >= 3)] = "validation"
    first = (size >= 3).astype(int)
    if shots is not None:
        split[place >= first + shots] = ""
    split[size < least] = ""
    return split


def build(corpus: Path, output: Path, *, committed: bool, shards: int) -> None:
    """Write `train-*.parquet`, `validation.parquet` and `class_names.txt`."""
    table = pd.read_parquet(corpus / "images.parquet")
    table = table[table["side"] == "pretraining"].drop_duplicates("pixel_hash")
    if committed:
        table = table[table["licence"].isin(COMMITTED_LICENCES)]
    table = table.sample(frac=1.0, random_state=0)
    table["split"] = assign_splits(table, shots=2 if committed else None, least=6 if committed else 1)
    if committed:  # a sample of the classes is enough to validate on
        chosen = table.index[table["split"] == "validation"][1500:]
        table.loc[chosen, "split"] = ""
    names = sorted(table.loc[table["split"] == "train", "name"].unique())
    images = np.load(corpus / "images.npy", mmap_mode="r")
    parts = {"validation": table[table["split"] == "validation"]}
    rows = table[table["split"] == "train"]
    for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        parts[f"train-{shard:05d}-of-{shards:05d}"] = rows.iloc[part]
    for name, part in parts.items():
        grey = part["monochrome"].astype(bool)
        files = [webp_bytes(images[row], grey=grey[row]) for row in part.index]
        write_split(output / f"{name}.parquet", files, {"label": (list(part["name"]), names)}, part[COLUMNS])
        print(f"{name}: {len(part)} images, {part['name'].nunique()} classes")
    (output / "class_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="output folder of build_corpus.py")
    parser.add_argument("--output", type=Path, help="folder to write to")
    parser.add_argument("--committed", action="store_true", help="the subset that is committed beside the scripts")
    args = parser.parse_args()
    if not args.committed and args.output is None:
        parser.error("give --output, or --committed")
    build(args.corpus, args.output or COMMITTED, committed=args.committed, shards=4 if args.committed else 16)


if __name__ == "__main__":
    main()
