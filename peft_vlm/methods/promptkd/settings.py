"""Checks of the objective's settings."""

from collections.abc import Mapping

from peft_vlm.losses import REDUCTIONS, TEACHER_WEIGHTINGS

_CHOICES = {
    "reduction": REDUCTIONS,
    "teacher_weighting": TEACHER_WEIGHTINGS,
    "teacher_cache": ("none", "views"),
    "student_cache": ("none", "views"),
}


def check_settings(
    names: Mapping[str, str], caches: Mapping[str, str | int], numbers: Mapping[str, float | int]
) -> None:
    """Refuse settings that are not among their choices, out of range, or do not go together.

    Args:
        names: `reduction` and `teacher_weighting`.
        caches: `teacher_cache`, `student_cache` and `align_steps`.
        numbers: Settings that must be positive.

    Raises:
        ValueError: Naming the setting, its value and what is possible.
    """
    for name, value in {**names, **caches}.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"Expected `{name}` to be one of {_CHOICES[name]!r}, got {value!r}.")
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"Expected `{name}` above 0, got {value!r}.")
    steps = caches["align_steps"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"Expected `align_steps` of 0 or more, got {steps!r}.")
    if caches["teacher_cache"] == "none" and (caches["student_cache"] != "none" or steps):
        raise ValueError(
            f"Expected `teacher_cache`='views' with `student_cache`={caches['student_cache']!r}, `align_steps`="
            f"{steps!r}, got 'none'. Both read stored features of the teacher."
        )
