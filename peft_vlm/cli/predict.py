"""`peft-vlm predict`: labels of image files."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.cli.command import add_command, print_json
from peft_vlm.errors import PeftVLMError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

EXAMPLES = """
  peft-vlm predict outputs/readme picture.png holiday/*.jpg
  peft-vlm predict user/adapter my_images/ --top_k 1 --json
"""


def register(commands: Any) -> None:
    """Add the command to the program.

    Args:
        commands: What `add_subparsers` gave.
    """
    command = add_command(commands, "predict", run, summary="labels of image files", examples=EXAMPLES)
    command.add_argument("adapter", help="folder or Hub id of an adapter; with --zero_shot: of a base model")
    command.add_argument("images", nargs="+", help="image files or folders")
    command.add_argument("--class_names", nargs="+", help="choose among these instead of the adapter's classes")
    command.add_argument("--template", help="text around a class name, with one {}")
    command.add_argument("--base_model", help="base model; by default the one the adapter records")
    command.add_argument("--zero_shot", action="store_true", help="the first argument is a base model, not an adapter")
    command.add_argument("--top_k", type=int, default=3, help="labels per image")


def image_files(paths: Sequence[str]) -> list[Path]:
    """Image files among paths, folders searched with their subfolders.

    Args:
        paths: Files and folders.

    Raises:
        PeftVLMError: If a path does not exist or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            reason = "it holds no image file" if path.is_dir() else "there is no such file or folder"
            raise PeftVLMError(f"Expected images in {str(path)!r}, but {reason}.")
        files += found
    return files


def run(arguments: argparse.Namespace) -> None:
    """Print the labels of image files.

    Args:
        arguments: Parsed words.
    """
    files = image_files(arguments.images)
    classifier = PromptedClassifier.from_pretrained(
        None if arguments.zero_shot else arguments.adapter,
        base_model=arguments.adapter if arguments.zero_shot else arguments.base_model,
        class_names=arguments.class_names,
        template=arguments.template,
    )
    predictions = classifier.predict(files, top_k=arguments.top_k)
    if arguments.json:
        print_json(
            [{"file": str(f), "labels": [asdict(p) for p in row]} for f, row in zip(files, predictions, strict=True)]
        )
        return
    for file, row in zip(files, predictions, strict=True):
        print(f"{file}: " + ", ".join(f"{p.label} {100 * p.probability:.1f} %" for p in row))
