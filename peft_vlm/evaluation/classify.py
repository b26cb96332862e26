"""Classify a dataset in batches, without autograd and without keeping logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from peft_vlm.data.dataset import ImageClassificationDataset, collate
from peft_vlm.data.transforms import TrainTransform
from peft_vlm.distributed import progress_bar
from peft_vlm.errors import ClassNameError, DataError, check_list
from peft_vlm.evaluation.metrics import accuracy, confusion_matrix, expected_calibration_error, per_class_accuracy
from peft_vlm.models.towers import device_of, image_features
from peft_vlm.text.class_features import (
    ClassFeatureCache,
    class_logits,
    conditioned_logits,
    depends_on_image,
    evaluation_mode,
)
from peft_vlm.text.prompts import ClassPrompts, tokenize_for_model

#: Pixels of a batch, on any device -> scaled logits over a fixed class list.
LogitsFn = Callable[[Float[Tensor, "batch channels rows cols"]], Float[Tensor, "batch classes"]]


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Predictions of a classifier for each image of a dataset, and their metrics; 24 bytes per image.

    Args:
        class_names: Names that labels index.
        labels: True class of each image, in dataset order.
        predicted: Class with the highest logit.
        confidence: Its probability: the softmax over all class names, in [0, 1].
        images: The dataset; None where it is not known.
    """

    class_names: tuple[str, ...]
    labels: Int[Tensor, " images"]
    predicted: Int[Tensor, " images"]
    confidence: Float[Tensor, " images"]
    images: ImageClassificationDataset | None = field(default=None, compare=False, repr=False)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return accuracy(self.predicted, self.labels)

    @property
    def per_class(self) -> dict[str, float | None]:
        """Accuracy of each class in percent, by name; None for a class without images."""
        values = per_class_accuracy(self.predicted, self.labels, num_classes=len(self.class_names)).tolist()
        return {name: None if value != value else value for name, value in zip(self.class_names, values, strict=True)}

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have images, in percent."""
        return per_class_accuracy(self.predicted, self.labels, num_classes=len(self.class_names)).nanmean().item()

    @property
    def ece(self) -> float:
        """Expected calibration error over 15 bins, in [0, 1]."""
        return expected_calibration_error(self.confidence, self.predicted == self.labels)

    @property
    def confusion(self) -> Int[Tensor, "classes classes"]:
        """Number of images per true class (row) and predicted class (column)."""
        return confusion_matrix(self.predicted, self.labels, num_classes=len(self.class_names))


@dataclass(frozen=True, eq=False)
class Predictions:
    """All logits of a dataset, of shape (images, classes).

    Args:
        logits: Scaled logits in float32.
        labels: True class of each image.
    """

    logits: Float[Tensor, "images classes"]
    labels: Int[Tensor, " images"]


@runtime_checkable
class ImageClassifier(Protocol):
    """Interface of a classifier under a protocol: logits for any class list."""

    def logits_for(self, class_names: Sequence[str], *, template: str | Sequence[str] | None = None) -> LogitsFn:
        """A function from pixels to logits over the classes, under another template where one is given."""
        ...


class TextClassifier:
    """Classifies by the cosine between image features and the features of class prompts.

    Args:
        model: CLIP-like model, with or without adapters.
        tokenizer: Its tokenizer.
        template: Text around a class name, or several to average.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, template: str | Sequence[str]) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._cache = ClassFeatureCache()
        self._prompts: ClassPrompts | None = None

    def logits_for(self, class_names: Sequence[str], *, template: str | Sequence[str] | None = None) -> LogitsFn:
        """A function from pixels to logits over the classes, by the model as it is now.

        Args:
            class_names: Label order.
            template: Used instead of the classifier's own.
        """
        check_list("class_names", class_names)
        chosen = self.template if template is None else template
        wanted = tuple(class_names), (chosen,) if isinstance(chosen, str) else tuple(chosen)
        prompts = self._prompts  # one read: another thread may ask for another class list
        if prompts is None or (prompts.class_names, prompts.templates) != wanted:
            prompts = tokenize_for_model(self.model, self.tokenizer, class_names, template=chosen)
            self._prompts = prompts
        return _logits_of(self.model, prompts, self._cache)


