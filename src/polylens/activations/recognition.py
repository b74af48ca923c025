"""Which activation a name, a host's function or module, or a saved one is.

A function is recognised by its values on PROBE, wherever it comes from.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.activations.table import ALIASES, FAMILIES, TABLE, known_activations
from polylens.errors import (
    ArtifactError,
    InvalidInputError,
    PolylensError,
    UnsupportedActivation,
)
from polylens.files.format import Record

# Points at which a model of any dtype can be asked, near and moderately far.
NEAR = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-60.0, -25.0, 25.0, 60.0])])
# And those that tell apart what agrees there: between the points of the grid, and far away.
_BETWEEN = (torch.arange(1, 510).double() * 0.6180339887498949 % 1).float() * 24 - 12
PROBE = torch.cat([NEAR, _BETWEEN, torch.tensor([-1e4, -1e3, -100.0, 100.0, 1e3, 1e4])])
# Where nothing but the candidate itself agrees everywhere: a spike of any width that matters.
_STEPS = torch.arange(1, 1 << 15).double() * 0.6180339887498949 % 1
_FAR = 10 ** (_STEPS[::16] * 3 + 2)
DENSE = torch.cat([_STEPS * 24 - 12, _STEPS * 240 - 120, _FAR, -_FAR]).float()
# What libraries differ by on it, relative to a value or to one.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-6}
# The points of it whose values are saved, everywhere and few.
SAVED = PROBE[-115:].double()
# Where 0.1 evaluated the activations that it saved, and what a saved one may differ by.
PROBE_OF_0_1, ROUNDING = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64), 1e-12


def activation(source: str | Activation | Callable[[Tensor], Tensor]) -> Activation:
    """The Activation for a name, or for a host's function or module by what it computes.

    A callable is evaluated on PROBE and compared with every known activation, so it does not
    matter which library it comes from. Modules with parameters (leaky ReLU, ELU, SiLU with a
    beta, xIELU, ...) are read first and then compared in the same way.

    Raises:
        UnsupportedActivation: unknown name, or a function that equals no known activation.
    """
    if isinstance(source, Activation):
        return source
    if isinstance(source, str):
        name = ALIASES.get(source, source)
        if name not in TABLE:
            near = difflib.get_close_matches(source, known_activations(), n=3)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            raise UnsupportedActivation(
                f"unknown activation {source!r}{hint}; known: {', '.join(known_activations())}"
            )
        return TABLE[name]
    if isinstance(source, type):
        raise UnsupportedActivation(
            f"{source.__name__} is a class; give a function or an instance, {source.__name__}()"
        )
    if not callable(source):
        raise UnsupportedActivation(
            f"an activation is a name, a callable or an Activation, got {type(source).__name__}"
        )
    return _recognised(source)


def activation_record(act: Activation) -> Record:
    """Its name, the parameters of a parametrised one, and its values on SAVED."""
    return {"name": act.name, "family": list(act.family)}, {"values": act(SAVED)}


def activation_of(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Activation:
    """The activation of a record.

    Raises:
        ArtifactError: a name that is unknown here, or means another function here.
    """
    name, family = metadata["name"], metadata["family"]
    try:
        if family:
            act = replace(FAMILIES[family[0]].make(*family[1:]), name=name)
        else:
            act = activation(str(name))
    except (PolylensError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"this was saved with the activation {name!r}, which is not known here; register the "
            f"same function with polylens.register_activation({name!r}, ...) and load again"
        ) from error
    saved = tensors["values"]
    probe = PROBE_OF_0_1 if saved.shape == PROBE_OF_0_1.shape else SAVED
    if saved.shape != probe.shape or saved.dtype != probe.dtype:
        raise ArtifactError(f"the saved values of {name!r} are {saved.dtype} {list(saved.shape)}")
    error = float(((act(probe) - saved).abs() / (1 + saved.abs())).max())
    if not error <= ROUNDING:
        raise ArtifactError(
            f"this was saved with an activation {name!r} that is another function than the one "
            f"known here under that name: they differ by {error:.3g}; register the right one "
            "under another name and save again, or start without the present one"
        )
    return act


def called(source: Callable[..., object], y: Tensor) -> object:
    """Of somebody else's function, which may return anything."""
    return source(y)


@torch.no_grad()
def _recognised(source: Callable[[Tensor], Tensor]) -> Activation:
    label = getattr(source, "__name__", type(source).__name__)
    parameter = next(iter(getattr(source, "parameters", lambda: ())()), None)
    device = parameter.device if parameter is not None else "cpu"
    for dtype, tolerance in TOLERANCES.items():
        probe = PROBE.to(dtype=dtype, device=device)
        try:
            values = called(source, probe.clone())
        except Exception:  # whatever a function of somebody else's raises in this dtype
            continue
        if not isinstance(values, Tensor) or values.shape != probe.shape:
            raise UnsupportedActivation(
                f"{label} is not elementwise: {tuple(probe.shape)} values in, "
                f"{tuple(getattr(values, 'shape', ()))} out"
            )
        for candidate in [*_suggested(source), *TABLE.values()]:
            if bool(_same(values, candidate, probe, tolerance).all()):
                _require_same_everywhere(label, source, candidate, probe, tolerance)
                return candidate
    raise UnsupportedActivation(
        f"{label} computes none of the known activations ({', '.join(sorted(TABLE))})"
    )


def _same(values: Tensor, candidate: Activation, y: Tensor, tolerance: float) -> Tensor:
    expected = candidate.fn(y)
    return (values.to(y.dtype) - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)


def _require_same_everywhere(
    label: str,
    source: Callable[[Tensor], Tensor],
    candidate: Activation,
    probe: Tensor,
    tolerance: float,
) -> None:
    """UnsupportedActivation for what is not the candidate between the points of PROBE."""
    dense = DENSE.to(probe)
    other = ~_same(source(dense.clone()), candidate, dense, tolerance)
    if other.any():
        raise UnsupportedActivation(
            f"{label} is nearly {candidate.name!r}, and another function at {int(other.sum())} of "
            f"{len(dense)} values, such as {float(dense[other][0]):.6g}; register it with "
            "polylens.register_activation(name, fn)"
        )


def _suggested(source: Any) -> Iterator[Activation]:
    """Activations that a module's own parameters suggest; the caller compares the values."""

    def number(*names: str) -> float | None:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int | float):
                return float(value)
            if isinstance(value, Tensor) and value.numel() == 1:
                return float(value)
        return None

    for family in FAMILIES.values():
        parameters = family.read(number)
        if None in parameters:
            continue
        try:
            yield family.make(*parameters)
        except InvalidInputError:  # named like its parameters, and something else
            continue
