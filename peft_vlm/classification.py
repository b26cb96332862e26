"""Cross-entropy over class prompts, for training methods that learn on the text side alone."""

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import AdapterError, check_choice
from peft_vlm.models.towers import device_of, towers_of
from peft_vlm.objective import Batch, ObjectiveOutput
from peft_vlm.text.class_features import PromptObjective, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts, reserve_slots

logger = logging.getLogger(__name__)


class ClassificationObjective(PromptObjective):
    """Mean cross-entropy of scaled cosines over all classes; only the text tower runs with autograd.

    Formula: L = mean_i CE(exp(scale) * cos(f(x_i), g(context, name_c)), y_i) over all classes c.

    Methods with further terms override `loss_terms`.

    Args:
        prompts: Plain class prompts with one template. What it says beside the class name stays in the prompt, after
            the context; a template that begins with the words the context was initialised from gives them up.
        image_cache: `"ram"`: image features are computed in large batches, once per run when the transform is not
            random, else once per epoch with that epoch's augmentation; `"none"`: per batch. The same result.
        cache_batch_size: Images per forward pass while caching.
        num_workers: Processes that decode images while caching.

    Requirements:
        Batches with `index` and `labels` (and `pixel_values` when `image_cache` is `"none"`); a `PeftModel` whose
        active adapter trains nothing on the vision side.

    Raises:
        ValueError: If the prompts have more than one template, or `image_cache` is unknown.
    """

    def __init__(
        self, prompts: ClassPrompts, *, image_cache: str = "ram", cache_batch_size: int = 64, num_workers: int = 0
    ) -> None:
        if len(prompts.templates) != 1:
            raise ValueError(
                f"Expected class prompts with one template, got {len(prompts.templates)}: {prompts.templates!r}. "
                "The learned context takes the place of an ensemble."
            )
        check_choice("image_cache", image_cache, ("ram", "none"))
        super().__init__(prompts)
        self.needs_pixels = image_cache == "none"
        self.image_cache, self.cache_batch_size, self.num_workers = image_cache, cache_batch_size, num_workers
        self._images: Tensor | None = None
        self._input_ids: Tensor | None = None

    def config_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"image_cache": self.image_cache}

    def check_stream(self) -> None:
        """Accept a stream where no image features are stored."""
        if self.image_cache != "none":
            super().check_stream()

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Reserve the context's places in the prompts, and drop the image features of an earlier run.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Not used; the classes come from the prompts.

        Raises:
            ValueError: If something on the vision side is to be trained.
        """
        if "vision" in towers_of(model).trained_sides():
            raise ValueError(
                f"Expected nothing to train on the vision side, whose features `{type(self).__name__}` computes "
                f"without gradients; got `modules_to_save`={model.active_peft_config.modules_to_save!r}. Leave it "
                "out, or use PromptSRC with all weights 0."
            )
        ids = reserve_slots(model, self.prompts).input_ids
        self._input_ids = ids.to(device_of(model))
        self._images = None

    def epoch_start(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream, epoch: int) -> None:
        """Compute the image features of the epoch.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        if self.image_cache == "none" or (self._images is not None and dataset.has_fixed_pixels):
            return
        with evaluation_mode(model):
            self._images = all_image_features(
                model, dataset, batch_size=self.cache_batch_size, num_workers=self.num_workers, divide=True
            )
        megabytes = self._images.numel() * 4 / 2**20
        logger.info("Image features: %d x %d = %.1f MB in RAM", *self._images.shape, megabytes)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Compute the loss over all classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `labels`, and `index` into the stored features or `pixel_values`.

        Returns:
            The terms of `loss_terms`, and the logits.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        if self._input_ids is None:
            raise RuntimeError("Expected `prepare(model, dataset)` before the first batch; the trainer calls it.")
        towers = towers_of(model)
        text = towers.finish_text(towers.embed_text(self._input_ids), self._input_ids, 0)
        logits = towers.similarity_logits(self._image_features(model, batch), text)
        return ObjectiveOutput(self.loss_terms(logits, text, batch["labels"]), logits, batch["labels"])

    def loss_terms(
        self, logits: Float[Tensor, "batch classes"], text: Float[Tensor, "classes dim"], labels: Int[Tensor, " batch"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted terms of the loss by name.

        Args:
            logits: Scaled cosines.
            text: Class features of the model with its adapter, not normalised.
            labels: Index into the classes.

        Returns:
            `cross_entropy`, a mean over the batch.
        """
        return {"cross_entropy": nn.functional.cross_entropy(logits, labels)}

    def _image_features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Frozen image features, stored or computed."""
        if self.image_cache == "ram":
            if self._images is None:
                raise AdapterError("Expected stored image features, got none. Call `epoch_start` before training.")
            return self._images[batch["index"].cpu()].to(batch["labels"].device)
        towers = towers_of(model)
        with torch.no_grad():
            return towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)
