"""Rows of a comparison: what is trained, from which model, and how the result classifies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PrinterCallback

from peft_vlm.baselines import LinearProbe
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.errors import PeftVLMError
from peft_vlm.evaluation.classify import evaluate_classifier
from peft_vlm.objective import Objective
from peft_vlm.text.prompts import ClassPrompts
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.trainer import VLMTrainer


@dataclass(frozen=True)
class Split:
    """Images of one seed.

    Args:
        train: The shots, with labels of the classes that are trained on.
        pool: The whole training split, all classes: what a method that needs no labels may see.
        tests: Test sets by the name of their score.
    """

    train: ImageClassificationDataset
    pool: ImageClassificationDataset
    tests: dict[str, ImageClassificationDataset]


@runtime_checkable
class MakePrompts(Protocol):
    """Class prompts of a list of names, in the template of the task unless another is given."""

    def __call__(self, class_names: Sequence[str], template: str | None = None) -> ClassPrompts:
        """Tokenise the classes."""
        ...


@dataclass
class Fitted:
    """A trained classifier.

    Args:
        accuracy: Top-1 accuracy in percent on a dataset whose classes are given by prompts; None when it has no
            answer.
        trainable_parameters: How many numbers were trained.
        template: Template to be evaluated with; None for the task's.
    """

    accuracy: Callable[[ImageClassificationDataset, ClassPrompts], float | None]
    trainable_parameters: int
    template: str | None = None


@runtime_checkable
class Learner(Protocol):
    """One row of the table. `uses_seed` is False when every seed gives the same result.

    `load_model` gives the model that the learner starts from; None for the experiment's.
    """

    name: str
    uses_seed: bool
    load_model: Callable[[], nn.Module] | None

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train on the images and return a classifier; everything between call and return is measured."""
        ...


def chosen_learners(learners: Sequence[Learner], names: Sequence[str] | None) -> list[Learner]:
    """The learners with some names, in the order of `learners`; all without names.

    Args:
        learners: Rows of a table.
        names: Which of them.

    Raises:
        PeftVLMError: If a name is not among them.
    """
    known = [learner.name for learner in learners]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise PeftVLMError(f"Expected `methods` among {known!r}, got {unknown!r}.")
    return [learner for learner in learners if not names or learner.name in names]


def model_accuracy(model: nn.Module) -> Callable[[ImageClassificationDataset, ClassPrompts], float]:
    """Accuracy function of a CLIP-like model."""
    return lambda dataset, prompts: evaluate_classifier(model, dataset, prompts).accuracy


@dataclass
class ZeroShot:
    """The untouched model."""

    name: str = "zero_shot"
    load_model: Callable[[], nn.Module] | None = None
    uses_seed: bool = False

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train nothing."""
        return Fitted(model_accuracy(model.eval()), 0)


class LinearProbeLearner:
    """Logistic regression on the frozen image features of the training images, without augmentation.

    Args:
        transform: Transform of evaluation.
    """

    name = "linear_probe"
    uses_seed = True
    load_model = None

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Extract features once and fit."""
        model.eval()
        features = all_image_features(model, split.train.with_transform(self.transform))
        probe = LinearProbe(features.shape[1], len(split.train.class_names))
        probe.fit(features.clone(), torch.tensor(split.train.labels))

        def accuracy(dataset: ImageClassificationDataset, names: ClassPrompts) -> float | None:
            if names.class_names != split.train.class_names:
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
        template: Text around a class name; None for the task's.
        on_pool: Train on the whole training split with all classes instead of the shots; for objectives that read no
            labels.
        load_model: Gives the model to start from; None for the experiment's.
        after: Called with the trained model and the seed.
    """

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    objective: Callable[[ClassPrompts, int], Objective]
    training: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    on_pool: bool = False
    load_model: Callable[[], nn.Module] | None = None
    after: Callable[[nn.Module, int], None] | None = None
    uses_seed: bool = True

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train; the adapter and its reports stay in `folder`."""
        model = self.wrap(model)
        train = split.pool if self.on_pool else split.train
        args = VLMTrainingArguments(
            output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **self.training
        )
        objective = self.objective(prompts(train.class_names, self.template), seed)
        trainer = VLMTrainer(model, objective, args, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.after is not None:
            self.after(model.eval(), seed)
        return Fitted(model_accuracy(model.eval()), trained, self.template)
