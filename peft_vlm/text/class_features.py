"""Text features of a class list: computed once, and known to be stale when anything on the text side has changed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from peft_vlm.distributed import divided, num_processes
from peft_vlm.errors import AdapterError
from peft_vlm.models.sharding import equal_chunks
from peft_vlm.models.towers import Towers, device_of, image_features, side_of, towers_of
from peft_vlm.objective import Batch, Objective
from peft_vlm.text.prompts import ClassPrompts, reserve_slots, slots_of

#: Activations, in bytes, of the shifted prompts that `conditioned_scores` runs together on a GPU.
SHIFTS_MEMORY = 4 * 2**30

_SIGNED_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation (no dropout, fixed batch statistics) and afterwards give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class StoredFeaturesLayer(ABC):
    """A layer around the head of the text tower that stores class features, for texts to be left out."""

    @abstractmethod
    def stored_features(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"] | None:
        """Stored features of some classes; None where the layer acts as the base layer.

        Args:
            class_names: Classes in label order.
        """


class ConditionedContext(ABC):
    """A layer around the token embedding whose context is shifted: by the image (CoCoOp), or by noise in several
    samples (Bayesian prompts). One text pass alone does not classify.
    """

    @property
    @abstractmethod
    def sees_image(self) -> bool:
        """Whether the active adapter's context depends on the image; no class features can be stored then."""

    @abstractmethod
    def shifts(self, image_features: Float[Tensor, "images dim"] | None) -> Float[Tensor, "shifted samples width"]:
        """Vectors that are added to the context, one per sample: of each image, or a single row for all of them.

        Args:
            image_features: Features of the images, not normalised; not read where the context does not see them.
        """

    @abstractmethod
    def shifted_by(self, shifts: Float[Tensor, "shifts width"]) -> AbstractContextManager[None]:
        """The class prompts shifted, all by the first, then all by the second, ...; in this thread, while it is open.

        Args:
            shifts: Some of `shifts`.
        """


def conditioned_context(model: nn.Module) -> ConditionedContext | None:
    """The layer that shifts the context of a model's class prompts; None where they stand as they are.

    Args:
        model: CLIP-like model, with or without adapters.
    """
    layer = towers_of(model).token_embedding
    is_active = isinstance(layer, ConditionedContext) and slots_of(model) is not None
    return layer if isinstance(layer, ConditionedContext) and is_active else None


def depends_on_image(model: nn.Module) -> bool:
    """Return whether every image has class prompts of its own, so that there are no class features.

    Args:
        model: CLIP-like model, with or without adapters.
    """
    layer = conditioned_context(model)
    return layer is not None and layer.sees_image


def conditioned_logits(
    model: nn.Module, prompts: ClassPrompts, image_features: Float[Tensor, "batch dim"], *, chunk_size: int = 256
) -> Float[Tensor, "batch classes"]:
    """Logits of a model whose context is shifted by the image (CoCoOp) or in several samples (Bayesian prompts).

    Each text pass computes once what its prompts begin with. With autograd it is computed again in the backward pass,
    so that memory grows neither with images and samples nor, beyond `chunk_size`, with the classes. A GPU, which waits
    for kernels to start, runs as many of them together as keep activations under 4 GiB. The probabilities of several
    samples are averaged, see `mean_over_samples`.

    Args:
        model: CLIP-like model with such an adapter.
        prompts: Tokenised class list.
        image_features: Features of the images, not normalised.
        chunk_size: Prompts per pass and shift.

    Raises:
        AdapterError: If the context is not shifted.
    """
    return conditioned_scores(model, prompts, image_features, image_features[:, None], chunk_size=chunk_size)[:, 0]


