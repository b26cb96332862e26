"""The adapters of model_cards/: trained by the examples, evaluated beside their base model, and given their cards.

Run in the repository's root (2 CPU cores, about 15 minutes), so that the paths on the cards are those of a clone.
    python examples/make_model_cards.py                        # all
    python examples/make_model_cards.py skip-tuning-emoji      # one
    python examples/make_model_cards.py my-adapter --adapter outputs/my_run --dataset examples/assets/emoji \
        --protocol few-shot --shots 16 --seed 1  # a finished run; --dataset if it has no report
Every folder is what `peft_vlm.publish` would upload; `tests/test_model_cards.py` measures each again.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peft_vlm import files
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from peft_vlm.hub import AdapterFolder, write_folder

ASSETS = "examples/assets"
TARGET = Path("model_cards")
LICENSE = "apache-2.0"
NOTE = (
    "Bundled with the peft_vlm repository, as are base model and data: paths are those in a clone. Authors and "
    "licences of the images are in its `NOTICE`."
)
SHOTS, SEED = 16, 1


@dataclass(frozen=True)
class Recipe:
    """How a published adapter is made.

    Args:
        script: Example that trains it, with its arguments.
        run: Folder of the adapter below the example's output.
        dataset: Bundled test set; None where the example measures the adapter itself (`transfer.json`).
        protocol: How it is evaluated.
        dtype: Data type of the published weights, which are those evaluated.
    """

    script: tuple[str, ...]
    run: str
    dataset: str | None = None
    protocol: str = ""
    dtype: str | None = None


ICONS = f"{ASSETS}/icons"
MULTIMODAL = ("--models", *(f"{ASSETS}/mllm_{family}" for family in ("llava", "idefics3", "paligemma")))
STUDENT = ("--model", f"{ASSETS}/clip_student")
RECIPES = {
    "skip-tuning-emoji": Recipe(
        ("train_skip_tuning.py", *STUDENT, "--dataset", f"{ASSETS}/emoji", "--protocol", "few_shot")
        + ("--template", "{} emoji", "--methods", "skip_tuning"),
        "emoji/skip_tuning",
        f"{ASSETS}/emoji",
        "few-shot",
        dtype="float16",
    ),
    "skip-tuning-icons": Recipe(
        ("train_skip_tuning.py", *STUDENT, "--dataset", ICONS, "--methods", "skip_tuning"),
        *("icons/skip_tuning", ICONS, "base-to-new"),
        dtype="float16",
    ),
    "promptsrc-icons": Recipe(
        ("train_promptsrc.py", *STUDENT, "--dataset", ICONS, "--methods", "promptsrc"),
        *("icons/promptsrc", ICONS, "base-to-new"),
    ),
    "promptkd-icons": Recipe(
        ("train_promptkd.py", *STUDENT, "--teacher", f"{ASSETS}/clip_teacher", "--dataset", ICONS),
        *("icons/student_promptkd", ICONS, "base-to-new"),
    ),
    "coop-emoji": Recipe(
        ("train_coop.py", *STUDENT, "--dataset", f"{ASSETS}/emoji"), "emoji/coop", f"{ASSETS}/emoji", "few-shot"
    ),
    "tvp-lamplight": Recipe(("train_tvp.py", *MULTIMODAL, "--variants", "tvp", "--shots", "32"), "tvp"),
}
RECIPES |= {
    f"rpp-{clip}": Recipe(("train_rpp.py", "--model", f"{ASSETS}/clip_{clip}"), "pretrained", ICONS, "zero-shot")
    for clip in ("student", "teacher")
}


def train(name: str, recipe: Recipe) -> Path:
    """Run the example with one seed; the folder of its adapter."""
    output = Path("outputs/model_cards") / name
    script, *arguments = recipe.script
    flags = ["--shots", str(SHOTS), "--seeds", str(SEED), "--use_cpu", "--output_dir", str(output)]
    subprocess.run([sys.executable, f"examples/{script}", *flags, *arguments], check=True)
    return output / recipe.run / ("" if recipe.protocol == "zero-shot" else f"seed{SEED}")


def collect(source: Path, target: Path, dtype: str | None) -> None:
    """Copy an adapter and the reports of its run; weights in another data type if asked for, paths as in a clone."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name in vars(files).values() and path.name != files.CARD_NAME:
            shutil.copyfile(path, target / path.name)
    for path in target.glob("*.json"):
        path.write_text(re.sub(r'"[^"]*/(?=examples/assets/)', '"', path.read_text("utf-8")), "utf-8")
    if dtype is not None:
        halved = {key: t.to(getattr(torch, dtype)) for key, t in load_file(target / files.WEIGHTS_NAME).items()}
        save_file(halved, target / files.WEIGHTS_NAME, metadata={"format": "pt"})
        config = AdapterFolder.read(target).config
        config.adapter_dtype = dtype
        config.save_pretrained(str(target))


def evaluate(target: Path, dataset: str, protocol: str, *, shots: int | None, seed: int | None) -> None:
    """Evaluate adapter and base model on the test split; the reports go into the adapter's folder."""
    settings = EvaluationArguments(protocol=protocol, dataset=[dataset], output_dir=str(target), adapter=str(target))
    settings.baseline, settings.plots, settings.shots, settings.seed = True, False, shots, seed
    run_evaluation(settings)


def main() -> None:
    """Make the folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"folders of model_cards; by default {', '.join(RECIPES)}")
    parser.add_argument("--adapter", type=Path, help="folder of a finished run; one name then says where it goes")
    parser.add_argument("--dataset", help="with --adapter: test set; none if the run has its transfer.json")
    parser.add_argument("--protocol", default="few-shot", help="with --dataset")
    parser.add_argument("--shots", type=int, help="with --adapter: labelled images per class, for the card")
    parser.add_argument("--seed", type=int, help="with --adapter: seed of the run, for the card")
    parser.add_argument("--note", default="", help="further sentences of the card")
    args = parser.parse_args()
    for name in args.names or RECIPES:
        target = TARGET / name
        recipe = None if args.adapter else RECIPES[name]
        collect(args.adapter or train(name, recipe), target, recipe and recipe.dtype)
        if recipe is not None and recipe.dataset is not None:
            shots, seed = (None, None) if recipe.protocol == "zero-shot" else (SHOTS, SEED)
            evaluate(target, recipe.dataset, recipe.protocol, shots=shots, seed=seed)
        elif args.dataset is not None:
            evaluate(target, args.dataset, args.protocol, shots=args.shots, seed=args.seed)
        note = f"{NOTE} {args.note}".strip()
        write_folder(AdapterFolder.read(target), target, repo_id=str(target), license=LICENSE, title=name, note=note)
        print(f"Written to {target}")


if __name__ == "__main__":
    main()
