"""An exported classifier as a torch module."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from .card import METADATA_KEY, ClassifierCard, best_labels, check_architecture, expect
from .errors import ExportedFileError
from .images import ImageSource, pixels_of
from .tower import ImageTower


class PlainClassifier(nn.Module):
    """An image classifier with fixed classes: image tower, class vectors, scale. Logits are those of the adapter.

    Args:
        card: Classes, preprocessing, sizes.

    Example:
        ```python
        from peft_vlm.serving.plain import load_exported

        classifier = load_exported("exported/classifier.safetensors")
        print(classifier.predict(["photo.png"])[0])
        ```
    """

    def __init__(self, card: ClassifierCard) -> None:
        super().__init__()
        self.card = card
        self.tower = ImageTower(card.architecture)
        self.class_vectors = nn.Buffer(torch.empty(len(card.class_names), card.architecture["dim"]))
        self.scale, self.bias = nn.Buffer(torch.empty(())), nn.Buffer(torch.empty(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (batch, classes) in float32.

        Args:
            pixel_values: (batch, 3, rows, cols), as `card.preprocessing` makes them.
        """
        features = normalize(self.tower(pixel_values).float(), dim=-1)
        return self.scale * (features @ self.class_vectors.T) + self.bias

    def prepare(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Decode images and return their pixels (images, 3, rows, cols); needs no model, so no lock.

        Args:
            images: Paths, contents of files, or PIL images.
        """
        return pixels_of(images, self.card.preprocessing)

    @torch.inference_mode()
    def classify(self, pixels: np.ndarray, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            pixels: From `prepare`; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        logits = self(torch.from_numpy(pixels).to(self.tower.positions))
        return best_labels(logits.cpu().numpy(), self.card.class_names, top_k)

    def predict(self, images: Sequence[ImageSource], *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            images: Paths, contents of files, or PIL images; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        return self.classify(self.prepare(images), top_k=top_k)

    def save(self, path: str | Path) -> None:
        """Write tensors and card into one safetensors file.

        Args:
            path: File to write; its folder must exist.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={METADATA_KEY: self.card.to_json()})


def load_exported(path: str | Path, *, device: str | torch.device = "cpu") -> PlainClassifier:
    """Read a file of `PlainClassifier.save`. Needs torch, safetensors, numpy and Pillow.

    Args:
        path: The safetensors file.
        device: Device of the model.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ExportedFileError: If the file is damaged or something else.
    """
    where = str(path)
    try:
        expect(Path(path).is_file(), "a file", "no such file, a folder or a pipe", where=where)
        with safe_open(path, framework="pt", device=str(device)) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            card = ClassifierCard.from_json((file.metadata() or {}).get(METADATA_KEY), where=where)
            check_architecture(card.architecture, num_tensors=len(slices), where=where)
            classifier = _empty(card, {name: tuple(part.get_shape()) for name, part in slices.items()}, where)
            # copies: in the file's own memory tensors are not aligned, and CPU kernels round by alignment
            tensors = {name: file.get_tensor(name).clone() for name in slices}
    except (SafetensorError, OSError) as error:
        raise ExportedFileError(
            f"Expected a complete safetensors file, got {where!r}: {error}. Copy or export it again."
        ) from error
    kinds = {name: tensor.is_floating_point() for name, tensor in classifier.state_dict().items()}
    for name, tensor in tensors.items():
        fits = tensor.is_floating_point() == kinds[name] and not tensor.is_complex()
        expect(fits and bool(torch.isfinite(tensor).all()), f"finite numbers in {name!r}", tensor.dtype, where=where)
    classifier.load_state_dict(tensors, assign=True)
    return classifier.requires_grad_(False).eval()


def _empty(card: ClassifierCard, shapes: dict[str, tuple[int, ...]], where: str) -> PlainClassifier:
    """A classifier without memory, after a comparison of its sizes with those of a file."""
    try:
        with torch.device("meta"):
            classifier = PlainClassifier(card).eval()
            classifier(torch.empty(1, 3, *card.preprocessing.image_size))
    except (RuntimeError, ValueError, TypeError, LookupError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportedFileError(
            f"Expected sizes in {where!r} that make a network, got others ({reason}). Export the classifier again."
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    different = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    for name in different[:1]:
        expect(False, f"{name!r} of shape {wanted.get(name)}", shapes.get(name), where=where)
    return classifier
