"""An exported classifier as an ONNX file: needs onnxruntime, numpy and Pillow, no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from .card import METADATA_KEY, ClassifierCard, best_labels
from .images import pixels_of


class OnnxClassifier:
    """Runs the ONNX file of an export.

    Args:
        path: The file.
        threads: Threads of one call; 0 lets onnxruntime choose.
        providers: Execution providers of onnxruntime, best first.
    """

    def __init__(
        self, path: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.card = ClassifierCard.from_json(metadata.get(METADATA_KEY), where=str(path))

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """Logits (batch, classes).

        Args:
            pixel_values: (batch, 3, rows, cols) in float32, as `card.preprocessing` makes them.
        """
        return np.asarray(self.session.run(["logits"], {"pixel_values": pixel_values})[0])

    def predict(
        self, images: Sequence[str | Path | bytes | Image.Image], *, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            images: Paths, contents of files, or PIL images; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        logits = self(pixels_of(images, self.card.preprocessing))
        return best_labels(logits, self.card.class_names, top_k)
