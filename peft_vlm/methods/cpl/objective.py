"""CPL's objective: CoCoOp's cross-entropy, and every class text closer to the image than to its counterfactual.

CPL: Counterfactual Prompt Learning for Vision and Language Models, 2022, arXiv 2210.10362.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.classification import ClassificationObjective
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.streaming import ImageStream
from peft_vlm.distributed import divided, num_processes, sum_over_processes
from peft_vlm.errors import AdapterError, ClassNameError, check_choice, check_number, shown
from peft_vlm.models.towers import device_of, image_features, text_features, towers_of
from peft_vlm.objective import Batch, Objective, ObjectiveOutput, Paper, prepared
from peft_vlm.registry import Preset, RunSize, sgd_training
from peft_vlm.text.class_features import conditioned_scores, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts

if TYPE_CHECKING:
    from transformers import TrainerCallback

PAPER = Paper(
    title="CPL: Counterfactual Prompt Learning for Vision and Language Models",
    year=2022,
    arxiv_id="2210.10362",
    venue="EMNLP 2022",
    bibtex="""@inproceedings{he2022cpl,
  title     = {{CPL}: Counterfactual Prompt Learning for Vision and Language Models},
  author    = {He, Xuehai and Yang, Diji and Feng, Weixi and Fu, Tsu-Jui and Akula, Arjun and Jampani, Varun and
               Narayana, Pradyumna and Basu, Sugato and Wang, William Yang and Wang, Xin Eric},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year      = {2022}
}""",
)


def greedy_target(
    features: Float[Tensor, "classes dim"],
    negatives: Float[Tensor, "classes dim"],
    own_texts: Float[Tensor, "classes dim"],
    negative_texts: Float[Tensor, "classes dim"],
) -> Float[Tensor, "classes dim"]:
    """Dimensions that turn an image into its negative: 1 where the search exchanges a number, -1 elsewhere.

    One dimension at a time takes the negative image's number: the one by which the normalised feature comes closest to
    the text of the negative class. It ends when that text scores higher than the class's own. Nothing is normalised
    beforehand. Where no exchange gives a positive score, the last dimension is taken, as in the official code.

    Args:
        features: An image of each class.
        negatives: An image of each one's negative class.
        own_texts: Text features of the classes.
        negative_texts: Those of their negative classes.
    """
    edited, dim = features.clone(), features.shape[-1]
    chosen = torch.zeros_like(features, dtype=torch.bool)
    searching = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for _ in range(dim):
        # (classes, dim): product with the negative text and squared length, were this one number exchanged
        dots = (edited * negative_texts).sum(dim=-1, keepdim=True) + (negatives - edited) * negative_texts
        squares = edited.square().sum(dim=-1, keepdim=True) + negatives.square() - edited.square()
        scores = (dots / squares.clamp(min=1e-12).sqrt()).masked_fill(chosen, -torch.inf)
        score, best = scores.max(dim=-1)
        best = torch.where(score > 0, best, dim - 1)
        rows = searching.nonzero()[:, 0]  # a class whose search has ended keeps what it has
        chosen[rows, best[rows]] = True
        edited = torch.where(chosen, negatives, edited)
        margin = (edited * (negative_texts - own_texts)).sum(dim=-1)
        searching &= margin <= 0
        if not bool(searching.any()):
            break
    return torch.where(chosen, 1.0, -1.0)


def nearest_classes(
    texts: Float[Tensor, "classes dim"],
    class_names: Sequence[str],
    seen: Sequence[bool],
    table: Mapping[str, str] | None,
) -> Int[Tensor, " classes"]:
    """The negative class of each class: that of a table, or the other one with the most similar text.

    Args:
        texts: Text features of the classes.
        class_names: Their names.
        seen: Whether there is an image of a class, which can be a negative then.
        table: Negative class of each class by name; None: by the texts.

    Raises:
        ClassNameError: If the table leaves out a class with images, or names an unknown class, or one without images.
        ValueError: If fewer than two classes have images.
    """
    if sum(seen) < 2:
        raise ValueError("Expected images of two classes or more, got those of one: a counterfactual needs another.")
    has_image = torch.tensor(list(seen), device=texts.device)
    unit = nn.functional.normalize(texts, dim=-1)
    # (classes, classes): neither a class without images nor the class itself can be the negative
    similar = (unit @ unit.T).masked_fill(~has_image[None], -torch.inf).fill_diagonal_(-torch.inf)
    nearest = similar.argmax(dim=-1)
    if table is None:
        return nearest
    places = {name: place for place, name in enumerate(class_names)}
    unknown = sorted({*table, *table.values()} - set(places))
    if unknown:
        raise ClassNameError(f"Expected names of the classes in `nearest`, got {shown(unknown[0])}.")
    for name, place in places.items():
        other = table.get(name)
        if other is None and seen[place]:
            raise ClassNameError(f"Expected a negative class for {shown(name)} in `nearest`, got none.")
        if other is not None and (other == name or not seen[places[other]]):
            raise ClassNameError(
                f"Expected another class with training images for {shown(name)} in `nearest`, got {shown(other)}."
            )
        if other is not None:
            nearest[place] = places[other]
    return nearest


class CPLObjective(ClassificationObjective):
    """Cross-entropy of a CoCoOp adapter, a contrast with counterfactual image features, and the size of their mask.

    Formula: L = CE + contrastive_weight * mean_c -log softmax(cos(t_c, x), cos(t_c, x'))_1 + norm_weight * |u_y|
        with x' = (1 - u_y) x + u_y n_y, element by element and normalised; x: image feature, n_y: that of an image of
        the class nearest to the label y, t_c: class prompts of the image, u_y = clamp(momentum * T_y + (1 - momentum)
        * m_y, 0, 1), T: result of a greedy search, m: the trained mask.

    Mask and search are state of the training: the result is an ordinary CoCoOp adapter, and checkpoints hold the mask.

    Args:
        prompts: As for `ClassificationObjective`.
        name_prompts: Texts of the same classes, by which nearest classes and the greedy search go; None: `prompts`.
        nearest: The negative class of each class with images, by name; None: the one with the most similar text.
        contrastive_weight: Weight of the contrast.
        norm_weight: Weight of the mask's size; official 0.07.
        momentum: Part of the search in the mask; official 0.999.
        image_cache: As for `ClassificationObjective`.
        num_views: As there.
        cache_batch_size: As there.
        num_workers: As there.

    Requirements:
        A `PeftModel` with an active CoCoOp adapter, images of two classes or more by position; the rest as for its
        base.

    Relations:
        CoCoOp at weights 0.

    Deviation: The official code mixes with the mask's first row alone, by a shape that broadcasts; this is the paper's
        equation. It finds nearest classes with BERTScore, which needs a language model; CLIP's text features stand in.

    Raises:
        ValueError: If a weight is negative, or the momentum outside [0, 1].
        ClassNameError: If `name_prompts` are of other classes.

    References:
        arXiv 2210.10362.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        name_prompts: ClassPrompts | None = None,
        nearest: Mapping[str, str] | None = None,
        contrastive_weight: float | int = 1.0,
        norm_weight: float | int = 0.07,
        momentum: float | int = 0.999,
        image_cache: str = "auto",
        num_views: int | None = None,
        cache_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        check_number("contrastive_weight", contrastive_weight, least=0)
        check_number("norm_weight", norm_weight, least=0)
        check_number("momentum", momentum, least=0, most=1)
        name_prompts = name_prompts or prompts
        prompts.check_same_classes(name_prompts, name="name_prompts")
        name_prompts.check_one_template("The greedy search goes by one text per class.")
        super().__init__(
            prompts,
            image_cache=image_cache,
            num_views=num_views,
            cache_batch_size=cache_batch_size,
            num_workers=num_workers,
        )
        self.name_prompts, self.nearest = name_prompts, nearest
        self.contrastive_weight, self.norm_weight, self.momentum = contrastive_weight, norm_weight, momentum
        #: m, target and negatives have a row per class.
        self.mask: nn.Parameter | None = None
        self.target: Tensor | None = None
        self.negatives: Tensor | None = None

    def config_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        own = {"nearest": None if self.nearest is None else dict(self.nearest), "momentum": self.momentum}
        own |= {"contrastive_weight": self.contrastive_weight, "norm_weight": self.norm_weight}
        own["name_templates"] = list(self.name_prompts.templates)
        return {**own, **super().config_dict()}

    def check_stream(self) -> None:
        """Refuse: a counterfactual is made of one and the same image of a class."""
        Objective.check_stream(self)

    def adapt_to(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Make the mask, which the optimizer must know, beside what its base decides.

        Args:
            model: Model with its adapter.
            dataset: Training images.

        Raises:
            AdapterError: If the active adapter is none of CoCoOp.
        """
        super().adapt_to(model, dataset)
        kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
        if kind != "COCOOP":
            raise AdapterError(
                f"Expected a model with an active CoCoOp adapter, got {shown(getattr(kind, 'value', None))}. Wrap it "
                "with `CoCoOpConfig`."
            )
        if self.mask is None:
            dim = towers_of(model).model.config.projection_dim
            self.mask = nn.Parameter(torch.ones(len(self.prompts.class_names), dim))

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Find the negative class of each class and the dimensions that make it one, with the model as it was.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images by position.
        """
        super().prepare(model, dataset)
        assert self.mask is not None, "`adapt_to` comes first"
        assert isinstance(dataset, ImageClassificationDataset), "`check_stream` refuses others"
        self.mask.data = self.mask.data.to(device_of(model))
        names = self.prompts.class_names
        first = {label: place for place, label in reversed(list(enumerate(dataset.labels)))}
        seen = [label in first for label in range(len(names))]
        # one view of each image, whatever the epoch; a class without images borrows one, and never is a label
        view = dataset.for_run(skip_unreadable=dataset.unreadable.are_skipped)
        places = [first.get(label, next(iter(first.values()))) for label in range(len(names))]

        def encode_images(rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
            pixels = torch.stack([view[places[row]]["pixel_values"] for row in rows.tolist()])
            return image_features(model, pixels.to(device_of(model))).float()

        def encode_names(rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
            return text_features(model, self.name_prompts.input_ids[rows].to(device_of(model))).float()

        with torch.no_grad(), evaluation_mode(model), model.disable_adapter():
            features = divided(len(names), encode_images, chunk_size=64)
            texts = divided(len(names), encode_names, chunk_size=256)
        nearest = nearest_classes(texts, names, seen, self.nearest)
        self.target = greedy_target(features, features[nearest], texts, texts[nearest])
        self.target[~torch.tensor(seen, device=texts.device)] = -1.0
        self.negatives = nn.functional.normalize(features[nearest], dim=-1)

    def masks(self, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The masks of some labels, in [0, 1].

        Args:
            labels: Index into the classes.
        """
        target, mask = prepared(self.target), prepared(self.mask)
        # (batch, dim): at the official momentum the search decides what is exchanged, the trained part how far
        mixed = self.momentum * target[labels] + (1 - self.momentum) * mask[labels]
        return mixed.clamp(0.0, 1.0)

    def counterfactuals(
        self, features: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Image features that have the masked dimensions of the negative image, unit-norm.

        Args:
            features: Image features, not normalised.
            labels: Their classes.
        """
        negatives = prepared(self.negatives)
        mask, unit = self.masks(labels), nn.functional.normalize(features.float(), dim=-1)
        return nn.functional.normalize((1 - mask) * unit + mask * negatives[labels], dim=-1)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Compute the loss over all classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `labels`, and `index` into the stored features or `pixel_values`.

        Returns:
            `cross_entropy`, `contrastive` and `mask_norm`, means over the batch, and the logits.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        prepared(self.negatives)
        features, labels = self._image_features(model, batch), batch["labels"]
        pair = torch.stack([features.float(), self.counterfactuals(features, labels)], dim=1)  # (batch, 2, dim)
        scores = conditioned_scores(model, self.prompts, features, pair)  # (batch, 2, classes)
        logits, cosines = scores[:, 0], scores / towers_of(model).logit_scale
        terms = {
            "cross_entropy": nn.functional.cross_entropy(logits, labels),
            "contrastive": self.contrastive_weight * -cosines.log_softmax(dim=1)[:, 0].mean(),
            "mask_norm": self.norm_weight * self.masks(labels).norm(dim=-1).mean(),
        }
        return ObjectiveOutput(terms, logits, labels)

    def param_groups(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
        """The adapter's tensors and the mask, in one group.

        Args:
            named_parameters: Those of the model.
        """
        parameters = [parameter for _, parameter in named_parameters]
        if self.mask is None:
            return {"all": parameters}
        self.mask.data = self.mask.data.to(parameters[0].device)  # before the optimizer has a state of it
        return {"all": [*parameters, self.mask]}

    def callbacks(self, model: nn.Module) -> "list[TrainerCallback]":
        """What treats the mask, which is no tensor of the model, as others treat the model's tensors.

        Args:
            model: `PeftModel` with the active adapter.
        """
        from transformers import TrainerCallback  # here: it imports PEFT, which imports this file

        mask = self.mask
        assert mask is not None, "`adapt_to` comes first"

        class MaskGradient(TrainerCallback):
            """Averages the gradient of the mask, as DDP does with the model's, and clears it after the step."""

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                if mask.grad is None or all(p.grad is None for p in kwargs["model"].parameters()):
                    mask.grad = None  # nothing moves in a step that is skipped
                else:
                    mask.grad = sum_over_processes(mask.grad) / num_processes()

            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                mask.grad = None

        return [MaskGradient()]

    def state_dict(self) -> dict[str, Tensor]:
        """The mask."""
        return {} if self.mask is None else {"mask": self.mask.detach()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the mask.

        Args:
            state: Mapping of `state_dict`.

        Raises:
            ValueError: If it is of another number of classes or another model.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if self.mask is None or shapes != {"mask": tuple(self.mask.shape)}:
            own = "none" if self.mask is None else tuple(self.mask.shape)
            raise ValueError(
                f"Expected the state of a mask of shape {own}, got {shapes!r}. Resume with the classes and the base "
                "model of the interrupted run."
            )
        self.mask.data.copy_(state["mask"])


# Hyper-parameters of CPL: those of CoCoOp, as its configuration files are not public.
def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return CoCoOp's official preset: four vectors from "a photo of a", SGD at 0.002, batch 1, 10 epochs.

    Args:
        protocol: `"base_to_new"`, 16 shots.
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = sgd_training(learning_rate=0.002, batch=1, epochs=10)
    return Preset(config={"num_text_tokens": 4, "context_init": "a photo of a"}, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.01, batch=8, config={"context_init": "a photo of a"})
