"""Which numbers are black and white in images of more than 8 bits: said, or clear from all training images."""

import math
from collections.abc import Sequence

from peft_vlm.errors import DataError

#: Training images that are looked at before a run.
SAMPLE = 256


def as_value_range(value: Sequence[int | float] | None) -> tuple[float, float] | None:
    """A range as a pair.

    Args:
        value: Number that is black and number that is white.

    Raises:
        DataError: If it is no pair of finite numbers, the first below the second.
    """
    if value is None:
        return None
    pair = tuple(value)
    if len(pair) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in pair):
        raise DataError(f"Expected `value_range` as (black, white), got {value!r}.")
    if not pair[0] < pair[1]:
        raise DataError(f"Expected `value_range` as (black, white) with black below white, got {value!r}.")
    return float(pair[0]), float(pair[1])


def check_value_range(
    tops: Sequence[tuple[float, float] | None], *, value_range: tuple[float, float] | None, are_all: bool
) -> None:
    """Refuse images whose numbers leave open what is white, and a range that none of them needs.

    An integer type of which no image uses the upper half may hold numbers of fewer bits, such as those of a 12-bit
    camera; taken by the range of the type they are nearly black.

    Args:
        tops: Of each image the number that is white by its type, and its highest number; None for 8 bits.
        value_range: The range that was said.
        are_all: Whether these are all images there are.

    Raises:
        DataError: If the range is missing, too small, or not needed.
    """
    highest: dict[float, float] = {}
    for white, top in filter(None, tops):
        highest[white] = max(highest.get(white, 0), top)
    if value_range is not None:
        if not highest and are_all:
            raise DataError(
                f"`value_range`={value_range!r} is for images of more than 8 bits, and all images have 8 or less. "
                "Leave it out."
            )
        if any(top > value_range[1] for top in highest.values()):
            raise DataError(
                f"Images hold numbers up to {max(highest.values()):g}, beyond `value_range`={value_range!r}."
            )
        return
    for white, top in highest.items():
        if white != 1 and top <= white // 2:
            likely = 2 ** max(8, math.ceil(math.log2(top + 1))) - 1
            raise DataError(
                f"The training images hold numbers up to {top:g} in a type that reaches {white:.0f}, so what is white "
                f"is not clear. Pass `value_range=(0, {likely})` or another (black, white); the type's is "
                f"`(0, {white:.0f})`."
            )
