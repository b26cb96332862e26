"""`peft-vlm evaluate | predict | info`: thin over the library.

Exit codes: 0 done, 2 wrong input (one line says what), 1 anything unexpected (with traceback).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import HfArgumentParser

import peft_vlm  # noqa: F401 - registers the methods
from peft_vlm.classifier import PromptedClassifier
from peft_vlm.errors import PeftVLMError
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from peft_vlm.prompting.config import installed_version
from peft_vlm.registry import METHODS
from peft_vlm.training.artifacts import environment

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

EVALUATE_EXAMPLES = """
examples:
  peft-vlm evaluate --protocol zero-shot --dataset examples/assets/icons --model examples/assets/clip_student \\
      --template "a {} icon" --output_dir outputs/zero_shot
  peft-vlm evaluate --protocol base-to-new --dataset my_images/ --adapter outputs/demo/icons/skip_tuning/seed1 \\
      --output_dir outputs/base_to_new
  peft-vlm evaluate settings.yaml
"""
PREDICT_EXAMPLES = """
examples:
  peft-vlm predict outputs/readme picture.png holiday/*.jpg
  peft-vlm predict user/adapter my_images/ --top_k 1 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words of the command line; those of the process by default.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(prog="peft-vlm", description="Prompted vision-language models: use and evaluate.")
    parser.add_argument("--version", action="version", version=f"peft-vlm {installed_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="evaluate | predict | info")
    _add_evaluate(commands)
    _add_predict(commands)
    _add_info(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not evaluate:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments, rest)
    except (PeftVLMError, ValueError) as error:
        print(f"peft-vlm {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_evaluate(commands: Any) -> None:
    flags = HfArgumentParser(EvaluationArguments, add_help=False)
    command = commands.add_parser(
        "evaluate",
        help="zero-shot, few-shot, base-to-new, cross-dataset or domain-shift accuracy of a model or adapter",
        description="Writes report.json, scores.png and a confusion matrix per part.",
        epilog=flags.format_help().partition("options:")[2] + EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON instead of a summary")
    command.set_defaults(run=evaluate)


def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="labels of image files",
        epilog=PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("adapter", help="folder or Hub id of an adapter; with --zero_shot: of a base model")
    command.add_argument("images", nargs="+", help="image files or folders")
    command.add_argument("--class_names", nargs="+", help="choose among these instead of the adapter's classes")
    command.add_argument("--template", help="text around a class name, with one {}")
    command.add_argument("--base_model", help="base model; by default the one the adapter records")
    command.add_argument("--zero_shot", action="store_true", help="the first argument is a base model, not an adapter")
    command.add_argument("--top_k", type=int, default=3, help="labels per image")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=predict)


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="what an adapter is, or what is installed")
    command.add_argument("adapter", nargs="?", help="folder or Hub id; none: versions and methods")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=info)


def evaluate(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Evaluate by flags, or by one YAML or JSON file.

    Args:
        arguments: Parsed words.
        rest: Flags of `EvaluationArguments`, or the path of a settings file.
    """
    parser = HfArgumentParser(EvaluationArguments, prog="peft-vlm evaluate")
    if len(rest) == 1 and Path(rest[0]).suffix in (".yaml", ".yml", ".json"):
        read = parser.parse_json_file if rest[0].endswith(".json") else parser.parse_yaml_file
        (settings,) = read(rest[0])
    else:
        (settings,) = parser.parse_args_into_dataclasses(rest)
    report = run_evaluation(settings)
    if arguments.json:
        print((Path(settings.output_dir) / "report.json").read_text(encoding="utf-8"))
        return
    for name, score in report.scores.items():
        print(f"{name:24}{score:7.2f} %")
    print(f"Written to {settings.output_dir}")


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


def predict(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Print the labels of image files.

    Args:
        arguments: Parsed words.
        rest: Not used.
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
        rows = [
            {"file": str(f), "labels": [asdict(p) for p in row]} for f, row in zip(files, predictions, strict=True)
        ]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for file, row in zip(files, predictions, strict=True):
        print(f"{file}: " + ", ".join(f"{p.label} {100 * p.probability:.1f} %" for p in row))


def info(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Print what an adapter's folder says, or what is installed.

    Args:
        arguments: Parsed words.
        rest: Not used.

    Raises:
        PeftVLMError: If the adapter is of a method that is not ours.
    """
    if arguments.adapter is None:
        facts: dict[str, Any] = {**environment(), "methods": sorted(METHODS)}
    else:
        config = PeftConfig.from_pretrained(arguments.adapter)
        if config.peft_type.value.lower() not in METHODS:
            raise PeftVLMError(
                f"Expected an adapter of {sorted(METHODS)!r}, got one of PEFT's {config.peft_type.value!r}."
            )
        facts = {key: value for key, value in config.to_dict().items() if value is not None}
        facts.pop("target_modules", None)
    if arguments.json:
        print(json.dumps(facts, default=str, ensure_ascii=False, indent=2))
        return
    for key, value in facts.items():
        text = str(value) if not isinstance(value, list) or len(value) <= 8 else f"{len(value)}: {value[:5]} ..."
        print(f"{key:24}{text}")


if __name__ == "__main__":
    sys.exit(main())
