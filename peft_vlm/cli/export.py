"""`peft-vlm export`: an adapter with fixed classes as an ordinary image classifier."""

import argparse
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.cli.console import calm

#: Of `peft_vlm.export.FORMATS`.
FORMATS = ("onnx", "pt2", "safetensors")

EXAMPLES = """
  peft-vlm export outputs/readme exported
  peft-vlm export user/adapter exported --formats onnx
  peft-vlm export openai/clip-vit-base-patch32 exported --zero_shot --class_names cat dog --template "a photo of a {}."
  peft-vlm predict exported/classifier.onnx photo.png
"""
DESCRIPTION = """\
Writes the image tower, the class vectors and the scale as one network: no PEFT, no text encoder, same logits.
The result is compared with the adapter before it is written. How to serve it: docs/serve.md."""


def register(commands: Any) -> None:
    """Add the command to the program."""
    summary = "an adapter with fixed classes as a plain image classifier: safetensors, ONNX, torch program"
    command = add_command(commands, "export", run, summary=summary, description=DESCRIPTION, examples=EXAMPLES)
    command.add_argument("adapter", help="folder or Hub id of an adapter; with --zero_shot: of a base model")
    command.add_argument("output_dir", help="folder for classifier.* ")
    command.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["safetensors", "onnx"],
        help="what to write; onnx needs the extra `onnx`, pt2 is a program of torch.export",
    )
    command.add_argument("--class_names", nargs="+", help="classes instead of the adapter's own")
    command.add_argument("--template", help="text around a class name, with one {}")
    command.add_argument("--base_model", help="base model; by default the one the adapter records")
    command.add_argument("--zero_shot", action="store_true", help="the first argument is a base model, not an adapter")


def run(arguments: argparse.Namespace) -> None:
    """Export, and print which files were written."""
    from peft_vlm.export import export_classifier, write_export

    with calm():
        classifier = export_classifier(
            None if arguments.zero_shot else arguments.adapter,
            base_model=arguments.adapter if arguments.zero_shot else arguments.base_model,
            class_names=arguments.class_names,
            template=arguments.template,
        )
        files = write_export(classifier, Path(arguments.output_dir), arguments.formats)
    sizes = {str(path): path.stat().st_size for path in files}
    if arguments.json:
        print_json({"classes": len(classifier.card.class_names), "files": sizes})
        return
    for path, size in sizes.items():
        print_line(f"{path:48}{size / 1e6:9.3f} MB")
    print_line(f"{len(classifier.card.class_names)} classes. Use it:  peft-vlm predict {str(files[0])!r} photo.png")
