"""An exported classifier as an ONNX file: needs onnxruntime, numpy and Pillow, no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from .card import METADATA_KEY, ClassifierCard, best_labels, expect
from .errors import ExportedFileError
from .images import ImageSource, pixels_of


class OnnxClassifier:
    """Runs the ONNX file of an export.

    Args:
        path: The file.
        threads: Threads of one call; 0 lets onnxruntime choose.
        providers: Execution providers of onnxruntime, best first.

    Raises:
        ExportedFileError: If the file is damaged or something else.
    """

    def __init__(
        self, path: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        where = str(path)
        expect(Path(path).is_file(), "a file", "no such file, a folder or a pipe", where=where)
        try:
            self.session = onnxruntime.InferenceSession(where, options, providers=list(providers))
        except Exception as error:  # onnxruntime has an error class of its own for each reason
            reason = " ".join(str(error).split())
            raise ExportedFileError(
                f"Expected a complete ONNX file, got {where!r}: {reason}. Copy or export it again."
            ) from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.card = ClassifierCard.from_json(metadata.get(METADATA_KEY), where=where)
        inputs = {value.name: list(value.shape)[1:] for value in self.session.get_inputs()}
        outputs = {value.name: list(value.shape)[1:] for value in self.session.get_outputs()}
        wanted = {"pixel_values": [3, *self.card.preprocessing.image_size]}
        expect(inputs == wanted, f"the input {wanted}", inputs, where=where)
        wanted = {"logits": [len(self.card.class_names)]}
        expect(outputs == wanted, f"the output {wanted}", outputs, where=where)

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """Logits (batch, classes).

        Args:
            pixel_values: (batch, 3, rows, cols) in float32, as `card.preprocessing` makes them.
        """
        return np.asarray(self.session.run(["logits"], {"pixel_values": pixel_values})[0])

    def prepare(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Decode images and return their pixels (images, 3, rows, cols); needs no model, so no lock.

        Args:
            images: Paths, contents of files, or PIL images.
        """
        return pixels_of(images, self.card.preprocessing)

    def classify(self, pixels: np.ndarray, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            pixels: From `prepare`; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        return best_labels(self(pixels), self.card.class_names, top_k)

    def predict(self, images: Sequence[ImageSource], *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Labels with probabilities for each image, best first.

        Args:
            images: Paths, contents of files, or PIL images; they go through the network as one batch.
            top_k: Labels per image, at most.
        """
        return self.classify(self.prepare(images), top_k=top_k)
