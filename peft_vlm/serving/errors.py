"""Errors of exported classifiers; they stand here because a server may have this folder alone."""


class PeftVLMError(ValueError):
    """Base class of the errors a caller may want to catch."""


class ExportedFileError(PeftVLMError):
    """A file is no exported classifier that this release can run, or a damaged one."""


class ImageError(PeftVLMError):
    """An image cannot be read, or is too large to be read."""
