"""`PromptedClassifier`: images in, labels with probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from peft_vlm.data.images import as_value_range, read_image
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import ClassNameError
from peft_vlm.evaluation.classify import LogitsFn, cosine_logits
from peft_vlm.evaluation.run import load_model
from peft_vlm.text.class_features import TextTensors, encode_classes
from peft_vlm.text.prompts import check_class_names, tokenize_for_model

#: One image: a path, file content, a PIL image, or a uint8 array (rows, cols, channels).
ImageInput = str | Path | bytes | Image.Image | np.ndarray

#: Class lists whose features are stored at once; each takes classes x dim x 4 bytes.
MAX_CLASS_LISTS = 16


@dataclass(frozen=True)
class Prediction:
    """A label with its probability.

    Args:
        label: Class name.
        probability: Softmax over all class names of the call, in [0, 1]; the best few need not sum to 1.
    """

    label: str
    probability: float


class PromptedClassifier:
    """Classifies images with a CLIP-like model, with or without an adapter.

    The class features of a class list are computed once per state of the model: they follow an adapter that is
    activated, switched off, merged, loaded or deleted, and another device or type. Weights changed in place by a fused
    optimizer or through `.data` are not noticed; call `refresh()` after that. Several threads may predict at once,
    each with its own class list.

    Args:
        model: CLIP-like model in evaluation mode.
        tokenizer: Its tokenizer.
        image_processor: Its image processor.
        class_names: Classes to choose from when a call names none.
        template: Text around a class name, or several, whose features are averaged.
        value_range: Black and white of images with more than 8 bits; see `read_image`.

    Example:
        ```python
        import peft_vlm

        classifier = peft_vlm.PromptedClassifier.from_pretrained("outputs/readme")
        print(classifier.predict("photo.png", top_k=3)[0].label)
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] = "a photo of a {}.",
        value_range: Sequence[int | float] | None = None,
    ) -> None:
        self.class_names = None if class_names is None else check_class_names(class_names)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._transform = EvalTransform(image_processor)
        self._features: tuple[TextTensors, dict[tuple[str, ...], Tensor]] | None = None
        self.value_range = as_value_range(value_range)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path | None,
        *,
        base_model: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        value_range: Sequence[int | float] | None = None,
    ) -> "PromptedClassifier":
        """Load an adapter with its base model, class names and template.

        Args:
            adapter: Folder or Hub id; None for the base model alone (zero-shot).
            base_model: Folder or id of the base model; None for the one the adapter records.
            class_names: Used instead of the classes the adapter records.
            template: Used instead of the template the adapter records.
            device: Device of the model; None takes a GPU if there is one.
            dtype: Data type of the base model's weights.
            revision: Branch, tag or commit of the adapter on the Hub.
            subfolder: Folder inside the adapter's folder or repository.
            token: Token of the Hub, for private repositories; None for the one of `hf auth login`.
            value_range: Used instead of the range the adapter records.
        """
        source = {"revision": revision, "subfolder": subfolder, "token": token}
        loaded = load_model(adapter, base_model=base_model, device=device, dtype=dtype, **source)
        return cls(
            loaded.model,
            loaded.tokenizer,
            loaded.image_processor,
            class_names=loaded.class_names if class_names is None else class_names,
            template=template or loaded.template or "a photo of a {}.",
            value_range=loaded.value_range if value_range is None else value_range,
        )

    def refresh(self) -> None:
        """Forget the class features; the next call of `predict` computes them from the weights as they are then."""
        self._features = None

    def _class_features(self, class_names: tuple[str, ...]) -> Float[Tensor, "classes dim"]:
        """Features of a class list by the model as it is, out of the last few lists where that is possible."""
        state, stored = TextTensors(self.model), self._features  # one read: another thread may replace it
        if stored is None or not stored[0].is_same(state):
            stored = self._features = (state, {})
        features = stored[1].get(class_names)
        if features is None:
            prompts = tokenize_for_model(self.model, self.tokenizer, class_names, template=self.template)
            features = encode_classes(self.model, prompts)
            if len(stored[1]) >= MAX_CLASS_LISTS:
                stored[1].clear()
            stored[1][class_names] = features
        return features

    @overload
    def predict(
        self,
        images: ImageInput,
        *,
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageInput],
        *,
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Most likely labels of one image or several.

        Args:
            images: One image or a list; see `read_image` for what counts as one.
            class_names: Choose among these instead of the classifier's own; the text side makes new classes possible
                without training.
            top_k: Maximum number of labels per image; fewer when there are fewer classes.
            batch_size: Images per forward pass.

        Returns:
            A list of `Prediction`, best first, for one image; a list of such lists for a list of images.

        Raises:
            ClassNameError: If there are no class names.
            ValueError: If `top_k` is below 1.
        """
        if top_k < 1:
            raise ValueError(f"Expected `top_k` of at least 1, got {top_k!r}.")
        names = self.class_names if class_names is None else check_class_names(class_names)
        if names is None:
            raise ClassNameError("The adapter records no class names. Pass `class_names=` to `predict`.")
        inputs = [images] if isinstance(images, ImageInput) else list(images)
        logits = cosine_logits(self.model, self._class_features(names))
        results: list[list[Prediction]] = []
        for start in range(0, len(inputs), batch_size):
            results += self._predict_batch(
                inputs, range(start, min(start + batch_size, len(inputs))), logits, names, top_k
            )
        return results[0] if isinstance(images, ImageInput) else results

    def _predict_batch(
        self, inputs: list[ImageInput], positions: range, logits: LogitsFn, names: tuple[str, ...], top_k: int
    ) -> list[list[Prediction]]:
        images = (
            read_image(inputs[position], where=f"image {position}", value_range=self.value_range)
            for position in positions
        )
        pixels = [self._transform(image) for image in images]
        probabilities = logits(torch.stack(pixels)).softmax(dim=-1)
        best = probabilities.topk(min(top_k, len(names)), dim=-1)
        return [
            [Prediction(names[index], value) for index, value in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
