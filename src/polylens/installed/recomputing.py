"""What flowed where gradient checkpointing computes again, in a backward pass.

A checkpoint throws activations away and runs its part of the model once more when gradients are
asked for, which may be after `replaced` was left. What runs again must be what ran.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint

from polylens.errors import AttachmentError

_FILE = checkpoint.__file__


class Flow:
    """Which degree flows at a layer (None: the true output), now or when it ran at first.

    Attributes:
        degree: what flows in passes that begin now.
    """

    def __init__(self) -> None:
        self.degree: int | None = None
        self._ran: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["Flow"], tuple[()]]:
        return Flow, ()  # a copy of a model is the true one

    def now(self, training: bool) -> int | None:
        """The degree that is to flow.

        Args:
            training: whether the model is, in which reentrant checkpoints run without gradients.

        Raises:
            AttachmentError: a checkpoint runs again that nobody saw running.
        """
        if torch.compiler.is_compiling():
            return self.degree
        again = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
        if not (again or training or torch.is_grad_enabled()):
            return self.degree
        checkpoints = list(_checkpoints())
        if not checkpoints:
            return self.degree
        known = [each for each in checkpoints if each in self._ran]
        if again and not known:
            raise AttachmentError(
                "gradient checkpointing computes a layer again that ran before polylens was "
                "attached, or with reentrant checkpoints in eval mode; attach before the forward "
                "pass, or use checkpoint(..., use_reentrant=False)"
            )
        degree = self._ran[known[0]] if known else self.degree
        for each in checkpoints:
            self._ran.setdefault(each, degree)
        return degree


def _checkpoints() -> Iterator[Any]:
    """What torch's checkpoints around this call are known by, the innermost first."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            found = _known_by(frame)
            if found is not None:
                yield found
        frame = frame.f_back


def _known_by(frame: FrameType) -> Any | None:
    """The same object in the forward pass of a checkpoint and when it runs again."""
    name, values = frame.f_code.co_name, frame.f_locals
    if name == "checkpoint" and "gen" in values:
        generator: Any = values["gen"].gi_frame
        return None if generator is None else generator.f_locals.get("new_frame")
    if name == "unpack_hook":
        return values.get("frame")
    return values.get("ctx") if name in ("forward", "backward") else None
