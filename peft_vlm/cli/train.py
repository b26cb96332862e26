"""`peft-vlm train`: an adapter of any method on a dataset."""

import argparse
import ast
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, as_flags, print_json, print_line, read_settings
from peft_vlm.cli.console import calm
from peft_vlm.errors import PeftVLMError
from peft_vlm.settings import RunSettings

#: What other programs call a flag, beside spellings that are close to one.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "device": "use_cpu",
    "workers": "dataloader_num_workers",
    "num_workers": "dataloader_num_workers",
}

EXAMPLES = """
  peft-vlm train --method skip_tuning --model examples/assets/clip_student --dataset examples/assets/icons \\
      --template "a {} icon" --shots 4 --max_steps 60 --output_dir outputs/icons
  peft-vlm train --method promptsrc --preset base_to_new --protocol base_to_new \\
      --model openai/clip-vit-base-patch16 --dataset my_images/ --output_dir outputs/promptsrc
  peft-vlm train settings.yaml --seed 2 --output_dir outputs/seed2

settings.yaml has the same names (flags after the file replace its values):
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
Hub id; with --data_root DIR, the name of a published benchmark, such as dtd. Settings have three homes: --config
rebuilds the adapter, --objective is for the loss (both: see the page of the method), and every field of transformers'
TrainingArguments is a flag of its own."""


