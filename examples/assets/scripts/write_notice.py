"""Write `collections.json` (every collection used, with author, licence and counts) and the NOTICE made from it.

python write_notice.py --cache DOWNLOADS
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from design_families import family_of
from downloads import NPM_PACKAGES, npm_package

ASSETS = Path(__file__).resolve().parent.parent
NOTICE = ASSETS.parent.parent / "NOTICE"
OTHER_SOURCES = [
    {
        "set": "fluent-emoji-3d",
        "name": "Fluent Emoji 3D",
        "author": "Microsoft Corporation",
        "author_url": "https://github.com/microsoft/fluentui-emoji",
        "licence": "MIT",
        "licence_url": "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "family": "fluent-emoji",
    },
    {
        "set": "fashion-mnist",
        "name": "Fashion-MNIST",
        "author": "Zalando SE",
        "author_url": "https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT",
        "licence_url": "https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE",
        "family": "fashion-mnist",
    },
    {
        "set": "emojibase-data",
        "name": "Emojibase (emoji names, keywords, subgroups; no images)",
        "author": "Miles Johnson",
        "author_url": "https://github.com/milesj/emojibase",
        "licence": "MIT",
        "licence_url": "https://github.com/milesj/emojibase/blob/master/LICENSE",
        "family": "emojibase-data",
    },
]
LICENCE_URLS = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
}
HEADER = """\
peft_vlm
========

The Python package contains no third-party images. The folder `examples/assets` of the source repository (not part of
the wheel) holds small models that were trained on the icon and emoji collections below, and evaluation images drawn
from some of them. All images were rasterised to 48 x 48 pixels on white; no other change was made to the evaluation
images. The models were trained on randomly warped and recoloured versions. Licences are those that the iconify project
states for each collection; they were not checked again upstream.

The folder `tests/parity/reference` of the source repository holds, as `T2_checkpoint_best`, the trained prompt of
Transferable Visual Prompting (https://github.com/zycheiheihei/Transferable-Visual-Prompting), MIT, by its authors.

Every evaluation image names its collection, icon, author and licence in its row; `examples/assets/collections.json`
is the machine-readable form of this list, `examples/assets/pretraining_images.parquet` lists every training image.

Collections ({count}; T = images used to train the models, E = evaluation images committed)
"""


def count_images() -> dict[str, dict[str, int]]:
    """Number of training images, and of committed evaluation images, of each collection."""
    trained = pd.read_parquet(ASSETS / "pretraining_images.parquet")["set"].value_counts()
    evaluated = pd.concat(
        [
            pq.read_table(path, columns=["set"]).to_pandas()
            for name in ("icons", "emoji")
            for path in (ASSETS / name).glob("*.parquet")
        ]
    )["set"].value_counts()
    fashion = sum(pq.read_metadata(path).num_rows for path in (ASSETS / "fashion").glob("*.parquet"))
    counts = {name: {"pretraining": int(number), "evaluation": 0} for name, number in trained.items()}
    counts |= {name: {"pretraining": 0, "evaluation": int(number)} for name, number in evaluated.items()}
    return counts | {
        "fashion-mnist": {"pretraining": 0, "evaluation": fashion},
        "emojibase-data": {"pretraining": 0, "evaluation": 0},
    }


def collect(cache: Path) -> list[dict]:
    """One record per collection used."""
    counts = count_images()
    information = json.loads((npm_package("iconify", cache) / "collections.json").read_text())
    records = [dict(record) for record in OTHER_SOURCES]
    for prefix, info in information.items():
        if prefix in counts:
            records.append(
                {
                    "set": prefix,
                    "name": info["name"],
                    "author": info["author"]["name"],
                    "author_url": info["author"].get("url", ""),
                    "licence": info["license"]["spdx"],
                    "licence_url": info["license"].get("url") or LICENCE_URLS.get(info["license"]["spdx"], ""),
                    "family": family_of(prefix) if not prefix.startswith("fluent-emoji") else "fluent-emoji",
                }
            )
    missing = set(counts) - {record["set"] for record in records}
    if missing:
        raise ValueError(f"No licence record for the collections {sorted(missing)}.")
    return sorted((record | counts[record["set"]] for record in records), key=lambda record: record["set"])


def notice(records: list[dict]) -> str:
    """Text of the NOTICE file, ASCII."""
    lines = [HEADER.format(count=len(records))]
    for record in records:
        uses = [f"{mark} {record[key]}" for mark, key in (("T", "pretraining"), ("E", "evaluation")) if record[key]]
        lines.append(
            f"{record['name']} ({record['set']}), by {record['author']}: {record['licence']} [{', '.join(uses)}]"
        )
        lines.extend(f"    {url}" for url in (record["author_url"], record["licence_url"]) if url)
    packages = ", ".join(spec for spec, _ in NPM_PACKAGES.values())
    lines.append(f"\nDownloaded as: npm {packages}; Debian dataset-fashion-mnist.\n")
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace").decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder with the downloads (filled when empty)")
    records = collect(parser.parse_args().cache)
    (ASSETS / "collections.json").write_text(json.dumps(records, indent=1) + "\n")
    NOTICE.write_text(notice(records))


if __name__ == "__main__":
    main()
