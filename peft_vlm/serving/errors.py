"""Errors of exported classifiers; they stand here because a server may have this folder alone."""

from .escape import one_line


class PeftVLMError(ValueError):
    """Base class of the errors a caller may want to catch.

    Messages quote files of strangers and errors of other libraries: as text they are one line that no terminal obeys.
    """

    def __str__(self) -> str:
        """The message, in one line."""
        return one_line(super().__str__())


class ExportedFileError(PeftVLMError):
    """A file is no exported classifier that this release can run, or a damaged one."""


class ImageError(PeftVLMError):
    """An image cannot be read, or is too large to be read."""
