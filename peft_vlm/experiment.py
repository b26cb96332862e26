"""Several methods, seeds and tasks in one run: train, evaluate, table, plot, `metrics.json`.

The harness knows no method by name. A `Learner` is given a fresh model, class prompts and the few-shot images, and
gives back something that classifies; time and memory are measured around its training alone, caching included.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, set_seed

from peft_vlm.baselines import LinearProbe, all_image_features
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.splits import base_and_new_classes, few_shot_indices
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.evaluation.classify import evaluate_classifier
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.objective import Objective
from peft_vlm.text.prompts import ClassPrompts, tokenize_classes
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.artifacts import write_json
from peft_vlm.training.memory import PeakMemory
from peft_vlm.training.trainer import VLMTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A dataset under a protocol.

    Args:
        name: Name in the report.
        protocol: `"base_to_new"`: train on the first half of the classes, test both halves with their own names.
            `"few_shot"`: train and test on all classes.
        train: Pool that the shots are drawn from.
        test: Test images; never seen in training.
        template: Text around a class name.
        shots: Images per class; classes with fewer give all they have.
    """

    name: str
    protocol: Literal["base_to_new", "few_shot"]
    train: ImageClassificationDataset
    test: ImageClassificationDataset
    template: str
    shots: int = 16


@dataclass(frozen=True)
class Split:
    """Training images of one seed, and the test sets by the name of their score."""

    train: ImageClassificationDataset
    tests: dict[str, ImageClassificationDataset]


@dataclass
class Fitted:
    """A trained classifier.

    Args:
        accuracy: Top-1 accuracy in percent on a dataset whose classes are given by prompts; None when it has no
            answer.
        trainable_parameters: How many numbers were trained.
    """

    accuracy: Callable[[ImageClassificationDataset, ClassPrompts], float | None]
    trainable_parameters: int


class Learner(Protocol):
    """One row of the table. `uses_seed` is False when every seed gives the same result."""

    name: str
    uses_seed: bool

    def fit(
        self, model: nn.Module, prompts: ClassPrompts, train: ImageClassificationDataset, *, seed: int, folder: Path
    ) -> Fitted:
        """Train on the images and return a classifier; everything between call and return is measured."""
        ...


def model_accuracy(model: nn.Module) -> Callable[[ImageClassificationDataset, ClassPrompts], float]:
    """Accuracy function of a CLIP-like model."""
    return lambda dataset, prompts: evaluate_classifier(model, dataset, prompts).accuracy


class ZeroShot:
    """The untouched model."""

    name = "zero_shot"
    uses_seed = False

    def fit(
        self, model: nn.Module, prompts: ClassPrompts, train: ImageClassificationDataset, *, seed: int, folder: Path
    ) -> Fitted:
        """Train nothing."""
        return Fitted(model_accuracy(model.eval()), 0)


class LinearProbeLearner:
    """Logistic regression on the frozen image features of the training images, without augmentation.

    Args:
        transform: Transform of evaluation.
    """

    name = "linear_probe"
    uses_seed = True

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def fit(
        self, model: nn.Module, prompts: ClassPrompts, train: ImageClassificationDataset, *, seed: int, folder: Path
    ) -> Fitted:
        """Extract features once and fit."""
        model.eval()
        features = all_image_features(model, train.with_transform(self.transform))
        probe = LinearProbe(features.shape[1], len(prompts.class_names))
        probe.fit(features.clone(), torch.tensor(train.labels))

        def accuracy(dataset: ImageClassificationDataset, names: ClassPrompts) -> float | None:
            if names.class_names != prompts.class_names:
                return None
            with torch.inference_mode():
                predicted = probe(all_image_features(model, dataset)).argmax(dim=-1)
            return 100.0 * (predicted == torch.tensor(dataset.labels)).float().mean().item()

        return Fitted(accuracy, sum(p.numel() for p in probe.parameters()))


