"""Skip Tuning's objective: cross-entropy over the selected classes, from cached hidden states upwards.

Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves, 2025, arXiv
2412.11509.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore, ViewCache, check_views, should_store
from peft_vlm.data.streaming import ImageStream
from peft_vlm.distributed import divided, gather_rows
from peft_vlm.errors import DataError, check_choice
from peft_vlm.losses import num_top_classes, rank_classes, rank_keep_probability, selected_classes
from peft_vlm.models.sharding import equal_chunks
from peft_vlm.models.towers import Towers, device_of, side_of, towers_of
from peft_vlm.objective import Batch, EpochBatchSampler, ObjectiveOutput, Paper, prepared
from peft_vlm.registry import Preset, RunSize
from peft_vlm.text.class_features import PromptObjective, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts

logger = logging.getLogger(__name__)


PAPER = Paper(
    title="Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves",
    year=2025,
    arxiv_id="2412.11509",
    venue="CVPR 2025",
    bibtex="""@inproceedings{wu2025skip,
  title     = {Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves},
  author    = {Wu, Shihan and Zhang, Ji and Zeng, Pengpeng and Gao, Lianli and Song, Jingkuan and Shen, Heng Tao},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025}
}""",
)


class SkipTuningBatchSampler(EpochBatchSampler):
    """Batches for one epoch.

    `"one_class"`: repeatedly choose one of the remaining classes uniformly and draw a batch of its remaining images.
    `"random"`: draw batches from all remaining images. What is left when fewer than a full batch remain is kept as a
    smaller batch (`remainder="keep"`) or left out of this epoch (`remainder="drop"`, the official rule).

    Args:
        labels: Class of each image.
        batch_size: Images per batch.
        seed: Seed of the run; the epoch is added to it.
        composition: `"one_class"` (official for 4 or more shots) or `"random"` (official below that).
        remainder: What happens to images that do not fill a batch.

    Raises:
        DataError: With `remainder="drop"`, if a class (or the whole set) has fewer images than a batch, which would
            never be seen. The official code crashes there.

    Deviation: The default keeps remainders, so that every shot is used in every epoch.
    """

    def __init__(
        self,
        labels: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        composition: str,
        remainder: str = "keep",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.composition, self.remainder = composition, remainder
        self.pools: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self.pools.setdefault(label if composition == "one_class" else 0, []).append(index)
        small = {label: len(pool) for label, pool in self.pools.items() if len(pool) < batch_size}
        if remainder == "drop" and small:
            raise DataError(
                f"Expected at least `batch_size`={batch_size} images in each "
                f"{'class' if composition == 'one_class' else 'training set'} with remainder='drop', got {small!r} "
                "(class: images). Use remainder='keep' or a smaller batch."
            )
        dropped = sum(len(pool) % batch_size for pool in self.pools.values()) if remainder == "drop" else 0
        if dropped:
            logger.info("Batches of %d leave out %d of %d images in each epoch.", batch_size, dropped, len(labels))

    def __len__(self) -> int:
        """Batches in an epoch; the same in every epoch."""
        extra = self.batch_size - 1 if self.remainder == "keep" else 0
        return sum((len(pool) + extra) // self.batch_size for pool in self.pools.values())

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the epoch set by `set_epoch`."""
        return self.draw(random.Random(self.seed + self.epoch))

    def draw(self, rng: random.Random) -> Iterator[list[int]]:
        """Batches drawn with a given generator.

        Args:
            rng: Python generator; seeded like the official run's, it gives the official batches.

        Yields:
            Lists of dataset positions.
        """
        pools = {label: list(pool) for label, pool in self.pools.items()}
        while pools:
            label = rng.choice(list(pools)) if self.composition == "one_class" else 0
            pool = pools[label]
            batch = rng.sample(pool, min(self.batch_size, len(pool)))
            taken = set(batch)
            pools[label] = pool = [index for index in pool if index not in taken]
            if not pool or (self.remainder == "drop" and len(pool) < self.batch_size):
                del pools[label]
            yield batch


