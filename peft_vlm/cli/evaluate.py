"""`peft-vlm evaluate`: the accuracy of a model or adapter under a protocol."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line, read_settings
from peft_vlm.cli.console import calm
from peft_vlm.settings import EvaluationArguments

EXAMPLES = """
  peft-vlm evaluate --protocol zero-shot --dataset examples/assets/icons --model examples/assets/clip_student \\
      --template "a {} icon" --output_dir outputs/zero_shot
  peft-vlm evaluate --protocol base-to-new --dataset examples/assets/icons \\
      --adapter outputs/demo/icons/skip_tuning/seed1 --output_dir outputs/base_to_new
  peft-vlm evaluate --protocol cross-dataset --data_root /data --dataset dtd eurosat \\
      --model openai/clip-vit-base-patch16 --output_dir outputs/zero_shot_of_two
  peft-vlm evaluate settings.yaml
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    add_command(
        commands,
        "evaluate",
        run,
        summary="zero-shot, few-shot, base-to-new, cross-dataset or domain-shift accuracy of a model or adapter",
        description="Writes report.json, scores.png, and of each part a confusion matrix and a reliability diagram.",
        examples=EXAMPLES,
        settings=EvaluationArguments,
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate by flags, or by one YAML or JSON file."""
    settings = read_settings(arguments, EvaluationArguments)
    settings.check()
    from peft_vlm.evaluation.report import EvalReport
    from peft_vlm.evaluation.run import run_evaluation
    from peft_vlm.files import BASELINE_NAME
    from peft_vlm.hub.card import write_card

    with calm():
        report = run_evaluation(settings)
    folder = Path(settings.output_dir)
    if settings.adapter and Path(settings.adapter).resolve() == folder.resolve():
        write_card(folder)
    if arguments.json:
        print_json(asdict(report))
        return
    scores = dict(report.scores)
    if settings.baseline:
        zero_shot = EvalReport.load(folder / BASELINE_NAME).scores
        scores |= {f"zero_shot_{name}": score for name, score in zero_shot.items()}
    for name, score in scores.items():
        print_line(f"{name:24}{score:7.2f} %")
    print_line(f"Written to {settings.output_dir}")
