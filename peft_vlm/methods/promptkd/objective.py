"""PromptKD's objective: the student imitates the teacher's class probabilities on images without labels."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore, ViewCache, should_store
from peft_vlm.distributed import apart, progress_bar, sum_over_processes
from peft_vlm.errors import ClassNameError, PeftVLMError, PeftVLMWarning, check_choice, check_list, check_number
from peft_vlm.losses import REDUCTIONS, TEACHER_WEIGHTINGS, distillation_loss
from peft_vlm.methods.promptkd.classes import stored_classes
from peft_vlm.methods.promptkd.model import Projector, store_classes
from peft_vlm.methods.promptkd.teacher import Teacher, Teachers
from peft_vlm.models.towers import Towers, device_of, image_features, towers_of, unwrap
from peft_vlm.objective import Batch, Objective, ObjectiveOutput, Paper, check_other_model, prepared
from peft_vlm.registry import Preset, RunSize, sgd_training
from peft_vlm.text.class_features import evaluation_mode
from peft_vlm.text.prompts import ClassPrompts, readable

logger = logging.getLogger(__name__)

PAPER = Paper(
    title="PromptKD: Unsupervised Prompt Distillation for Vision-Language Models",
    year=2024,
    arxiv_id="2403.02781",
    venue="CVPR 2024",
    bibtex="""@inproceedings{li2024promptkd,
  title     = {PromptKD: Unsupervised Prompt Distillation for Vision-Language Models},
  author    = {Li, Zheng and Li, Xiang and Fu, Xinyi and Zhang, Xin and Wang, Weiqiang and Chen, Shuo and Yang, Jian},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}""",
)


_CHOICES = {
    "reduction": REDUCTIONS,
    "teacher_weighting": TEACHER_WEIGHTINGS,
    "teacher_cache": ("auto", "none", "views"),
    "student_cache": ("none", "views"),
}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are not among their choices, out of range, or do not go together."""
    for name, known in _CHOICES.items():
        check_choice(name, settings[name], known)
    for name in ("temperature", "weight", "num_views", "align_learning_rate"):
        check_number(name, settings[name], above=0)
    steps = settings["align_steps"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"Expected `align_steps` of 0 or more, got {steps!r}.")
    if settings["teacher_cache"] != "views" and (settings["student_cache"] != "none" or steps):
        raise ValueError(
            f"Expected `teacher_cache`='views' with `student_cache`={settings['student_cache']!r}, `align_steps`="
            f"{steps!r}, got {settings['teacher_cache']!r}. Both read stored features of the teacher."
        )


