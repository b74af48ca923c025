"""A second device in software: tensors that say they are on "soft:0" and compute on the CPU.

They refuse to mix with CPU tensors where those of a GPU would, NumPy cannot read them, and it is
counted what makes a program wait for its GPU: reading a single value (`item`, `bool`, `float`),
copies to the CPU, and what has a size that only values tell (`nonzero`, indexing by a mask).
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "soft"
aten = torch.ops.aten
# What takes tensors of several devices on a GPU, too: copies, and indices that are on the CPU.
MIXING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# What gives a Python number, or a tensor whose size depends on values.
WAITING = {
    aten._local_scalar_dense.default,
    aten._linalg_check_errors.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
waits: Counter[tuple[str, str]] = Counter()


@contextmanager
def software_device() -> Iterator[Counter[tuple[str, str]]]:
    """Within the context torch knows the device "soft".

    Yields:
        How often something waited for it since then, by what and by the line of polylens.
    """
    if registered() is None:
        pytest.skip("this torch has no devices in Python")
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    waits.clear()
    try:
        with _Factories():
            yield waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class SoftTensor(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SoftTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.held = inner
        return made

    def __repr__(self) -> str:
        return f"SoftTensor({self.held!r})"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes tensors where `device="soft"` is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_soft(kwargs.get("device")) or _tensors(args, kwargs, SoftTensor):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    soft = _tensors(args, kwargs, SoftTensor)
    _require_one_device(func, args, kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    target = kwargs.get("device")
    if target is not None:
        kwargs["device"] = "cpu" if _is_soft(target) else target
    if func is aten.copy_.default:
        if soft and not isinstance(args[0], SoftTensor):
            _wait("copy to the CPU")
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    if soft:
        _note(func, args, target)
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not _is_soft(target) and (target is not None or not soft):
        return out
    out = tree_map(_outer, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if soft else out


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    tensors = _tensors(args, kwargs, Tensor)
    if func in MIXING or not any(isinstance(t, SoftTensor) for t in tensors):
        return
    for t in tensors:
        if t.device.type not in (NAME, "meta") and t.dim():
            shapes = [tuple(t.shape) for t in tensors]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {t.device}! ({func}, {shapes})"
            )


def _note(func: Any, args: Any, target: Any) -> None:
    if func in WAITING:
        _wait(func.__name__)
    elif target is not None and torch.device(target).type == "cpu":
        _wait("copy to the CPU")
    elif func in MIXING and func is not aten._to_copy.default:
        indices = tree_leaves(args[1])
        if any(isinstance(i, SoftTensor) and i.dtype == torch.bool for i in indices):
            _wait("indexing by a mask")


def _wait(what: str) -> None:
    frame = sys._getframe()
    while frame is not None and "/polylens/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = "" if frame is None else frame.f_code.co_filename.rpartition("/polylens/")[2]
    waits[what, where if frame is None else f"{where}:{frame.f_lineno}"] += 1


def _is_soft(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _tensors(args: Any, kwargs: Any, kind: type) -> list[Any]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, kind)]


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, SoftTensor) else value


def _outer(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, SoftTensor)
    return SoftTensor(value) if plain else value


@cache
def registered() -> Any:
    """The backend, for the whole process; what is returned must be kept, None without one.

    To be called before the first backward pass: autograd counts the devices then.
    """
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        return None
    _setup_privateuseone_for_python_backend(NAME)
    # which gradient checkpointing asks of whatever device there is
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return SoftTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return SoftTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _inner(target).copy_(_inner(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library
