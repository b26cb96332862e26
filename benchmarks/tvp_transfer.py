"""What makes a pixel prompt transfer, and how far: on the bundled multimodal models, colours under warm light.

    python benchmarks/tvp_transfer.py                                  # all parts, one seed, one JSON file per part
    python benchmarks/tvp_transfer.py --parts shapes --seeds 1 2 3
    python benchmarks/tvp_transfer.py --json                           # and one JSON object as the last line

Parts: `shapes` and `sources` train prompts of other shapes and on other models; `corruptions` damages the test images
of a prompt; `sizes` trains on fewer images; `domains` puts one prompt on images and questions that it was not trained
for. Everything starts from the demo preset of examples/train_tvp.py with both extra losses off (`visual_prompting`).
Results are accuracies in percent, on the same test images.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_vlm.data import ImageQuestionDataset, load_image_dataset
from peft_vlm.evaluation.mllm import (
    PromptEffect,
    corruption_robustness,
    data_scale_curve,
    evaluate_prompt,
    mean_effect,
)
from peft_vlm.evaluation.plots import lines_png
from peft_vlm.evaluation.transfer import comparison_table, effect_curves
from peft_vlm.experiments.transfer import TransferExperiment, Variant
from peft_vlm.files import write_json

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from train_tvp import PRESETS, VARIANTS, experiment_of, parse_arguments  # noqa: E402
from tvp_domains import DOMAINS, LIGHTS, inked_icons, load_domain, named_icons  # noqa: E402

_OVER = {"shape": "full", "border": 0, "shrink": "none"}
#: Name -> (settings of the prompt, learning rate): about 0.08 per step and canvas pixel, twice that on borders.
SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    "over the image, canvas 2 (demo)": ({**_OVER, "canvas_size": 2}, 0.3),
    "over the image, canvas 8": ({**_OVER, "canvas_size": 8}, 1.0),
    "over the image, canvas 224": (_OVER, 30.0),
    "around and over the shrunken image, canvas 8": ({"shape": "full", "canvas_size": 8, "border": 1}, 1.0),
    "border, canvas 8": ({"canvas_size": 8, "border": 1}, 2.0),
    "border, canvas 224 (official)": ({}, 60.0),
}
SOURCES: dict[str, tuple[str, ...]] = {
    "llava": ("mllm_llava",),
    "idefics3": ("mllm_idefics3",),
    "paligemma": ("mllm_paligemma",),
    "llava + idefics3": ("mllm_llava", "mllm_idefics3"),
    "llava + paligemma": ("mllm_llava", "mllm_paligemma"),
    "idefics3 + paligemma": ("mllm_idefics3", "mllm_paligemma"),
}
SIZES = (11, 33, 110, 330)
LEVELS = (1, 3, 5)
KINDS = ("gaussian_noise", "defocus_blur", "contrast", "jpeg", "pixelate")


class Bench:
    """Models and data of the demo, and the output folder.

    Args:
        output: Folder of the results.
        seeds: Seeds of every training.
        images: Test images.
    """

    def __init__(self, output: Path, seeds: list[int], images: int) -> None:
        self.output, self.seeds = output, seeds
        self.arguments = parse_arguments(["--test_images", str(images), "--use_cpu"])

    def experiment(self, name: str, prompt: dict[str, Any], rate: float | None = None) -> TransferExperiment:
        """The demo's experiment with another prompt."""
        preset = PRESETS["demo"]
        training = {**preset["training"], "use_cpu": True, "warmup_epochs": 0}
        training |= {} if rate is None else {"learning_rate": rate}
        self.arguments.output_dir = self.output / name
        return experiment_of(self.arguments, {**preset, "prompt": prompt}, training)

    def train(self, experiment: TransferExperiment, seed: int, sources: tuple[str, ...] = ()) -> Path:
        """A prompt without the extra losses; its folder."""
        folder = experiment.output_dir / f"seed{seed}"
        experiment.fit(Variant("visual_prompting", VARIANTS["visual_prompting"], sources), seed, folder)
        return folder

    def on_all(
        self, experiment: TransferExperiment, folder: Path, measure: Callable[[PeftModel, Any], Any]
    ) -> dict[str, Any]:
        """Results of `measure` for the prompt on every model, with the model's collator."""
        results = {}
        for name, member in experiment.models.items():
            model = PeftModel.from_pretrained(member.model, folder).eval()
            results[name] = measure(model, member.collator)
            model.unload()
        return results


def shapes(bench: Bench) -> dict[str, Any]:
    """Gains of prompts of other shapes and canvases."""
    reports = {}
    for name, (prompt, rate) in SHAPES.items():
        experiment = bench.experiment(f"shapes/{len(reports)}", prompt, rate)
        variant = Variant("visual_prompting", VARIANTS["visual_prompting"])
        reports[name] = experiment.run([variant], bench.seeds)[variant.name]
    print(comparison_table(reports))
    return {name: [report.scores() for report in runs] for name, runs in reports.items()}


