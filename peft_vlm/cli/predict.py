"""`peft-vlm predict`: labels of image files."""

import argparse
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.cli.console import calm
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.serving.images import find_images, is_image_file, walk

#: Files to their labels with probabilities, best first.
Labeller = Callable[[Sequence[Path]], list[list[tuple[str, float]]]]
#: Images per call of it.
BATCH_SIZE = 32

EXAMPLES = """
  peft-vlm predict outputs/readme photo.png "holiday photos/"
  peft-vlm predict outputs/readme "scans/**/*.png" --top_k 1 --json     (quoted: peft-vlm looks for the files itself)
  peft-vlm predict user/adapter my_images/ --class_names cat dog
  peft-vlm predict openai/clip-vit-base-patch32 my_images/ --zero_shot --class_names cat dog
  peft-vlm predict exported/classifier.onnx my_images/
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    command = add_command(commands, "predict", run, summary="labels of image files", examples=EXAMPLES)
    command.add_argument(
        "adapter",
        help="folder or Hub id of an adapter; with --zero_shot: of a base model; or a file that `export` wrote",
    )
    command.add_argument("images", nargs="+", help="image files, folders (with their subfolders), or patterns with *")
    command.add_argument("--class_names", nargs="+", help="choose among these instead of the adapter's classes")
    command.add_argument("--template", help="text around a class name, with one {}")
    command.add_argument("--base_model", help="base model; by default the one the adapter records")
    command.add_argument("--zero_shot", action="store_true", help="the first argument is a base model, not an adapter")
    command.add_argument("--top_k", type=int, default=3, help="labels per image")


def image_files(paths: Sequence[str]) -> list[Path]:
    """Image files among paths, each once: folders are searched with their subfolders, patterns are looked up.

    Args:
        paths: Files, folders, and patterns with `*`, `?` or `[...]`.

    Raises:
        PeftVLMError: If a path does not exist, or a folder or pattern gives no image.
    """
    files: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if os.path.isfile(path):
            found = [path]
        elif os.path.isdir(path):
            found = find_images(path)
        else:
            found = [match for match in sorted(set(_matches(text))) if is_image_file(match)]
        if not found:
            pattern = glob.has_magic(text)
            reason = "it holds no image file" if os.path.isdir(path) else "there is no such file or folder"
            raise PeftVLMError(
                f"Expected images in {text!r}, but {'no image file matches it' if pattern else reason}."
            )
        files |= dict.fromkeys(found)
    return list(files)


def _matches(pattern: str) -> Iterator[Path]:
    """Paths that a pattern matches, as `glob` finds them, but for links in circles behind `**`, which it follows."""
    parts = [part for part, _ in groupby(Path(pattern).parts)]  # `**/**` is `**`
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    place = parts.index("**")
    rest = os.path.join(*(parts[place + 1 :] or ["*"]))
    for start in _matches(os.path.join(*parts[:place])) if place else [Path()]:
        for folder, _ in walk(start, Counter()) if os.path.isdir(start) else ():
            yield from _matches(os.path.join(glob.escape(str(folder)), rest))


def run(arguments: argparse.Namespace) -> None:
    """Print the labels of image files, in their order; one that cannot be read is named in its place.

    Args:
        arguments: Parsed words.

    Raises:
        PeftVLMError: At the end, if files could not be read; or for a wrong word.
    """
    if arguments.top_k < 1:
        raise PeftVLMError(f"Expected `--top_k` of at least 1, got {arguments.top_k}.")
    files = image_files(arguments.images)
    label_files = _labeller(arguments)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = _labelled(label_files, files[start : start + BATCH_SIZE])
        rows += batch
        for row in () if arguments.json else batch:
            text = ", ".join(f"{p['label']} {100 * p['probability']:.1f} %" for p in row["labels"])
            print_line(f"{row['file']}: {row.get('error', text)}")
    if arguments.json:
        print_json(rows)
    if unread := [row["file"] for row in rows if "error" in row]:
        raise PeftVLMError(f"{len(unread)} of {len(files)} images could not be read, the first is {unread[0]!r}.")


def _labelled(label_files: Labeller, files: Sequence[Path]) -> list[dict[str, Any]]:
    """A row per file; `error` says why one has no labels."""
    try:
        predictions = label_files(files)
    except DataError as error:
        if len(files) == 1:
            return [{"file": str(files[0]), "labels": [], "error": str(error)}]
        return [row for file in files for row in _labelled(label_files, [file])]
    rows = []
    for file, row in zip(files, predictions, strict=True):
        labels = [{"label": label, "probability": probability} for label, probability in row]
        rows.append({"file": str(file), "labels": labels})
    return rows


def _labeller(arguments: argparse.Namespace) -> Labeller:
    """The function from files to labels for the given arguments."""
    path, top_k = Path(arguments.adapter), arguments.top_k
    if path.suffix in (".safetensors", ".onnx") and path.is_file():
        fixed = {"class_names", "template", "base_model", "zero_shot"}
        given = sorted(name for name in fixed if getattr(arguments, name))
        if given:
            raise PeftVLMError(
                f"{str(path)!r} is an exported classifier, whose classes are fixed; leave out {given!r}."
            )
        exported = _load_exported(path)

        def predict_exported(files: Sequence[Path]) -> list[list[tuple[str, float]]]:
            try:
                return exported.predict(files, top_k=top_k)
            except ValueError as error:  # the folder `serving` knows no other errors
                raise DataError(str(error)) from error

        return predict_exported
    from peft_vlm.classifier import PromptedClassifier

    with calm():
        classifier = PromptedClassifier.from_pretrained(
            None if arguments.zero_shot else arguments.adapter,
            base_model=arguments.adapter if arguments.zero_shot else arguments.base_model,
            class_names=arguments.class_names,
            template=arguments.template,
        )

    def predict(files: Sequence[Path]) -> list[list[tuple[str, float]]]:
        return [[(p.label, p.probability) for p in row] for row in classifier.predict(files, top_k=top_k)]

    return predict


def _load_exported(path: Path) -> Any:
    """Load an exported classifier with the runtime of its format."""
    if path.suffix == ".safetensors":
        from peft_vlm.serving.plain import load_exported

        return load_exported(path)
    try:
        from peft_vlm.serving.onnx import OnnxClassifier
    except ImportError as error:
        raise PeftVLMError("ONNX files need onnxruntime. Install: pip install onnxruntime.") from error
    return OnnxClassifier(path)
