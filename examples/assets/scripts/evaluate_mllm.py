"""Measure a bundled multimodal language model on the evaluation sets, whose design families it never saw.

python evaluate_mllm.py ../mllm_llava --images 300 --write
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluate_clip import load
from mllm_questions import COLOURS
from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.shrink import shrunken_image
from peft_vlm.evaluation.mllm import generation_accuracy, likelihood_accuracy

WHAT = "what is this?"
IMAGES = 600
OTHER_WORDS = {"t-shirt": "t shirt"}


class Window:
    """The picture, 35 of 48 pixels wide, inside a black border; what a visual prompt's shrinking leaves."""

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """The shrunken picture; nothing random."""
        return shrunken_image(image, canvas_size=48, border=6)


class Blank:
    """A white picture instead of the image: what the question alone gives away."""

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """White, in the size of the image."""
        return Image.new("RGB", image.size, "white")


def sample(data: Dataset, count: int) -> Dataset:
    """`count` rows of a set, spread over it, the same every time."""
    rows = random.Random(0).sample(range(len(data)), min(count, len(data)))
    return data.select(sorted(rows))


def naming(data: Dataset, names: list[str], collator: QuestionCollator, column: str = "label") -> ImageQuestionDataset:
    """Asks what each image of a set is."""
    return ImageQuestionDataset(data, names, question=WHAT, label_column=column, collator=collator)


def yes_no(data: Dataset, names: list[str], collator: QuestionCollator) -> ImageQuestionDataset:
    """Asks of half of the images whether they are what they are, of the others whether they are something else."""
    generator, rows = random.Random(0), []
    for row, label in enumerate(data["label"]):
        right = row % 2 == 0
        asked = label if right else (label + generator.randrange(1, len(names))) % len(names)
        question, answer = f"is this a {names[asked]}?", "yes" if right else "no"
        rows.append({"image": data[row]["image"], "question": question, "answer": answer})
    return ImageQuestionDataset(
        rows, ("yes", "no"), question_column="question", answer_column="answer", collator=collator
    )


def colours(data: Dataset, collator: QuestionCollator) -> ImageQuestionDataset:
    """Asks for the colour of grey drawings that are inked in one of the palette's colours."""
    rows = []
    for row in range(len(data)):
        name = list(COLOURS)[row % len(COLOURS)]
        ink = np.array(COLOURS[name])
        shade = np.asarray(data[row]["image"].convert("L"), dtype=float)[..., None] / 255
        paper = 1.0 if ink.mean() < 0.55 else 0.05
        picture = shade * paper + (1 - shade) * ink
        image = Image.fromarray((255 * picture).round().astype(np.uint8))
        rows.append({"image": image, "answer": name})
    return ImageQuestionDataset(
        rows, tuple(COLOURS), question="what colour is it?", answer_column="answer", collator=collator
    )


def n_way(model: nn.Module, data: Dataset, collator: QuestionCollator, *, ways: int = 50, draws: int = 4) -> float:
    """Mean accuracy (%) of telling `ways` known emoji concepts apart."""
    names, accuracies = data.features["concept"].names, []
    present = sorted({row["concept"] for row in data.select_columns(["concept", "seen"]) if row["seen"]})
    for draw in range(draws):
        chosen = random.Random(draw).sample(present, ways)
        questions = naming(data, names, collator, "concept").restrict(chosen)
        accuracies.append(likelihood_accuracy(model, questions, include_end=True))
    return float(np.mean(accuracies))


def evaluate(folder: Path, *, images: int = IMAGES) -> dict[str, float]:
    """All figures (%) of the model in `folder`, on at most `images` images per set."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    collator = QuestionCollator(AutoProcessor.from_pretrained(folder))
    icons = load("icons", "test")
    names = icons.features["label"].names
    pixel = icons.filter(lambda domain: domain == "pixel", input_columns="domain")
    icons = sample(icons.filter(lambda domain: domain == "plain", input_columns="domain"), images)
    fashion = load("fashion", "test")
    garments = [OTHER_WORDS.get(name, name) for name in fashion.features["label"].names]
    asked = naming(icons, names, collator)
    results = {
        "icons_written": generation_accuracy(model, asked, max_new_tokens=8),
        "icons_chosen": likelihood_accuracy(model, asked, include_end=True),
        "icons_chosen_shrunken": likelihood_accuracy(model, asked.with_augmentation(Window()), include_end=True),
        "icons_chosen_blank": likelihood_accuracy(model, asked.with_augmentation(Blank()), include_end=True),
        "icons_chance": 100 / len(names),
        "pixel_art_chosen": likelihood_accuracy(
            model, naming(sample(pixel, images), names, collator), include_end=True
        ),
        "yes_no": likelihood_accuracy(model, yes_no(icons, names, collator)),
        "yes_no_chance": 50.0,
        "colour": likelihood_accuracy(model, colours(sample(icons, images // 2), collator)),
        "colour_chance": 100 / len(COLOURS),
        "emoji_50way": n_way(model, load("emoji", "train"), collator),
        "emoji_50way_chance": 2.0,
        "fashion": likelihood_accuracy(model, naming(sample(fashion, images), garments, collator)),
        "fashion_chance": 10.0,
    }
    return {key: round(value, 2) for key, value in results.items()} | {"images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder with its processor")
    parser.add_argument("--images", type=int, default=IMAGES, help="images per set at most")
    parser.add_argument("--write", action="store_true", help="store evaluation.json in the model folder")
    args = parser.parse_args()
    results = evaluate(args.model, images=args.images)
    print(json.dumps(results, indent=1))
    if args.write:
        args.model.joinpath("evaluation.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
