"""What a lens does to a model: the polynomials installed in it, read, switched and taken off."""

import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Generic, NoReturn, TypeVar

from polylens.calibration.overlap import TokenSketch
from polylens.checks import Layer, Layers, check_degree, check_layers, from_the_end, renamed
from polylens.errors import AttachmentError, InvalidInputError
from polylens.hosts.base import Host, MLPSite
from polylens.hosts.quiet import forget_compiled
from polylens.installed.emitter import SiteEmitter
from polylens.normal_forms.fingerprint import Fingerprint
from polylens.polynomials.joint import Fitted

Self = TypeVar("Self", bound="Installation")
Owner = TypeVar("Owner", bound="Installation", covariant=True)


class Installation:
    """Polynomials beside the MLPs of a model, of which some flow in place of their outputs.

    Attributes:
        host: the model.
        layers: in order; `installation[layer]` is the layer's polynomial, and
            `installation[Expert(layer, expert)]` that of an expert. As an argument, the number of a
            layer stands for the experts in it, too.
        sites: the MLPSite of each.
        degree: fitted degree.
        refused: reason for each layer that could not be read.
        inputs_summary: which input model the polynomials were fitted to.
        exclude_first: whether the first position of each sequence was left out of the fit and is
            left out of R2; what flows does not depend on it.
        calibrated_on: passages of the tokens that the polynomials were fitted to; None where
            there were none, or a file does not say.
    """

    def __init__(
        self,
        host: Host,
        sites: dict[Layer, MLPSite],
        polynomials: dict[Layer, Fitted],
        refused: dict[Layer, str],
        inputs_summary: str,
        exclude_first: bool,
        calibrated_on: TokenSketch | None = None,
    ) -> None:
        self.host = host
        self.sites = sites
        self.refused = refused
        self.inputs_summary = inputs_summary
        self.exclude_first = exclude_first
        self.calibrated_on = calibrated_on
        self.degree = next(iter(polynomials.values())).degree
        self._emitters = {layer: SiteEmitter(sites[layer], polynomials[layer]) for layer in sites}
        self._flows: list[dict[Layer, int | None]] = []
        self._undo: ExitStack | None = None
        self._install()
        for emitter in self._emitters.values():
            emitter.owner = self

    def _install(self) -> None:
        with ExitStack() as undo:
            for layer, site in self.sites.items():
                undo.callback(self.host.install(site, self._emitters[layer]))
            undo.callback(forget_compiled)
            self._undo = undo.pop_all()
        forget_compiled()

    @contextmanager
    def giving_way(self) -> Generator[None, None, None]:
        """Detached for good if the context ends well, attached again after an error in it.

        Raises:
            AttachmentError: detached already, or layers are replaced.
        """
        if self._flows:
            raise AttachmentError(
                "the lens that is on this model replaces layers; leave `with lens.replaced()` "
                "before another one takes its place"
            )
        self.detach()
        try:
            yield
        except BaseException:
            self._install()
            raise

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self.sites)

    @property
    def model_name(self) -> str:
        return self.host.model_name

    @property
    def is_attached(self) -> bool:
        return self._undo is not None

    def __getitem__(self, layer: Layer) -> Fitted:
        if not isinstance(layer, Layer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInputError(
                f"a lens has one polynomial a layer, lens[{self.layers[0]}]; of several there are "
                f"[lens[n] for n in lens.layers]; got lens[{layer!r}]"
            )
        layer = from_the_end(layer, self.layers)
        if layer not in self._emitters:
            experts = self._chosen([layer])
            raise InvalidInputError(f"layer {layer} is a mixture of experts; there are {experts}")
        return self._emitters[layer].polynomial

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.sites)

    def __enter__(self: Self) -> Self:
        self._require_attached()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        return (
            f"{type(self).__name__}({self.model_name}, {self.host.name}, {len(self)} layers, "
            f"degree {self.degree}, {self.inputs_summary}, {state})"
        )

    @renamed()
    def replaced(
        self: Self, *, degree: int | None = None, layers: Layers | None = None
    ) -> "Replacement[Self]":
        """Within the context, these MLPs' outputs are those of their polynomials.

        Nestable: an inner context adds to or changes the outer one, which comes back on exit,
        also after an exception.
        Without autograd and while nobody listens at or inside a layer, its polynomial reads the
        preactivations that the model computes anyway: a few elementwise operations more than
        the true layer. Otherwise it is evaluated beside the true layer, to the same values.

        Args:
            degree: 0 ... fitted degree (default), by truncation.
            layers: one, several, or all (default); -1 is the last, "0-5,10" a text of several.

        Raises:
            InvalidInputError: unknown layer, degree above the fitted one.
            AttachmentError: the lens is detached.
            StalePolynomialError: weights changed since the fit.
        """
        return Replacement(self, degree, layers)

    @contextmanager
    def suspended(self) -> Generator[None, None, None]:
        """Within the context every true output flows, whatever is replaced around it."""
        with self.flowing(dict.fromkeys(self.layers)):
            yield

    def ready(self, layers: Layers | None, degree: int | None) -> tuple[list[Layer], int]:
        """The layers and the degree that were asked for, fitted to the weights there are now.

        Raises:
            InvalidInputError, AttachmentError, StalePolynomialError: as `replaced`.
        """
        self._require_attached()
        chosen = self._chosen(layers)
        degree = self.degree if degree is None else check_degree(degree, self.degree, "attach")
        self.verify(chosen)
        return chosen, degree

    def verify(self, layers: Iterable[Layer]) -> dict[Layer, Fingerprint]:
        """The fingerprints of these layers' weights, which are those fitted to.

        Raises:
            StalePolynomialError: weights changed since the fit.
        """
        return {layer: self._emitters[layer].verify() for layer in layers}

    @contextmanager
    def flowing(self, degrees: Mapping[Layer, int | None]) -> Generator[None, None, None]:
        """Within the context, layer's polynomial of this degree (None: the true output) flows."""
        entry = dict(degrees)
        self._flows.append(entry)
        self._settle(entry)
        try:
            yield
        finally:
            self._flows = [flow for flow in self._flows if flow is not entry]
            self._settle(entry)

    def _settle(self, layers: Iterable[Layer]) -> None:
        """At each of these layers the last context that was entered and not left decides."""
        for layer in layers:
            degrees = (flow[layer] for flow in reversed(self._flows) if layer in flow)
            self._emitters[layer].replacing = next(degrees, None)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AttachmentError(
            "a lens belongs to its model and is neither copied nor pickled; lens.save(path) writes "
            "it, and polylens.load(path, model) attaches it to a copy of the model"
        )

    def detach(self) -> None:
        """Take everything off the model; it is exactly as before `attach`.

        Raises:
            AttachmentError: detached already.
        """
        self._require_attached()
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()

    def _require_attached(self) -> None:
        if not self.is_attached:
            raise AttachmentError("this lens is detached; attach again to use it")

    def _chosen(self, layers: Layers | None) -> list[Layer]:
        return check_layers(layers, self.sites, self.refused, " in this lens")


class Replacement(Generic[Owner]):
    """What `replaced` returns: the context in which MLPs are their polynomials.

    One that is dropped without `with` has done nothing, and warns.
    """

    def __init__(self, owner: Owner, degree: int | None, layers: Layers | None) -> None:
        self._owner, self._degree, self._layers = owner, degree, layers
        self._inside = ExitStack()
        self._entered = False

    def __enter__(self) -> Owner:
        self._entered = True
        chosen, degree = self._owner.ready(self._layers, self._degree)
        self._inside.enter_context(self._owner.flowing(dict.fromkeys(chosen, degree)))
        return self._owner

    def __exit__(self, *exception: object) -> None:
        self._inside.close()

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                "replaced() alone changes nothing; write `with lens.replaced():`", stacklevel=2
            )
