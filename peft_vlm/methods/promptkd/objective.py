"""PromptKD's objective: the student imitates the teacher's class probabilities on images without labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import PeftVLMError
from peft_vlm.losses import distillation_loss
from peft_vlm.methods.promptkd.agreement import Agreement
from peft_vlm.methods.promptkd.classes import stored_classes
from peft_vlm.methods.promptkd.model import check_stored, store_classes
from peft_vlm.methods.promptkd.paper import PAPER
from peft_vlm.methods.promptkd.settings import check_settings
from peft_vlm.methods.promptkd.teacher import Teacher, Teachers
from peft_vlm.methods.promptkd.views import ViewCache, align_projector, projector_of, student_features
from peft_vlm.models.towers import Towers, image_features, towers_of, unwrap
from peft_vlm.objective import Objective, ObjectiveOutput, check_other_model
from peft_vlm.shapes import Batch
from peft_vlm.text.prompts import ClassPrompts, readable


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
            image, once. The student sees the same views.
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
        teacher_cache: str = "none",
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
        check_settings(
            {"reduction": reduction, "teacher_weighting": teacher_weighting},
            {"teacher_cache": teacher_cache, "student_cache": student_cache, "align_steps": align_steps},
            {"temperature": temperature, "weight": weight, "num_views": num_views},
        )
        self.prompts, self.temperature, self.weight, self.reduction = prompts, temperature, weight, reduction
        members = _as_teachers(teacher)
        self.teachers = Teachers(members, weighting=teacher_weighting)
        self.agreement = Agreement(prompts.class_names, seen_classes)
        store = RowStore(cache_storage, name="promptkd teacher features", folder=cache_folder)
        cache = ViewCache(num_views, store, batch_size=cache_batch_size, num_workers=num_workers)
        self.cache = cache if teacher_cache == "views" else None
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
        for member in self.teachers.members:
            check_other_model(member.model, model)
            member.check_pixels(model)
        self.teachers.prepare(self.prompts, next(model.parameters()).device)
        check_stored(model, self.prompts.class_names, self.teachers.members[0].name)
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
        if self.cache is not None:
            if isinstance(dataset.transform, EvalTransform):
                self.cache.num_views = 1  # every epoch sees the same pixels
            self.settings["num_views"] = self.cache.num_views
            self.cache.bind(dataset, unwrap(model), *(member.model for member in self.teachers.members))
        if not self._restored:
            self._aligned, self.agreement.epoch = self.align_steps == 0, -1
        self._restored = False
        dataset.repeat_views(None if self.cache is None else self.cache.num_views)
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
        device, with_student = next(model.parameters()).device, self.student_cache == "views" or not self._aligned

        def encode(pixels: Tensor) -> Tensor:
            features = self.teachers.features(pixels, self._transform)
            return torch.cat([features, student_features(model, pixels)], dim=-1) if with_student else features

        if not self._aligned and epoch == 0:
            self.cache.fill(encode, dataset, device=device)
            self.settings["loss_after_alignment"] = align_projector(
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
        if not self.teachers.classes:
            raise RuntimeError("Expected `prepare(model, dataset)` before the first batch; the trainer calls it.")
        if self.cache is None:
            features = self.teachers.features(batch["pixel_values"], self._transform)
        else:
            features = self.cache.read(batch["index"])
        columns = sum(classes.shape[-1] for classes in self.teachers.classes)
        target = self.teachers.logits(features[:, :columns])
        if self.student_cache == "views":
            image = projector_of(model).project(features[:, columns:])
        else:
            towers = towers_of(model)
            image = towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)
        loss, logits = self._loss(model, image, target)
        self.agreement.add(logits, target)
        labels = batch["labels"]
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
