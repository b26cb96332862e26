"""Write adapters as files that the official trainers load: shared parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import ADAPTER_PREFIX, TowerNames
from peft_vlm.conversion.class_texts import word_ids
from peft_vlm.conversion.official_file import WRAPPING_KEY
from peft_vlm.errors import AdapterError, UnsupportedModelError


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What an adapter becomes in the official code of its method.

    Args:
        tensors: By their official names.
        settings: Official settings that belong to the file and are not in it, such as `START_LAYER`.
        is_wrapped: Whether the file is a trainer's checkpoint, which holds more than the tensors.
    """

    tensors: Mapping[str, Tensor]
    settings: dict[str, Any]
    is_wrapped: bool = True

    def save(self, path: str | Path, *, epoch: int) -> None:
        """Write the file atomically, with the entries that the official trainers look for.

        Args:
            path: The file; an older one is replaced.
            epoch: Epoch to record in the file.
        """
        content: dict[str, Any] = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if self.is_wrapped:
            content = {WRAPPING_KEY: content, "epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            torch.save(content, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's tensors by their names in the base model, on the CPU.

    Args:
        model: Model with the adapter.

    Raises:
        AdapterError: If it trains further modules of the model, which official files cannot hold.
    """
    modules = model.active_peft_config.modules_to_save
    if modules:
        raise AdapterError(
            f"Expected an adapter without `modules_to_save`, got {modules!r}: the official codes train no further "
            "modules, so a file without them would give other outputs."
        )
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return {name.removeprefix(ADAPTER_PREFIX): tensor.detach().cpu() for name, tensor in state.items()}


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The base model's own weights under the names of `CLIPModel`, on the CPU.

    Args:
        model: Model with adapters.

    Raises:
        UnsupportedModelError: If the base is no CLIP.
    """
    base = model.get_base_model()
    if not isinstance(base, CLIPModel):
        raise UnsupportedModelError(
            f"Expected an adapter on a `CLIPModel`, got one on `{type(base).__name__}`. The official codes know no "
            "other family."
        )
    prefix: Any = model.base_model.prefix
    return {
        name.replace(".base_layer", ""): tensor.detach().cpu()
        for name, tensor in base.state_dict().items()
        if prefix not in name
    }


def official_tokens(tensors: Mapping[str, Tensor], names: TowerNames, *, prefix: str) -> dict[str, Tensor]:
    """Learned tokens of one tower under their official names.

    Args:
        tensors: Result of `adapter_tensors`.
        names: The tower.
        prefix: Parameter prefix of the method.
    """
    found: dict[str, Tensor] = {}
    while f"{names.module(len(found))}.{prefix}prompt" in tensors:
        official = names.deep(len(found)) if found else names.shallow
        found[official] = tensors[f"{names.module(len(found))}.{prefix}prompt"]
    return found


def prompt_buffers(
    base: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None, *, config: Any, prefix: str = ""
) -> dict[str, Float[Tensor, "classes tokens width"]]:
    """The buffers of a prompt learner for the adapter's classes; nothing without class names or tokenizer.

    Args:
        base: Result of `base_tensors`.
        tokenizer: The base model's tokenizer.
        config: Configuration of the adapter.
        prefix: What the names of the buffers begin with.
    """
    _check_template(config)
    if tokenizer is None or config.class_names is None:
        return {}
    table, positions = (base[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    left = (word_ids(config.context_init, tokenizer) or [])[config.num_text_tokens :]
    ids = torch.zeros(len(config.class_names), len(positions) - config.num_text_tokens, dtype=torch.long)
    for row, name in zip(ids, config.class_names, strict=True):
        text = tokenizer(f"{name.replace('_', ' ')}.", add_special_tokens=False)["input_ids"]
        tokens = [tokenizer.bos_token_id, *left, *text, tokenizer.eos_token_id]
        row[: len(tokens)] = torch.tensor(tokens)
    return {f"{prefix}token_prefix": table[ids[:, :1]], f"{prefix}token_suffix": table[ids[:, 1:]]}


def _check_template(config: Any) -> None:
    """Refuse text that the official files cannot hold: they have context, class name, full stop.

    Args:
        config: Configuration of an adapter with text context.

    Raises:
        AdapterError: If there are attribute words, or other text around the class name.
    """
    if config.before:
        raise AdapterError(
            f"Expected an adapter without attribute words, got {config.attributes or config.attribute_ids!r}. The "
            "official file of this method has no place for them."
        )
    template = config.template
    if template is None:
        return
    rest = template.removeprefix(f"{config.context_init} ") if isinstance(template, str) else template
    if rest != "{}.":
        raise AdapterError(
            "Expected an adapter whose class prompts are context, class name and full stop, the only ones of the "
            f"official codes, got `template`={template!r} with `context_init`={config.context_init!r}. Its outputs "
            "would be others there."
        )
