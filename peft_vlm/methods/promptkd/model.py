"""PromptKD as a PEFT tuner: visual prompts, a projector, and the teacher's class vectors instead of a text tower."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.adapters.context import learned_token_pattern, learned_tokens
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.layer_copy import LayerCopy
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.errors import AdapterError, ClassNameError, PeftVLMWarning, UnsupportedModelError
from peft_vlm.methods.promptkd.classes import StoredClasses, StoredClassText, stored_classes
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.methods.promptkd.projector import Projector
from peft_vlm.methods.promptkd.teacher import Teacher
from peft_vlm.models.towers import LEAVES_OF_A_LAYER, towers_of
from peft_vlm.text.prompts import readable, tokenize_for_model


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
        if config.tune_vision:
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
        old = layer.active_vectors
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
        if recorded is None or self.model.logit_scale.is_meta:
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


def check_stored(model: nn.Module, class_names: Sequence[str], teacher_name: str) -> None:
    """Refuse an adapter with other classes; warn where its vectors came from another teacher.

    Args:
        model: `PeftModel` with an active PromptKD adapter.
        class_names: Classes of the training at hand.
        teacher_name: Its first teacher.

    Raises:
        ClassNameError: If the adapter stores other classes.
    """
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
