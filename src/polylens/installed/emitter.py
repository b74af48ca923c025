"""What runs at an attached MLP in every forward pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from polylens.checks import FLOATING
from polylens.errors import AttachmentError, StalePolynomialError
from polylens.hosts.base import Arrival, MLPSite, Tap
from polylens.installed.compiled import Watch, when_compiled
from polylens.installed.recomputing import Flow
from polylens.normal_forms.fingerprint import Fingerprint, fingerprint, same_weights
from polylens.polynomials.base import kept
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import Fitted


class SiteEmitter:
    """Offers the polynomial at the hook points and, while replacing, lets it flow on.

    Points: `in` (the MLP's input), `out` (the polynomial's output), `error` (true minus
    polynomial) and `degree_k`, whose sum over k = 0 ... degree is `out`. The polynomial is
    evaluated only if a point has listeners or the layer is replaced. Edits made by hooks at
    `in`, `out` and `degree_k` reach what flows on.

    Attributes:
        replacing: degree of the replacement, or None while the true output flows on.
    """

    def __init__(self, site: MLPSite, polynomial: Fitted) -> None:
        self.site = site
        self.polynomial = polynomial
        self._flow = Flow()
        self.owner: Any = None
        self.point_names = (
            "in",
            "out",
            "error",
            *(f"degree_{k}" for k in range(polynomial.degree + 1)),
        )
        self._truncated: dict[int, Fitted] = {polynomial.degree: polynomial}
        self._kinds = {name: _kind(tensor) for name, tensor in site.parameters().items()}
        self._identity = self._identified()
        self._fingerprint = fingerprint(polynomial.weights)
        self._dtype = polynomial.weights.dtype
        self._watch = Watch(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model gets its own emitters, but the lens stays with the original, and so
        # does what it replaces: nobody could end that in the copy.
        return {**self.__dict__, "owner": None, "_flow": Flow(), "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _watch=Watch(self))

    @property
    def replacing(self) -> int | None:
        """The degree that flows, also where gradient checkpointing computes again what ran."""
        return self._flow.now(self.owner is not None and self.owner.host.module.training)

    @replacing.setter
    def replacing(self, degree: int | None) -> None:
        self._flow.degree = degree

    def __call__(self, arrival: Arrival, tap: Tap) -> Tensor:
        x, y = arrival.x, arrival.y
        wanted, replacing = {name for name in self.point_names if tap.wants(name)}, self.replacing
        if replacing is None and not wanted:
            return y
        degree = self.polynomial.degree if replacing is None else replacing
        self.refresh()
        # copies: models may write to x and to what flows on, after somebody kept it
        x = tap("in", x.clone()) if "in" in wanted else x
        if any(name.startswith("degree_") for name in wanted):
            out = self._sum_of_parts(x, degree, tap)
        else:
            out = self.truncated(degree)(x)
        out = tap("out", out) if "out" in wanted else out
        if "error" in wanted:
            tap("error", y - out)
        if replacing is None:
            return y
        return out.clone() if "out" in wanted else out

    def takes(self, value: Tensor) -> bool:
        """Whether `neurons` can be computed of preactivations like this one."""
        polynomial = self.polynomial
        if not isinstance(polynomial, Polynomial):
            return False
        return value.dtype == polynomial.dtype and value.device == polynomial.device

    def neurons(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """What the out-projection reads while replacing, from what the host has computed."""
        replacing = self.replacing
        assert replacing is not None
        self.refresh()
        polynomial = self.truncated(replacing)
        assert isinstance(polynomial, Polynomial)
        return polynomial.neurons(y, z)

    def truncated(self, degree: int) -> Fitted:
        """The optimum of this degree, made once."""
        if degree not in self._truncated:
            with kept():
                self._truncated[degree] = self.polynomial.truncate(degree)
        return self._truncated[degree]

    def refresh(self) -> None:
        """`verify`, but cheap unless the tensors are other objects or were written to."""
        if torch.compiler.is_compiling():
            self._ready()
            self._watch()
        elif self._identified() != self._identity:
            self.verify()

    @when_compiled
    def _ready(self) -> None:
        """Verified, and with all that the optimum which flows derives from its tensors."""
        if torch.compiler.is_exporting():
            raise AttachmentError(
                f"layer {self.site.layer} ({self.site.path}) is replaced, or read at a point of "
                "the lens, which torch.export cannot take along; export the model that "
                "lens.export() returns"
            )
        with kept():
            if self._identified() != self._identity:
                self.verify()
            weights = self.polynomial.weights
            nothing = torch.empty(0, weights.d_in, dtype=weights.dtype, device=weights.device)
            flowing = self._flow.degree
            self.truncated(self.polynomial.degree if flowing is None else flowing)(nothing)

    def verify(self) -> Fingerprint:
        """Make sure the polynomial belongs to the weights that the host has now.

        Weights that only moved to another device or dtype are adopted.

        Returns:
            The fingerprint of the weights.

        Raises:
            StalePolynomialError: the weights have other values than those fitted.
        """
        identity, weights = self._identified(), self.site.weights()
        now = fingerprint(weights)
        if not same_weights(self._fingerprint, now, weights, self._dtype):
            raise StalePolynomialError(
                f"layer {self.site.layer} ({self.site.path}): the weights changed after the "
                "polynomial was fitted to them (weight processing, training or an edit); detach "
                "and attach again"
            )
        if identity != self._identity:
            with kept():
                self.polynomial = self.polynomial.over(weights)
            self._truncated = {self.polynomial.degree: self.polynomial}
            self._identity = identity
        return now

    def _identified(self) -> dict[str, tuple[object, ...]]:
        """What tells whether the site's tensors are other ones, or were written to.

        Raises:
            AttachmentError: tensors that hold no numbers of their own (which, and why).
        """
        site, tensors = self.site, self.site.parameters()
        for name, tensor in tensors.items():
            cause = None
            if _kind(tensor) != self._kinds.get(name, _PLAIN):
                cause = _no_numbers(tensor)
            if cause is not None:
                raise AttachmentError(f"layer {site.layer} ({site.path}): {name} {cause}")
        return {
            # tensors made in inference_mode do not count their versions
            name: (
                t.data_ptr(),
                None if t.is_inference() else t._version,
                t.dtype,
                t.device,
                t.stride(),
            )
            for name, t in tensors.items()
        }

    def _sum_of_parts(self, x: Tensor, degree: int, tap: Tap) -> Tensor:
        optima = self.polynomial.all_degrees(x)[: degree + 1]
        parts = [optima[0], *(optima[1:] - optima[:-1])]
        return torch.stack([tap(f"degree_{k}", part) for k, part in enumerate(parts)]).sum(0)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What plain weights are not, but those of an offloaded model, or on another device, may be."""
    functorch = cast(Any, torch._C._functorch)  # pyright: ignore
    wrapped = bool(functorch.is_functorch_wrapped_tensor(tensor))
    return wrapped, tensor.is_meta, type(tensor), tensor.dtype in FLOATING


_PLAIN = False, False, nn.Parameter, True


def _no_numbers(tensor: Tensor) -> str | None:
    """Why weights of another kind than at attach cannot be told from others; None if they can."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore
        return (
            "is a variable of torch.func here, of which a polynomial that was fitted to the "
            "weights does not know; transform by other variables, or use torch.autograd"
        )
    if tensor.is_meta:
        return (
            "is on the meta device now: its module was offloaded after attach; detach, and attach "
            "to the model in memory"
        )
    if isinstance(tensor, FakeTensor):
        return (
            "has a shape only, as where torch.export traces; export the model that lens.export() "
            "returns"
        )
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in FLOATING:
        return (
            f"is a {type(tensor).__name__} of {tensor.dtype} now: quantised or sharded after "
            "attach; detach, and attach to the model with plain weights"
        )
    return None
