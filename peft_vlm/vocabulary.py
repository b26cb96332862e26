"""The tokenizer of a model, if there is one."""

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def has_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows more than its special tokens.

    Where a folder has no vocabulary files, transformers 5 builds a tokenizer all the same, and it gives ids.

    Args:
        tokenizer: Any tokenizer.
    """
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights; None where its folder or repository has none.

    Args:
        model: Model of transformers, which knows where it came from.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, TypeError):
        return None
    return tokenizer if has_vocabulary(tokenizer) else None
