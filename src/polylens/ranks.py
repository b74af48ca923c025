"""Processes of torch.distributed that do one thing together: `Ranks`."""

import atexit
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polylens.errors import InvalidInputError, RankError

dist: Any = torch.distributed  # without types

Sum = TypeVar("Sum", bound=Tensor | float)
# What is named, at most, of the weights that differ.
NAMED = 3


class Merge(Protocol):
    """What becomes of the sums over some inputs; tensors are changed in place where they can be."""

    def total(self, value: Sum) -> Sum:
        """Of what inputs are added to."""
        ...

    def lowest(self, value: Tensor) -> Tensor:
        """Of what keeps the lowest of inputs."""
        ...

    def highest(self, value: Tensor) -> Tensor:
        """Of what keeps the highest of inputs."""
        ...


class Forget:
    """No inputs: sums begin anew, and what the inputs so far have decided stays decided."""

    def total(self, value: Sum) -> Sum:
        return cast(Sum, value.zero_() if isinstance(value, Tensor) else type(value)(0))

    def lowest(self, value: Tensor) -> Tensor:
        return value

    highest = lowest


@dataclass(frozen=True)
class Ranks:
    """All processes of torch.distributed, for `attach(ranks=)` and `Lens.report(ranks=)`.

        torch.distributed.init_process_group()   # in a script under torchrun
        lens = polylens.attach(model, own_tokens, ranks=polylens.Ranks())
        torch.distributed.destroy_process_group()  # when all is done

    Every process has the whole model and tokens of its own, and gets the same lens, to the bit:
    that of one process with the tokens of rank 0, rank 1, ... one after the other. Sums
    travel, not activations, over a process group of gloo's on the CPU, whatever the model is on.

    Args:
        timeout: seconds that a process waits for the others until it raises a RankError. They
            run as many batches each, so that it need not be longer than what they differ by.

    Raises:
        InvalidInputError: torch.distributed is not initialised, or a timeout that cannot be.

    >>> import polylens, torch
    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> polylens.Ranks(timeout=60).size
    1
    >>> torch.distributed.destroy_process_group()
    """

    timeout: float = 600.0

    def __post_init__(self) -> None:
        given: Any = self.timeout
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not 0 < given < float("inf"):
            raise InvalidInputError(f"timeout must be a number of seconds above 0, got {given!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError(
                "Ranks() are the processes of torch.distributed, which is not initialised; call "
                "torch.distributed.init_process_group() in a script that torchrun starts, or "
                "leave out ranks="
            )
        # its own, for its timeout and for tensors on the CPU
        group = [dist.new_group(backend="gloo", timeout=timedelta(seconds=given))]
        object.__setattr__(self, "_group", group)
        atexit.register(_end, group)

    @property
    def rank(self) -> int:
        """Of this process: 0 ... size - 1."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size()

    @classmethod
    def of_launcher(cls) -> "Ranks | None":
        """Those that torchrun started, for the command line; None of one process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        if not dist.is_initialized():
            dist.init_process_group("gloo")
            atexit.register(dist.destroy_process_group)
        return cls()

    @contextmanager
    def together(self) -> Generator[None, None, None]:
        """Within the context an error on one rank is a RankError on the others, at the next thing
        that they do together; the last should be `gathered(None)`."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            try:
                self._gathered(f"{type(error).__name__}: {error}", None)
            except RankError:
                pass
            raise

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gives, of any kind; its tensors on the CPU.

        Raises:
            RankError: another rank failed (why), or does not answer.
        """
        found = self._gathered(None, tree_map_only(Tensor, Tensor.cpu, value))
        failed = {rank: error for rank, (error, _) in enumerate(found) if error is not None}
        if failed:
            said = "; ".join(f"rank {rank} failed with {error}" for rank, error in failed.items())
            raise RankError(f"{said}; rank {self.rank} ends with it")
        return [value for _, value in found]

    def _gathered(self, error: str | None, value: Any) -> list[tuple[str | None, Any]]:
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, (error, value), group=self._own_group())
        return found

    def of_first(self, value: Tensor) -> Tensor:
        """That of rank 0 on every rank, to the bit; in place on a CPU."""
        there = value.detach().cpu().contiguous()
        with self._answered():
            dist.broadcast(there, 0, group=self._own_group())
        return value.copy_(there)

    def total(self, value: Sum) -> Sum:
        """The sum over ranks, the same on all of them to the bit."""
        if isinstance(value, Tensor):
            return cast(Sum, self._reduced(value, dist.ReduceOp.SUM))
        kind = torch.int64 if isinstance(value, int) else torch.float64
        return cast(Sum, type(value)(self.total(torch.tensor(value, dtype=kind))))

    def lowest(self, value: Tensor) -> Tensor:
        """The least of all ranks, entry by entry."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def highest(self, value: Tensor) -> Tensor:
        """The largest of all ranks, entry by entry."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        there = value.cpu().contiguous()
        with self._answered():
            dist.all_reduce(there, how, group=self._own_group())
        return self.of_first(there).to(value.device)

    def require_same(self, what: Mapping[str, Any]) -> None:
        """InvalidInputError on every rank unless all have the same: what differs, and where."""
        first, *others = self.gathered(dict(what))
        for rank, other in enumerate(others, 1):
            found = list(_differences(first, other, rank))
            if found:
                raise InvalidInputError(
                    f"ranks must have the same model and options: {'; '.join(found)}"
                )

    @contextmanager
    def _answered(self) -> Generator[None, None, None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} got no answer from another rank, which died, raised an error of "
                f"its own or is more than timeout={self.timeout:g} seconds behind; its own output "
                f"says why ({str(error).splitlines()[0]})"
            ) from error

    def _own_group(self) -> Any:
        return getattr(self, "_group")[0]  # noqa: B009


def _end(group: list[Any]) -> None:
    """Join a group's threads: one that lets go of its last tensor while the interpreter ends aborts
    the process."""
    own = group.pop()
    if dist.is_initialized():
        with suppress(ValueError):  # of a world that was initialised anew
            dist.destroy_process_group(own)


def together(ranks: Any) -> AbstractContextManager[None]:
    """`Ranks.together` of a `ranks=`; nothing of one process alone.

    Raises:
        InvalidInputError: something else was given.
    """
    if ranks is None:
        return nullcontext()
    if not isinstance(ranks, Ranks):
        raise InvalidInputError(f"ranks must be polylens.Ranks(), got {ranks!r:.80}")
    return ranks.together()


def _differences(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> Iterable[str]:
    for name in dict.fromkeys([*first, *other]):
        mine, its = first.get(name), other.get(name)
        if mine == its:
            continue
        if isinstance(mine, Mapping) and isinstance(its, Mapping):
            tables = cast(Mapping[str, Any], mine), cast(Mapping[str, Any], its)
            names = [n for n in {**tables[0], **tables[1]} if tables[0].get(n) != tables[1].get(n)]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            yield f"rank {rank} has other {name} than rank 0 ({', '.join(names[:NAMED])}{more})"
        else:
            yield f"{name} is {mine} on rank 0 and {its} on rank {rank}"
