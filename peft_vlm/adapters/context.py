"""The learned text context of an adapter's configuration, and where learned tokens go in CLIP's towers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

from torch import nn

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.config import VLMConfig, fit_fields, fitted
from peft_vlm.adapters.learned_tokens import DeepTokens, LearnedTokens, TextContext, VisionTokens
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.errors import AdapterError, UnsupportedModelError, shown
from peft_vlm.models.towers import Side, towers_of
from peft_vlm.text.prompts import Slots, tokenizer_of


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class TextContextConfig(VLMConfig):
    """Learned context before, around or after the class name.

    Args:
        num_text_tokens: Context vectors per prompt; 0 for none. Official `N_CTX`.
        context_init: Words whose token embeddings the context starts from; the first `num_text_tokens` tokens count.
            None: N(0, 0.02). Official `CTX_INIT`.
        context_init_ids: Token ids of these words. Filled in from the base model's tokenizer; give them where there is
            none.
        placeholder_id: Token id that reserves a place in a prompt: the base model's start-of-text token. Filled in.
    """

    num_text_tokens: int = field(default=4)
    context_init: str | None = field(default="a photo of a")
    context_init_ids: list[int] | None = field(default=None)
    placeholder_id: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (*(self.context_init_ids or ()), self.placeholder_id or 0):
            if value < 0:
                raise ValueError(f"Expected token ids of 0 or more, got {shown(value)}. Take those of the tokenizer.")

    def file_shapes(self) -> dict[str, Shape]:
        """The shapes of the learned tokens of both towers, as the methods' depths place them."""
        prefix = f"{self.peft_type.value.lower()}_"
        has_text = self.num_text_tokens and getattr(self, "text_depth", 1)
        shapes = self.text_shapes(rf"{prefix}\w+") if has_text else {}
        count = getattr(self, "num_vision_tokens", 0) if getattr(self, "vision_depth", 0) else 0
        return shapes | ({rf".*\bvision_model\..*{prefix}\w+": (count, None)} if count else {})

    def text_shapes(self, name: str) -> dict[str, Shape]:
        """The shapes of the text context: vectors before fixed words are part of the first one alone.

        Args:
            name: Regular expression of the tensors' last names.
        """
        own, extra = self.num_text_tokens, self.num_vectors_before
        if not extra or own is None:
            return {rf".*\btext_model\..*{name}": (own, None)}
        shapes: dict[str, Shape] = {rf".*\btext_model\.embeddings\..*{name}": (extra + own, None)}
        is_deep = (getattr(self, "text_depth", None) or getattr(self, "depth", None) or 1) > 1
        return shapes | ({rf".*\btext_model\.encoder\..*{name}": (own, None)} if is_deep else {})

    @property
    def text_position(self) -> str:
        """Position of the class name, one of `POSITIONS`; methods with a setting for it override this."""
        return "end"

    @property
    def before(self) -> list[int | None]:
        """Places before the context: the token id of a fixed word, or None for a learned vector."""
        return []

    @property
    def num_vectors_before(self) -> int:
        """Learned vectors among these places."""
        return 0

    @property
    def slots(self) -> Slots | None:
        """Places that prompts must reserve; None without context, or before the adapter was created."""
        if not self.num_text_tokens or self.placeholder_id is None:
            return None
        ids = None if self.context_init_ids is None else tuple(self.context_init_ids)
        return Slots(len(self.before) + self.num_text_tokens, self.placeholder_id, self.text_position, ids)


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class AttributeContextConfig(TextContextConfig):
    """A context that may follow attribute words, each after learned vectors of its own (ATPrompt).

    Args:
        attributes: Words before the context whose token embeddings stay as they are, such as `["color", "shape"]`;
            None: no words. Official `ATT1_TEXT` to `ATT3_TEXT`.
        attribute_ids: Token ids of each word. Filled in from the base model's tokenizer; give them where there is
            none.
        num_attribute_tokens: Learned vectors before each word. None: as many as `num_text_tokens`. Official `N_ATT1`
            to `N_ATT3`.

    References:
        ATPrompt: Textual-based Attribute Prompting for Vision-Language Models, 2024, arXiv 2412.09442, Eq. (4) to (6).
    """

    attributes: list[str] | None = field(default=None)
    attribute_ids: list[list[int]] | None = field(default=None)
    num_attribute_tokens: list[int] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        words, ids, counts = self.attributes, self.attribute_ids, self.num_attribute_tokens
        if words is None and ids is None:
            if counts is not None:
                raise ValueError("Expected no `num_attribute_tokens` without `attributes`. Leave it out.")
            return
        if not (words or ids) or not all(word.strip() for word in words or ()):
            raise ValueError(f"Expected `attributes` to be words, such as ['color', 'shape'], got {shown(words)}.")
        known = [part for part in (words, ids, counts) if part is not None]
        if len({len(part) for part in known}) > 1:
            raise ValueError(
                f"Expected one entry for each attribute, got `attributes`={shown(words)}, `attribute_ids`="
                f"{shown(ids)} and `num_attribute_tokens`={shown(counts)}."
            )
        if min(counts or [0]) < 0 or any(not word or min(word) < 0 for word in ids or ()):
            raise ValueError(
                "Expected numbers of 0 or more in `num_attribute_tokens` and `attribute_ids`, and at least one token "
                f"id for each attribute, got {shown(counts)} and {shown(ids)}."
            )
        if self.num_text_tokens == 0 or getattr(self, "text_depth", None) == 0:
            raise ValueError(f"Expected a text context after `attributes`={shown(words)}, got none.")
        if self.text_position != "end":
            raise ValueError(
                f"Expected the class name at the 'end' of a context with `attributes`, got {self.text_position!r}."
            )

    @property
    def before(self) -> list[int | None]:
        """Places before the context: for each attribute its learned vectors (None), then the ids of its word."""
        if self.num_attribute_tokens is None or self.attribute_ids is None:  # no attributes, or not completed yet
            return []
        parts = zip(self.num_attribute_tokens, self.attribute_ids, strict=True)
        return [place for count, word in parts for place in (*[None] * count, *word)]

    @property
    def num_vectors_before(self) -> int:
        """Learned vectors of the attributes; counted without a list, which a stranger's number could make large."""
        return sum(self.num_attribute_tokens or ()) if self.attribute_ids else 0


