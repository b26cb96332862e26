"""`peft-vlm train`: an adapter of any method on a data set."""

import argparse
from typing import Any

from peft_vlm.cli.command import add_command, print_json, read_settings
from peft_vlm.errors import PeftVLMError
from peft_vlm.experiments.run import RunSettings, preset_of, run_training
from peft_vlm.training.arguments import VLMTrainingArguments

EXAMPLES = """
  peft-vlm train --method skip_tuning --model examples/assets/clip_student --dataset examples/assets/icons \\
      --template "a {} icon" --shots 4 --config start_layer=3 text_start_layer=2 \\
      --objective batch_composition=random --max_steps 60 --learning_rate 0.02 \\
      --per_device_train_batch_size 32 --output_dir outputs/icons
  peft-vlm train --method promptsrc --preset base_to_new --protocol base_to_new \\
      --model openai/clip-vit-base-patch16 --dataset my_images/ --output_dir outputs/promptsrc
  peft-vlm train settings.yaml --seed 2 --output_dir outputs/seed2

settings.yaml has the same names (flags behind the file replace its values):
  method: promptkd
  model: examples/assets/clip_student
  teacher: examples/assets/clip_teacher
  dataset: examples/assets/icons
  template: a {} icon
  transductive: true
  config: {vision_depth: 4, projector_depth: 1}
  objective: {weight: 10}
  learning_rate: 0.01
  max_steps: 100
  output_dir: outputs/student
"""
DESCRIPTION = """\
Writes the adapter, training_summary.json, metrics.json and, after classifying the test split, report.json.

A dataset is a folder with train/<class>/*.png and test/<class>/*.png, a CSV file with image, label and split, or a
Hub id. Settings have three homes: --config is what rebuilds the adapter, --objective what the loss needs (both: see
the page of the method), and every field of transformers' TrainingArguments is a flag of its own."""

#: What `TrainingArguments` puts in the place of no folder.
NO_FOLDER = "trainer_output"


def register(commands: Any) -> None:
    """Add the command to the program.

    Args:
        commands: What `add_subparsers` gave.
    """
    add_command(
        commands,
        "train",
        run,
        summary="an adapter of any method on a data set",
        description=DESCRIPTION,
        examples=EXAMPLES,
        settings=[RunSettings],
        more="\n  and every field of VLMTrainingArguments, most of all --output_dir (required), --learning_rate,\n"
        "  --num_train_epochs, --max_steps, --per_device_train_batch_size, --warmup_epochs, --seed, --use_cpu,\n"
        "  --resume_from_checkpoint",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, save and measure.

    Args:
        arguments: Parsed words.

    Raises:
        PeftVLMError: If no folder is given.
    """
    # transformers would switch progress off, since the program keeps its remarks quiet; --json is for scripts
    defaults = {"disable_tqdm": arguments.json}
    settings, args = read_settings(arguments, RunSettings, VLMTrainingArguments, defaults=defaults)
    preset = preset_of(settings)
    if preset.training:
        defaults |= preset.training
        settings, args = read_settings(arguments, RunSettings, VLMTrainingArguments, defaults=defaults)
    if args.output_dir == NO_FOLDER:
        raise PeftVLMError("Expected `--output_dir`, the folder of the adapter, got none.")
    scores = run_training(settings, args)
    if arguments.json:
        print_json({"adapter": args.output_dir, "scores": scores})
        return
    for name, score in scores.items():
        print(f"{name:24}{score:7.2f} %")
    print(f"Written to {args.output_dir}. Use it:  peft-vlm predict {args.output_dir!r} picture.png")
