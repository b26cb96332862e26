"""Classification metrics on tensors. Accuracies are in percent; the calibration error is a share in [0, 1]."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def accuracy(predicted: Int[Tensor, " images"], labels: Int[Tensor, " images"]) -> float:
    """Share of images whose predicted class is right, in percent.

    Args:
        predicted: Class ids.
        labels: True class ids.

    Raises:
        ValueError: If there is no image.
    """
    if not len(labels):
        raise ValueError("Expected at least one image, got none: an accuracy over nothing has no value.")
    return 100.0 * (predicted == labels).double().mean().item()


def confusion_matrix(
    predicted: Int[Tensor, " images"], labels: Int[Tensor, " images"], *, num_classes: int
) -> Int[Tensor, "classes classes"]:
    """Number of images per true class (row) and predicted class (column).

    Args:
        predicted: Class ids below `num_classes`.
        labels: True class ids below `num_classes`.
        num_classes: Number of classes; the result has its square of entries.
    """
    # A pair of classes as one number: row times width plus column.
    counts = torch.bincount(labels.long() * num_classes + predicted.long(), minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def per_class_accuracy(
    predicted: Int[Tensor, " images"], labels: Int[Tensor, " images"], *, num_classes: int
) -> Float[Tensor, " classes"]:
    """Accuracy among the images of each class (its recall), in percent; NaN for a class without images.

    Args:
        predicted: Class ids.
        labels: True class ids below `num_classes`.
        num_classes: Number of classes.
    """
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    return 100.0 * right / torch.bincount(labels, minlength=num_classes)


def harmonic_mean(base: float, new: float) -> float:
    """Harmonic mean `2 b n / (b + n)` of base and new accuracy; 0 when either is 0.

    Over several seeds or datasets it is taken of the averages, as papers report it (`report.summarize`), which is not
    the average of the harmonic means.

    Args:
        base: Accuracy on base classes, in any unit.
        new: Accuracy on new classes, in the same unit.

    Raises:
        ValueError: If a value is negative.
    """
    if base < 0 or new < 0:
        raise ValueError(f"Expected accuracies of at least 0, got {base!r} and {new!r}.")
    return 2 * base * new / (base + new) if base and new else 0.0


def expected_calibration_error(
    confidence: Float[Tensor, " images"], correct: Bool[Tensor, " images"], *, num_bins: int = 15
) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by the images in each; in [0, 1].

    Bins are open on the left and closed on the right, as in the paper; a confidence of 0 falls into the first.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: True where the predicted class is right.
        num_bins: Number of bins.

    Raises:
        ValueError: If there is no image, or a confidence is outside [0, 1].

    References:
        On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599, Eq. 3.
    """
    if not len(confidence):
        raise ValueError("Expected at least one image, got none: a calibration error over nothing has no value.")
    confidence = confidence.double().cpu()
    # A softmax in float32 may end a rounding error above 1.
    if confidence.min() < 0 or confidence.max() > 1 + 1e-5:
        raise ValueError(
            f"Expected confidences in [0, 1], got {confidence.min().item()} to {confidence.max().item()}. "
            "Pass probabilities, not logits."
        )
    # `bucketize` counts the edges below a value, so that a value on an edge falls into the bin below.
    inner_edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidence, inner_edges)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, confidence - correct.cpu().double())
    return gaps.abs().sum().item() / len(confidence)
