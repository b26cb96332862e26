"""Errors and warnings of peft_vlm.

All errors are `ValueError`s, so that callers who know nothing of us still catch them.
"""


class PeftVLMError(ValueError):
    """Base class of the errors a caller may want to catch."""


class AdapterError(PeftVLMError):
    """An adapter folder, file or name does not fit: damaged, incomplete, made for another base model, stale."""


class CheckpointError(PeftVLMError):
    """A checkpoint could not be written, or is damaged or incomplete."""


class ClassNameError(PeftVLMError):
    """Class names or templates cannot be used: duplicates, empty names, prompts that are too long."""


class DataError(PeftVLMError):
    """A dataset, split, label or image cannot be used."""


class UnsupportedModelError(PeftVLMError):
    """The method does not work on this model family."""


class HubError(PeftVLMError):
    """A model hub refused, failed or could not be reached."""


class PeftVLMWarning(UserWarning):
    """Something the user asked for is not done, or not done as asked."""