def conditioned_scores(
    model: nn.Module,
    prompts: ClassPrompts,
    image_features: Float[Tensor, "batch dim"],
    vectors: Float[Tensor, "batch vectors dim"],
    *,
    chunk_size: int = 256,
) -> Float[Tensor, "batch vectors classes"]:
    """Scaled cosines between vectors of each image and the class prompts that the image has made, as logits.

    Args:
        model: CLIP-like model with an adapter that shifts its context.
        prompts: Tokenised class list.
        image_features: Features of the images that shift the context, not normalised.
        vectors: Vectors to score, not normalised: an image feature itself, or others.
        chunk_size: Prompts per pass and shift.

    Raises:
        AdapterError: If the context is not shifted.
    """
    layer, towers = conditioned_context(model), towers_of(model)
    if layer is None:
        raise AdapterError("Expected an active adapter that shifts its context, by the image or by noise, got none.")
    ids = reserve_slots(model, prompts).input_ids.to(device_of(model))
    ids = ids.unflatten(0, (-1, len(prompts.class_names)))  # (templates, classes, tokens)
    parts = ids.split(max(1, chunk_size // len(ids)), dim=1)
    trained = [p for p in towers.token_embedding.parameters() if p.requires_grad]

    def scores_of(scored: Tensor, shifts: Tensor, part: Tensor, *_: Tensor) -> Tensor:
        with layer.shifted_by(shifts):
            text = _unit_features(model, part.flatten(0, 1).repeat(len(shifts), 1))
        # the features of a class in several templates are averaged, as `encode_classes` does
        text = text.unflatten(0, (len(shifts), len(part), -1)).mean(dim=1)  # (shifts, classes, dim)
        return towers.similarity_logits(scored, text)

    def scores(*inputs: Tensor) -> Tensor:
        inputs = (*inputs, *trained)
        return checkpoint(scores_of, *inputs, use_reentrant=False) if torch.is_grad_enabled() else scores_of(*inputs)

    shifts = layer.shifts(image_features)  # (one per image, or one for all; samples; width)
    scored = vectors.reshape(len(shifts), 1, -1, vectors.shape[-1]).expand(-1, shifts.shape[1], -1, -1)
    together = _shifts_per_pass(towers, parts[0].flatten(0, 1))
    rows = (scored.flatten(0, 1), shifts.flatten(0, 1))  # a row per image and sample
    passes = zip(*(equal_chunks(model, part, together) for part in rows), strict=True)
    logits = torch.cat([torch.cat([scores(*inputs, part) for part in parts], dim=-1) for inputs in passes])
    own = len(rows[0])
    if len(logits) > own:  # repeated rows: their backward pass gathers weights as that of the others
        logits = logits[:own] + 0.0 * logits[own:].sum()
    return mean_over_samples(logits.unflatten(0, shifts.shape[:2]).transpose(0, 1)).reshape(*vectors.shape[:2], -1)


def _shifts_per_pass(towers: Towers, input_ids: Int[Tensor, "prompts tokens"]) -> int:
    """Shifts whose class prompts run together: one on a CPU, which gains nothing by more."""
    if input_ids.device.type == "cpu":
        return 1
    longest = int(towers.pooled_positions(input_ids).max()) + 1
    return max(1, SHIFTS_MEMORY // towers.text_activation_bytes(longest * len(input_ids)))


def mean_over_samples(logits: Float[Tensor, "samples *rows classes"]) -> Float[Tensor, "*rows classes"]:
    """The logarithm of the class probabilities averaged over samples; logits of a single sample as they are.

    Its softmax is the average, so that it serves as logits. Averaged logits would be another classifier.

    Args:
        logits: Scaled logits.
    """
    if len(logits) == 1:
        return logits[0]
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def class_logits(
    model: nn.Module, image_features: Float[Tensor, "batch dim"], class_features: Float[Tensor, "*samples classes dim"]
) -> Float[Tensor, "batch classes"]:
    """Logits from class features, those of several samples included.

    Args:
        model: CLIP-like model.
        image_features: Features of the images, not normalised.
        class_features: Result of `encode_classes`.
    """
    towers = towers_of(model)
    if class_features.ndim == 2:
        return towers.similarity_logits(image_features, class_features)
    return mean_over_samples(torch.stack([towers.similarity_logits(image_features, s) for s in class_features]))


@torch.no_grad()
def encode_classes(
    model: nn.Module, prompts: ClassPrompts, *, chunk_size: int = 256, divide: bool = False
) -> Float[Tensor, "*samples classes dim"]:
    """Class features: each prompt's text feature is normalised, averaged over the templates, and normalised again.

    Runs in evaluation mode without autograd; memory beside the result grows with `chunk_size`, not with the number of
    classes. The result is float32, unit-norm, on the model's device, and may enter a loss as a constant.

    A model whose active adapter stores class features (a PromptKD student) gives those, by class name. One whose
    context has samples (Bayesian prompts without the image) gives the class features of each.

    Args:
        model: CLIP-like model, with or without adapters.
        prompts: Tokenised class list of this model; slots for learned context are added where an adapter needs them.
        chunk_size: Prompts per forward pass.
        divide: Divide the prompts among the processes of the training, which must all call this; all get all features.

    Raises:
        ClassNameError: If the prompts were made with the tokenizer of another model, or have no room for the learned
            context of the active adapter.
    """
    stored = _stored_class_features(model, prompts.class_names)
    if stored is not None:
        return stored
    prompts = reserve_slots(model, prompts)
    layer = conditioned_context(model)
    if layer is None or layer.sees_image:  # the latter refuses
        return _encode(model, prompts, chunk_size, divide)
    with evaluation_mode(model):
        features = []
        for shift in layer.shifts(None)[0]:
            with layer.shifted_by(shift[None]):
                features.append(_encode(model, prompts, chunk_size, divide))
    return torch.stack(features)


def _encode(model: nn.Module, prompts: ClassPrompts, chunk_size: int, divide: bool) -> Float[Tensor, "classes dim"]:
    """The class features of prompts with slots, by the tower as it is."""
    device = device_of(model)
    num_classes = len(prompts.class_names)
    if divide and num_processes() > 1:
        return _encode_together(model, prompts, device, chunk_size)
    sums: Tensor | None = None
    with evaluation_mode(model):
        for start in range(0, len(prompts.input_ids), chunk_size):
            input_ids = prompts.input_ids[start : start + chunk_size].to(device)
            features = _unit_features(model, input_ids)
            if sums is None:
                sums = features.new_zeros(num_classes, features.shape[-1])
            # Row t * classes + c of the prompts is class c, so that a chunk may end inside a template.
            rows = torch.arange(start, start + len(features), device=device) % num_classes
            sums.index_add_(0, rows, features)
    assert sums is not None, "ClassPrompts has at least one class"
    return sums.div_(sums.norm(dim=-1, keepdim=True).clamp_min(1e-12))  # in place: nothing beside the result grows


def _unit_features(model: nn.Module, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts dim"]:
    """Unit-norm text features, computed once where the prompts begin alike."""
    towers = towers_of(model)
    features = towers.finish_text(towers.embed_text(input_ids), input_ids, 0)
    return nn.functional.normalize(features.float(), dim=-1)


def _encode_together(
    model: nn.Module, prompts: ClassPrompts, device: torch.device, chunk_size: int
) -> Float[Tensor, "classes dim"]:
    """The class features, each process computing a part of the prompts."""

    def features_of(rows: Int[Tensor, " rows"]) -> Tensor:
        input_ids = prompts.input_ids[rows].to(device)
        return _unit_features(model, input_ids)

    with evaluation_mode(model):
        features = divided(len(prompts.input_ids), features_of, chunk_size=chunk_size)
    return nn.functional.normalize(features.unflatten(0, (-1, len(prompts.class_names))).sum(dim=0), dim=-1)


def _stored_class_features(model: nn.Module, class_names: Sequence[str]) -> Float[Tensor, "classes dim"] | None:
    """Class features that the active adapter stores instead of computing them from text; None without such an adapter.

    Args:
        model: CLIP-like model, with or without adapters.
        class_names: Classes whose features are wanted; a layer that stores features refuses those it does not have.
    """
    head = towers_of(model).text_head
    return head.stored_features(class_names) if isinstance(head, StoredFeaturesLayer) else None


@dataclass(frozen=True)
class _TextState:
    """Inputs of the class features: the content of each text-side tensor and the state of each adapter layer."""

    tensors: tuple[tuple[object, ...], ...]
    adapters: tuple[tuple[object, ...], ...]


class TextTensors:
    """The tensors on a model's text side and the state of its adapters at one moment; their content is not read.

    Comparing two of these takes a millisecond. It notices other tensors (adapters added, deleted, switched, merged or
    unloaded), another device or type, and changes that raise a tensor's version counter, such as `load_state_dict`. It
    does not notice a step of a fused optimizer or an edit through `.data`.

    Args:
        model: CLIP-like model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapters = _adapter_states(model)
        self._tensors = _text_tensors(model)  # held, so that the identity of a deleted one is not given away again
        self._marks = [(t.device, t.dtype, t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors]

    def is_same(self, other: "TextTensors") -> bool:
        """Return whether nothing noticeable happened between the two moments.

        Args:
            other: State of the same model.
        """
        return (
            self._adapters == other._adapters
            and self._marks == other._marks
            and len(self._tensors) == len(other._tensors)
            and all(mine is theirs for mine, theirs in zip(self._tensors, other._tensors, strict=True))
        )


class ClassFeatureCache:
    """Keeps the class features of one model and class list, and never returns features of another state.

    Every `get` compares the content of all text-side tensors (a checksum of their bits: about 20 ms per 60 million
    parameters on one core), the active, disabled and merged adapters, and the prompts. Vision-side changes do not
    count. Version counters of tensors would be cheaper, but fused optimizers and `.data` edits do not raise them.

    Several threads may ask for different class lists at once; each gets its own features, and the last ones stay.

    Args:
        chunk_size: Prompts per forward pass.
    """

    def __init__(self, *, chunk_size: int = 256) -> None:
        self.chunk_size = chunk_size
        self.num_computed = 0
        self._entry: tuple[_TextState, ClassPrompts, Tensor] | None = None

    def get(
        self, model: nn.Module, prompts: ClassPrompts, *, refresh: bool = True, divide: bool = False
    ) -> Float[Tensor, "*samples classes dim"]:
        """Class features of the model as it is now, unit-norm.

        Args:
            model: CLIP-like model, with or without adapters.
            prompts: Tokenised class list.
            refresh: False: raise where the features would have to be computed again, except the first time.
            divide: As for `encode_classes`.

        Raises:
            AdapterError: If `refresh` is False and the cache is stale.
        """
        state, entry = _text_state(model), self._entry  # one read: another thread may replace it
        if entry is not None:
            reason = _difference(entry, state, prompts)
            if reason is None:
                return entry[2]
            if not refresh:
                raise AdapterError(
                    f"The cached class features are stale: {reason}. Call `get` with `refresh=True`, or `clear()`."
                )
        features = encode_classes(model, prompts, chunk_size=self.chunk_size, divide=divide)
        self.num_computed += 1
        self._entry = (state, prompts, features)
        return features

    def clear(self) -> None:
        """Forget the features; the next `get` computes them."""
        self._entry = None


def _difference(
    entry: tuple[_TextState, ClassPrompts, Tensor], state: _TextState, prompts: ClassPrompts
) -> str | None:
    known, known_prompts, _ = entry
    if not known_prompts.is_same(prompts):
        return "the class prompts changed"
    if known.adapters != state.adapters:
        return "another adapter is active, or adapters were switched off, on or merged"
    if known.tensors != state.tensors:
        return "weights on the text side changed"
    return None


def _text_parts(model: nn.Module) -> list[nn.Module]:
    """Modules of the text side; parameters of the model itself only scale the logits."""
    return [part for name, part in towers_of(model).model.named_children() if side_of(name) != "vision"]


def _text_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors with values; weights that accelerate has offloaded are on `meta` between two calls, and do not train.

    Of a weight that is divided among processes, the part that this one holds.
    """
    tensors = [tensor for part in _text_parts(model) for tensor in (*part.parameters(), *part.buffers())]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors if not t.is_meta]


def _adapter_states(model: nn.Module) -> tuple[tuple[object, ...], ...]:
    """Active, disabled and merged adapters of each layer on the text side."""
    layers = [m for part in _text_parts(model) for m in part.modules() if isinstance(m, BaseTunerLayer)]
    return tuple((tuple(x.active_adapters), x.disable_adapters, tuple(x.merged_adapters)) for x in layers)


def _text_state(model: nn.Module) -> _TextState:
    tensors = _text_tensors(model)
    device = device_of(model)
    digests = [_bit_sums(tensor.detach()).to(device, non_blocking=True) for tensor in tensors]
    sums = torch.stack(digests).tolist() if digests else []  # one transfer for all
    kinds = [(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors]
    return _TextState(tuple((*kind, *pair) for kind, pair in zip(kinds, sums, strict=True)), _adapter_states(model))


def _bit_sums(tensor: Tensor) -> Int[Tensor, "2"]:
    """Checksums of the bits, weighted by row and by column, modulo 2**64; a change of one bit always shows."""
    if not tensor.numel():
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
    size = tensor.element_size()
    # Eight bytes at a time is 25 times faster than four; it needs aligned rows.
    wide = rows.is_contiguous() and rows.shape[1] * size % 8 == 0 and rows.storage_offset() * size % 8 == 0
    bits = rows.view(torch.int64 if wide else _SIGNED_INTEGERS[size])
    sums = [bits.sum(dim, dtype=torch.int64) for dim in (1, 0)]
    # Odd weights have an inverse modulo 2**64, so a changed sum cannot vanish in the product.
    return torch.stack([(s * torch.arange(1, 2 * len(s), 2, device=s.device)).sum() for s in sums])


class CompactPrompts:
    """Class prompts end to end, 4 bytes a token: 22,000 classes take about a megabyte.

    Args:
        prompts: Prompts with one template, slots reserved.
        lengths: Tokens of each prompt, the end of text included.
    """

    def __init__(self, prompts: ClassPrompts, lengths: Int[Tensor, " prompts"]) -> None:
        ids = prompts.input_ids
        self.lengths = lengths.cpu()
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._ids = ids[torch.arange(ids.shape[1]) < self.lengths[:, None]].to(torch.int32)

    def rows(self, classes: Int[Tensor, " selected"]) -> Int[Tensor, "selected tokens"]:
        """Token ids of some classes, cut to the longest of them; after its end a row repeats its last token.

        Args:
            classes: Positions of the classes, on the CPU.
        """
        lengths = self.lengths[classes]
        within = torch.arange(int(lengths.max()))[None].minimum(lengths[:, None] - 1)  # (selected, tokens)
        return self._ids[self._starts[classes][:, None] + within].long()


class PromptObjective(Objective):
    """An objective whose model classifies with the features of class prompts.

    Args:
        prompts: Tokenised class prompts.
    """

    def __init__(self, prompts: ClassPrompts) -> None:
        self.prompts = prompts
        self._class_features = ClassFeatureCache()

    @classmethod
    def texts_per_step(cls, num_classes: int, *, batch_size: int, settings: Mapping[str, Any]) -> int:
        """Class prompts whose activations a training step keeps at a time, for an estimate of its memory.

        Args:
            num_classes: All classes.
            batch_size: Images.
            settings: Those of the constructor, by name.
        """
        return num_classes

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits over all classes by the full model on pixels; class features are computed once per state of the
        model.

        Args:
            model: The model under evaluation.
            batch: `pixel_values`.
        """
        images = image_features(model, batch["pixel_values"])
        if depends_on_image(model):
            return conditioned_logits(model, self.prompts, images)
        return class_logits(model, images, self._class_features.get(model, self.prompts))
