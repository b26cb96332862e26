"""`PromptedClassifier`: images in, labels with probabilities out."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from peft_vlm.evaluation.classify import LogitsFn, cosine_logits, image_wise_logits
from peft_vlm.evaluation.run import load_model
from peft_vlm.text.class_features import TextTensors, depends_on_image, encode_classes
from peft_vlm.text.prompts import check_class_names, tokenize_for_model

#: One image: a path, file content, a PIL image, or a uint8 array (rows, cols, channels).
ImageInput = str | Path | bytes | Image.Image | np.ndarray

#: Text around a class name where nothing names another.
TEMPLATE = "a photo of a {}."

#: Class lists, each in its template, whose features are stored at once; each takes classes x dim x 4 bytes.
MAX_CLASS_LISTS = 16

#: Threads that decode images while the model runs; Pillow and numpy release the interpreter for most of that.
DECODING_THREADS = min(8, os.cpu_count() or 1)


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
    each with its own class list. Which adapter is active is PEFT's state of the model, for all threads: for several
    adapters at once make a classifier of each.

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
        template: str | Sequence[str] = TEMPLATE,
        value_range: Sequence[int | float] | None = None,
    ) -> None:
        self.class_names = None if class_names is None else check_class_names(class_names)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.transform = EvalTransform(image_processor)
        self._features: tuple[TextTensors, dict[tuple[tuple[str, ...], str | tuple[str, ...]], Tensor]] | None = None
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
            template=template or loaded.template or TEMPLATE,
            value_range=loaded.value_range if value_range is None else value_range,
        )

    def refresh(self) -> None:
        """Forget the class features; the next call of `predict` computes them from the weights as they are then."""
        self._features = None

    def logits_for(self, class_names: Sequence[str], *, template: str | Sequence[str] | None = None) -> LogitsFn:
        """A function from prepared pixels to logits, by the model as it is now; it is an `ImageClassifier`.

        Args:
            class_names: Label order.
            template: Used instead of the classifier's own.
        """
        names, chosen = check_class_names(class_names), self.template if template is None else template
        if depends_on_image(self.model):
            prompts = tokenize_for_model(self.model, self.tokenizer, names, template=chosen)
            return image_wise_logits(self.model, prompts)
        return cosine_logits(
            self.model, self._class_features(names, chosen if isinstance(chosen, str) else tuple(chosen))
        )

    def _class_features(
        self, class_names: tuple[str, ...], template: str | tuple[str, ...]
    ) -> Float[Tensor, "*samples classes dim"]:
        """Features of a class list by the model as it is, out of the last few lists where that is possible."""
        state, stored = TextTensors(self.model), self._features  # one read: another thread may replace it
        if stored is None or not stored[0].is_same(state):
            stored = self._features = (state, {})
        features = stored[1].get((class_names, template))
        if features is None:
            prompts = tokenize_for_model(self.model, self.tokenizer, class_names, template=template)
            features = encode_classes(self.model, prompts)
            if len(stored[1]) >= MAX_CLASS_LISTS:
                stored[1].clear()
            stored[1][class_names, template] = features
        return features

    @overload
    def predict(
        self,
        images: ImageInput,
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageInput],
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Most likely labels of one image or several.

        Args:
            images: One image or a list; see `read_image` for what counts as one.
            class_names: Choose among these instead of the classifier's own; the text side makes new classes possible
                without training.
            template: Text around a class name instead of the classifier's own, or several.
            top_k: Maximum number of labels per image; fewer when there are fewer classes.
            batch_size: Images per forward pass.

        Returns:
            A list of `Prediction`, best first, for one image; a list of such lists for a list of images.

        Raises:
            ClassNameError: If there are no class names.
            ValueError: If `top_k` or `batch_size` is below 1.
        """
        for name, number in (("top_k", top_k), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {number!r}.")
        names = self.class_names if class_names is None else check_class_names(class_names)
        if names is None:
            raise ClassNameError("The adapter records no class names. Pass `class_names=` to `predict`.")
        inputs = [images] if isinstance(images, ImageInput) else list(images)
        logits = self.logits_for(names, template=template)
        results: list[list[Prediction]] = []
        for pixels in self._pixel_batches(inputs, batch_size):
            probabilities = logits(pixels).softmax(dim=-1)
            best = probabilities.topk(min(top_k, len(names)), dim=-1)
            results += [
                [Prediction(names[index], value) for index, value in zip(indices, values, strict=True)]
                for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return results[0] if isinstance(images, ImageInput) else results

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        candidate_labels: Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, str | float]] | list[list[dict[str, str | float]]]:
        """Labels in the format of transformers' pipelines, `[{"label": ..., "score": ...}]`, best first.

        Args:
            images: One image or a list.
            candidate_labels: Choose among these instead of the classifier's own names.
            top_k: Maximum number of labels per image; None for all.
            batch_size: Images per forward pass.

        Returns:
            A list of labels for one image; a list of such lists for a list of images.
        """
        several = [images] if isinstance(images, ImageInput) else list(images)
        names = candidate_labels if candidate_labels is not None else self.class_names or ()
        found = self.predict(
            several,
            class_names=candidate_labels,
            top_k=max(1, len(names)) if top_k is None else top_k,
            batch_size=batch_size,
        )
        rows = [[{"label": p.label, "score": p.probability} for p in row] for row in found]
        return rows[0] if isinstance(images, ImageInput) else rows

    def __repr__(self) -> str:
        """Model, adapter, classes and template, in one line."""
        config = getattr(self.model, "active_peft_config", None)
        adapter = "no adapter" if config is None else f"{config.peft_type.value} adapter"
        base = self.model if config is None else self.model.get_base_model()
        count = "no classes" if self.class_names is None else f"{len(self.class_names)} classes"
        return f"PromptedClassifier({type(base).__name__}, {adapter}, {count}, template={self.template!r})"

    def _pixel_batches(
        self, inputs: Sequence[ImageInput], batch_size: int
    ) -> Iterator[Float[Tensor, "batch channels rows cols"]]:
        """Batches of prepared images; threads decode the next one while the model runs on this one."""

        def pixels_at(position: int) -> Tensor:
            image = read_image(inputs[position], where=f"image {position}", value_range=self.value_range)
            return self.transform(image)

        if len(inputs) == 1:
            yield pixels_at(0)[None]
            return
        with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="peft_vlm-decode") as pool:
            waiting: list[Future[Tensor]] = []
            try:
                for start in range(0, len(inputs) + batch_size, batch_size):
                    ready = waiting
                    waiting = [
                        pool.submit(pixels_at, position)
                        for position in range(start, min(start + batch_size, len(inputs)))
                    ]
                    if ready:
                        yield torch.stack([future.result() for future in ready])
            finally:
                pool.shutdown(cancel_futures=True)  # an image that cannot be read, or Ctrl-C, ends the others too
