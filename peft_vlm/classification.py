"""Cross-entropy over class prompts, for any adapter on a CLIP-like model."""

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore, ViewCache, check_views, should_store
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import AdapterError, check_choice
from peft_vlm.models.towers import Side, device_of, image_features, towers_of
from peft_vlm.objective import Batch, ObjectiveOutput, prepared
from peft_vlm.text.class_features import PromptObjective, encode_classes, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts, reserve_slots

logger = logging.getLogger(__name__)


class ClassificationObjective(PromptObjective):
    """Mean cross-entropy of scaled cosines over all classes, for any adapter on a CLIP-like model, also PEFT's own.

    Formula: L = mean_i CE(exp(scale) * cos(f(x_i), g(name_c)) + bias, y_i) over all classes c; only SigLIP has a bias.

    What nothing trains on is computed once: image features where the vision side is frozen, class features where the
    text side is. A full fine-tuning, a LoRA in both towers and a learned context differ only in that.

    Methods with further terms override `loss_terms`.

    Args:
        prompts: Plain class prompts with one template. With a learned context, what the template says beside the class
            name stays in the prompt, after the context; one that begins with the words the context was initialised
            from gives them up.
        image_cache: Where the vision side is frozen: `"ram"`: image features are stored, once per run where every
            epoch sees the same pixels, else once per view or epoch; `"none"`: computed per batch. The same result.
            `"auto"`: stored where images come again unchanged (no random transform, or `num_views`), else per batch.
        num_views: Augmented views per image that come again, epoch e training on view e modulo this number; None: new
            augmentation in every epoch.
        cache_batch_size: Images per forward pass while caching.
        num_workers: Processes that decode images while caching.

    Requirements:
        Batches with `labels` and, with stored image features, `index`, else `pixel_values`.

    Raises:
        ValueError: If the prompts have more than one template, or `image_cache` is unknown.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(clip, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        trainer = VLMTrainer(model, args, train_dataset=images, objective=ClassificationObjective(prompts))
        ```
    """

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        image_cache: str = "auto",
        num_views: int | None = None,
        cache_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        prompts.check_one_template("What is trained takes the place of an ensemble.")
        check_choice("image_cache", image_cache, ("auto", "ram", "none"))
        check_views(num_views, image_cache)
        super().__init__(prompts)
        self.image_cache, self.num_views, self.needs_pixels = image_cache, num_views, image_cache == "none"
        self._views = ViewCache(
            RowStore("ram", name="image features"),
            num_views=num_views,
            batch_size=cache_batch_size,
            num_workers=num_workers,
        )
        self._trained: set[Side] | None = None
        self._input_ids: Tensor | None = None
        self._text: Tensor | None = None

    def config_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"image_cache": self.image_cache, "num_views": self.num_views}

    def adapt_to(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Decide whether image features are stored: not where the vision side trains, or where it would not pay.

        Args:
            model: Model with its adapter.
            dataset: Training images.

        Raises:
            AdapterError: If it is an AdaLoRA.
        """
        kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
        if kind == "ADALORA":
            raise AdapterError(
                "Expected an adapter that a plain loss trains, got AdaLoRA, whose ranks are given out in every step "
                "and whose loss has a term of its own; here it would stay a LoRA of `init_r`. Take `LoraConfig`."
            )
        self._trained = towers_of(model).trained_sides()
        stores, self._why = should_store(self.image_cache, dataset, num_views=self.num_views)
        if "vision" in self._trained:
            stores, self._why = False, "the vision side trains"
        self.needs_pixels = not stores

    def check_stream(self) -> None:
        """Accept a stream where no image features are stored."""
        if not self.needs_pixels:
            super().check_stream()

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Reserve the places of a learned context in the prompts, or compute class features that stay as they are.

        Args:
            model: Model with its adapter.
            dataset: Training images; the classes come from the prompts.
        """
        super().prepare(model, dataset)
        self.adapt_to(model, dataset)
        logger.info("Image features are %s: %s.", "computed per batch" if self.needs_pixels else "stored", self._why)
        if not self.needs_pixels:
            self._views.num_views = 1 if dataset.has_fixed_pixels else self.num_views
            self._views.bind(dataset, towers_of(model).model)
            dataset.repeat_views(self.num_views)
        self._text = None
        ids = reserve_slots(model, self.prompts).input_ids
        self._input_ids = ids.to(device_of(model))
        if "text" not in (self._trained or ()):
            self._text = encode_classes(model, self.prompts, divide=True)

    def epoch_start(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream, epoch: int) -> None:
        """Store the image features of the epoch's view, unless they are there.

        Args:
            model: Model with its adapter.
            dataset: Training images; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        if self.needs_pixels:
            return

        def encode(pixels: Tensor) -> Tensor:
            return image_features(model, pixels).float()

        with evaluation_mode(model):
            self._views.start_epoch(encode, dataset, epoch, device=device_of(model))

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Compute the loss over all classes.

        Args:
            model: Model with its adapter.
            batch: `labels`, and `index` into the stored features or `pixel_values`.

        Returns:
            The terms of `loss_terms`, and the logits.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        ids, towers, text = prepared(self._input_ids), towers_of(model), self._text
        if text is None:
            text = towers.finish_text(towers.embed_text(ids), ids, 0)  # (classes, dim)
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
        """Image features: stored, computed, or, where the vision side trains, computed with gradients."""
        if not self.needs_pixels:
            return self._views.read(batch["index"].to(batch["labels"].device))
        towers = towers_of(model)
        # Without gradients where nothing on the vision side trains: no activations are kept.
        with torch.set_grad_enabled("vision" in (self._trained or ()) and torch.is_grad_enabled()):
            return towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)
