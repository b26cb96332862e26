"""Build the three committed evaluation sets from the drawn corpus and Fashion-MNIST.

    python build_datasets.py --cache DOWNLOADS --corpus CORPUS [--output examples/assets]

Near-duplicates (see `duplicates.py`) of any pretraining image are dropped, and within each set no two images are
near-duplicates of each other. The sets are written as parquet files with Hugging Face feature metadata.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from downloads import fashion_mnist
from duplicates import THRESHOLD, fingerprints, nearest
from emoji_set import build_emoji
from fashion_set import build_fashion
from icon_set import build_icons

ASSETS = Path(__file__).resolve().parent.parent


def evaluation_candidates(corpus: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Evaluation rows and images whose drawing is not in pretraining, with their highest correlation to it."""
    table = pd.read_parquet(corpus / "images.parquet")
    images = np.load(corpus / "images.npy", mmap_mode="r")
    trained = np.flatnonzero(table["side"] == "pretraining")
    held_out = np.flatnonzero(table["side"] == "evaluation")
    correlation, rows = nearest(fingerprints(images[held_out]), fingerprints(images[trained]))
    twins = table.iloc[trained[rows]]
    candidates = table.iloc[held_out].reset_index(drop=True)
    candidates["pretraining_correlation"] = correlation.round(4)
    candidates["nearest_in_pretraining"] = (twins["set"] + ":" + twins["icon"]).to_numpy()
    in_training = candidates["pixel_hash"].isin(set(table["pixel_hash"].iloc[trained]))
    fresh = np.flatnonzero((candidates["pretraining_correlation"] <= THRESHOLD) & ~in_training)
    print(f"{len(candidates) - len(fresh)} of {len(candidates)} candidates have a twin in pretraining")
    return candidates.iloc[fresh].reset_index(drop=True), images[held_out[fresh]]


def write_pretraining_list(corpus: Path, output: Path) -> None:
    """List every pretraining image (collection, icon, family, name, pixel hash), without its pixels."""
    table = pd.read_parquet(corpus / "images.parquet")
    columns = ["set", "icon", "family", "kind", "name", "licence", "pixel_hash"]
    trained = table.loc[table["side"] == "pretraining", columns].reset_index(drop=True)
    trained.to_parquet(output / "pretraining_images.parquet", compression="zstd", index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder with the downloads (filled when empty)")
    parser.add_argument("--corpus", type=Path, required=True, help="output folder of build_corpus.py")
    parser.add_argument("--output", type=Path, default=ASSETS)
    args = parser.parse_args()
    candidates, images = evaluation_candidates(args.corpus)
    build_icons(candidates, images, args.output / "icons")
    build_emoji(candidates, images, args.output / "emoji")
    build_fashion(fashion_mnist(args.cache), args.output / "fashion")
    write_pretraining_list(args.corpus, args.output)


if __name__ == "__main__":
    main()
