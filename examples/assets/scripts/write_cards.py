"""Write the cards of the bundled models and sets. Every number in them is read from files, none is typed.

python write_cards.py        # after evaluate_clip.py and evaluate_mllm.py with --write for each model
"""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoProcessor

from card_texts import ASSETS_README, EMOJI_CARD, FASHION_CARD, ICONS_CARD, LINEAGE, MLLM_CARD, MODEL_CARD
from evaluate_clip import ASSETS
from mllm_models import prompt_text

MODELS = ("clip_student", "clip_teacher")
MLLMS = {"mllm_llava": 0, "mllm_idefics3": 1, "mllm_paligemma": 2}  # seeds of their training
SPLITS = ("train", "val", "test")


def _table(rows: list[tuple[str, ...]]) -> str:
    """Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _accuracies(results: dict[str, dict[str, float]]) -> str:
    """The zero-shot figures of one model as a table."""
    icons, emoji, fashion = results["icons"], results["emoji"], results["fashion"]
    rows = [
        ("task", "top-1 %", "chance %"),
        ("**icons**, all classes, test", f"**{icons['all']:.1f}**", f"{icons['chance']:.1f}"),
    ]
    rows += [
        (f"icons, {title}", f"{icons[key]:.1f}", chance)
        for key, title, chance in (
            ("all_top5", "all classes, top-5", ""),
            ("plain", "plain drawings", ""),
            ("pixel", "pixel art", ""),
            ("hand", "hand drawn", ""),
            ("base", "base half among base", ""),
            ("new", "new half among new", ""),
        )
    ]
    for style, title in (("flat", "flat"), ("3d", "3D"), ("high_contrast", "high contrast")):
        rows += [
            (f"emoji {title}, subgroup, test", f"{emoji[f'subgroup_{style}']:.1f}", f"{emoji['chance_subgroup']:.1f}"),
            (f"emoji {title}, known concepts, 50-way", f"**{emoji[f'seen_50way_{style}']:.1f}**", "2.0"),
            (f"emoji {title}, known concepts, 100-way", f"{emoji[f'seen_100way_{style}']:.1f}", "1.0"),
            (
                f"emoji {title}, all concepts at once",
                f"{emoji[f'concept_all_{style}']:.1f}",
                f"{emoji['chance_concept_all']:.1f}",
            ),
            (f"emoji {title}, unseen concepts, 50-way", f"{emoji[f'unseen_50way_{style}']:.1f}", "2.0"),
        ]
    rows.append(("**fashion**, photos, test", f"**{fashion['all']:.1f}**", f"{fashion['chance']:.1f}"))
    rows.append(
        (
            "control: icons with permuted class names",
            f"{icons['control_permuted_names']:.1f}",
            f"{icons['chance']:.1f}",
        )
    )
    return _table(rows)


def write_model_card(folder: Path) -> None:
    """README.md of one model."""
    results = json.loads((folder / "evaluation.json").read_text())
    log = json.loads((folder / "training_log.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        parameters = sum(tensors.get_tensor(key).numel() for key in tensors.keys())
    records = json.loads((ASSETS / "collections.json").read_text())
    trained = [record for record in records if record["pretraining"]]
    licences = Counter()
    for record in trained:
        licences[record["licence"]] += record["pretraining"]
    card = MODEL_CARD.format(
        name=folder.name,
        lineage=LINEAGE[folder.name],
        parameters=f"{parameters / 1e6:.2f}",
        megabytes=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        vision=config["vision_config"],
        text=config["text_config"],
        pairs=f"{log[-1]['pairs']:,}",
        minutes=f"{log[-1]['seconds'] / 60:.0f}",
        cpu_minutes=f"{log[-1]['cpu_seconds'] / 60:.0f}",
        first_loss=f"{log[0]['loss']:.2f}",
        last_loss=f"{log[-1]['loss']:.2f}",
        last_accuracy=f"{log[-1]['accuracy']:.0f}",
        images=f"{sum(record['pretraining'] for record in trained):,}",
        num_sets=len(trained),
        num_families=len({record["family"] for record in trained}),
        licences=", ".join(f"{name} {count:,}" for name, count in licences.most_common()),
        accuracies=_accuracies(results),
        dim=config["projection_dim"],
    )
    (folder / "README.md").write_text(card)


def _mllm_accuracies(results: dict[str, float]) -> str:
    """The figures of one multimodal model as a table."""
    rows = [("task", "accuracy %", "chance %")]
    for key, title, chance in (
        ("icons_chosen", "**icons**, plain, chosen among all classes", "icons_chance"),
        ("icons_written", "icons, plain, written word by word", ""),
        ("icons_chosen_shrunken", "icons shrunk into a window with a black border, chosen", "icons_chance"),
        ("pixel_art_chosen", "icons in pixel art, chosen", "icons_chance"),
        ("icons_chosen_blank", "control: a white picture instead of the icon", "icons_chance"),
        ("yes_no", "**is it a ...?**, icons", "yes_no_chance"),
        ("colour", "**colour** of the ink, icons", "colour_chance"),
        ("emoji_50way", "emoji of an unseen vendor, known concepts, 50-way", "emoji_50way_chance"),
        ("fashion", "fashion, photos", "fashion_chance"),
    ):
        rows.append((title, f"{results[key]:.1f}", f"{results[chance]:.1f}" if chance else ""))
    return _table(rows)


def write_mllm_card(folder: Path) -> None:
    """README.md of one multimodal model."""
    results, log, config = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "training_log", "config")
    )
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        parameters = sum(tensors.get_tensor(key).numel() for key in tensors.keys())
    processor = AutoProcessor.from_pretrained(folder)
    card = MLLM_CARD.format(
        name=folder.name,
        architecture=config["architectures"][0],
        text=prompt_text(processor)("what is this?"),
        parameters=f"{parameters / 1e6:.2f}",
        megabytes=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        vision=config["vision_config"],
        language=config["text_config"],
        vocabulary=f"{len(processor.tokenizer):,}",
        images=f"{log[-1]['pairs']:,}",
        minutes=f"{log[-1]['seconds'] / 60:.0f}",
        cpu_minutes=f"{log[-1]['cpu_seconds'] / 60:.0f}",
        first_loss=f"{log[0]['loss']:.2f}",
        last_loss=f"{log[-1]['loss']:.2f}",
        seed=MLLMS[folder.name],
        evaluated=results["images"],
        accuracies=_mllm_accuracies(results),
    )
    (folder / "README.md").write_text(card)


def _split_rows(name: str, files: list[str]) -> list[tuple[str, ...]]:
    """One row per parquet file: images and images per class."""
    rows = [("file", "images", "per class: least", "median", "most")]
    for file in files:
        data = Dataset.from_parquet(str(ASSETS / name / f"{file}.parquet"))
        counts = pd.Series(Counter(data["label"]).values())
        rows.append(
            (f"`{file}.parquet`", str(len(data)), str(counts.min()), f"{counts.median():.0f}", str(counts.max()))
        )
    return rows


def write_icons_card() -> None:
    """README.md of the icon set."""
    parts = {split: Dataset.from_parquet(str(ASSETS / "icons" / f"{split}.parquet")) for split in SPLITS}
    shots = Counter(parts["train"]["label"])
    names = parts["train"].features["label"].names
    licences = Counter(licence for part in parts.values() for licence in part["licence"])
    text = ICONS_CARD.format(
        splits=_table(_split_rows("icons", list(SPLITS))),
        classes=", ".join(names),
        num_classes=len(names),
        num_base=(len(names) + 1) // 2,
        families=", ".join(f"{split} {len(set(part['family']))}" for split, part in parts.items()),
        domains=", ".join(f"{domain} {count}" for domain, count in Counter(parts["test"]["domain"]).most_common()),
        rare=", ".join(f"{names[label]} {count}" for label, count in sorted(shots.items()) if count < 16),
        licences=", ".join(f"{name} {count:,}" for name, count in licences.most_common()),
    )
    (ASSETS / "icons" / "README.md").write_text(text)


def write_emoji_card() -> None:
    """README.md of the emoji set."""
    styles = ("", "_3d", "_high_contrast")
    files = [f"{split}{style}" for style in styles for split in SPLITS]
    train = Dataset.from_parquet(str(ASSETS / "emoji" / "train.parquet"))
    unseen = [
        sum(not seen for seen in Dataset.from_parquet(str(ASSETS / "emoji" / f"{s}.parquet"))["seen"]) for s in SPLITS
    ]
    text = EMOJI_CARD.format(
        splits=_table(_split_rows("emoji", files)),
        classes=", ".join(train.features["label"].names),
        num_classes=train.features["label"].num_classes,
        num_concepts=train.features["concept"].num_classes,
        unseen=", ".join(f"{split} {count}" for split, count in zip(SPLITS, unseen, strict=True)),
    )
    (ASSETS / "emoji" / "README.md").write_text(text)


def write_overview() -> None:
    """README.md of the folder of all assets."""
    figures = {name: json.loads((ASSETS / name / "evaluation.json").read_text()) for name in MODELS}
    rows = [("", *MODELS)]
    for title, name, key in (
        ("icons, all classes", "icons", "all"),
        ("emoji, known concepts, 50-way, flat", "emoji", "seen_50way_flat"),
        ("emoji, subgroups, flat", "emoji", "subgroup_flat"),
        ("fashion", "fashion", "all"),
    ):
        rows.append((title, *(f"{figures[model][name][key]:.1f}" for model in MODELS)))
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        for path in sorted(ASSETS.iterdir())
        if path.is_dir() and path.name != "scripts"
    }
    listing = _table([("folder", "MB"), *((f"`{name}/`", f"{size:.1f}") for name, size in sizes.items())])
    answers = {name: json.loads((ASSETS / name / "evaluation.json").read_text()) for name in MLLMS}
    asked = [("", *MLLMS)]
    for title, key in (
        ("icons, chosen among all classes", "icons_chosen"),
        ("icons, written", "icons_written"),
        ("is it a ...?", "yes_no"),
        ("colour", "colour"),
        ("emoji, 50-way", "emoji_50way"),
        ("fashion", "fashion"),
    ):
        asked.append((title, *(f"{answers[name][key]:.1f}" for name in MLLMS)))
    text = ASSETS_README.format(accuracies=_table(rows), answers=_table(asked), sizes=listing)
    (ASSETS / "README.md").write_text(text)


def main() -> None:
    for name in MODELS:
        if (ASSETS / name / "evaluation.json").exists():
            write_model_card(ASSETS / name)
    for name in MLLMS:
        if (ASSETS / name / "evaluation.json").exists():
            write_mllm_card(ASSETS / name)
    write_icons_card()
    write_emoji_card()
    fashion = FASHION_CARD.format(splits=_table(_split_rows("fashion", list(SPLITS))))
    (ASSETS / "fashion" / "README.md").write_text(fashion)
    if all((ASSETS / name / "evaluation.json").exists() for name in (*MODELS, *MLLMS)):
        write_overview()


if __name__ == "__main__":
    main()