def fit_depths(config: VLMConfig, layers: Mapping[str, int], *, official: int = 9) -> None:
    """Fill in `text_depth` and `vision_depth` where they are None: three quarters of a tower, at most the official 9.

    Args:
        config: Configuration of a new adapter.
        layers: Layers by tower.
        official: Depth in a tower of 12 layers.
    """
    names = [f"{tower}_depth" for tower in ("text", "vision") if hasattr(config, f"{tower}_depth")]
    fits = {name: fitted(official, layers.get(name.removesuffix("_depth"))) for name in names}
    fit_fields(config, dict.fromkeys(names, official), fits)


def check_count(config: Any, name: str, *, minimum: int = 0, optional: bool = False) -> None:
    """Refuse a field that is not a whole number of some size.

    Args:
        config: Configuration with the field.
        name: Name of the field.
        minimum: Smallest allowed value.
        optional: Allow None, which is replaced when the adapter is put on a model.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    value = getattr(config, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"Expected `{name}` to be {minimum} or more, got {value!r}.")


def complete_context(config: TextContextConfig, model: Any) -> None:
    """Fill in what the context needs from the base model: the placeholder and the ids of the initial words.

    Args:
        config: Configuration of a new or loaded adapter.
        model: The base model.

    Raises:
        ValueError: If the initial words are fewer tokens than `num_text_tokens`.
        AdapterError: If the base model has no such tokens.
    """
    config.placeholder_id = towers_of(model).start_token_id
    _read_context_words(config, model)
    if isinstance(config, AttributeContextConfig):
        _complete_attributes(config, model)
    if config.context_init_ids is None:
        return
    if len(config.context_init_ids) < config.num_text_tokens:
        raise ValueError(
            f"Expected `num_text_tokens` of at most {len(config.context_init_ids)}, the tokens of "
            f"{config.context_init!r}, got {config.num_text_tokens!r}. Give more words, fewer tokens, or "
            "`context_init=None`."
        )
    config.context_init_ids = list(config.context_init_ids[: config.num_text_tokens])
    _check_ids("context_init_ids", config.context_init_ids, model)


def _check_ids(name: str, ids: Sequence[int], model: Any) -> None:
    """Refuse token ids that the base model does not know."""
    known = len(towers_of(model).token_embedding.weight)
    if max(ids, default=0) >= known:
        raise AdapterError(
            f"Expected `{name}` below {known}, the vocabulary of the base model, got {shown(list(ids))}. The adapter "
            "was made for another base model: load it onto that one."
        )


def _complete_attributes(config: AttributeContextConfig, model: Any) -> None:
    """Fill in the token ids of the attribute words, and the number of vectors before each."""
    if config.attributes is not None and config.attribute_ids is None:
        ids = [_ids_of(word, config, model, name="attribute_ids") for word in config.attributes]
        config.attribute_ids = ids
    ids = config.attribute_ids or []
    if ids and config.num_attribute_tokens is None:
        config.num_attribute_tokens = [config.num_text_tokens] * len(ids)
    places = config.num_vectors_before + sum(map(len, ids))
    if places > towers_of(model).text_length:
        raise ValueError(
            f"Expected attribute words and their vectors to fit into {towers_of(model).text_length} tokens, the limit "
            f"of the text tower, got {places}. Take fewer words, or lower `num_attribute_tokens`."
        )
    _check_ids("attribute_ids", [token for word in ids for token in word], model)
    towers = towers_of(model)
    special = {towers.start_token_id, towers.end_token_id}
    for index, word in enumerate(ids):
        if not word or special.intersection(word):
            name = shown(word if config.attributes is None else config.attributes[index])
            raise ValueError(
                f"Expected attributes that the base model's tokenizer knows, got {name}, of which it makes the token "
                f"ids {word!r}: none, or a start or end of the text. Take another word."
            )


def complete_whole_context(config: TextContextConfig, model: Any) -> None:
    """Fill in what a context needs that takes the place of all its initial words: as many vectors as their tokens.

    Args:
        config: Configuration of a new or loaded adapter.
        model: The base model.

    Raises:
        ValueError: If the words are no token.
    """
    _read_context_words(config, model)
    if config.context_init_ids is not None:
        if not config.context_init_ids:
            raise ValueError(
                f"Expected words in `context_init`, got {shown(config.context_init)}, of which the tokenizer makes no "
                "token. Pass words, or `context_init=None` for a random start."
            )
        config.num_text_tokens = len(config.context_init_ids)
    complete_context(config, model)


def _read_context_words(config: TextContextConfig, model: Any) -> None:
    """Fill in `context_init_ids` from the words, by the base model's tokenizer, unless they are given."""
    if config.context_init_ids is None and config.context_init is not None:
        advice = ", or `context_init=None` for a random start"
        config.context_init_ids = _ids_of(config.context_init, config, model, name="context_init_ids", advice=advice)