_CHUNK = 256
"""Class prompts in a pass without autograd."""


def _text_hidden_states(
    towers: Towers, input_ids: Int[Tensor, "prompts tokens"], *, start: int
) -> Float[Tensor, "prompts tokens width"]:
    """What enters text layer `start` for every class prompt, all run long: nothing below that layer is trained."""

    def states_of(rows: Int[Tensor, " rows"]) -> Tensor:
        return towers.run_text(towers.embed_text(input_ids[rows]), 0, start)

    with torch.no_grad():
        return divided(len(input_ids), states_of, chunk_size=_CHUNK)


def _initial_prototypes(
    model: nn.Module,
    towers: Towers,
    hidden: Float[Tensor, "prompts tokens width"],
    input_ids: Int[Tensor, "prompts tokens"],
    *,
    start: int,
) -> Float[Tensor, "prompts dim"]:
    """Unit-norm text features of the untouched base model, in float32, from the states that enter layer `start`."""

    def features_of(rows: Int[Tensor, " rows"]) -> Tensor:
        return towers.finish_text(hidden[rows], input_ids[rows], start)

    with torch.no_grad(), model.disable_adapter():
        features = divided(len(hidden), features_of, chunk_size=_CHUNK)
    return nn.functional.normalize(features.float(), dim=-1)


