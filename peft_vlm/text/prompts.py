"""Templates, class names and class prompts as token ids, with slots for learned context vectors."""

import dataclasses
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_vlm.errors import MAX_CHARACTERS, ClassNameError, check_template, shown
from peft_vlm.models.repository import hub_options
from peft_vlm.models.towers import Towers, towers_of

POSITIONS = ("end", "middle", "front")
"""Positions of the class name relative to the context, as CoOp's `CLASS_TOKEN_POSITION`."""


@dataclass(frozen=True)
class Slots:
    """Number and position of the places that a prompt reserves.

    A reserved place holds the start-of-text token, which no tokenizer puts anywhere but at position 0: a tokenised
    prompt says by itself where its slots are, and nothing a user writes is overwritten by accident.

    Args:
        num_tokens: Places per prompt: for context vectors, and for fixed words before them.
        placeholder_id: The start-of-text token.
        position: `"end"`: context, then class name. `"middle"`: half of the context, class name, the other half.
            `"front"`: class name, then context. The rest of the template follows.
        initial_ids: Token ids of the words that the context was initialised from. A template that begins with these
            words gives them up as slots; before any other template the slots are inserted.
    """

    num_tokens: int
    placeholder_id: int
    position: str = "end"
    initial_ids: tuple[int, ...] | None = None


class SlotLayer(ABC):
    """A layer around the token embedding that fills slots: what texts are made for the model with its adapters."""

    @property
    @abstractmethod
    def slots(self) -> Slots | None:
        """Slots of the active adapter; None where the layer acts as the base layer."""


def slot_mask(input_ids: Int[Tensor, "prompts tokens"], placeholder_id: int) -> Bool[Tensor, "prompts tokens"]:
    """Mask of the slots of tokenised prompts: start-of-text tokens after the first position."""
    mask = input_ids == placeholder_id
    mask[:, 0] = False  # the start token itself
    return mask


def has_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer knows more than its special tokens.

    Where a folder has no vocabulary files, transformers 5 builds a tokenizer all the same, and it gives ids.

    Args:
        tokenizer: Any tokenizer.
    """
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def tokenizer_of(model: nn.Module, *, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights; None where its folder or repository has none.

    Args:
        model: Model of transformers, which knows where it came from, but not at which revision.
        revision: Branch, tag or commit of the model on the Hub; None for the main branch.
    """
    name = model.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(name, revision=revision))
    except (OSError, ValueError, TypeError):
        return None
    return tokenizer if has_vocabulary(tokenizer) else None


#: Seven prompts that OpenAI found to do almost as well on ImageNet as its list of 80 (notebook
#: `Prompt_Engineering_for_ImageNet.ipynb` of openai/CLIP). Average their features: pass the tuple as the template.
IMAGENET_ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def readable(class_name: str) -> str:
    """The class name as a text shows it: underscores become spaces, outer and doubled spaces go away."""
    return " ".join(class_name.replace("_", " ").split())


def places_of(class_names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Find classes in another class list: by `readable`, else by what CLIP's tokenizer makes of the name.

    It lowers capitals and splits off every digit and all punctuation, so `"Dr. No!"` and `"dr . no !"` are one class
    for a model, and names that were read off a file's tokens are found under their proper spelling.

    Args:
        class_names: Names that are looked for.
        known: Names among which they are.

    Returns:
        Position of each; None where there is none, where two known names have these tokens, or where another of
        `class_names` has that place already.
    """
    exact = {readable(name): place for place, name in enumerate(known)}
    found: list[int | None] = [exact.get(readable(name)) for name in class_names]
    taken: set[int | None] = set(found)
    by_tokens: dict[tuple[str, ...], list[int]] = {}
    for place, name in enumerate(known):
        by_tokens.setdefault(_tokens_of(name), []).append(place)
    for index, name in enumerate(class_names):
        candidates = by_tokens.get(_tokens_of(name), [])
        if found[index] is None and len(candidates) == 1 and candidates[0] not in taken:
            found[index] = candidates[0]
            taken.add(candidates[0])
    return found


def _tokens_of(class_name: str) -> tuple[str, ...]:
    """Pieces that CLIP's tokenizer splits a name into before it merges letters."""
    pieces = re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\s\w]+", readable(class_name).lower())
    return tuple(pieces)