def sources(bench: Bench) -> dict[str, Any]:
    """Gains of prompts trained on one or two models, on models they did not see."""
    experiment = bench.experiment("sources", PRESETS["demo"]["prompt"])
    variants = [Variant(name, VARIANTS["visual_prompting"], models) for name, models in SOURCES.items()]
    reports = experiment.run(variants, bench.seeds)
    print(comparison_table(reports))
    return {name: [report.scores() for report in runs] for name, runs in reports.items()}


def corruptions(bench: Bench) -> dict[str, Any]:
    """The three conditions on damaged images, per model and level, mean over kinds of damage and seeds."""
    experiment = bench.experiment("corruptions", PRESETS["demo"]["prompt"])
    runs: list[dict[str, dict[str, dict[int, PromptEffect]]]] = []
    for seed in bench.seeds:
        folder = bench.train(experiment, seed)

        def damaged(model: PeftModel, collator: Any) -> dict[str, dict[int, PromptEffect]]:
            questions = experiment.test.with_collator(collator)
            return corruption_robustness(model, questions, kinds=KINDS, levels=LEVELS, score=experiment.score)

        runs.append(bench.on_all(experiment, folder, damaged))
    curves = {
        name: {level: mean_effect([run[name][kind][level] for run in runs for kind in KINDS]) for level in LEVELS}
        for name in experiment.models
    }
    for name, curve in curves.items():
        path = bench.output / f"corruptions_{name}.png"
        lines_png(effect_curves(curve), path, x_label="level of damage", title=f"{name}, mean over damages")
    return {"runs": [_plain(run) for run in runs], "mean": _plain(curves)}


def sizes(bench: Bench) -> dict[str, Any]:
    """The three conditions per model by the number of training images; as many are seen in all for each number."""
    experiment = bench.experiment("sizes", PRESETS["demo"]["prompt"])
    steps = PRESETS["demo"]["training"]["num_train_epochs"] * max(SIZES)
    runs = []
    for seed in bench.seeds:
        whole = experiment.train(seed)

        def fit(questions: ImageQuestionDataset, seed: int = seed) -> dict[str, PromptEffect]:
            experiment.train = lambda seed: questions
            experiment.training["num_train_epochs"] = round(steps / len(questions))
            folder = bench.train(experiment, seed)
            return experiment.measure(Variant("visual_prompting"), seed, folder, {}).effects

        runs.append(data_scale_curve(fit, whole, SIZES, seed=seed))
    curves = {
        name: {size: mean_effect([run[size][name] for run in runs]) for size in SIZES} for name in runs[0][SIZES[0]]
    }
    for name, curve in curves.items():
        path = bench.output / f"sizes_{name}.png"
        lines_png(effect_curves(curve), path, x_label="training images", title=name, logarithmic=True)
    return {"runs": [_plain(run) for run in runs], "mean": _plain(curves)}


def domains(bench: Bench) -> dict[str, Any]:
    """The three conditions of the prompt for warm light under other lights, for another question, and on photos."""
    experiment = bench.experiment("domains", PRESETS["demo"]["prompt"])
    tests = {f"colour, {light}": _questions(inked_icons("test", LIGHTS[light]), "lamplight") for light in LIGHTS}
    tests["name, warm_light"] = _questions(named_icons("test", LIGHTS["warm_light"]), "fashion")
    tests["fashion"] = ImageQuestionDataset.from_images(
        load_domain("fashion", split="test"), question=DOMAINS["fashion"]
    )
    count = len(experiment.test)
    runs = []
    for seed in bench.seeds:
        folder = bench.train(experiment, seed)

        def elsewhere(model: PeftModel, collator: Any) -> dict[str, PromptEffect]:
            return {
                name: evaluate_prompt(model, _spread(questions, count).with_collator(collator), score=experiment.score)
                for name, questions in tests.items()
            }

        runs.append(bench.on_all(experiment, folder, elsewhere))
    mean = {model: {test: mean_effect([run[model][test] for run in runs]) for test in tests} for model in runs[0]}
    return {"runs": [_plain(run) for run in runs], "mean": _plain(mean)}


def _questions(data: Any, domain: str) -> ImageQuestionDataset:
    return ImageQuestionDataset.from_images(load_image_dataset(data), question=DOMAINS[domain])


def _spread(questions: ImageQuestionDataset, count: int) -> ImageQuestionDataset:
    """At most `count` questions, evenly over the whole set."""
    step = max(1, len(questions) // count)
    return questions.select(range(0, len(questions), step)[:count])


def _plain(results: Any) -> Any:
    """Nested effects as JSON values."""
    if isinstance(results, PromptEffect):
        return asdict(results)
    return {str(key): _plain(value) for key, value in results.items()}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "shapes": shapes,
    "sources": sources,
    "corruptions": corruptions,
    "sizes": sizes,
    "domains": domains,
}


def main() -> None:
    """Run the parts and write one JSON file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--images", type=int, default=220, help="test images")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tvp_transfer"))
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_args()
    bench = Bench(args.output_dir, args.seeds, args.images)
    results = {"seeds": args.seeds, "images": args.images}
    for part in args.parts:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        results[part] = PARTS[part](bench)
        write_json(args.output_dir / f"{part}.json", results[part])
    print(json.dumps(results) if args.json else f"Written to {args.output_dir}/: {', '.join(args.parts)}")


if __name__ == "__main__":
    main()
