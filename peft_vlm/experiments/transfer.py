"""Train a pixel prompt on one or some image-text models, several ways and seeds, and measure it on all of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from peft_vlm.adapters.pixel_prompt import remove_prompts, show_prompted
from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.distributed import is_main_process, progress_bar, wait_for_everyone
from peft_vlm.errors import DataError
from peft_vlm.evaluation.mllm import PromptEffect, Score, evaluate_prompt, likelihood_accuracy
from peft_vlm.evaluation.transfer import (
    TransferReport,
    comparison_table,
    prompt_png,
    transfer_png,
    transfer_table,
)
from peft_vlm.files import TRANSFER_NAME, write_json
from peft_vlm.hub.card import write_card
from peft_vlm.models.sharding import has_sharded_layers
from peft_vlm.models.towers import device_of, is_placed
from peft_vlm.objective import Objective
from peft_vlm.serving.escape import markdown
from peft_vlm.text.answers import Candidates
from peft_vlm.training import VLMTrainer, VLMTrainingArguments

#: Training images that `prompted_images.png` shows, with and without the prompt.
SHOWN_IMAGES = 8


@dataclass(frozen=True)
class ImageTextModel:
    """A multimodal model with its processor and collator.

    Args:
        name: Name in the reports.
        model: The base model; prompts are put on it and taken off again.
        collator: Makes its inputs; holds its processor.
        training_collator: Makes the inputs of training where they have more columns, such as those of TSE's CLIP;
            None: `collator`.
    """

    name: str
    model: nn.Module
    collator: QuestionCollator
    training_collator: QuestionCollator | None = None

    @classmethod
    def load(cls, name_or_path: str, *, clip_processor: Any = None, **options: Any) -> "ImageTextModel":
        """Load a model folder or Hub id.

        Args:
            name_or_path: Folder or Hub id of an image-text-to-text model with its processor.
            clip_processor: Image processor of the CLIP of TSE, for models that a prompt is trained on.
            **options: Passed to `from_pretrained` of the model, such as `dtype` or `quantization_config`; `device_map`
                may be the JSON text of a map.

        Raises:
            ValueError: If that text is no JSON.
        """
        if str(options.get("device_map", "")).startswith("{"):
            options["device_map"] = _places(options["device_map"])
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, **options)
        processor = AutoProcessor.from_pretrained(name_or_path)
        training = None if clip_processor is None else QuestionCollator(processor, clip_processor=clip_processor)
        return cls(Path(name_or_path).name, model, QuestionCollator(processor), training)


def _places(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected `device_map` to be 'auto' or JSON of parts and their places, got {text!r}."
        ) from error


@dataclass(frozen=True)
class Variant:
    """One way to train the prompt.

    Args:
        name: Name in the reports.
        objective: Settings of the objective that differ from the experiment's.
        sources: Names of the models that the prompt is trained on; the first is the one the trainer is given.
    """

    name: str
    objective: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


#: Makes the objective of a variant for training questions, their candidate answers, and further source models.
MakeObjective = Callable[[Variant, ImageQuestionDataset, Candidates, Sequence[ImageTextModel]], Objective]


class TransferExperiment:
    """Variants x seeds: train, save the adapter, load it onto every model, measure.

    Args:
        models: All models; what a prompt is trained on is said by the variants.
        train: Gives the training questions of a seed, without a collator.
        test: Test questions, without a collator.
        output_dir: Folder of the adapters and reports.
        wrap: Puts a new adapter on a model.
        objective: Makes the objective of a variant.
        training: Settings of `VLMTrainingArguments`.
        include_end: Count the end token of an answer, for class names of which one is the beginning of another.
        score: Function that scores answers, in percent.
        task: Data and question, for the reports.

    Raises:
        DataError: If two models have one name.
    """

    def __init__(
        self,
        models: Sequence[ImageTextModel],
        *,
        train: Callable[[int], ImageQuestionDataset],
        test: ImageQuestionDataset,
        output_dir: Path,
        wrap: Callable[[ImageTextModel], nn.Module],
        objective: MakeObjective,
        training: Mapping[str, Any] | None = None,
        include_end: bool = False,
        score: Score | None = None,
        task: str = "",
    ) -> None:
        self.models = {member.name: member for member in models}
        if len(self.models) < len(models):
            raise DataError(f"Expected models with different names, got {[member.name for member in models]!r}.")
        self.train, self.test, self.output_dir = train, test, output_dir
        self.wrap, self.objective = wrap, objective
        self.training, self.task, self.include_end = dict(training or {}), task, include_end
        self.score: Score = score or (lambda m, d: likelihood_accuracy(m, d, include_end=include_end))
        self._baselines: dict[str, PromptEffect] = {}
        self._device: torch.device | None = None

    def run(self, variants: Sequence[Variant], seeds: Sequence[int]) -> dict[str, list[TransferReport]]:
        """Train and measure everything.

        Args:
            variants: Ways to train; one without sources uses the first model.
            seeds: Seeds of shots and order.

        Returns:
            Reports by variant, one per seed; empty lists on all but the main process.
        """
        reports: dict[str, list[TransferReport]] = {variant.name: [] for variant in variants}
        main = is_main_process()
        jobs = [(variant, seed) for seed in seeds for variant in variants]
        for variant, seed in progress_bar(jobs, desc="prompts", unit="run"):
            folder = self.output_dir / variant.name / f"seed{seed}"
            settings = self.fit(variant, seed, folder)
            # Layers that are divided among the processes run on all of them together.
            if main or any(has_sharded_layers(member.model) for member in self.models.values()):
                report = self.measure(variant, seed, folder, settings)
                if main:
                    report.save(folder / TRANSFER_NAME)
                    write_card(folder)
                    reports[variant.name].append(report)
            wait_for_everyone()
        return reports

    def fit(self, variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
        """Train one prompt and save it.

        Args:
            variant: How.
            seed: Seed of shots and order.
            folder: Output folder of the adapter and its reports.

        Returns:
            The objective's settings.
        """
        first, *others = self._sources(variant)
        questions = self.train(seed).with_collator(first.training_collator or first.collator)
        candidates = first.collator.candidates(questions.class_names, include_end=self.include_end)
        objective = self.objective(variant, questions, candidates, others)
        homes = [(member.model, device_of(member.model)) for member in (first, *others)]
        model: Any = self.wrap(first)
        args = VLMTrainingArguments(
            output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **self.training
        )
        trainer = VLMTrainer(model, args, train_dataset=questions, objective=objective)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if is_main_process():
            prompt_png(model, folder / "prompt.png")
            shown = [questions.image(index) for index in range(0, len(questions), -(-len(questions) // SHOWN_IMAGES))]
            show_prompted(model, shown).save(folder / "prompted_images.png")
        model.unload()
        for base, home in homes:
            remove_prompts(base)
            _move(base, home)
        self._device = args.device
        return objective.config_dict()

    def measure(self, variant: Variant, seed: int, folder: Path, settings: Mapping[str, Any]) -> TransferReport:
        """Load a saved prompt onto every model and measure it; the baselines are measured once.

        Models are measured where the prompt was trained, one after the other, and go back to where they were.

        Args:
            variant: The variant that was trained.
            seed: Seed of the training.
            folder: The adapter.
            settings: The objective's settings.
        """
        effects = {}
        for name, member in self.models.items():
            questions = self.test.with_collator(member.collator)
            home = device_of(member.model)
            _move(member.model, self._device or home)
            model = _with_adapter(member.model, folder).eval()
            if name not in self._baselines:
                effects[name] = self._baselines[name] = evaluate_prompt(model, questions, score=self.score)
            else:
                known = self._baselines[name]
                effects[name] = PromptEffect(known.full_size, known.shrunken, self.score(model, questions))
            model.unload()
            _move(member.model, home)
        sources = tuple(member.name for member in self._sources(variant))
        run = {**settings, "training": self.training}
        return TransferReport(self.task, sources, effects, seed=seed, settings=run)

    def _sources(self, variant: Variant) -> list[ImageTextModel]:
        names = variant.sources or (next(iter(self.models)),)
        unknown = [name for name in names if name not in self.models]
        if unknown:
            raise DataError(f"Expected sources out of {sorted(self.models)!r}, got {unknown!r}.")
        return [self.models[name] for name in names]


def write_transfer_results(variants: Mapping[str, Sequence[TransferReport]], folder: Path) -> str:
    """Write `metrics.json`, `table.md` and `results.png` of an experiment, from the main process.

    Args:
        variants: Result of `TransferExperiment.run`.
        folder: Output folder.

    Returns:
        The tables as Markdown.
    """
    first = next(iter(variants.values()))
    metrics = {
        "task": first[0].task,
        "seeds": [report.seed for report in first],
        "versions": first[0].versions,
        "variants": {name: _columns(reports) for name, reports in variants.items()},
    }
    parts = [f"### {markdown(name)}\n\n{transfer_table(reports)}" for name, reports in variants.items()]
    if len(variants) > 1 and all(report.unseen for reports in variants.values() for report in reports):
        parts.append(f"### comparison\n\n{comparison_table(variants)}")
    if not is_main_process():
        return "\n\n".join(parts)
    write_json(folder / "metrics.json", metrics)
    (folder / "table.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    for name, reports in variants.items():
        transfer_png(reports, folder / f"results_{name}.png", title=f"{first[0].task}: {name}")
    return "\n\n".join(parts)


def _columns(reports: Sequence[TransferReport]) -> dict[str, Any]:
    """Per model and condition a list over seeds, with the gains on unseen models."""
    first = reports[0]
    return {
        "sources": list(first.sources),
        "settings": first.settings,
        "models": {
            name: {key: [asdict(r.effects[name])[key] for r in reports] for key in asdict(first.effects[name])}
            for name in first.effects
        },
        "unseen_gain": [report.mean_gain() for report in reports],
        "unseen_gain_over_full_size": [report.mean_gain(over="full_size") for report in reports],
    }


def _with_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put a saved adapter on a model; `from_pretrained` takes accelerate's hooks off one with parts in memory."""
    if not is_placed(model):
        return PeftModel.from_pretrained(model, folder)
    wrapped: Any = get_peft_model(model, PeftConfig.from_pretrained(folder))
    set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
    return wrapped


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model, unless it is there, divided or placed: quantised ones may refuse to be moved at all."""
    if device_of(model) != device and not has_sharded_layers(model) and not is_placed(model):
        model.to(device)
        torch.cuda.empty_cache()  # does nothing without a GPU
