"""What runs beside a compiled graph: looking whether weights are those that were fitted to.

torch.compile cannot follow that, and a graph that it breaks within hooks forgets what they noted.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Verified(Protocol):
    def refresh(self) -> None:
        """Raise unless the weights are those that were fitted to."""


class Watch:
    """Has `watched.refresh` called whenever a compiled graph that calls this runs."""

    def __init__(self, watched: Verified) -> None:
        self._mark = torch.zeros(())
        self._key = next(_KEYS)
        _WATCHED[self._key] = watched

    def __call__(self) -> None:
        _verify(self._mark, self._key)


def when_compiled(method: Callable[P, R]) -> Callable[P, R]:
    """A method that torch.compile calls while it compiles, and takes what it returns as given.

    As torch.compiler.assume_constant_result, which would import the compiler.
    """
    cast(Any, method)._dynamo_marked_constant = True
    return method


_KEYS = count()
_WATCHED: WeakValueDictionary[int, Verified] = WeakValueDictionary()


# What writes to a tensor is not left out; this does not.
@torch.library.custom_op("polylens::verify", mutates_args=("mark",))
def _verify(mark: Tensor, key: int) -> None:
    watched = _WATCHED.get(key)
    if watched is not None:
        watched.refresh()