def register(commands: Any) -> None:
    """Add the command to the program."""
    add_command(
        commands,
        "train",
        run,
        summary="an adapter of any method on a dataset",
        description=DESCRIPTION,
        examples=EXAMPLES,
        settings=RunSettings,
        takes_more=True,
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
    if arguments.dry_run:
        arguments.more = [*arguments.more, "--output_dir", "nothing is written"]
    if not _is_given(arguments.more, "output_dir"):
        raise PeftVLMError("Expected `output_dir`, the folder of the adapter, got none.")
    settings = read_settings(arguments, RunSettings)
    settings.check()
    if settings.seeds and _is_given(arguments.more, "seed"):
        raise PeftVLMError("Expected `seed` or `seeds`, got both. Leave one out.")
    check_training_flags(arguments.more)
    from peft_vlm.experiments.run import run_training

    words = arguments.more
    # transformers would switch progress off, since the program keeps its remarks quiet; --json is for scripts
    training_arguments = arguments_maker(
        words,
        {"disable_tqdm": arguments.json or arguments.quiet},
        usage="peft-vlm train [FILE.yaml]",
        has_preset=settings.preset is not None,
    )
    args = training_arguments({})  # wrong values are found before anything is loaded
    if settings.dry_run:
        from peft_vlm.experiments.dry_run import dry_run

        with calm():
            counted = dry_run(settings, training_arguments)
        if arguments.json:
            print_json(counted.to_dict())
            return
        for line in str(counted).splitlines():
            print_line(line)
        return
    if settings.seeds:
        _train_with_seeds(settings, args.output_dir, training_arguments, as_json=arguments.json)
        return
    with calm():
        scores = run_training(settings, training_arguments)
    if args.process_index:  # one of several processes says what has become of the run, after the evaluation
        return
    if arguments.json:
        print_json({"adapter": args.output_dir, "scores": scores})
        return
    for name, score in scores.items():
        print_line(f"{name:24}{score:7.2f} %")
    print_line(f"Written to {args.output_dir}. Use it:  peft-vlm predict {args.output_dir!r} photo.png")


def arguments_maker(
    words: Sequence[str], defaults: dict[str, Any], *, usage: str, has_preset: bool
) -> Callable[..., Any]:
    """A function that makes `VLMTrainingArguments` of recommended settings, flags, and further words, in this order.

    Args:
        words: Flags of the command line.
        defaults: Settings that recommended ones replace.
        usage: Beginning of the command, for messages.
        has_preset: Whether an official configuration was asked for, whose warm-up stays whatever the length.
    """
    from transformers import HfArgumentParser

    from peft_vlm.training.arguments import VLMTrainingArguments

    parser = HfArgumentParser(VLMTrainingArguments, prog=" ".join(usage.split()[:2]))
    parser.usage = f"{usage} [--flag value ...]   (all flags: --help)"

    def training_arguments(recommended: dict[str, Any], more: Sequence[str] = ()) -> VLMTrainingArguments:
        values = defaults | {k: json.dumps(v) if isinstance(v, dict) else v for k, v in recommended.items()}
        if not has_preset and _is_given(words, "max_steps", "num_train_epochs"):
            values = {name: value for name, value in values.items() if not name.startswith("warmup_")}
        return parser.parse_args_into_dataclasses([*as_flags(values), *words, *more], look_for_args_file=False)[0]

    return training_arguments


def _train_with_seeds(
    settings: RunSettings, folder: str, training_arguments: Callable[..., Any], *, as_json: bool
) -> None:
    """Train once per seed; print and write mean and spread."""
    from peft_vlm.evaluation.report import summarize
    from peft_vlm.experiments.run import run_training
    from peft_vlm.files import write_json

    runs: dict[int, dict[str, float]] = {}
    for seed in settings.seeds:
        place = [f"--seed={seed}", f"--output_dir={Path(folder) / f'seed{seed}'}"]
        if not as_json:
            print(f"Seed {seed}", file=sys.stderr)
        with calm():
            runs[seed] = run_training(settings, lambda given, place=place: training_arguments(given, place))
    if not all(runs.values()):  # another process than the first, or nothing was evaluated
        return
    summary = summarize(list(runs.values()))
    result = {"seeds": {str(seed): scores for seed, scores in runs.items()}, "mean": summary.mean, "std": summary.std}
    write_json(Path(folder) / "seeds.json", result)
    if as_json:
        print_json({"adapter": folder, "scores": summary.mean, **result})
        return
    for name, mean in summary.mean.items():
        spread = summary.std[name]
        print(f"{name:24}{mean:7.2f} %" + ("" if spread is None else f" +- {spread:.2f} over {len(runs)} seeds"))
    print(f"Written to {folder}, an adapter per seed.")


def _is_given(words: Sequence[str], *names: str) -> bool:
    """True if one of some flags is among the words, in either spelling."""
    return any(word.partition("=")[0].removeprefix("--").replace("-", "_") in names for word in words)


def check_training_flags(words: Sequence[str]) -> None:
    """Refuse a misspelt flag before anything is loaded.

    Args:
        words: Flags of `VLMTrainingArguments` with their values.

    Raises:
        PeftVLMError: Naming the one that was meant.
    """
    known = training_settings()
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            continue
        if flag in _OTHER_NAMES or not any(name.startswith((flag, flag.removeprefix("no_"))) for name in known):
            close = [_OTHER_NAMES[flag]] if flag in _OTHER_NAMES else difflib.get_close_matches(flag, known, n=3)
            advice = f" Did you mean {' or '.join(f'--{name}' for name in close)}?" if close else ""
            raise PeftVLMError(f"There is no flag --{flag}.{advice} All flags: peft-vlm train --help.")


def training_settings(kind: str = "") -> list[str]:
    """Fields of `VLMTrainingArguments`, read off the files of its classes, which takes no import.

    Args:
        kind: Part of the annotation of those that are wanted, such as `"bool"`; all by default.
    """
    return [name for name, annotation in _training_fields() if kind in annotation]


@cache
def _training_fields() -> tuple[tuple[str, str], ...]:
    """Names and annotations, read once: a command asks several times."""
    files = (Path(__file__).parent.parent / "training" / "arguments.py", _file_of("transformers", "training_args.py"))
    classes = [node for file in files for node in ast.parse(file.read_text("utf-8")).body]
    lines = [node for found in classes if isinstance(found, ast.ClassDef) for node in found.body]
    fields = [(node.target, node.annotation) for node in lines if isinstance(node, ast.AnnAssign)]
    return tuple((name.id, ast.unparse(annotation)) for name, annotation in fields if isinstance(name, ast.Name))


def _file_of(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported for that."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise PeftVLMError(f"Expected {package!r} to be installed.")
    return Path(spec.origin).parent / name