class SkipTuningObjective(PromptObjective):
    """Mean cross-entropy of scaled cosines over the classes that CSkip keeps, with LSkip's caches.

    Formula: L = mean_i CE(exp(scale) * cos(f(x_i), t_c), y_i) over c in K, where K holds the `num_top` classes most
        similar
    to the batch (by the initial text features) and a random tail.

    Args:
        prompts: Tokenised class prompts with a single template.
        top_ratio: Share (up to 1) or number of classes always selected. Paper: r; official `TOP_RATIO`, 0.5.
        max_top: Upper bound of that number; ignored when `top_ratio` is 1. Official `MAX_TOP`, 50.
        tail_scale: Scale of the tail's exponential distribution. Paper: lambda; official `LAMBDA`, 0.3.
        redraw_tail: When the selected tail ranks are drawn: `"never"` (once per run, as in the official code),
            `"epoch"` or `"step"`.
        image_cache: Where the image states below the tuned layers are kept: `"ram"`, `"disk"` (memory-mapped), or
            `"none"`, which runs these layers per batch, with the same result. `"auto"`: in RAM where images come again
            unchanged (no random transform, or `num_views`), else per batch. The official code: in RAM, per epoch.
        num_views: Augmented views per image that come again, epoch e training on view e modulo this number; None: new
            augmentation in every epoch.
        cache_folder: Folder of the memory-mapped file; temporary by default.
        cache_batch_size: Images per forward pass of the frozen layers; bounds their working memory.
        num_workers: Processes that decode images while caching.
        batch_composition: `"one_class"` batches (official for 4 or more shots) or `"random"` ones.
        remainder: `"keep"` smaller last batches or `"drop"` them (official).
        seed: Seed of the tail draw.

    Requirements:
        Batches with `index` and `labels` (and `pixel_values` when `image_cache` is `"none"`); a `PeftModel` with an
        active Skip Tuning adapter; at least two classes.

    Relations:
        With `top_ratio=1` it is full cross-entropy; with `start_layer=0` and no cache it is fine-tuning of both towers
        except embeddings and logit scale.

    Raises:
        ValueError: If a setting is not among its choices, or the prompts have more than one template.

    References:
        arXiv 2412.11509, Sec. 4; batch rule, tail mask and cap from the official code.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        top_ratio: float | int = 0.5,
        max_top: int = 50,
        tail_scale: float = 0.3,
        redraw_tail: str = "never",
        image_cache: str = "auto",
        num_views: int | None = None,
        cache_folder: str | Path | None = None,
        cache_batch_size: int = 32,
        num_workers: int = 0,
        batch_composition: str = "one_class",
        remainder: str = "keep",
        seed: int = 0,
    ) -> None:
        prompts.check_one_template("An ensemble has no single prompt to train; evaluate with it instead.")
        check_choice("redraw_tail", redraw_tail, ("never", "epoch", "step"))
        check_choice("image_cache", image_cache, ("auto", "ram", "disk", "none"))
        check_views(num_views, image_cache)
        check_choice("batch_composition", batch_composition, ("one_class", "random"))
        check_choice("remainder", remainder, ("keep", "drop"))
        super().__init__(prompts)
        num_classes = len(prompts.class_names)
        self.settings: dict[str, Any] = {
            "top_ratio": top_ratio,
            "max_top": max_top,
            "tail_scale": tail_scale,
            "redraw_tail": redraw_tail,
            "image_cache": image_cache,
            "num_views": num_views,
            "batch_composition": batch_composition,
            "remainder": remainder,
            "seed": seed,
        }
        self.num_top = num_top_classes(num_classes, top_ratio=top_ratio, max_top=max_top)
        self.keep_probability = rank_keep_probability(num_classes, self.num_top, tail_scale=tail_scale)
        self.redraw_tail, self.batch_composition, self.remainder = redraw_tail, batch_composition, remainder
        place = "disk" if image_cache == "disk" else "ram"
        store = RowStore(place, name="skip tuning hidden states", folder=cache_folder)
        self._views = ViewCache(store, num_views=num_views, batch_size=cache_batch_size, num_workers=num_workers)
        self.cache = None if image_cache == "none" else self._views
        self.cache_batch_size = cache_batch_size
        self.needs_pixels = self.cache is None
        self.generator = torch.Generator().manual_seed(seed)
        self.tail_uniform = torch.rand(num_classes, generator=self.generator)
        self._text: tuple[Tensor, Tensor, Tensor] | None = None
        self._starts = (0, 0)

    @classmethod
    def texts_per_step(cls, num_classes: int, *, batch_size: int, settings: Mapping[str, Any]) -> int:
        """The classes that CSkip keeps: the most similar ones, the tail as it is drawn first, and those of the images.

        Args:
            num_classes: All classes.
            batch_size: Images.
            settings: Those of the constructor, by name.
        """
        num_top = num_top_classes(num_classes, top_ratio=settings["top_ratio"], max_top=settings["max_top"])
        probability = rank_keep_probability(num_classes, num_top, tail_scale=settings["tail_scale"])
        drawn = torch.rand(num_classes, generator=torch.Generator().manual_seed(settings["seed"])) < probability
        others = 0 if settings["batch_composition"] == "one_class" else max(0, batch_size - num_top)
        return min(num_classes, int(drawn.sum()) + others)

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dict(self.settings)

    def adapt_to(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Decide whether the states of the images are stored: what lies below the tuned layers never trains."""
        stores, self._why = should_store(self.settings["image_cache"], dataset, num_views=self.settings["num_views"])
        self.cache = self._views if stores else None
        self.needs_pixels = not stores

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset) -> None:
        """Run the frozen text layers and compute the prototypes, once per run.

        Args:
            model: `PeftModel` with the active Skip Tuning adapter.
            dataset: Training images; the classes come from the prompts.
        """
        super().prepare(model, dataset)
        self.adapt_to(model, dataset)
        logger.info("Image states are %s: %s.", "computed per batch" if self.needs_pixels else "stored", self._why)
        self._views.num_views = 1 if dataset.has_fixed_pixels else self.settings["num_views"]
        self._views.bind(dataset, towers_of(model).model)
        dataset.repeat_views(self.settings["num_views"])
        self._starts = model.active_peft_config.start_layers
        towers, start = towers_of(model), self._starts[1]
        ids = self.prompts.input_ids.to(device_of(towers.model))
        with evaluation_mode(model):
            hidden = _text_hidden_states(towers, ids, start=start)
            self._text = (ids, hidden, _initial_prototypes(model, towers, hidden, ids, start=start))

    def epoch_start(self, model: nn.Module, dataset: ImageClassificationDataset, epoch: int) -> None:
        """Store the states of the images as this epoch sees them, unless they are there; redraw the tail if asked to.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        if self.redraw_tail == "epoch" and epoch > 0:
            self._draw_tail(epoch)
        if self.cache is None:
            return
        towers, start = towers_of(model), self._starts[0]

        def encode(pixels: Tensor) -> Tensor:
            return towers.run_vision(towers.embed_image(pixels), 0, start)

        with evaluation_mode(model):
            self.cache.start_epoch(encode, dataset, epoch, device=device_of(model))

    def batch_sampler(self, labels: Sequence[int], *, batch_size: int, seed: int) -> SkipTuningBatchSampler:
        """Batches by the official rule.

        Args:
            labels: Class of each training image.
            batch_size: Images per batch.
            seed: Seed of the run.
        """
        return SkipTuningBatchSampler(
            labels,
            batch_size=batch_size,
            seed=seed,
            composition=self.batch_composition,
            remainder=self.remainder,
        )

    def param_groups(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by tower, for staged learning rates.

        Args:
            named_parameters: Names and parameters that require a gradient.
        """
        groups: dict[str, list[nn.Parameter]] = {"text": [], "vision": []}
        for name, parameter in named_parameters:
            groups[side_of(name) or "text"].append(parameter)
        return groups

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss over the selected classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `labels`, and `index` into the cache or `pixel_values`.

        Returns:
            The term `cross_entropy` (mean over the batch) and logits over the selected classes, with remapped labels.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        ids, text_hidden, prototypes = prepared(self._text)
        towers, labels = towers_of(model), batch["labels"]
        image = towers.finish_image(self._image_hidden(model, batch), self._starts[0])  # (batch, dim)
        # The choice of classes follows the image features of this step, but no gradient flows through it.
        selected = self._select_classes(image.detach(), prototypes, labels)
        if selected is not None:
            ids, text_hidden = ids[selected], text_hidden[selected]
            labels = torch.searchsorted(selected, labels)  # positions among the selected classes, which are sorted
        if towers.text_is_causal:  # states behind the last end-of-text token influence nothing
            length = int(towers.pooled_positions(ids).max()) + 1
            ids, text_hidden = ids[:, :length], text_hidden[:, :length]
        text = towers.finish_text(text_hidden, ids, self._starts[1])
        logits = towers.similarity_logits(image, text)
        return ObjectiveOutput({"cross_entropy": nn.functional.cross_entropy(logits, labels)}, logits, labels)

    def state_dict(self) -> dict[str, Tensor]:
        """The tail draw and its generator."""
        return {"tail_uniform": self.tail_uniform, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tail draw.

        Args:
            state: Mapping of `state_dict`.

        Raises:
            ValueError: If the number of classes differs.
        """
        if state["tail_uniform"].shape != self.tail_uniform.shape:
            raise ValueError(
                f"Expected a state for {len(self.tail_uniform)} classes, got one for {len(state['tail_uniform'])}. "
                "Resume with the class names of the interrupted run."
            )
        self.tail_uniform = state["tail_uniform"]
        self.generator.set_state(state["generator"])

    def _image_hidden(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch tokens width"]:
        """What enters the first tuned vision layer, from the cache or computed without autograd."""
        if self.cache is not None:
            return self.cache.read(batch["index"].to(batch["labels"].device))
        towers, pixels = towers_of(model), batch["pixel_values"]
        chunks = equal_chunks(model, pixels, self.cache_batch_size)
        with torch.no_grad():
            hidden = [towers.run_vision(towers.embed_image(chunk), 0, self._starts[0]) for chunk in chunks]
        return torch.cat(hidden)[: len(pixels)]

    def _draw_tail(self, epoch: int | None = None) -> None:
        """Draw anew; per epoch from (seed, epoch), so that a resumed run draws the same."""
        if epoch is not None:
            self.generator.manual_seed(self.settings["seed"] * 1_000_003 + epoch)
        self.tail_uniform = torch.rand(len(self.tail_uniform), generator=self.generator)

    def _select_classes(
        self,
        image: Float[Tensor, "batch dim"],
        prototypes: Float[Tensor, "classes dim"],
        labels: Int[Tensor, " batch"],
    ) -> Int[Tensor, " selected"] | None:
        """Ids of the selected classes, ascending; None when nothing is skipped."""
        if self.num_top == len(prototypes):
            return None
        if self.redraw_tail == "step":
            self._draw_tail()
        image, labels = gather_rows(image), gather_rows(labels)  # the batch of all processes decides
        # Rank by cosine to the initial text features: position 0 is the class most similar to the batch.
        ranked = rank_classes(nn.functional.normalize(image.float(), dim=-1), prototypes, labels)
        keep_rank = (self.tail_uniform < self.keep_probability).to(ranked.device)
        return selected_classes(ranked, keep_rank, labels)


# Hyper-parameters of the official runs, by protocol.

_TRAINING = {"optim": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "per_device_train_batch_size": 4}
_OBJECTIVE = {"top_ratio": 0.5, "max_top": 50, "tail_scale": 0.3, "redraw_tail": "never"}


def _preset(**training: Any) -> Preset:
    """The settings that all configurations share, with the training settings that differ."""
    return Preset(config={"start_layer": 6}, objective=dict(_OBJECTIVE), training=_TRAINING | training)


PRESETS: dict[str, Preset] = {
    # vit_b16_bs4.yaml: "text 2e-5, image 5e-6", one warm-up epoch at 1e-6 for both towers
    "base_to_new": _preset(
        learning_rate=2e-5,
        vision_learning_rate=5e-6,
        num_train_epochs=20,
        warmup_epochs=1,
        warmup_learning_rate=1e-6,
    ),
    # vit_b16_bs4_cross_datasets.yaml
    "cross_dataset": _preset(
        learning_rate=1e-5,
        vision_learning_rate=1e-6,
        num_train_epochs=20,
        warmup_epochs=1,
        warmup_learning_rate=1e-8,
    ),
    # vit_b16_bs4_few_shot.yaml: one learning rate, no warm-up
    "few_shot": _preset(learning_rate=1e-5, num_train_epochs=40, warmup_epochs=0),
}
"""`base_to_new`, `cross_dataset` and `few_shot`; see `preset_for` for the data-dependent parts."""

QUARTER_EPOCHS = ("imagenet", "sun397", "food101")
"""Datasets on which the official scripts train a quarter of the epochs."""


def preset_for(protocol: str, *, shots: int, quarter_epochs: bool = False) -> Preset:
    """An official preset with the parts that depend on the data filled in.

    Args:
        protocol: Key of `PRESETS`.
        shots: Images per class; below 4 the official batches are random instead of one-class.
        quarter_epochs: Train `int(epochs / 4)` epochs, as the official scripts do on the `QUARTER_EPOCHS` datasets.
    """
    check_choice("protocol", protocol, sorted(PRESETS))
    preset = PRESETS[protocol]
    composition = "one_class" if shots >= 4 else "random"
    epochs = preset.training["num_train_epochs"] // (4 if quarter_epochs else 1)
    return Preset(
        config=dict(preset.config),
        objective={**preset.objective, "batch_composition": composition},
        training={**preset.training, "num_train_epochs": epochs},
    )


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: that of its protocol; on a small model random batches.

    Args:
        run: Size of the run.
    """
    official = preset_for(run.protocol, shots=run.fewest)
    return run.recommend(official, rate=0.02, objective={"batch_composition": "random"})
