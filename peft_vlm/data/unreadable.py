"""Images that cannot be read: an error, or another image of the same class in their place, and counted."""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image

from peft_vlm.errors import DataError

logger = logging.getLogger(__name__)


class UnreadableImages:
    """What was found out about the images of a source, in memory that its data loader's workers share.

    Args:
        count: Rows of the source.
    """

    def __init__(self, count: int) -> None:
        self._skip = torch.zeros((), dtype=torch.bool).share_memory_()
        self._found = torch.zeros(count, dtype=torch.bool).share_memory_()

    def skip(self, skip: bool) -> None:
        """Say what happens to such an image from now on, in running workers too.

        Args:
            skip: Whether another one takes its place; False: an error, the default.
        """
        self._skip.fill_(skip)

    @property
    def are_skipped(self) -> bool:
        """Whether another image takes the place of one that cannot be read."""
        return bool(self._skip)

    def note(self, row: int, error: DataError) -> None:
        """Count an image that another one stands in for, with a line of the log.

        Args:
            row: Row of the source.
            error: Why it cannot be read.
        """
        self._found[row] = True
        logger.warning("Another image takes the place of one that cannot be read: %s", error)

    @property
    def rows(self) -> list[int]:
        """Rows of the source whose images could not be read so far."""
        return self._found.nonzero().flatten().tolist()

    def first_readable(
        self, positions: Iterable[int], rows: Sequence[int], read: Callable[[int], Image.Image]
    ) -> tuple[int, Image.Image]:
        """The first position whose image can be read, and the image.

        Args:
            positions: The wanted position, then those that may stand in for it.
            rows: Row of the source at each position.
            read: Opens the image at a position.

        Raises:
            DataError: If the wanted image cannot be read and that is an error, or none of the others can either.
        """
        problem: DataError | None = None
        for position in positions:
            if self._found[rows[position]]:
                continue
            try:
                return position, read(position)
            except DataError as error:
                if not self.are_skipped:
                    raise
                self.note(rows[position], error)
                problem = error
        raise DataError("Expected at least one readable image of each class, got none of one class.") from problem
