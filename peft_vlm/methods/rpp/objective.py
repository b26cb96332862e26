"""RPP's objective: cross-entropy over sampled classes plus soft labels of a frozen teacher over the same classes.

Revisiting Prompt Pretraining of Vision-Language Models, 2024, arXiv 2409.06166; class sampling of POMP, 2023, arXiv
2304.04704.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel

from peft_vlm.data.feature_store import RowStore
from peft_vlm.data.splits import BalancedBatches
from peft_vlm.distributed import equal_passes, gather_rows, local_place, part_of
from peft_vlm.errors import DataError, UnsupportedModelError, check_choice, check_number
from peft_vlm.losses import (
    CORRECTIONS,
    FORMS,
    false_negatives,
    local_correction,
    sample_negatives,
    sampled_logits,
    soft_label_loss,
)
from peft_vlm.models.sharding import equal_chunks
from peft_vlm.models.towers import Towers, device_of, side_of, towers_of
from peft_vlm.objective import Batch, EpochBatchSampler, ObjectiveOutput, Paper, check_other_model, prepared
from peft_vlm.registry import Preset, RunSize
from peft_vlm.text.class_features import CompactPrompts, PromptObjective, encode_classes
from peft_vlm.text.prompts import ClassPrompts, reserve_slots

PAPER = Paper(
    title="Revisiting Prompt Pretraining of Vision-Language Models",
    year=2024,
    arxiv_id="2409.06166",
    venue="arXiv 2024",
    bibtex="""@article{chen2024revisiting,
  title   = {Revisiting Prompt Pretraining of Vision-Language Models},
  author  = {Chen, Zhenyuan and Yang, Lingfeng and Chen, Shuo and Chen, Zhaowei and Liang, Jiajun and Li, Xiang},
  journal = {arXiv preprint arXiv:2409.06166},
  year    = {2024}
}""",
)


SAMPLINGS = ("natural", "balanced")
MAX_TEXT_BYTES = 4 * 2**30
"""Activations of the text tower that a step keeps before it recomputes them in chunks."""
_FROZEN_CHUNK = 256  # without autograd a larger pass is no faster


def _stream_class_features(model: nn.Module, prompts: ClassPrompts, *, storage: str, chunk_size: int) -> RowStore:
    """Class features of a model as it is now, one pass in chunks; only a chunk is in memory with storage `"disk"`.

    The processes of a machine divide the pass and share the features.

    Args:
        model: CLIP-like model, with or without adapters.
        prompts: Its class prompts.
        storage: `"ram"` or `"disk"`.
        chunk_size: Classes per forward pass.
    """
    store = RowStore(storage, name="class features")
    count = len(prompts.class_names)
    index, parts = local_place()
    part = part_of(count, index=index, parts=parts)
    for rows in equal_passes(part, total=count, parts=parts, size=chunk_size):
        features = encode_classes(model, prompts.select(rows), chunk_size=max(_FROZEN_CHUNK, chunk_size))
        store.allocate((count, features.shape[-1]), torch.float32)
        store.write(rows, features)
    store.complete()
    return store


class _ZeroShotTeacher:
    """A CLIP whose class probabilities are the soft labels.

    Args:
        model: CLIP-like model with its weights loaded, with or without an adapter; not trained and not saved.
        prompts: Class prompts by its own tokenizer.
        storage: Where its class features are kept, `"ram"` or `"disk"`.
        chunk_size: Classes per forward pass.
    """

    def __init__(self, model: nn.Module, prompts: ClassPrompts, *, storage: str, chunk_size: int) -> None:
        self.model, self.prompts, self.storage, self.chunk_size = model, prompts, storage, chunk_size
        self.classes: RowStore | None = None

    def prepare(self, student: nn.Module) -> None:
        """Move to the student's device and compute the class features, once.

        Args:
            student: Model that learns.

        Raises:
            AdapterError: If the student is its own teacher.
            DataError: If the two take images of different sizes.
        """
        check_other_model(self.model, student)
        sizes = [towers_of(model).image_size for model in (student, self.model)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"Expected a teacher for images of {sizes[0]} pixels, as the student's, got one for {sizes[1]}. Both "
                "see the same pixel values; choose a teacher of the student's image size."
            )
        device = device_of(student)
        self.model.to(device).eval()
        if self.classes is None:
            options: dict[str, Any] = {"storage": self.storage, "chunk_size": self.chunk_size}
            with torch.autocast(device.type, enabled=False):  # as the image features
                self.classes = _stream_class_features(self.model, self.prompts, **options)

    @torch.no_grad()
    def image_features(self, pixel_values: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch dim"]:
        """Image features in float32, in the type of its weights whatever the run's mixed precision.

        Args:
            pixel_values: Pixels as the student gets them.
        """
        towers = towers_of(self.model)
        with torch.autocast(pixel_values.device.type, enabled=False):
            return towers.finish_image(towers.embed_image(pixel_values), 0).float()

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "batch dim"], classes: Tensor) -> Float[Tensor, "batch selected"]:
        """Scaled logits over some classes.

        Args:
            images: What `image_features` gave.
            classes: Positions of the classes.
        """
        return towers_of(self.model).similarity_logits(images, prepared(self.classes).read(classes, images.device))


class RPPObjective(PromptObjective):
    """Hard and soft labels on a few classes per step, so that cost does not grow with the number of classes.

    Formula: L = (1 - a) * mean_i CE(z_i, y_i) + a * T^2 * mean_i KL(softmax(t_i / T) || softmax(s_i / T)), over the
        image's own class and K - 1 classes drawn for the whole batch, of which its own is masked; z has POMP's local
        correction, s and t are the plain logits of student and teacher. The paper leaves a, T, K, the form of the soft
        term and what the teacher's softmax runs over unsaid: all defaults here are ours or POMP's.

    Args:
        prompts: Plain class prompts with one template.
        teacher: Frozen CLIP that gives the soft labels; None needs `soft_weight` 0.
        teacher_prompts: Class prompts by its tokenizer, with any number of templates; None: `prompts`.
        soft_weight: a, from 0 (hard labels alone) to 1 (soft labels alone). Ours: 0.5.
        soft_form: `"kl"` or `"cross_entropy"`. Ours: "kl".
        temperature: T. Ours: 1.
        correct_soft_labels: Add the local correction to the logits of the soft term too. Ours: no.
        num_sampled_classes: K. POMP's script: 1000. As many as there are classes, or more: the plain softmax.
        correction: `"ln"`; `"log10"` as in POMP's later code; `"none"`.
        image_sampling: `"natural"`: every image once per epoch; `"balanced"`: every class equally often.
        text_chunk_size: Prompts per pass of the text tower; more than one chunk is recomputed in the backward pass.
            None: all in one pass where that keeps at most 4 GiB (K = 1000 on ViT-B/16: about 2.5), else in equal
            chunks of that size.
        storage: Where class features that do not change are kept: `"disk"` (memory-mapped) or `"ram"`.
        seed: Seed of the drawn classes, which depend on it, the epoch and the images of the whole batch alone.

    Requirements:
        Batches with `pixel_values`, `labels` and `index`; an active adapter with text or vision prompts of any method.

    Relations:
        `soft_weight=0` with one shared text prompt (or a CoOp adapter): POMP. With all classes sampled: cross-entropy.

    Raises:
        ValueError: If a setting is out of range or the prompts do not fit.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        teacher: nn.Module | None = None,
        teacher_prompts: ClassPrompts | None = None,
        soft_weight: float | int = 0.5,
        soft_form: str = "kl",
        temperature: float | int = 1.0,
        correct_soft_labels: bool = False,
        num_sampled_classes: int = 1000,
        correction: str = "ln",
        image_sampling: str = "natural",
        text_chunk_size: int | None = None,
        storage: str = "disk",
        seed: int = 0,
    ) -> None:
        super().__init__(prompts)
        self.settings = {
            "soft_weight": soft_weight,
            "soft_form": soft_form,
            "temperature": temperature,
            "correct_soft_labels": correct_soft_labels,
            "num_sampled_classes": num_sampled_classes,
            "correction": correction,
            "image_sampling": image_sampling,
        }
        self.text_chunk_size, self.storage, self.seed = text_chunk_size, storage, seed
        _check(self.settings, prompts, teacher, text_chunk_size)
        self.teacher: _ZeroShotTeacher | None = None
        if teacher is not None and soft_weight:
            prompts.check_same_classes(teacher_prompts or prompts, name="teacher_prompts")
            options: dict[str, Any] = {"storage": storage, "chunk_size": text_chunk_size or _FROZEN_CHUNK}
            self.teacher = _ZeroShotTeacher(teacher, teacher_prompts or prompts, **options)
        self._tokens: CompactPrompts | None = None
        self._fixed_text: RowStore | None = None
        self._epoch = 0

    @classmethod
    def texts_per_step(cls, num_classes: int, *, batch_size: int, settings: Mapping[str, Any]) -> int:
        """The images' own classes and the sampled ones; those of a chunk, where a size of chunks is set.

        Args:
            num_classes: All classes.
            batch_size: Images.
            settings: Those of the constructor, by name.
        """
        count = min(num_classes, settings["num_sampled_classes"] - 1 + batch_size)
        return min(count, settings["text_chunk_size"] or count)

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dict(self.settings)

    def param_groups(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
        """Text and vision prompts apart, for a learning rate each.

        Args:
            named_parameters: Trained tensors.
        """
        groups: dict[str, list[nn.Parameter]] = {"text": [], "vision": []}
        for name, parameter in named_parameters:
            groups[side_of(name) or "text"].append(parameter)
        return groups

    def check_stream(self) -> None:
        """A stream decides by itself how often a class comes."""
        if self.settings["image_sampling"] != "natural":
            raise DataError(
                f"Expected `image_sampling`='natural' for a stream, got {self.settings['image_sampling']!r}. A stream "
                "is balanced when it is opened: `load_image_stream(..., images_per_class=16)`."
            )

    def batch_sampler(self, labels: Sequence[int], *, batch_size: int, seed: int) -> EpochBatchSampler | None:
        """Batches in which every class comes equally often, where `image_sampling` says so.

        Args:
            labels: Labels of the training images.
            batch_size: Images per batch.
            seed: Seed of the run.
        """
        if self.settings["image_sampling"] == "natural":
            return None
        return BalancedBatches(labels, batch_size=batch_size, seed=seed)

    def prepare(self, model: nn.Module, dataset: Any) -> None:
        """Make the token ids compact; compute class features that do not change.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; the classes come from the prompts.

        Raises:
            UnsupportedModelError: If the model is no `CLIPModel`.
            AdapterError: If the student is its own teacher.
            DataError: If the teacher takes images of another size.
        """
        super().prepare(model, dataset)
        towers, prompts = towers_of(model), reserve_slots(model, self.prompts)
        if not isinstance(towers.model, CLIPModel):
            raise UnsupportedModelError(
                "Expected a `CLIPModel`, whose texts can be cut behind their end, got "
                f"`{type(towers.model).__name__}`. Train it with the objective of its method."
            )
        self._tokens = CompactPrompts(prompts, towers.pooled_positions(prompts.input_ids) + 1)
        self._fixed_text = None
        if "text" not in towers_of(model).trained_sides():
            options = {"storage": self.storage, "chunk_size": self.text_chunk_size or _FROZEN_CHUNK}
            self._fixed_text = _stream_class_features(model, prompts, **options)
        if self.teacher is not None:
            self.teacher.prepare(model)

    def epoch_start(self, model: nn.Module, dataset: Any, epoch: int) -> None:
        """Draw other classes for the same batch in another epoch."""
        self._epoch = epoch

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss over the image's own class and the sampled ones.

        Args:
            model: Model with the active adapter.
            batch: `pixel_values`, `labels`, `index`.

        Returns:
            `hard_label` and `soft_label`, those whose weight is not 0, already weighted; plain logits with the
            image's own class in column 0.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        labels, towers = batch["labels"], towers_of(model)
        negatives = self._draw(batch["index"]).to(labels.device)  # (sampled - 1,), the same for all images
        rejected = false_negatives(labels, negatives)  # (batch, sampled - 1): an image's own class among them
        count, form = len(self.prompts.class_names), str(self.settings["correction"])
        correction = local_correction(rejected, num_classes=count, form=form)
        # Each class is encoded once, however many images have it; `rows` finds its column again.
        classes, rows = torch.cat([labels, negatives]).unique(return_inverse=True)

        def arranged(logits: Tensor, added: Tensor) -> Tensor:
            # (batch, selected) -> own class first, then the sampled ones: (batch, sampled)
            positive = logits.gather(1, rows[: len(labels), None])[:, 0]
            return sampled_logits(positive, logits[:, rows[len(labels) :]], rejected, added)

        pixels, plain = batch["pixel_values"], torch.zeros_like(correction)
        image = towers.finish_image(towers.embed_image(pixels), 0)
        logits = towers.similarity_logits(image, self._text_features(towers, classes))
        target, weight, terms = torch.zeros_like(labels), self.settings["soft_weight"], {}
        if weight < 1:
            hard = nn.functional.cross_entropy(arranged(logits, correction), target)
            terms["hard_label"] = (1 - weight) * hard
        if self.teacher is not None:
            added = correction if self.settings["correct_soft_labels"] else plain
            taught = self.teacher.logits(self.teacher.image_features(pixels), classes)
            options = {"form": self.settings["soft_form"], "temperature": self.settings["temperature"]}
            terms["soft_label"] = weight * soft_label_loss(arranged(logits, added), arranged(taught, added), **options)
        return ObjectiveOutput(terms, arranged(logits, plain), target)

    def _draw(self, index: Int[Tensor, " batch"]) -> Int[Tensor, " selected"]:
        """Sampled classes of a batch: the same whenever the run is resumed, and however many processes share it."""
        text = f"{self.seed},{self._epoch},{gather_rows(index).tolist()}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        return sample_negatives(len(self.prompts.class_names), self._num_drawn, generator=generator)

    @property
    def _num_drawn(self) -> int:
        """K - 1 beside an image's own class; all classes where K leaves none out."""
        sampled, classes = int(self.settings["num_sampled_classes"]), len(self.prompts.class_names)
        return classes if sampled >= classes else sampled - 1

    def _text_features(self, towers: Towers, classes: Int[Tensor, " selected"]) -> Float[Tensor, "selected dim"]:
        """Features of some classes; several chunks keep one chunk's activations at a time."""
        if self._fixed_text is not None:
            return self._fixed_text.read(classes, classes.device)
        tokens = prepared(self._tokens)
        # By length, so that a chunk pads little; the order is restored at the end.
        lengths = tokens.lengths[classes.cpu()]
        order, size = lengths.argsort(stable=True), self.text_chunk_size
        if size is None:
            passes = math.ceil(towers.text_activation_bytes(int(lengths.sum())) / MAX_TEXT_BYTES)
            size = math.ceil(len(classes) / passes)
        chunks = equal_chunks(towers.model, classes.cpu()[order], size)

        def encode(ids: Tensor) -> Tensor:
            return towers.finish_text(towers.embed_text(ids), ids, 0)

        parts = []
        for chunk in chunks:
            ids = tokens.rows(chunk).to(classes.device)
            # One chunk needs no second forward pass in the backward one.
            parts.append(encode(ids) if len(chunks) == 1 else checkpoint(encode, ids, use_reentrant=False))
        features = torch.cat(parts)
        if len(features) > len(order):  # the backward pass of what fills up gathers weights as that of the others
            features = features[: len(order)] + 0.0 * features[len(order) :].sum()
        return features[order.argsort().to(classes.device)]


def _check(settings: dict[str, Any], prompts: ClassPrompts, teacher: nn.Module | None, chunk_size: int | None) -> None:
    """Refuse settings that cannot work."""
    known = {"soft_form": FORMS, "correction": CORRECTIONS, "image_sampling": SAMPLINGS}
    for name, values in known.items():
        check_choice(name, settings[name], values)
    check_number("soft_weight", settings["soft_weight"], least=0, most=1)
    if settings["soft_weight"] and teacher is None:
        raise ValueError(
            f"Expected a teacher for `soft_weight`={settings['soft_weight']!r}, got None. Pass a frozen CLIP, or "
            "`soft_weight=0` for hard labels alone."
        )
    check_number("temperature", settings["temperature"], above=0)
    check_number("num_sampled_classes", settings["num_sampled_classes"], least=2)
    if chunk_size is not None:
        check_number("text_chunk_size", chunk_size, least=1)
    prompts.check_one_template("An ensemble goes into `teacher_prompts`.")


# Settings of whole runs: ours for the bundled models, and POMP's recipe with our prompts for ImageNet-21K.

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # ours, for the bundled 48 px CLIPs: 4 text layers, 6 or 8 vision layers, so that J < L in both towers
    "demo": {
        "config": {"num_text_tokens": 4, "text_depth": 3, "num_vision_tokens": 4, "vision_depth": 5},
        "objective": {"num_sampled_classes": 128, "soft_weight": 0.5},
        "training": {
            "learning_rate": 0.02,  # ours, by validation accuracy of one run each at 0.005, 0.02, 0.05 and 0.2
            "max_steps": 150,
            "per_device_train_batch_size": 32,
            "lr_schedule": "transformers",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "save_strategy": "steps",
            "save_steps": 50,
            "logging_steps": 10,
        },
        "augmentation": {"scale": (0.7, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
        "few_shot": {
            "learning_rate": 0.02,  # ours, by validation accuracy over 0.005, 0.02, 0.05
            "max_steps": 12,
            "per_device_train_batch_size": 16,
            "warmup_epochs": 0,
            "logging_strategy": "no",
        },
    },
    # rate, schedule, batch (32 on each of 8 GPUs), epochs and K of POMP; RPP's own are not published
    "imagenet21k": {
        "config": {"num_text_tokens": 4, "text_depth": 9, "num_vision_tokens": 4, "vision_depth": 9},
        "objective": {"num_sampled_classes": 1000, "soft_weight": 0.5},
        "training": {
            "learning_rate": 0.002,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 32,
            "warmup_epochs": 1,
            "warmup_learning_rate": 1e-5,
            "save_strategy": "steps",
            "save_steps": 500,
        },
        "augmentation": {"scale": (0.08, 1.0), "flip_probability": 0.5},
        "few_shot": {"learning_rate": 0.002, "num_train_epochs": 50, "per_device_train_batch_size": 32},
    },
}
"""Keyword arguments by preset: `config`, `objective`, `training`, `augmentation`, and `few_shot` training."""


def preset_for(name: str) -> Preset:
    """A preset as the parts that every method has.

    Args:
        name: Key of `PRESETS`.
    """
    check_choice("name", name, sorted(PRESETS))
    return Preset(**{part: dict(PRESETS[name][part]) for part in ("config", "objective", "training")})


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: POMP's few-shot training.

    Args:
        run: Size of the run.
    """
    official = Preset(training={"warmup_epochs": 0, **PRESETS["imagenet21k"]["few_shot"]})
    return run.recommend(official, rate=0.02)
