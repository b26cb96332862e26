"""An exported classifier as a torch module."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from .card import METADATA_KEY, ClassifierCard, best_labels
from .images import pixels_of
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

    @torch.inference_mode()
    def predict(
        self, images: Sequence[str | Path | bytes | Image.Image], *, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            images: Paths, contents of files, or PIL images; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        pixels = torch.from_numpy(pixels_of(images, self.card.preprocessing))
        logits = self(pixels.to(self.tower.positions))
        return best_labels(logits.cpu().numpy(), self.card.class_names, top_k)

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
        ValueError: If the file is damaged or something else.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            card = ClassifierCard.from_json((file.metadata() or {}).get(METADATA_KEY), where=str(path))
            # copies: in the file's own memory tensors are not aligned, and CPU kernels round by alignment
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"Expected a complete safetensors file, got {str(path)!r}: {error}") from error
    with torch.device("meta"):
        classifier = PlainClassifier(card)
    classifier.load_state_dict(tensors, assign=True)
    return classifier.requires_grad_(False).eval()