class Agreement:
    """Counts of one epoch, over the batches of all processes. The teacher's class decides whether an image counts as
    seen.

    Args:
        class_names: Classes in label order.
        seen_classes: Names of the classes with training labels at some stage; None: all.

    Raises:
        ClassNameError: If a seen class is none of the classes.
    """

    def __init__(self, class_names: Sequence[str], seen_classes: Sequence[str] | None) -> None:
        names = [readable(name) for name in class_names]
        check_list("seen_classes", seen_classes)
        seen = set(names) if seen_classes is None else {readable(name) for name in seen_classes}
        if seen - set(names):
            raise ClassNameError(
                f"Expected `seen_classes` out of the {len(names)} classes of the prompts, got "
                f"{sorted(seen - set(names))[:3]!r} too."
            )
        self.seen: Bool[Tensor, " classes"] = torch.tensor([name in seen for name in names])
        self.epoch = -1
        self.counts = torch.zeros(2, 2, dtype=torch.long)

    def start(self, epoch: int) -> None:
        """Begin an epoch anew, unless it is the one whose counts were restored."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.counts = torch.zeros(2, 2, dtype=torch.long)

    def add(self, student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"]) -> None:
        """Count a batch; with several processes the batch of each, so all of them must call it.

        The sum is formed here and not at the end of the epoch, so that a checkpoint of the first process, which is
        the only one that is written, holds the counts of all.

        Args:
            student: Logits of the student.
            teacher: Logits of the teacher.
        """
        chosen = teacher.argmax(dim=-1)
        same = student.detach().argmax(dim=-1) == chosen
        group = (~self.seen.to(chosen.device)[chosen]).long()  # 0 seen, 1 unseen
        # (groups, 2): images of the group that student and teacher agree on, and all of it
        rows = [torch.stack([(same & (group == g)).sum(), (group == g).sum()]) for g in (0, 1)]
        self.counts = self.counts.to(chosen.device) + sum_over_processes(torch.stack(rows))

    def metrics(self) -> dict[str, float]:
        """Agreement in percent of the groups that had images."""
        counts = self.counts.tolist()
        return {
            f"agreement_{name}": 100.0 * same / total
            for name, (same, total) in zip(("seen", "unseen"), counts, strict=True)
            if total
        }


class PromptKDObjective(Objective):
    """Distils the teacher's class probabilities; labels are never read.

    Formula: L = weight * T^2 * KL(softmax(q_t / T) || softmax(q_s / T)), q_t = s_t cos(g(x), w_c),
        q_s = s_s cos(P(f(x)), w_c), with the teacher's class vectors w_c in both.

    `prepare` computes the class vectors once, with the teacher's weights as they are then, and stores them in the
    student's adapter.

    Args:
        prompts: Class prompts of the teacher (by its tokenizer), in label order. The student reads no text.
        teacher: A CLIP-like model, with or without adapter; or a `Teacher`, where tokenizer or image processor differ;
            or several of either: their logits, each multiplied by its own logit scale, are averaged, not their
            probabilities. The first one's class vectors become the student's.
        temperature: T; 1 in the paper.
        weight: Factor of the loss. Official `KD_WEIGHT`.
        reduction: `"batchmean"` (mean over the images), or `"official"` (over images x classes).
        teacher_weighting: How the logits of several teachers are averaged: `"equal"`, or `"confidence"` (weighted by
            each one's highest probability per image).
        teacher_cache: `"none"` runs the teacher on each batch; `"views"` on a fixed number of augmented views per
            image, once. The student sees the same views. `"auto"`: stored where every epoch sees the same pixels, else
            per batch.
        num_views: Views per image; epoch e trains on view e modulo this number.
        student_cache: `"none"`, or `"views"` where the student's tower is frozen (`vision_depth=0`): its features are
            stored too.
        align_steps: Steps on stored features in which the projector learns alone, before the first epoch. Ours;
            officially 0: a random projector.
        align_learning_rate: Rate of these steps.
        cache_storage: `"ram"`, or `"disk"` (memory-mapped).
        cache_folder: Folder of the memory-mapped file; temporary by default.
        cache_batch_size: Images per teacher forward pass while caching.
        num_workers: Processes that read images while caching.
        seen_classes: Names of the classes that the teacher was trained on, for the agreement in the log; None: all.
        transductive: Whether the training images come from the distribution and classes that are tested on. Reported.

    Requirements:
        Batches with `pixel_values` and, with cached views, `index`; a `PeftModel` with an active PromptKD adapter.
        BatchNorm normalises a batch of one image with its running statistics.

    Relations:
        `PromptKDConfig(vision_depth=0)` trains the projector alone, `tune_vision=True` the whole student.

    Raises:
        ValueError: If a setting is not among its choices, or out of its range.

    References:
        arXiv 2403.02781, Eq. 5; loss weights and divisor from the official code.
    """

    paper = PAPER
    labels_are_positions = False  # classes are found by name, and labels only counted

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher],
        temperature: float | int = 1.0,
        weight: float | int = 10.0,
        reduction: str = "batchmean",
        teacher_weighting: str = "equal",
        teacher_cache: str = "auto",
        num_views: int = 1,
        student_cache: str = "none",
        align_steps: int = 0,
        align_learning_rate: float | int = 0.05,
        cache_storage: str = "ram",
        cache_folder: str | Path | None = None,
        cache_batch_size: int = 32,
        num_workers: int = 0,
        seen_classes: Sequence[str] | None = None,
        transductive: bool = True,
    ) -> None:
        given: dict[str, Any] = {"temperature": temperature, "weight": weight, "reduction": reduction}
        given |= {"teacher_weighting": teacher_weighting, "teacher_cache": teacher_cache, "num_views": num_views}
        given |= {"student_cache": student_cache, "align_steps": align_steps}
        given |= {"align_learning_rate": align_learning_rate}
        _check_settings(given)
        self.prompts, self.temperature, self.weight, self.reduction = prompts, temperature, weight, reduction
        members = _as_teachers(teacher)
        self.teachers = Teachers(members, weighting=teacher_weighting)
        self.agreement = Agreement(prompts.class_names, seen_classes)
        store = RowStore(cache_storage, name="promptkd teacher features", folder=cache_folder)
        self._views = ViewCache(store, num_views=num_views, batch_size=cache_batch_size, num_workers=num_workers)
        self.cache = self._views if teacher_cache == "views" else None
        self.student_cache, self.needs_pixels = student_cache, student_cache == "none"
        self.align_steps, self.align_learning_rate = align_steps, align_learning_rate
        self._transform, self._aligned, self._restored = None, align_steps == 0, False
        self.settings = {
            "teachers": [member.name for member in members],
            **{"temperature": temperature, "weight": weight, "reduction": reduction},
            **{"teacher_weighting": teacher_weighting, "teacher_cache": teacher_cache},
            **({"num_views": num_views, "cache_storage": cache_storage} if self.cache is not None else {}),
            **({"student_cache": student_cache} if student_cache != "none" else {}),
            **({"align_steps": align_steps, "align_learning_rate": align_learning_rate} if align_steps else {}),
            "seen_classes": None if seen_classes is None else list(seen_classes),
            "transductive": transductive,
        }

    def config_dict(self) -> dict[str, Any]:
        """The settings, and after `prepare` which images were seen, as JSON values."""
        return dict(self.settings)

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset) -> None:
        """Compute the teacher's class vectors and store them in the student's adapter.

        Args:
            model: `PeftModel` with the active PromptKD adapter.
            dataset: Training images; labels are counted for the report, and not used.

        Raises:
            PeftVLMError: If the student is its own teacher.
        """
        super().prepare(model, dataset)
        for member in self.teachers.members:
            check_other_model(member.model, model)
            member.check_pixels(model)
        self.teachers.prepare(self.prompts, device_of(model))
        _check_stored(model, self.prompts.class_names, self.teachers.members[0].name)
        if self.student_cache == "views" and any(
            p.requires_grad and _group_of(name) == "vision" for name, p in model.named_parameters()
        ):
            raise PeftVLMError(
                "Expected a frozen vision tower with `student_cache`='views', got trainable tensors in it: stored "
                "features would be stale after one step. Use `PromptKDConfig(vision_depth=0)`, or `'none'`."
            )
        first = self.teachers.members[0]
        store_classes(
            model,
            self.prompts.class_names,
            self.teachers.classes[0],
            teacher_name=first.name,
            teacher_logit_scale=first.logit_scale,
        )
        self._transform = dataset.transform
        if self.settings["teacher_cache"] == "auto":
            stores, why = should_store("auto", dataset, num_views=None)
            self.cache = self._views if stores else None
            logger.info("Teacher features are %s: %s.", "stored" if stores else "computed per batch", why)
        if self.cache is not None:
            if dataset.has_fixed_pixels:
                self.cache.num_views = 1  # every epoch sees the same pixels
            self.settings["num_views"] = self.cache.num_views
            self.cache.bind(dataset, unwrap(model), *(member.model for member in self.teachers.members))
        if not self._restored:
            self._aligned, self.agreement.epoch = self.align_steps == 0, -1
        self._restored = False
        dataset.repeat_views(None if self.cache is None else self.cache.num_views)
        # Labels are not learned from; they only count how often the student is right.
        rows = {readable(name): row for row, name in enumerate(self.prompts.class_names)}
        self._label_of = torch.tensor([rows.get(readable(name), -1) for name in dataset.class_names])
        labelled = [label for label in dataset.labels if label >= 0]
        self.settings["training_images"] = {
            "images": len(dataset),
            "with_label": len(labelled),
            "classes_with_labelled_images": sorted({dataset.class_names[label] for label in labelled}),
        }

    def epoch_start(self, model: nn.Module, dataset: ImageClassificationDataset, epoch: int) -> None:
        """Begin to count anew, cache the features of the epoch's view, and align the projector before epoch 0.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        self.agreement.start(epoch)
        if self.cache is None:
            return
        device, with_student = device_of(model), self.student_cache == "views" or not self._aligned

        def encode(pixels: Tensor) -> Tensor:
            features = self.teachers.features(pixels, self._transform)
            return torch.cat([features, student_features(model, pixels)], dim=-1) if with_student else features

        if not self._aligned and epoch == 0:
            self.cache.fill(encode, dataset, device=device)
            self.settings["loss_after_alignment"] = _align_projector(
                projector_of(model),
                lambda image, features: self._loss(model, image, self.teachers.logits(features))[0],
                self.cache,
                steps=self.align_steps,
                learning_rate=self.align_learning_rate,
            )
        self._aligned = True
        self.cache.start_epoch(encode, dataset, epoch, device=device)

    def _loss(self, model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss, and the student's logits, from its projected features and the teachers' logits."""
        logits = towers_of(model).similarity_logits(image, stored_classes(model).active_vectors)
        loss = distillation_loss(logits, target, temperature=self.temperature, reduction=self.reduction)
        return self.weight * loss, logits

    def epoch_end(self) -> dict[str, float]:
        """Agreement of student and teacher on the epoch's training batches of all processes, in percent:
        `agreement_seen`, and `agreement_unseen` where the teacher named a class outside `seen_classes`.
        """
        return self.agreement.metrics()

    def param_groups(self, named_parameters: Any) -> dict[str, list[nn.Parameter]]:
        """The projector (`"projector"`), and what is trained inside the vision tower (`"vision"`).

        Args:
            named_parameters: Names and parameters that require a gradient.
        """
        groups: dict[str, list[nn.Parameter]] = {"projector": [], "vision": []}
        for name, parameter in named_parameters:
            groups[_group_of(name)].append(parameter)
        return groups

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Distillation loss of a batch.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `pixel_values` (not with a cached student), and `index` into cached views.

        Returns:
            The term `distillation`, weighted, and the student's logits over all classes.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        vectors = prepared(self.teachers.classes or None)
        if self.cache is None:
            features = self.teachers.features(batch["pixel_values"], self._transform)
        else:
            features = self.cache.read(batch["index"])
        # (batch, features of all teachers [, features of the student])
        columns = sum(classes.shape[-1] for classes in vectors)
        target = self.teachers.logits(features[:, :columns])  # (batch, classes)
        if self.student_cache == "views":
            image = projector_of(model).project(features[:, columns:])
        else:
            towers = towers_of(model)
            image = towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)
        loss, logits = self._loss(model, image, target)
        self.agreement.add(logits, target)
        labels = batch["labels"]
        # From the dataset's class list to the prompts'; -1 where no class has that name.
        labels = torch.where(labels < 0, labels, self._label_of.to(labels.device)[labels.clamp(min=0)])
        return ObjectiveOutput({"distillation": loss}, logits, labels)

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits over all stored classes, as `model(pixel_values=...)` gives them.

        Args:
            model: The model under evaluation.
            batch: `pixel_values`.
        """
        vectors = stored_classes(model).active_vectors
        return towers_of(model).similarity_logits(image_features(model, batch["pixel_values"]), vectors)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts of the running epoch, and whether the projector was aligned."""
        return {
            "agreement": self.agreement.counts.cpu(),
            "agreement_epoch": torch.tensor(self.agreement.epoch),
            "aligned": torch.tensor(self._aligned),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the counts; an aligned projector is not aligned again.

        Args:
            state: Mapping of `state_dict`.
        """
        self.agreement.counts, self.agreement.epoch = state["agreement"], int(state["agreement_epoch"])
        self._aligned, self._restored = bool(state["aligned"]), True


def _group_of(name: str) -> str:
    """Parameter group of a trainable tensor: what is wrapped around the image head is the projector."""
    return "projector" if Towers.vision_head_paths[-1] in name.split(".") else "vision"


def _as_teachers(given: nn.Module | Teacher | Sequence[nn.Module | Teacher]) -> list[Teacher]:
    """The teachers as a list of `Teacher`."""
    entries = [given] if isinstance(given, nn.Module | Teacher) else list(given)
    if not entries:
        raise ValueError("Expected at least one `teacher`, got none.")
    return [entry if isinstance(entry, Teacher) else Teacher(entry) for entry in entries]


@torch.no_grad()
def student_features(
    model: nn.Module, pixel_values: Float[Tensor, "batch channels rows cols"]
) -> Float[Tensor, "batch width"]:
    """What enters the projector: the student's own image features, not normalised, in float32, in evaluation mode.

    Args:
        model: Student with an active PromptKD adapter.
        pixel_values: Pixels of a batch.
    """
    towers = towers_of(model)
    outputs: list[Tensor] = []
    hook = projector_of(model).base_layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        with evaluation_mode(towers.model):
            towers.finish_image(towers.embed_image(pixel_values), 0)
    finally:
        hook.remove()
    return outputs[0].float()


def projector_of(model: nn.Module) -> Projector:
    """The projector layer of a student."""
    layer = towers_of(model).vision_head
    assert isinstance(layer, Projector), "the objective checks for a PromptKD adapter first"
    return layer


#: Images per step of the alignment.
_ALIGN_BATCH = 32


def _align_projector(
    projector: Projector,
    loss_of: Callable[[Float[Tensor, "batch width"], Float[Tensor, "batch teacher_dim"]], Tensor],
    cache: ViewCache,
    *,
    steps: int,
    learning_rate: float | int,
) -> float:
    """Train the projector alone on stored features: seconds, where the student's tower would take minutes.

    A random projector sends large, wrong gradients into the prompts; this is over before they start to learn. SGD
    with momentum 0.9 and a cosine; the order of the images is that of seed 0, so every process gets the same result.

    Args:
        projector: The student's projector; its active adapter is trained.
        loss_of: Loss from the student's and the teachers' stored features.
        cache: All views, each row with the teachers' columns and then the student's.
        steps: Optimizer steps at least; the last pass over the images is finished. Pass p uses view p modulo their
            number.
        learning_rate: Initial rate.

    Returns:
        Mean loss of the last pass.
    """
    rows, width = cache.store.rows, int(projector.base_layer.out_features)
    assert rows is not None, "`ViewCache.fill` comes first"
    parameters = [p for p in projector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    views = cache.num_views or 1
    generator, images = torch.Generator().manual_seed(0), len(rows) // views
    passes = math.ceil(steps / math.ceil(images / _ALIGN_BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=passes)
    training, device, losses = projector.training, parameters[0].device, [0.0]
    projector.train()
    with torch.enable_grad(), apart():
        for number in progress_bar(range(passes), desc="Aligning the projector", leave=False):
            losses = []
            # the rows of a view lie below those of the view before it
            order = torch.randperm(images, generator=generator) + number % views * images
            for index in order.split(_ALIGN_BATCH):
                batch = rows[index].to(device)
                # columns: features of the teachers, then those of the student
                loss = loss_of(projector.project(batch[:, -width:]), batch[:, :-width])
                # `backward` would call the hooks of DDP and DeepSpeed, which wait for a step of theirs
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(float(loss.detach()))
            schedule.step()
    optimizer.zero_grad()
    projector.train(training)
    return sum(losses) / len(losses)


def _check_stored(model: nn.Module, class_names: Sequence[str], teacher_name: str) -> None:
    """Refuse an adapter with other classes; warn where its vectors came from another teacher."""
    layer = stored_classes(model)
    config = layer.adapter_configs[layer.active_adapters[0]]
    names, first = config.class_names, teacher_name
    if config.num_classes and names is not None and tuple(names) != tuple(class_names):
        raise ClassNameError(
            f"The adapter stores {len(names)} classes, beginning {names[:3]!r}; the objective has "
            f"{len(class_names)}, beginning {list(class_names[:3])!r}. Go on with the "
            "stored classes, change them with `keep_classes` and `add_classes`, or start a new adapter."
        )
    if config.num_classes and config.teacher_name_or_path not in (None, first):
        warnings.warn(
            f"The adapter was distilled from {config.teacher_name_or_path!r} and goes on with {first!r}, whose "
            "class vectors replace the stored ones.",
            PeftVLMWarning,
            stacklevel=4,
        )


# Hyper-parameters of the official runs, by protocol; `class_dim` comes from the teacher.

VISION_DEPTHS = {"base_to_new": 9, "cross_dataset": 3}
"""Layers with visual prompts by protocol, for a tower of 12 (the base-to-new and the cross-dataset configuration)."""

LOW_WEIGHT_DATASETS = ("fgvc_aircraft", "oxford_flowers", "dtd")
"""Datasets for which a comment in the official scripts advises the lower weight."""


def preset_for(protocol: str, *, low_weight: bool = False) -> Preset:
    """An official preset.

    Args:
        protocol: `"base_to_new"` or `"cross_dataset"`.
        low_weight: Loss weight 200 instead of 1000, as advised for the `LOW_WEIGHT_DATASETS`.
    """
    check_choice("protocol", protocol, sorted(VISION_DEPTHS))
    return Preset(
        config={"num_vision_tokens": 4, "vision_depth": VISION_DEPTHS[protocol]},
        objective={"weight": 200.0 if low_weight else 1000.0, "reduction": "official", "temperature": 1.0},
        training=sgd_training(learning_rate=0.005, batch=8, epochs=20) | {"dataloader_drop_last": True},
    )


def batchmean_weight(weight: float | int, num_classes: int) -> float:
    """The weight that gives the same loss with `reduction="batchmean"`.

    Args:
        weight: Weight with `reduction="official"`.
        num_classes: Classes of the prompts.
    """
    return weight / num_classes


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the base-to-new one; on a small model the default loss.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for("base_to_new"), rate=0.01)