def _ids_of(words: str, config: TextContextConfig, model: Any, *, name: str, advice: str = "") -> list[int]:
    """Token ids of words by the base model's tokenizer.

    Args:
        words: The words.
        config: Configuration they stand in.
        model: The base model.
        name: Field of their ids.
        advice: What else can be done.

    Raises:
        ValueError: If the base model's folder has no tokenizer.
    """
    # On another model than the recorded one the recorded revision means nothing.
    is_recorded = config.base_model_name_or_path in (None, model.name_or_path)
    tokenizer = tokenizer_of(model, revision=config.revision if is_recorded else None)
    if tokenizer is None:
        raise ValueError(
            f"The context has the words {words!r}, and the base model's folder {model.name_or_path!r} has no "
            f"tokenizer to read them. Pass their token ids as `{name}`{advice}."
        )
    return list(tokenizer(words, add_special_tokens=False)["input_ids"])


def learned_token_pattern(model: nn.Module, *, text_depth: int, vision_depth: int, first_layer: int = 1) -> str:
    """Names of the modules that carry learned tokens.

    Args:
        model: The base model.
        text_depth: Layers of the text tower whose input has learned tokens; 0 for none.
        vision_depth: The same for the vision tower.
        first_layer: Layer that is the first to be wrapped itself; the tokens at the input of layer 0 enter with the
            embeddings.

    Returns:
        Regular expression over full module names.

    Raises:
        UnsupportedModelError: If the model is not a CLIP.
        ValueError: If a depth exceeds its tower, or both are 0.
    """
    towers = towers_of(model)
    if not towers.takes_learned_tokens:
        raise UnsupportedModelError(
            f"Expected a `CLIPModel`, got `{type(model).__name__}`. Learned tokens are placed relative to CLIP's "
            "start and class tokens, which this family does not have; Skip Tuning works for it."
        )
    if not text_depth and not vision_depth:
        raise ValueError("Expected learned tokens in at least one tower, got depth 0 or no tokens in both.")
    parts: list[str] = []
    sides: dict[Side, tuple[int, nn.ModuleList]] = {
        "text": (text_depth, towers.text_layers),
        "vision": (vision_depth, towers.vision_layers),
    }
    for tower, (depth, layers) in sides.items():
        if depth > len(layers):
            raise ValueError(
                f"Expected `{tower}_depth` from 0 to {len(layers)}, the layers of the {tower} tower, got {depth!r}."
            )
        if depth:
            parts.append(re.escape(towers.entrance_paths[tower]))
        if depth > first_layer:
            numbers = "|".join(str(layer) for layer in range(first_layer, depth))
            parts.append(rf"{re.escape(towers.layers_paths[tower])}\.({numbers})")
    return "|".join(f"({part})" for part in parts)


def learned_tokens(model: nn.Module, target: nn.Module, *, prefix: str) -> LearnedTokens:
    """The layer with learned tokens for a module that `learned_token_pattern` named.

    Args:
        model: The base model.
        target: One of its modules.
        prefix: The method's parameter prefix.
    """
    towers = towers_of(model)
    if target is towers.token_embedding:
        return TextContext(target, prefix=prefix)
    if target is towers.vision_embeddings:
        return VisionTokens(target, prefix=prefix)
    tower: Side = "text" if any(target is layer for layer in towers.text_layers) else "vision"
    return DeepTokens(target, prefix=prefix, tower=tower)


class ContextTuner(VLMTuner):
    """A tuner that wraps the token embedding alone, with a context that takes the place of its initial words."""

    def target_pattern(self, config: Any) -> str:
        """Name of the token embedding.

        Args:
            config: The adapter's configuration; gets the ids of its initial words, and their number.

        Returns:
            Regular expression over full module names.
        """
        pattern = learned_token_pattern(self.model, text_depth=1, vision_depth=0)
        complete_whole_context(config, self.model)
        return pattern