def cosine_logits(model: nn.Module, class_features: Float[Tensor, "*samples classes dim"]) -> LogitsFn:
    """A function from pixels to logits; pixels are moved to the model's device.

    Args:
        model: CLIP-like model, with or without adapters.
        class_features: Result of `encode_classes` for it.
    """

    def logits(pixel_values: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch classes"]:
        with torch.no_grad(), evaluation_mode(model):
            pixels = pixel_values.to(class_features.device)
            return class_logits(model, image_features(model, pixels), class_features)

    return logits


def _logits_of(model: nn.Module, prompts: ClassPrompts, cache: ClassFeatureCache) -> LogitsFn:
    """Logits over class prompts, by class features where the prompts do not depend on the image."""
    if depends_on_image(model):
        return image_wise_logits(model, prompts)
    return cosine_logits(model, cache.get(model, prompts))


def image_wise_logits(model: nn.Module, prompts: ClassPrompts) -> LogitsFn:
    """The same for a model whose class prompts depend on the image.

    Args:
        model: CLIP-like model with such an adapter.
        prompts: Tokenised class list.
    """

    def logits(pixel_values: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch classes"]:
        with torch.no_grad(), evaluation_mode(model):
            return conditioned_logits(model, prompts, image_features(model, pixel_values.to(device_of(model))))

    return logits


@torch.no_grad()
def iterate_logits(
    logits: LogitsFn,
    dataset: ImageClassificationDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> Iterator[tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]]:
    """Logits and labels batch by batch, in dataset order, on the CPU.

    Args:
        logits: Classifier over the dataset's classes.
        dataset: Images with a transform that is not random.
        batch_size: Images per forward pass.
        num_workers: Processes that read images.
        progress: Show a progress bar.

    Raises:
        DataError: If the dataset's transform is one of training.
    """
    if isinstance(dataset.transform, TrainTransform):
        raise DataError(
            "Expected a transform of evaluation, got `TrainTransform`, whose random crops lower the accuracy. Use "
            "`dataset.with_transform(EvalTransform(image_processor))`."
        )
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in progress_bar(loader, desc="classify", unit="batch", leave=False, disable=not progress):
        yield logits(batch["pixel_values"]).float().cpu(), batch["labels"]


def classify(logits: LogitsFn, dataset: ImageClassificationDataset, **options: int | bool) -> EvalResult:
    """Most likely class and its probability for each image.

    Args:
        logits: Classifier over the dataset's classes, in label order.
        dataset: Images with a transform that is not random.
        **options: Passed to `iterate_logits`.

    Raises:
        DataError: If the images have no labels.
    """
    if min(dataset.labels) < 0:
        raise DataError("Expected images with labels, got images without; `predict_logits` needs none.")
    labels, predicted, confidence = [], [], []
    for batch_logits, batch_labels in iterate_logits(logits, dataset, **options):
        best = batch_logits.softmax(dim=-1).max(dim=-1)  # (batch,) values and indices; the logits are dropped
        labels.append(batch_labels)
        predicted.append(best.indices)
        confidence.append(best.values)
    return EvalResult(dataset.class_names, torch.cat(labels), torch.cat(predicted), torch.cat(confidence), dataset)


def evaluate_classifier(
    model: nn.Module,
    dataset: ImageClassificationDataset,
    prompts: ClassPrompts,
    *,
    cache: ClassFeatureCache | None = None,
    **options: int | bool,
) -> EvalResult:
    """Classify a dataset with class prompts.

    Args:
        model: CLIP-like model, with or without adapters.
        dataset: Images with a transform that is not random.
        prompts: Tokenised class names of the dataset.
        cache: Keeps the class features between calls.
        **options: Passed to `iterate_logits`.

    Raises:
        ClassNameError: If prompts and dataset have different classes, so that labels would mean other names.
    """
    if prompts.class_names != dataset.class_names:
        raise ClassNameError(
            f"Expected prompts for the dataset's {len(dataset.class_names)} classes, beginning "
            f"{list(dataset.class_names[:3])!r}, got {len(prompts.class_names)}, beginning "
            f"{list(prompts.class_names[:3])!r}. Tokenise `dataset.class_names`."
        )
    return classify(_logits_of(model, prompts, cache or ClassFeatureCache()), dataset, **options)


def predict_logits(
    model: nn.Module,
    dataset: ImageClassificationDataset,
    class_features: Float[Tensor, "*samples classes dim"],
    **options: int | bool,
) -> Predictions:
    """All logits of a dataset, for analyses that need more than the best class.

    Args:
        model: CLIP-like model, with or without adapters.
        dataset: Images with a transform that is not random.
        class_features: Result of `encode_classes` for it.
        **options: Passed to `iterate_logits`.
    """
    batches = list(iterate_logits(cosine_logits(model, class_features), dataset, **options))
    return Predictions(torch.cat([logits for logits, _ in batches]), torch.cat([labels for _, labels in batches]))
