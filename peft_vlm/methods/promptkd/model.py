"""PromptKD as a PEFT tuner: visual prompts, a projector, and the teacher's class vectors instead of a text tower."""

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.adapters.context import learned_token_pattern, learned_tokens
from peft_vlm.adapters.layer import LayerCopy, PromptLayer
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.distributed import is_left_out, num_processes, sum_over_processes
from peft_vlm.errors import AdapterError, ClassNameError, PeftVLMWarning, UnsupportedModelError, check_list
from peft_vlm.methods.promptkd.classes import StoredClasses, StoredClassText, stored_classes
from peft_vlm.methods.promptkd.config import MAX_PROJECTOR_DEPTH, PromptKDConfig
from peft_vlm.methods.promptkd.teacher import Teacher
from peft_vlm.models.towers import LEAVES_OF_A_LAYER, towers_of
from peft_vlm.text.prompts import readable, tokenize_for_model


class Projector(PromptLayer):
    """The visual projection followed by an adapter's Linear-Norm-ReLU-Linear.

    The projector's parameters are float32 whatever the base model is, and it computes in their type, under autocast
    too: BatchNorm over eight images in half precision is where official runs collapse. Its input is the un-normalised
    image feature.

    Args:
        base_layer: CLIP's visual projection.
        prefix: The method's parameter prefix.

    References:
        arXiv 2403.02781, Sec. 3.3 and Table 8 (depth 1 to 3). The official 1x1 convolutions on one position are
        linear layers.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer)
        self._linear = [f"{prefix}linear{index}" for index in range(1, MAX_PROJECTOR_DEPTH + 1)]
        self._norm = [f"{prefix}norm{index}" for index in range(1, MAX_PROJECTOR_DEPTH)]
        self.adapter_layer_names = (*self._linear, *self._norm)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """A projector with random weights, fresh statistics and this layer's training mode.

        Args:
            adapter_name: Key of the new modules.
            config: A `PromptKDConfig`.
        """
        device, width = self.get_base_layer().weight.device, self.get_base_layer().out_features
        for depth in range(config.projector_depth):
            linear = nn.Linear(width, config.class_dim, device=device, dtype=torch.float32)
            getattr(self, self._linear[depth])[adapter_name] = linear
            width = config.class_dim  # hidden layers are as wide as the teacher's space
            if depth + 1 < config.projector_depth and config.projector_norm != "none":
                kind = nn.BatchNorm1d if config.projector_norm == "batchnorm" else nn.LayerNorm
                norm = kind(width, device=device, dtype=torch.float32).train(self.training)
                getattr(self, self._norm[depth])[adapter_name] = norm

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Image features in the teacher's space, not normalised; without an adapter the student's own.

        Args:
            pooled: The class token after the last norm.
        """
        features = self.base_layer(pooled)
        return features if self.current_adapter is None else self.project(features)

    def plain(self) -> nn.Module:
        """Projection and projector as one sequence."""
        # the student's own projection comes first; the rest is what `project` runs
        name, layers = self.current_adapter, [copy.deepcopy(self.base_layer)]
        if name is not None:
            for depth, names in enumerate(self._linear):
                if name in getattr(self, names):
                    if depth:
                        norms = getattr(self, self._norm[depth - 1])
                        layers += [*([copy.deepcopy(norms[name])] if name in norms else []), nn.ReLU()]
                    layers.append(copy.deepcopy(getattr(self, names)[name]))
        return nn.Sequential(*layers)

    def project(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """The active adapter's projector alone.

        Args:
            features: The student's own image features, not normalised.
        """
        name = self.current_adapter
        assert name is not None, "the callers know that an adapter is active"
        linears = [getattr(self, names)[name] for names in self._linear if name in getattr(self, names)]
        # In float32, also under autocast: BatchNorm over a small batch overflows in half precision.
        with torch.autocast(features.device.type, enabled=False):
            hidden = features.to(linears[0].weight.dtype)
            for depth, linear in enumerate(linears):
                hidden = linear(hidden)  # (batch, class_dim)
                if depth + 1 < len(linears):
                    norms = getattr(self, self._norm[depth])
                    hidden = normalise(norms[name], hidden).relu() if name in norms else hidden.relu()
        return hidden if torch.is_autocast_enabled(features.device.type) else hidden.to(features.dtype)


def normalise(norm: nn.Module, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """A norm layer; BatchNorm in training takes the statistics of the batches of all processes, and falls back to its
    running ones for a batch of one image.

    Args:
        norm: `BatchNorm1d` or `LayerNorm`.
        hidden: Its input.
    """
    if not isinstance(norm, nn.BatchNorm1d) or not norm.training:
        return norm(hidden)
    if num_processes() > 1:
        return _normalise_together(norm, hidden)
    if len(hidden) == 1:
        return _by_running_statistics(norm, hidden)
    return norm(hidden)


def _normalise_together(norm: nn.BatchNorm1d, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """BatchNorm over the rows of all processes, gradients included; torch's `SyncBatchNorm` needs a GPU.

    Args:
        norm: In training mode.
        hidden: Rows of this process; all processes call this together.
    """
    from torch.distributed.nn.functional import all_reduce  # not there in builds of torch without distributed

    kept = hidden[: 0 if is_left_out() else None]  # a filler batch takes part in the sums with no row
    count = float(sum_over_processes(torch.tensor(float(len(hidden)), device=hidden.device)))
    if count == 1:
        return _by_running_statistics(norm, hidden)
    mean = all_reduce(kept.sum(dim=0)) / count
    variance = all_reduce((kept - mean).square().sum(dim=0)) / count  # biased, as BatchNorm normalises
    with torch.no_grad():  # the running variance is the unbiased one
        for statistic, value in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
            statistic.lerp_(value, norm.momentum)
        norm.num_batches_tracked.add_(1)
    return (hidden - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


def _by_running_statistics(norm: nn.BatchNorm1d, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    statistics = norm.running_mean, norm.running_var
    return nn.functional.batch_norm(hidden, *statistics, norm.weight, norm.bias, False, 0.0, norm.eps)


class PromptKDModel(VLMTuner):
    """The tuner behind `get_peft_model(student, PromptKDConfig(class_dim=...))`.

    Its public methods can be called on the `PeftModel`: `set_class_vectors`, `add_classes`, `keep_classes`.
    """

    prefix = "promptkd_"

    def target_pattern(self, config: PromptKDConfig) -> str:
        """Names of the wrapped modules.

        Args:
            config: The adapter's configuration.

        Returns:
            Regular expression over full module names.

        Raises:
            UnsupportedModelError: If the student is not a CLIP.
            ValueError: If `class_dim` is missing.
        """
        if not isinstance(self.model, CLIPModel):
            raise UnsupportedModelError(
                f"Expected a `CLIPModel` as student, got `{type(self.model).__name__}`. Projector and class vectors "
                "take the place of CLIP's two projections, which this family does not have."
            )
        if config.class_dim is None:
            raise ValueError(
                "Expected `class_dim`, the width of the teacher's class vectors, got None. Pass "
                "`PromptKDConfig(class_dim=teacher.config.projection_dim)`."
            )
        self._check_neighbours(config)
        self._check_logit_scale(config)
        towers = towers_of(self.model)
        heads = (towers.vision_head_paths[-1], towers.text_head_paths[-1], towers.text_tower_path)
        parts = [re.escape(path) for path in heads]
        if config.vision_depth:
            parts.append(learned_token_pattern(self.model, text_depth=0, vision_depth=config.vision_depth))
        if config.tune_vision:  # copies of all leaves of the tower's layers, and of the norms around them
            leaves = "|".join(re.escape(leaf) for leaf in LEAVES_OF_A_LAYER)
            parts.append(rf"{re.escape(towers.layers_paths['vision'])}\.\d+\.({leaves})")
            parts += [re.escape(path) for path in towers.vision_norm_paths]
        return "|".join(f"({part})" for part in parts)

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The layer for one module.

        Args:
            target: Module of the student.
        """
        towers = towers_of(self.model)
        if target is towers.vision_head:
            return Projector(target, prefix=self.prefix)
        if target is towers.text_head:
            return StoredClasses(target, prefix=self.prefix)
        if target is towers.text_tower:
            return StoredClassText(target, prefix=self.prefix)
        if isinstance(target, nn.Linear | nn.LayerNorm):
            return LayerCopy(target, prefix=self.prefix)
        return learned_tokens(self.model, target, prefix=self.prefix)

    def set_class_vectors(
        self,
        class_names: Sequence[str],
        vectors: Float[Tensor, "classes dim"],
        *,
        teacher_name: str | None = None,
        teacher_logit_scale: float | None = None,
    ) -> None:
        """Store the classes of the active adapter.

        Args:
            class_names: One per vector, in label order.
            vectors: The teacher's class features; they are normalised.
            teacher_name: Recorded in the configuration.
            teacher_logit_scale: Recorded too.
        """
        store_classes(
            self.model, class_names, vectors, teacher_name=teacher_name, teacher_logit_scale=teacher_logit_scale
        )

    def add_classes(
        self,
        class_names: Sequence[str],
        *,
        teacher: nn.Module | Teacher,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Sequence[str],
    ) -> None:
        """Add classes without training, behind those that are stored.

        Args:
            class_names: New names.
            teacher: The teacher of the training.
            tokenizer: Its tokenizer.
            template: Text around a class name; take the one of the training.

        Raises:
            ClassNameError: If a name is stored already.
        """
        check_list("class_names", class_names)
        layer = stored_classes(self.model)
        config = layer.adapter_configs[layer.active_adapters[0]]
        stored = list(config.class_names or ())
        known = {readable(name) for name in stored}
        twice = [name for name in class_names if readable(name) in known]
        if twice:
            raise ClassNameError(f"Expected new classes, got {twice[:3]!r}, which the adapter has already.")
        guide = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        if config.teacher_name_or_path not in (None, guide.name):
            warnings.warn(
                f"The class vectors of this adapter come from the teacher {config.teacher_name_or_path!r}, the new "
                f"ones from {guide.name!r}. Vectors of another teacher lie elsewhere, even with the same width.",
                PeftVLMWarning,
                stacklevel=2,
            )
        prompts = tokenize_for_model(guide.model, tokenizer, class_names, template=template)
        new = Teacher(guide.model, name=guide.name).class_features(prompts)
        if new.shape[-1] != config.class_dim:
            raise AdapterError(
                f"Expected a teacher with class vectors of {config.class_dim} numbers, got {new.shape[-1]} from "
                f"{guide.name!r}. Use the teacher of the training, {config.teacher_name_or_path!r}."
            )
        old = layer.active_vectors  # (classes, dim): they keep their rows, hence their labels
        layer.store(layer.active_adapters[0], [*stored, *class_names], torch.cat([old, new.to(old)]))

    def keep_classes(self, class_names: Sequence[str]) -> None:
        """Keep only some classes, in the order given.

        Args:
            class_names: Stored names.
        """
        layer = stored_classes(self.model)
        vectors = layer.stored_features(class_names)
        assert vectors is not None, "`stored_classes` gives active layers only"
        layer.store(layer.active_adapters[0], class_names, vectors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Make room for a file's class vectors in an adapter that has none yet, as on resuming; then check as ever."""
        for module in model.modules():
            # A new adapter has no classes before `prepare`, a checkpoint of it has them.
            if isinstance(module, StoredClasses) and not len(module.vectors[adapter_name]):
                stored = [t for key, t in state_dict.items() if key.endswith("promptkd_class_vectors")]
                if stored and stored[0].shape[-1] == config.class_dim:
                    module.vectors[adapter_name] = torch.empty_like(stored[0], device=module.base_layer.weight.device)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _check_neighbours(self, config: PromptKDConfig) -> None:
        """Refuse prompts and copies of the same layers in one model: they would rename each other."""
        others = [other for other in self.peft_config.values() if other is not config]
        if any(isinstance(other, PromptKDConfig) and other.tune_vision != config.tune_vision for other in others):
            raise AdapterError(
                "Expected adapters with the same `tune_vision` on one model, got both. Load the base model again for "
                "the other kind."
            )

    def _check_logit_scale(self, config: PromptKDConfig) -> None:
        """Warn where the base model is not the one of the training, as its logit scale shows."""
        recorded = config.student_logit_scale
        if recorded is None:
            return
        actual = towers_of(self.model).logit_scale
        if abs(actual - recorded) > 0.01 * recorded:
            warnings.warn(
                f"The adapter was trained with logit scale {recorded:.4g}, this base model has {actual:.4g}: it is "
                f"probably not {config.base_model_name_or_path!r}, for which the adapter was made.",
                PeftVLMWarning,
                stacklevel=2,
            )


def store_classes(
    model: nn.Module,
    class_names: Sequence[str],
    vectors: Float[Tensor, "classes dim"],
    *,
    teacher_name: str | None = None,
    teacher_logit_scale: float | None = None,
) -> None:
    """Store class vectors in a model's active PromptKD adapter, and what the configuration records about them.

    Args:
        model: `PeftModel`, or a base model with injected adapters.
        class_names: One per vector, in label order.
        vectors: The teacher's class features.
        teacher_name: Recorded.
        teacher_logit_scale: Recorded.
    """
    layer = stored_classes(model)
    name = layer.active_adapters[0]
    layer.store(name, class_names, vectors)
    config = layer.adapter_configs[name]
    config.teacher_name_or_path, config.teacher_logit_scale = teacher_name, teacher_logit_scale
    config.student_logit_scale = towers_of(model).logit_scale