def fill(template: str, class_name: str) -> str:
    """Put a class name into a template.

    Args:
        template: Text with `{}` exactly once; other braces stay as they are.
        class_name: Underscores become spaces, as in CoOp's code.

    Returns:
        The prompt, for example `"a photo of a golden retriever."`.

    Raises:
        ClassNameError: If `{}` is not there exactly once.
    """
    check_template(template)
    return template.replace("{}", readable(class_name))


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """Tokenised prompts of a class list.

    Args:
        class_names: Names as the user gave them; labels index this tuple.
        templates: Texts with `{}`.
        input_ids: Row `t * len(class_names) + c` is template `t` filled with class `c`.
        name_lengths: Tokens of each bare class name; None when the prompts were not made from texts.
        slots: Places reserved for learned context; None for plain prompts.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    input_ids: Int[Tensor, "prompts tokens"]
    name_lengths: tuple[int, ...] | None = None
    slots: Slots | None = None

    def is_same(self, other: "ClassPrompts") -> bool:
        """Return whether both are the same token ids of the same classes in the same order."""
        return (
            self.class_names == other.class_names
            and len(self.templates) == len(other.templates)
            and torch.equal(self.input_ids, other.input_ids)
        )

    def select(self, rows: Int[Tensor, " selected"]) -> "ClassPrompts":
        """Return the prompts of some classes, in all templates.

        Args:
            rows: Positions of the classes.
        """
        templates = torch.arange(len(self.templates))[:, None] * len(self.class_names)
        lengths = self.name_lengths
        return dataclasses.replace(
            self,
            class_names=tuple(self.class_names[row] for row in rows.tolist()),
            input_ids=self.input_ids[(templates + rows).flatten()],
            name_lengths=None if lengths is None else tuple(lengths[row] for row in rows.tolist()),
        )

    def check_one_template(self, advice: str) -> None:
        """Refuse an ensemble of templates.

        Args:
            advice: Sentence that says what to do with one.

        Raises:
            ClassNameError: If there are several templates.
        """
        if len(self.templates) != 1:
            raise ClassNameError(
                f"Expected class prompts with one template, got {len(self.templates)}: {self.templates!r}. {advice}"
            )

    def check_same_classes(self, others: "ClassPrompts", *, name: str) -> None:
        """Refuse prompts of other classes, or of the same ones in another order.

        Args:
            others: Prompts by which a loss goes beside these.
            name: Their name as an argument.

        Raises:
            ClassNameError: If names or order differ.
        """
        if others.class_names != self.class_names:
            raise ClassNameError(
                f"Expected `{name}` of the {len(self.class_names)} classes of `prompts`, in their order, got "
                f"{len(others.class_names)}: {list(others.class_names[:5])!r}. Tokenise the same names."
            )


#: Unicode categories of characters that no name may hold: controls, ends of lines and paragraphs, half characters.
CONTROL = {"Cc", "Zl", "Zp", "Cs"}


def check_class_names(class_names: Sequence[object]) -> tuple[str, ...]:
    """The names as a tuple, refused when a classifier could not tell them apart.

    Args:
        class_names: Label order; `_` counts as a space.

    Raises:
        ClassNameError: If there is no name, a name is empty, not a string or holds a control character such as the end
            of a line, or two names read the same.
    """
    if isinstance(class_names, str) or not len(class_names):
        raise ClassNameError(f"Expected a list of at least one class name, got {class_names!r}.")
    seen: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if not isinstance(name, str) or not readable(name):
            raise ClassNameError(f"Class {index} has no name: got {name!r}. Give every class a non-empty string.")
        if len(name) > MAX_CHARACTERS:
            raise ClassNameError(f"Expected class names of at most {MAX_CHARACTERS:,} characters, got {shown(name)}.")
        if any(unicodedata.category(character) in CONTROL for character in name):
            raise ClassNameError(
                f"Class {index} has a control character in its name {name!r}, which shifts the lines of a list. Take "
                "it out, for example with `name.strip()`."
            )
        first = seen.setdefault(readable(name), index)
        if first != index:
            raise ClassNameError(
                f"Classes {first} and {index} have the same name {readable(name)!r}. Rename one, for example "
                "'crane bird' and 'crane machine', or merge the classes."
            )
    return tuple(str(name) for name in class_names)


def tokenize_classes(
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    *,
    template: str | Sequence[str],
    max_length: int,
    pad_to_max: bool = False,
) -> ClassPrompts:
    """Tokenise every class in every template.

    Ids are cut to the longest prompt. For CLIP that changes no feature: the text tower is causal and pools at the end
    of the text. SigLIP attends to its padding, so its prompts need the full length (`pad_to_max=True`).

    Args:
        tokenizer: The tokenizer of the model.
        class_names: Label order.
        template: One text with `{}`, or several, whose features `encode_classes` averages.
        max_length: Tokens the text tower takes, start and end token included.
        pad_to_max: Pad to `max_length` instead of to the longest prompt.

    Returns:
        Names, templates and token ids, padded on the right.

    Raises:
        ClassNameError: If names are missing, empty or the same, a template has no `{}`, a prompt is longer than
            `max_length` or holds a start or end token, two classes get the same tokens, or the tokenizer has no
            vocabulary or padding token.
    """
    names = check_class_names(class_names)
    templates = (template,) if isinstance(template, str) else tuple(template)
    if not templates:
        raise ClassNameError("Expected at least one template, got none. Pass for example 'a photo of a {}.'.")
    for text in templates:
        check_template(text)
    _check_tokenizer(tokenizer)
    rows = tokenizer([fill(text, name) for text in templates for name in names], padding=False, truncation=False)
    rows = rows["input_ids"]
    _check_special_tokens(tokenizer, rows, names, templates)
    _check_lengths(rows, names, templates, max_length)
    _check_distinct(rows, names, templates)
    length = max_length if pad_to_max else max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id, dtype=torch.long)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    bare = tokenizer([readable(name) for name in names], add_special_tokens=False)["input_ids"]
    return ClassPrompts(names, templates, input_ids, tuple(len(row) for row in bare))


def tokenize_for_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    *,
    template: str | Sequence[str],
) -> ClassPrompts:
    """`tokenize_classes` with the length and padding that a model's text tower needs.

    The prompts are plain; `reserve_slots(model, prompts)` adds the places of an adapter's learned context.

    Args:
        model: CLIP-like model, with or without adapters.
        tokenizer: Its tokenizer.
        class_names: Label order.
        template: One text with `{}`, or several.

    Raises:
        ClassNameError: As `tokenize_classes`, or if a text has a token that this model takes for the end.
    """
    towers = towers_of(model)
    prompts = tokenize_classes(
        tokenizer,
        class_names,
        template=template,
        max_length=towers.text_length,
        pad_to_max=not towers.text_is_causal,
    )
    highest, end = int(prompts.input_ids.max()), tokenizer.eos_token_id
    if towers.pools_highest_id and isinstance(end, int) and highest > end:
        raise ClassNameError(
            f"The prompts hold the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id {highest}, above "
            f"the end-of-text token ({end}), and this model takes the highest id for the end of a text. {_END_ADVICE}"
        )
    return prompts


def check_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers where the prompts of one are given to the models of both.

    Args:
        first: Tokenizer that makes the prompts.
        second: Tokenizer of another model that reads them.

    Raises:
        ClassNameError: If a token has different ids, or is known to one of them only.
    """
    ids, other_ids = first.get_vocab(), second.get_vocab()
    tokens = ids.keys() | other_ids.keys()
    different = [token for token in tokens if ids.get(token) != other_ids.get(token)]
    if different:
        token = min(different)
        raise ClassNameError(
            f"Expected two models with one vocabulary, for both read the same class prompts; {len(different)} of "
            f"{len(tokens)} tokens differ: {token!r} has the id {ids.get(token)!r} in {first.name_or_path!r} and "
            f"{other_ids.get(token)!r} in {second.name_or_path!r}. Take models of one tokenizer, or tokenise for each "
            "model on its own with `tokenize_for_model`."
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not has_vocabulary(tokenizer):
        raise ClassNameError(
            f"The tokenizer of {tokenizer.name_or_path!r} knows only its special tokens: its vocabulary files were "
            "not found. Load it from the folder of the model with `AutoTokenizer.from_pretrained`."
        )
    if tokenizer.pad_token_id is None:
        raise ClassNameError("The tokenizer has no padding token. Set `tokenizer.pad_token` as the model expects it.")


def _check_special_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], names: tuple[str, ...], templates: tuple[str, ...]
) -> None:
    """Refuse texts with start or end tokens besides those that the tokenizer puts around every text."""
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    usual = sum(token in special for token in tokenizer("")["input_ids"])
    for row, ids in enumerate(rows):
        found = [token for token in ids if token in special]
        if len(found) > usual:
            template, name = templates[row // len(names)], names[row % len(names)]
            raise ClassNameError(
                f"Class {name!r} in template {template!r} holds a start or end token inside "
                f"({tokenizer.convert_ids_to_tokens(found)!r}), after which the text tower reads nothing. Take it "
                "out, or characters that the tokenizer does not know."
            )


def _check_lengths(rows: list[list[int]], names: tuple[str, ...], templates: tuple[str, ...], max_length: int) -> None:
    for row, ids in enumerate(rows):
        if len(ids) > max_length:
            template, name = templates[row // len(names)], names[row % len(names)]
            raise ClassNameError(
                f"Class {name!r} in template {template!r} needs {len(ids)} tokens, the limit of the text tower is "
                f"{max_length}. Shorten the class name or the template."
            )


def _check_distinct(rows: list[list[int]], names: tuple[str, ...], templates: tuple[str, ...]) -> None:
    for start in range(0, len(rows), len(names)):
        seen: dict[tuple[int, ...], str] = {}
        for name, ids in zip(names, rows[start : start + len(names)], strict=True):
            first = seen.setdefault(tuple(ids), name)
            if first != name:
                raise ClassNameError(
                    f"Classes {first!r} and {name!r} have the same tokens in template "
                    f"{templates[start // len(names)]!r} (upper and lower case may count as one). Rename one of them."
                )


def slots_of(model: nn.Module) -> Slots | None:
    """The slots that the active adapter fills; None without learned context, or while adapters are switched off."""
    embedding = towers_of(model).token_embedding
    return embedding.slots if isinstance(embedding, SlotLayer) else None


def reserve_slots(model: nn.Module, prompts: ClassPrompts) -> ClassPrompts:
    """Class prompts as the model with its active adapter takes them.

    Args:
        model: CLIP-like model, with or without adapters.
        prompts: Plain class prompts, or prompts that already have this adapter's slots.

    Returns:
        `prompts` itself when the active adapter has no learned context.

    Raises:
        ClassNameError: If a prompt gets too long, was tokenised with other slots, its template has no room, or the
            text tower would not read all of it.
    """
    slots = slots_of(model)
    if prompts.slots != slots:
        prompts = _reserved(model, prompts, slots)
    _check_ids(towers_of(model), prompts.input_ids)
    return prompts


def _reserved(model: nn.Module, prompts: ClassPrompts, slots: Slots | None) -> ClassPrompts:
    if prompts.slots is not None:
        raise ClassNameError(
            f"Expected plain class prompts or ones with {slots!r}, got prompts with {prompts.slots!r}. "
            "Pass what `tokenize_classes` gave; the slots of the active adapter are added where they are needed."
        )
    assert slots is not None
    ids = _with_slots(prompts, slots)
    limit = towers_of(model).text_length
    if ids.shape[1] > limit:
        raise ClassNameError(
            f"The longest of the class prompts needs {ids.shape[1]} tokens with the {slots.num_tokens} context "
            f"tokens of the adapter, the limit of the text tower is {limit}. Shorten class names or template."
        )
    return dataclasses.replace(prompts, input_ids=ids, slots=slots)


def _check_ids(towers: Towers, input_ids: Int[Tensor, "prompts tokens"]) -> None:
    """Refuse prompts that a text tower does not know, or does not read to their end."""
    highest, size = int(input_ids.max()), towers.vocab_size
    if highest >= size:
        raise ClassNameError(
            f"The prompts hold the token id {highest}, the model's vocabulary has {size} tokens: they were made with "
            "another model's tokenizer. Load tokenizer and model from the same folder."
        )
    if not towers.text_is_causal:  # such a tower reads every position
        return
    positions = towers.pooled_positions(input_ids)
    # CLIP pools the first end-of-text token, and silently the first position when there is none.
    if bool((positions == 0).any()):
        raise ClassNameError(
            "The prompts hold no end-of-text token of this model: they were made with another model's tokenizer, or "
            "`eos_token_id` in the model's text config is wrong. Load tokenizer and model from the same folder."
        )
    # What follows the pooled token must be padding: words there change no feature, so that classes become the same.
    unread = torch.arange(input_ids.shape[1], device=input_ids.device) > positions[:, None]
    cut = (unread & (input_ids != input_ids[:, -1:])).any(dim=1).nonzero()
    if len(cut):
        row = int(cut[0])
        position = int(positions[row])
        raise ClassNameError(
            f"The text tower reads prompt {row} only up to the token {int(input_ids[row, position])} at position "
            f"{position}; words follow it. {_END_ADVICE}"
        )


_END_ADVICE = (
    "Take start and end tokens out of names and templates. If tokens were added to the vocabulary of a model with "
    "`eos_token_id=2` in its text config, for which the highest id is the end of a text, load it with the tokenizer's "
    "ids: `config.text_config.bos_token_id`, `config.text_config.eos_token_id`."
)


def _with_slots(prompts: ClassPrompts, slots: Slots) -> Int[Tensor, "prompts tokens"]:
    """Token ids with the slots reserved."""
    ids, count = prompts.input_ids, slots.num_tokens
    # One row of placeholders per prompt, (prompts, slots).
    places = torch.full((len(ids), count), slots.placeholder_id, dtype=ids.dtype, device=ids.device)
    if slots.position == "end":
        # A template that spells the initial words gives them up; else the slots are inserted before it.
        words = torch.tensor(slots.initial_ids or (), dtype=ids.dtype, device=ids.device)
        begins = ids[:, 1 : 1 + len(words)]  # fewer columns where all prompts are shorter than the words
        spelled = 0 < len(words) == begins.shape[1] and bool((begins == words).all())
        return torch.cat([ids[:, :1], places, ids[:, 1 + (len(words) if spelled else 0) :]], dim=1)
    if prompts.name_lengths is None or not all(text.startswith("{}") for text in prompts.templates):
        raise ClassNameError(
            f"Expected a template that begins with the class name, such as '{{}}.', for context in the "
            f"{slots.position!r} position, got {list(prompts.templates)!r}. Change the template."
        )
    before = count // 2 if slots.position == "middle" else 0  # slots before the class name
    lengths = prompts.name_lengths * len(prompts.templates)  # rows are templates x classes
    rows = [
        torch.cat([row[:1], place[:before], row[1 : 1 + length], place[before:], row[1 + length :]])
        for row, place, length in zip(ids, places, lengths, strict=True)
    ]
    return torch.stack(rows)
