"""Annotations of arrays, checked at run time wherever a test calls the library.

Of a function's annotations only those are checked that name arrays, by dtype and shape. All others
are left to pyright: tests give wrong names and numbers on purpose, to see the library's own errors.
"""

import inspect
import typing

import beartype
import jaxtyping


def checked(function):
    """``function``, which jaxtyping makes from one of the library, with its arrays checked."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if names_arrays(hint)}
    return beartype.beartype(function)


def names_arrays(hint) -> bool:
    """Whether an annotation is, or contains, one of jaxtyping's."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray | jaxtyping.PyTree):
        return True
    return any(map(names_arrays, typing.get_args(hint)))
