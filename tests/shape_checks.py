"""Types are checked in all tests; only where an annotation names a shape, jaxtyping keeps the sizes of its axes too.

jaxtyping wraps every function of the package and binds and checks its arguments twice, for the sake of axes that most
functions do not have. Those are checked by the type checker alone, as strictly; a short training runs a tenth faster.
"""

from collections.abc import Callable
from inspect import isfunction
from typing import Any, get_args

import jaxtyping

_with_axes = jaxtyping.jaxtyped


def _may_name_a_shape(hint: Any) -> bool:
    """True if a type, or a part of it, is an array with named axes; or a text, which pyright alone may resolve."""
    if isinstance(hint, str) or (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)):
        return True
    return any(map(_may_name_a_shape, hint if isinstance(hint, list) else get_args(hint)))


def _jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What jaxtyping's import hook puts around each function and class."""

    def check(function: Any) -> Any:
        if isfunction(function) and not any(map(_may_name_a_shape, function.__annotations__.values())):
            return typechecker(function)
        return _with_axes(function, typechecker=typechecker)

    return check


jaxtyping.jaxtyped = _jaxtyped
