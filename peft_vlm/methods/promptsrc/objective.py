"""PromptSRC's objective: cross-entropy, held back by three terms that keep the prompted model near the frozen one.

Self-regulating Prompts: Foundational Model Adaptation without Forgetting, 2023, arXiv 2307.06948.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.streaming import ImageStream
from peft_vlm.distributed import divided
from peft_vlm.errors import check_choice, check_number
from peft_vlm.losses import distillation_loss, feature_distance
from peft_vlm.models.towers import device_of, towers_of
from peft_vlm.objective import Batch, ObjectiveOutput, Paper, prepared
from peft_vlm.registry import Preset, RunSize, sgd_training
from peft_vlm.text.class_features import PromptObjective, encode_classes, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts, reserve_slots

if TYPE_CHECKING:
    import transformers

    from peft_vlm.methods.promptsrc.aggregation import PromptAggregation

PAPER = Paper(
    title="Self-regulating Prompts: Foundational Model Adaptation without Forgetting",
    year=2023,
    arxiv_id="2307.06948",
    venue="ICCV 2023",
    bibtex="""@inproceedings{khattak2023self,
  title     = {Self-regulating Prompts: Foundational Model Adaptation without Forgetting},
  author    = {Khattak, Muhammad Uzair and Wasim, Syed Talal and Naseer, Muzammal and Khan, Salman and
               Yang, Ming-Hsuan and Khan, Fahad Shahbaz},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2023}
}""",
)


@torch.no_grad()
def frozen_class_features(model: nn.Module, prompts: ClassPrompts) -> Float[Tensor, "classes dim"]:
    """Text features of the model without its adapter: mean over the templates, then normalised once, in float32.

    Zero-shot ensembles (`peft_vlm.text.encode_classes`) also normalise before the mean; the official code of PromptSRC
    does not, which moves the features by 2e-3.

    Args:
        model: `PeftModel`; its adapter is switched off for this pass.
        prompts: Plain class prompts, divided among the processes of the training, with any number of templates.
    """
    towers, num_classes = towers_of(model), len(prompts.class_names)
    input_ids = prompts.input_ids.to(device_of(towers.model))

    def features_of(rows: Int[Tensor, " rows"]) -> Tensor:
        ids = input_ids[rows]
        return towers.finish_text(towers.embed_text(ids), ids, 0).float()

    with evaluation_mode(model), model.disable_adapter():
        features = divided(len(input_ids), features_of, chunk_size=256)
    features = features.unflatten(0, (-1, num_classes)).mean(dim=0)
    return nn.functional.normalize(features, dim=-1)


class PromptSRCObjective(PromptObjective):
    """Cross-entropy plus weighted distances to the frozen model's text features, image features and predictions.

    Formula: L = CE + w_text |g_p - g|_1 + w_image |f_p - f|_1 + w_logit KL(frozen || prompted); means over all
        entries, KL divided by batch x classes; g averages a template ensemble.

    Args:
        prompts: Plain class prompts with one template, which begins with the words the context starts from.
        frozen_prompts: The same classes in the templates that the frozen text features average, for example
            `OFFICIAL_TEMPLATES` or `IMAGENET_ENSEMBLE`. None: `prompts` as they are.
        text_weight: Weight of the text term. Official `TEXT_LOSS_WEIGHT`, 25.
        image_weight: Weight of the image term. Official `IMAGE_LOSS_WEIGHT`, 10.
        logit_weight: Weight of the divergence of predictions; 1 in the official code.
        gpa_mean: Gaussian prompt aggregation: epoch with the largest weight, counted from 1. None: no aggregation.
        gpa_std: Its standard deviation in epochs.
        image_cache: `"auto"`: frozen image features are computed once per run where the transform is not random;
            `"none"`: per batch. The same result.
        cache_batch_size: Images per forward pass while caching.
        num_workers: Processes that decode images while caching.

    Requirements:
        Batches with `pixel_values`, `labels` and `index`; a `PeftModel` with an active PromptSRC adapter.

    Relations:
        All weights 0: independent vision-language prompting (IVLP), where no frozen features are computed.

    Raises:
        ValueError: If a setting is out of range, or the prompts do not fit.

    References:
        arXiv 2307.06948, Sec. 3.2, Eq. (3) to (6); reductions and weights from the official code.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        frozen_prompts: ClassPrompts | None = None,
        text_weight: float | int = 25.0,
        image_weight: float | int = 10.0,
        logit_weight: float | int = 1.0,
        gpa_mean: float | int | None = None,
        gpa_std: float | int | None = None,
        image_cache: str = "auto",
        cache_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        frozen_prompts = frozen_prompts or prompts
        self.weights = {"text": text_weight, "image": image_weight, "logit": logit_weight}
        _check(prompts, frozen_prompts, self.weights, (gpa_mean, gpa_std), image_cache)
        super().__init__(prompts)
        self.frozen_prompts = frozen_prompts
        self.image_cache, self.cache_batch_size, self.num_workers = image_cache, cache_batch_size, num_workers
        self.aggregation: PromptAggregation | None = None
        if gpa_mean is not None and gpa_std is not None:
            from peft_vlm.methods.promptsrc import aggregation

            self.aggregation = aggregation.PromptAggregation(mean=gpa_mean, std=gpa_std)
        self._input_ids: Tensor | None = None
        self._fixed_text: Tensor | None = None
        self._frozen_text: Tensor | None = None
        self._frozen_images: Tensor | None = None
        self._trains_vision = True

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        settings: dict[str, Any] = {f"{name}_weight": weight for name, weight in self.weights.items()}
        if self.aggregation is not None:
            settings |= {"gpa_mean": self.aggregation.mean, "gpa_std": self.aggregation.std}
        return settings | {"frozen_templates": list(self.frozen_prompts.templates), "image_cache": self.image_cache}

    def check_stream(self) -> None:
        """A stream will do: its frozen features are computed in every step, as for all augmented images."""

    def callbacks(self, model: nn.Module) -> "list[transformers.TrainerCallback]":
        """The aggregation, when it is switched on.

        Args:
            model: The model whose trained tensors it averages.
        """
        if self.aggregation is None:
            return []
        self.aggregation.model = model
        return [self.aggregation]

    def state_dict(self) -> dict[str, Tensor]:
        """The aggregation so far."""
        return {} if self.aggregation is None else self.aggregation.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved aggregation.

        Args:
            state: Mapping of `state_dict`.
        """
        if self.aggregation is None:
            super().load_state_dict(state)
        else:
            self.aggregation.load_state_dict(state)

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Compute what stays the same all run: frozen text features, and frozen image features where pixels stay too.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images.
        """
        super().prepare(model, dataset)
        trained = towers_of(model).trained_sides()
        self._trains_vision = "vision" in trained
        ids = reserve_slots(model, self.prompts).input_ids
        self._input_ids = ids.to(device_of(model))
        self._fixed_text = None if "text" in trained else encode_classes(model, self.prompts, divide=True)
        self._frozen_text = self._frozen_images = None
        if self.weights["text"] or self.weights["logit"]:
            self._frozen_text = frozen_class_features(model, self.frozen_prompts)
        if self._needs_frozen_images and self.image_cache == "auto" and dataset.has_fixed_pixels:
            with evaluation_mode(model), model.disable_adapter():
                self._frozen_images = all_image_features(
                    model, dataset, batch_size=self.cache_batch_size, num_workers=self.num_workers, divide=True
                )

    @property
    def _needs_frozen_images(self) -> bool:
        """Whether frozen image features are used: by a term, or because the vision tower has no prompts."""
        return not self._trains_vision or bool(self.weights["image"] or self.weights["logit"])

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss over all classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `pixel_values`, `labels`, `index`.

        Returns:
            `cross_entropy` and, where their weight is not 0, `text_consistency`, `image_consistency` and
            `logit_consistency`, already weighted; logits of the prompted model.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        ids, towers = prepared(self._input_ids), towers_of(model)
        frozen = self._frozen_image_features(model, batch) if self._needs_frozen_images else None  # (batch, dim)
        image = frozen  # which, without prompts on the vision side, are the features of the prompted model too
        if self._trains_vision or image is None:
            image = towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)
        text = self._fixed_text  # (classes, dim)
        if text is None:
            text = towers.finish_text(towers.embed_text(ids), ids, 0)
        logits = towers.similarity_logits(image, text)
        terms = {"cross_entropy": nn.functional.cross_entropy(logits, batch["labels"])}
        if self.weights["text"] and self._frozen_text is not None:
            terms["text_consistency"] = self.weights["text"] * feature_distance(text, self._frozen_text)
        if self.weights["image"] and frozen is not None:
            terms["image_consistency"] = self.weights["image"] * feature_distance(image, frozen)
        if self.weights["logit"] and frozen is not None and self._frozen_text is not None:
            frozen_logits = towers.similarity_logits(frozen, self._frozen_text)
            # Official: KL with reduction "sum", divided by batch x classes.
            divergence = distillation_loss(logits, frozen_logits, reduction="official")
            terms["logit_consistency"] = self.weights["logit"] * divergence
        return ObjectiveOutput(terms, logits, batch["labels"])

    @torch.no_grad()
    def _frozen_image_features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Image features of the model without its adapter."""
        if self._frozen_images is not None:
            # Stored on the CPU, where they take no memory of the device.
            return self._frozen_images[batch["index"].cpu()].to(batch["labels"].device)
        towers = towers_of(model)
        with model.disable_adapter():
            return towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)


def _check(
    prompts: ClassPrompts,
    frozen_prompts: ClassPrompts,
    weights: dict[str, float | int],
    gpa: tuple[float | int | None, float | int | None],
    image_cache: str,
) -> None:
    """Refuse settings that cannot work."""
    prompts.check_one_template("An ensemble goes into `frozen_prompts`.")
    prompts.check_same_classes(frozen_prompts, name="frozen_prompts")
    for name, weight in weights.items():
        check_number(f"{name}_weight", weight, least=0)
    mean, std = gpa
    if (mean is None) != (std is None):
        raise ValueError(f"Expected both `gpa_mean` and `gpa_std` > 0, or neither, got {mean!r} and {std!r}.")
    if mean is not None and std is not None:  # both count epochs
        check_number("gpa_mean", mean)
        check_number("gpa_std", std, above=0)
    check_choice("image_cache", image_cache, ("auto", "none"))


# Hyper-parameters of the official runs, by protocol, for ViT-B/16 (`"teacher"`: ViT-L/14), and their templates.

# 60 of OpenAI's 80 ImageNet templates (openai/CLIP, `Prompt_Engineering_for_ImageNet.ipynb`, MIT licence), as chosen
# in muzairkhattak/PromptSRC, `trainers/imagenet_templates.py`, commit 8be7dcf. They describe photographs.
OFFICIAL_TEMPLATES = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
)


def _preset(*, depth: int, epochs: int, rate: float, batch: int, mean: float, std: float) -> Preset:
    """The settings that all configurations share, with those that differ."""
    tokens = {"num_text_tokens": 4, "num_vision_tokens": 4, "context_init": "a photo of a"}
    weights = {"text_weight": 25.0, "image_weight": 10.0, "logit_weight": 1.0}
    training = sgd_training(learning_rate=rate, batch=batch, epochs=epochs)
    return Preset(
        config=tokens | {"text_depth": depth, "vision_depth": depth},
        objective=weights | {"gpa_mean": mean, "gpa_std": std},
        training=training,
    )


PRESETS: dict[str, Preset] = {
    # vit_b16_c2_ep20_batch4_4+4ctx.yaml
    "base_to_new": _preset(depth=9, epochs=20, rate=0.0025, batch=4, mean=15.0, std=1.0),
    # vit_b16_c2_ep20_batch4_4+4ctx_cross_datasets.yaml; also for other domains
    "cross_dataset": _preset(depth=3, epochs=20, rate=0.0025, batch=4, mean=6.0, std=10.0),
    # vit_b16_c2_ep50_batch4_4+4ctx_few_shot.yaml, for the datasets that are not in `LATE_MEAN`
    "few_shot": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=30.0, std=30.0),
    # the same file, for the datasets in `LATE_MEAN`
    "few_shot_late": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=45.0, std=5.0),
    # PromptKD, stage 1: vit_l14_c2_ep20_batch8_4+4ctx.yaml
    "teacher": _preset(depth=9, epochs=20, rate=0.005, batch=8, mean=15.0, std=1.0),
}
"""Official configurations by protocol."""

LATE_MEAN = ("stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat")
"""Datasets that the official few-shot configuration gives the later Gaussian (`"few_shot_late"`)."""


def preset_for(protocol: str) -> Preset:
    """An official preset.

    Args:
        protocol: Key of `PRESETS`.
    """
    check_choice("protocol", protocol, sorted(PRESETS))
    preset = PRESETS[protocol]
    return Preset(config=dict(preset.config), objective=dict(preset.objective), training=dict(preset.training))


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: that of its protocol, its aggregation as long as the run.

    Args:
        run: Size of the run.
    """
    official = preset_for(run.protocol)
    preset = run.recommend(official, rate=0.01)
    share = preset.training["num_train_epochs"] / official.training["num_train_epochs"]
    scaled = {name: round(share * official.objective[name], 3) for name in ("gpa_mean", "gpa_std")}
    return Preset(config=preset.config, objective={**preset.objective, **scaled}, training=preset.training)
