"""The CLIP of TSE, which looks at the prompted images and says how much of the right class is in them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from peft_vlm.errors import DataError
from peft_vlm.methods.tvp.sources import share_once
from peft_vlm.models.patch_embedding import input_size_of
from peft_vlm.models.towers import towers_of
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import ClassPrompts, readable


class ClipGuide:
    """A frozen CLIP with class prompts of its own, on which the prompt in training is added too.

    The features of the class prompts are computed once: nothing on the text side ever changes.

    Args:
        model: CLIP-like model of any size. It is wrapped when training begins.
        prompts: The classes in label order, tokenised for it. Official template: `"this is a photo of a {}"`.
        processor: Its image processor; batches then have `clip_pixel_values` made by it. None: it looks at
            `pixel_values`, normalised as for the trained model, which then must have its input size. The official code
            does so, with models of one size and normalisation.
    """

    def __init__(self, model: nn.Module, prompts: ClassPrompts, *, processor: Any = None) -> None:
        self.model, self.prompts, self.processor = model, prompts, processor
        self._shared: PeftModel | None = None
        self._class_features: Tensor | None = None

    def prepare(self, source: PeftModel, class_names: Sequence[str]) -> None:
        """Put the source's prompt on the CLIP and compute its class features.

        Args:
            source: Trained model with an active TVP adapter, on its device.
            class_names: Classes that the labels of the training images index.

        Raises:
            DataError: If the CLIP's prompts are of other classes.
        """
        own, expected = ([readable(n) for n in names] for names in (self.prompts.class_names, class_names))
        if own != expected:
            raise DataError(
                f"Expected class prompts of the CLIP for the {len(expected)} classes of the training images in their "
                f"order, beginning {expected[:3]!r}, got {len(own)}, beginning {own[:3]!r}. Make them with "
                "`tokenize_for_model(clip, tokenizer, dataset.class_names, template='this is a photo of a {}')`."
            )
        processor = self.processor
        if processor is None:
            config = source.active_peft_config
            processor = CLIPImageProcessorPil(image_mean=list(config.image_mean), image_std=list(config.image_std))
        self._shared = share_once(self._shared, source, self.model, processor=processor)
        self._shared.to(next(source.parameters()).device).eval()
        self.refresh()

    def refresh(self) -> None:
        """Compute the class features anew."""
        self._class_features = encode_classes(self._shared, self.prompts, divide=True)

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Scaled cosines between the prompted images and the classes.

        Args:
            batch: `clip_pixel_values`, or `pixel_values` when the CLIP has no processor of its own.

        Raises:
            DataError: If the column is missing or of another size than the CLIP takes.
            RuntimeError: If `prepare` was not called.
        """
        if self._shared is None or self._class_features is None:
            raise RuntimeError(
                "Expected `prepare(source, class_names)` before the first batch; the objective calls it."
            )
        column = "pixel_values" if self.processor is None else "clip_pixel_values"
        pixels, size = batch.get(column), input_size_of(self._shared)
        if pixels is None or pixels.ndim != 4 or (size is not None and tuple(pixels.shape[-2:]) != size):
            shape = None if pixels is None else tuple(pixels.shape)
            raise DataError(
                f"Expected `{column}` of {size} pixels per image for the CLIP of TSE, got {shape!r}. Give its image "
                "processor to both `ClipGuide(..., processor=...)` and `QuestionCollator(..., clip_processor=...)`."
            )
        towers = towers_of(self._shared)
        images = towers.finish_image(towers.embed_image(pixels), 0)
        return towers.similarity_logits(images, self._class_features)
