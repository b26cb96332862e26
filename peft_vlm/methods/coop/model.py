"""CoOp as a PEFT tuner: the text tower's token embedding fills the reserved slots with learned vectors."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.adapters.context import ContextTuner
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.learned_tokens import EncodedContext, fill_slots
from peft_vlm.errors import ClassNameError
from peft_vlm.methods.coop.config import CoOpConfig
from peft_vlm.models.packed_texts import OwnContexts
from peft_vlm.models.towers import towers_of
from peft_vlm.text.prompts import tokenize_for_model, tokenizer_of


class CoOpContext(EncodedContext, OwnContexts):
    """The token embedding with a context for all prompts, or, by adapter, one for each class of a fixed list.

    A class is recognised by the token ids of its prompt, so that prompts may come in any order and number.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
        end_id: The end-of-text token.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str, end_id: int) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.end_id = end_id
        self.class_rows: dict[str, dict[tuple[int, ...], int]] = {}
        self.other_param_names = (*self.other_param_names, "class_rows")

    @property
    def contexts_differ(self) -> bool:
        """Whether the active adapter has contexts per class."""
        return bool(self.class_rows.get(self.current_adapter or ""))

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """A context, or one for each class.

        Args:
            adapter_name: Key of the new tensor.
            config: A `CoOpConfig`, completed by the tuner.
        """
        super().add_adapter(adapter_name, config)
        slots, ids = config.slots, config.class_token_ids or []
        self.class_rows[adapter_name] = {self._key(row, slots.placeholder_id): i for i, row in enumerate(ids)}
        if ids:  # (classes, slots, width): every class starts from random vectors of its own
            shared = self.prompts[adapter_name]
            start = self._random(len(ids) * slots.num_tokens, shared)
            self.prompts[adapter_name] = nn.Parameter(start.detach().view(len(ids), *shared.shape))
        if config.network is not None:
            self.add_network(adapter_name, config.network)

    def _key(self, row: list[int], placeholder_id: int) -> tuple[int, ...]:
        """Tokens of a prompt between start and end, without slots."""
        end = row.index(self.end_id) if self.end_id in row else len(row)
        return tuple(token for token in row[1:end] if token != placeholder_id)

    def forward(self, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts tokens width"]:
        """Embeddings with the context in the slots.

        Args:
            input_ids: Token ids with reserved slots.

        Raises:
            ClassNameError: If contexts are per class, and a prompt is of another class or template.
        """
        if not self.contexts_differ:
            return super().forward(input_ids)
        name, slots = self.current_adapter or "", self.slots
        assert slots is not None, "an adapter with contexts is active"
        known, embedded = self.class_rows[name], self.base_layer(input_ids)
        contexts = self.context(name).to(embedded.dtype)  # (classes, slots, width)
        # the placeholders of the context are no part of what tells classes apart
        rows = [known.get(self._key(row, slots.placeholder_id)) for row in input_ids.tolist()]
        if None in rows:
            raise ClassNameError(
                f"Expected class prompts of the {len(known)} classes that this adapter has a context for, in the "
                f"template of its training, got another one at position {rows.index(None)}. Contexts per class "
                "(`class_specific`) have nothing to say about new classes: train a shared context for those."
            )
        return fill_slots(embedded, input_ids, contexts[torch.tensor(rows, device=contexts.device)], slots)


class CoOpModel(ContextTuner):
    """The tuner behind `get_peft_model(clip, CoOpConfig(...))`."""

    prefix = "coop_"

    def target_pattern(self, config: CoOpConfig) -> str:
        """Name of the token embedding.

        Args:
            config: The adapter's configuration; gets the ids of its initial words, and their number.

        Returns:
            Regular expression over full module names.

        Raises:
            ValueError: If contexts are per class, and there is no tokenizer to read the names.
        """
        pattern = super().target_pattern(config)
        if config.class_specific and config.class_token_ids is None:
            tokenizer = tokenizer_of(self.model)
            if tokenizer is None:
                raise ValueError(
                    f"The base model's folder {self.model.name_or_path!r} has no tokenizer to read the class names of "
                    "a `class_specific` context. Pass `class_token_ids=prompts.input_ids.tolist()`."
                )
            prompts = tokenize_for_model(self.model, tokenizer, config.class_names, template=config.template)
            config.class_token_ids = prompts.input_ids.tolist()
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The token embedding with context.

        Args:
            target: `nn.Embedding` of the text tower.
        """
        return CoOpContext(target, prefix=self.prefix, end_id=towers_of(self.model).end_token_id)
