"""Draw every image that the bundled models are trained or evaluated on, and write one cached corpus.

Writes `images.npy` (RGBA, 48 px) and `images.parquet` (one row per image: where it comes from, what it is called, and
on which side of the split its design family stands) to the output folder. About two minutes on two cores.

    python build_corpus.py --cache DOWNLOADS --output CORPUS
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

import design_families as families
from downloads import npm_package
from emoji_names import Emoji, read_emoji
from icon_names import CLASS_OF_NAME, words_of
from pixels import on_white
from rasterise import draw_bitmap, draw_svg, svg_of

MAX_RENDERINGS = {"pretraining": 3, "evaluation": 2}
MIN_FAMILIES_PER_NAME = 2


def read_collection(package: Path, prefix: str) -> tuple[dict, dict[str, list[str]]]:
    """The iconify JSON of a collection, and for each of its icons the extra names (plain aliases)."""
    data = json.loads((package / "json" / f"{prefix}.json").read_text())
    extra = defaultdict(list)
    for name, alias in data.get("aliases", {}).items():
        if alias.keys() <= {"parent"} and alias["parent"] in data["icons"]:
            extra[alias["parent"]].append(words_of(name))
    return data, extra


def _choose_renderings(icon_names: list[str], limit: int) -> list[str]:
    """Up to `limit` drawings of one thing by one collection: the plainest first, then the most different styles."""
    ordered = sorted(icon_names, key=lambda name: (len(name), name))
    chosen = ordered[:1]
    for marks in (("fill", "solid", "bold"), ("duotone", "two", "thin", "sharp"), ("",)):
        rest = [name for name in ordered if name not in chosen and any(mark in name for mark in marks)]
        if rest and len(chosen) < limit:
            chosen.append(rest[0])
    return chosen


def _icons_by_name(icons: dict[str, dict]) -> dict[str, list[str]]:
    """Icons of one collection that show the same thing, by its name; icons without a name are left out."""
    by_name = defaultdict(list)
    for icon_name, icon in icons.items():
        name = words_of(icon_name)
        if name and not icon.get("hidden"):
            by_name[name].append(icon_name)
    return by_name


def _collection_rows(package: Path, prefix: str, info: dict, held_out: frozenset[str]) -> Iterator[dict]:
    """Rows of one collection: the chosen renderings of everything that it names."""
    family = families.family_of(prefix)
    side = "pretraining" if family in families.PRETRAINING_FAMILIES else "evaluation"
    data, extra = read_collection(package, prefix)
    for name, icon_names in _icons_by_name(data["icons"]).items():
        for icon_name in _choose_renderings(icon_names, MAX_RENDERINGS[side]):
            others = sorted({word for word in extra[icon_name] if word and word != name} - held_out)
            yield {
                "set": prefix,
                "icon": icon_name,
                "family": family,
                "side": side,
                "kind": "icon",
                "domain": families.domain_of(prefix),
                "monochrome": not info.get("palette"),
                "licence": info["license"]["spdx"],
                "author": info["author"]["name"],
                "name": name,
                "other_names": others[:8],
                "subgroup": "",
                "svg": svg_of(data["icons"][icon_name], data),
            }


def list_icons(package: Path, held_out: frozenset[str]) -> list[dict]:
    """Rows (without pixels) of all icons that one of the two sides uses.

    Pretraining takes the names that at least `MIN_FAMILIES_PER_NAME` of its families draw and that are no held-out
    emoji concept; evaluation takes the names of its classes.
    """
    information = json.loads((package / "collections.json").read_text())
    rows, families_of_name = [], defaultdict(set)
    for prefix, info in sorted(information.items()):
        if families.is_icon_set_usable(prefix, info):
            for row in _collection_rows(package, prefix, info, held_out):
                families_of_name[row["side"], row["name"]].add(row["family"])
                rows.append(row)

    def is_used(row: dict) -> bool:
        if row["side"] == "evaluation":
            return row["name"] in CLASS_OF_NAME
        common = len(families_of_name["pretraining", row["name"]]) >= MIN_FAMILIES_PER_NAME
        return common and row["name"] not in held_out

    return [row for row in rows if is_used(row)]


def _emoji_row(entry: Emoji, prefix: str, info: dict, held_out: frozenset[str]) -> dict:
    evaluated = prefix.startswith("fluent")
    return {
        "set": prefix,
        "family": "fluent-emoji" if evaluated else families.family_of(prefix),
        "side": "evaluation" if evaluated else "pretraining",
        "kind": "emoji",
        "domain": prefix.removeprefix("fluent-emoji-").replace("-", "_") if evaluated else "emoji",
        "monochrome": not info.get("palette"),
        "licence": info["license"]["spdx"],
        "author": info["author"]["name"],
        "name": entry.name,
        "other_names": [word for word in entry.keywords if word not in held_out and word != entry.name][:12],
        "subgroup": entry.subgroup,
    }


def list_emoji(iconify: Path, fluent_3d: Path, emoji: dict[str, Emoji], held_out: frozenset[str]) -> list[dict]:
    """Rows of all emoji drawings: the pretraining vendors without held-out concepts, and the evaluation vendor."""
    information = json.loads((iconify / "collections.json").read_text())
    rows = []
    for prefix in (*families.PRETRAINING_EMOJI_SETS, *families.EVALUATION_EMOJI_STYLES.values()):
        data, _ = read_collection(iconify, prefix)
        for key, entry in emoji.items():
            if key in data["icons"] and (prefix.startswith("fluent") or not entry.held_out):
                row = _emoji_row(entry, prefix, information[prefix], held_out)
                rows.append(row | {"icon": key, "svg": svg_of(data["icons"][key], data)})
    microsoft = {"palette": True, "license": {"spdx": "MIT"}, "author": {"name": "Microsoft Corporation"}}
    files = {path.stem.replace("-fe0f", ""): path for path in (fluent_3d / "assets").glob("*.webp")}
    for entry in emoji.values():
        path = files.get(entry.hexcode.replace("-fe0f", ""))
        if path is not None:
            row = _emoji_row(entry, "fluent-emoji-3d", microsoft, held_out)
            rows.append(row | {"icon": path.stem, "bitmap": str(path)})
    return rows


def _draw(row: dict) -> np.ndarray:
    return draw_bitmap(Path(row["bitmap"])) if "bitmap" in row else draw_svg(row["svg"])


def build(cache: Path, output: Path, processes: int) -> pd.DataFrame:
    """Draw everything, drop blank images, and save pixels and table."""
    iconify = npm_package("iconify", cache)
    emoji = read_emoji(npm_package("emojibase", cache))
    held_out = frozenset(entry.name for entry in emoji.values() if entry.held_out)
    rows = list_icons(iconify, held_out) + list_emoji(iconify, npm_package("fluent-3d", cache), emoji, held_out)
    with ProcessPoolExecutor(processes) as pool:
        images = np.stack(list(pool.map(_draw, rows, chunksize=256)))
    table = pd.DataFrame([{key: row[key] for key in row if key not in ("svg", "bitmap")} for row in rows])
    visible = on_white(images).reshape(len(images), -1).std(axis=1) > 2
    images, table = images[visible], table[visible].reset_index(drop=True)
    table["pixel_hash"] = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in on_white(images)]
    table["seen_concept"] = ~table["name"].isin(held_out)
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "images.npy", images)
    table.to_parquet(output / "images.parquet")
    print(f"drew {len(rows)} images, dropped {int((~visible).sum())} blank ones")
    print(
        table.groupby(["side", "kind"]).agg(
            images=("name", "size"), names=("name", "nunique"), sets=("set", "nunique")
        )
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder with the downloads (filled when empty)")
    parser.add_argument("--output", type=Path, required=True, help="folder for images.npy and images.parquet")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    build(args.cache, args.output, args.processes)


if __name__ == "__main__":
    main()