@dataclass
class TrainerLearner:
    """Anything that `VLMTrainer` trains.

    Args:
        name: Name in the report.
        wrap: Makes the trainable model from a fresh base model, for example with `get_peft_model`.
        objective: Builds the objective from class prompts and a seed.
        training: Keyword arguments of `VLMTrainingArguments`.
    """

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    objective: Callable[[ClassPrompts, int], Objective]
    training: dict[str, Any] = field(default_factory=dict)
    uses_seed: bool = True

    def fit(
        self, model: nn.Module, prompts: ClassPrompts, train: ImageClassificationDataset, *, seed: int, folder: Path
    ) -> Fitted:
        """Train; the adapter and its reports stay in `folder`."""
        model = self.wrap(model)
        args = VLMTrainingArguments(
            output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **self.training
        )
        trainer = VLMTrainer(model, self.objective(prompts, seed), args, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Fitted(model_accuracy(model.eval()), trained)


def split_of(task: Task, *, seed: int, train_transform: ImageTransform, test_transform: ImageTransform) -> Split:
    """Draw the shots of one seed. The halves of the classes do not depend on the seed.

    Args:
        task: Dataset and protocol.
        seed: Seed of the shots.
        train_transform: Augmentation.
        test_transform: Preparation of test images.
    """
    pool = task.train.select(few_shot_indices(task.train.labels, shots=task.shots, seed=seed))
    pool.seed = seed
    test = task.test.with_transform(test_transform)
    if task.protocol == "few_shot":
        return Split(pool.with_transform(train_transform), {"accuracy": test})
    base, new = base_and_new_classes(len(task.train.class_names))
    train = pool.restrict(base).with_transform(train_transform)
    return Split(train, {"base": test.restrict(base), "new": test.restrict(new)})


@dataclass
class Experiment:
    """Tasks x learners x seeds.

    Args:
        load_model: Gives a fresh base model.
        tokenizer: Tokenizer of the model.
        max_length: Longest text of the model, in tokens.
        train_transform: Augmentation.
        test_transform: Preparation of test images.
        output_dir: Folder of everything that is written.
    """

    load_model: Callable[[], nn.Module]
    tokenizer: Any
    max_length: int
    train_transform: ImageTransform
    test_transform: ImageTransform
    output_dir: Path

    def run(self, tasks: Sequence[Task], learners: Sequence[Learner], seeds: Sequence[int]) -> dict[str, Any]:
        """Run everything and write `metrics.json` after each task.

        Args:
            tasks: The first one's results stand at the top level of the report.
            learners: Rows of the tables.
            seeds: Seeds of shots and training order.

        Returns:
            `{"seeds": [...], "methods": {...}, "tasks": {name: {"methods": {...}}}}`; scores in percent per seed.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"seeds": list(seeds), "methods": {}, "tasks": {}}
        progress = tqdm(total=len(tasks) * len(learners) * len(seeds), unit="run")
        for position, task in enumerate(tasks):
            methods: dict[str, Any] = {}
            known: dict[str, dict[str, Any]] = {}
            for seed in seeds:  # seeds outside: a drift of the machine hits all learners alike
                split = split_of(
                    task, seed=seed, train_transform=self.train_transform, test_transform=self.test_transform
                )
                for learner in learners:
                    progress.set_description(f"{task.name}: {learner.name}, seed {seed}")
                    if learner.uses_seed or learner.name not in known:
                        known[learner.name] = self.run_one(task, split, learner, seed)
                    _append(methods.setdefault(learner.name, {}), known[learner.name])
                    progress.update()
            if position == 0:
                report |= {"task": task.name, "methods": methods}
            else:
                report["tasks"][task.name] = {"methods": methods}
            write_json(self.output_dir / "metrics.json", report)
        progress.close()
        return report

    def run_one(self, task: Task, split: Split, learner: Learner, seed: int) -> dict[str, Any]:
        """Train and evaluate one learner once.

        Args:
            task: Dataset and protocol.
            split: Images of this seed.
            learner: What is trained.
            seed: Seed of the training.

        Returns:
            Scores in percent, seconds, peak memory in MB above the loaded model, number of trained parameters.
        """
        set_seed(seed)
        model = self.load_model()
        prompts = self.prompts(split.train.class_names, task.template)
        peak = PeakMemory(next(model.parameters()).device)
        peak.start()
        started = time.perf_counter()
        folder = self.output_dir / task.name / learner.name / f"seed{seed}"
        fitted = learner.fit(model, prompts, split.train, seed=seed, folder=folder)
        seconds, memory = time.perf_counter() - started, peak.stop()
        row: dict[str, Any] = {
            name: fitted.accuracy(dataset, self.prompts(dataset.class_names, task.template))
            for name, dataset in split.tests.items()
        }
        if "new" in row:
            row["h"] = None if row["new"] is None else harmonic_mean(row["base"], row["new"])
        trained = fitted.trainable_parameters > 0
        return row | {
            "seconds": seconds if trained else 0.0,
            "peak_memory_mb": memory if trained else 0.0,
            "trainable_parameters": fitted.trainable_parameters,
        }

    def prompts(self, class_names: Sequence[str], template: str) -> ClassPrompts:
        """Tokenised prompts of a class list."""
        return tokenize_classes(self.tokenizer, class_names, template=template, max_length=self.max_length)


def _append(columns: dict[str, Any], row: dict[str, Any]) -> None:
    """Add one seed's row; a column without any value becomes null, the parameter count stays a single number."""
    for key, value in row.items():
        if key == "trainable_parameters" or (value is None and key not in columns):
            columns[key] = value
        elif value is not None:
            columns.setdefault(key, []).append(value)
