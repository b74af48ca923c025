"""What every fitted polynomial offers, whatever form it is kept in."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore

from polylens.checks import real_numbers
from polylens.errors import InvalidInputError
from polylens.files import format as storage
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.model import Fitted, InputModel, from_record
from polylens.normal_forms.weights import GLUWeights, MLPWeights, weights_of
from polylens.polynomials.piece import Piece
from polylens.polynomials.records import checked, reading
from polylens.polynomials.shares import Shares

Self = TypeVar("Self", bound="Approximation")

# What is known of how good a polynomial is, by degree, and kept in files.
FIGURES = ("r2", "replacement_r2", "beyond")


class Approximation(nn.Module):
    """A polynomial that approximates a layer under a model of its inputs.

    Subclasses say what they consist of (`record`, `of_record`) and, where they have
    closed forms of it, how well they do (`optimum_r2`, `r2_under`).
    """

    kind: ClassVar[str]
    degree: int
    d_out: int
    weights: MLPWeights | GLUWeights | None
    inputs: InputModel | None
    # Whether the optima are known beside what replaces the layer: not in every file of before.
    has_optimum: bool = True
    _r2: Tensor | None = None
    _replacement_r2: Tensor | None = None
    _beyond: Tensor | None = None

    @property
    def r2(self) -> Tensor:
        """[degree + 1] float64, share of the layer's variance explained by each degree's optimum.

        Under the input model of the fit: closed form under a Gaussian (see
        `explained_variance` for its bounds) or a mixture, over the samples under Samples; in a
        lens that was fitted to tokens, over some hundred of the inputs that were seen. Of a
        constant output it is 1 if the polynomial reproduces it, else 0. Computed once,
        O(d_mlp^2 (d_in + d_out)), and saved with the polynomial if it was.

        Raises:
            InvalidInputError: a polynomial without an input model, such as a `part`, or one
                loaded from a file, where samples are not kept.
        """
        if self._r2 is None:
            self._r2 = self._model("R2").r2(cast("Fitted", self.optimum()))
        return self._r2

    @property
    def replacement_r2(self) -> Tensor:
        """[degree + 1] as `r2`, of what replaces the layer at each degree, with its ends.

        Raises:
            InvalidInputError: as `r2`; ends under a Gaussian or a mixture, without closed form.
        """
        if self._replacement_r2 is None:
            if self.ends is None:
                return self.r2
            self._replacement_r2 = self._measurable("R2 of a polynomial with ends").r2(
                cast("Fitted", self)
            )
        return self._replacement_r2

    @property
    def beyond(self) -> Tensor:
        """[degree + 1] share of the layer's preactivations that lie beyond the ends of each degree.

        Raises:
            InvalidInputError: as `replacement_r2`.
        """
        if self._beyond is None:
            if self.ends is None:
                return torch.zeros(self.degree + 1, dtype=torch.float64)
            model = self._measurable("a share beyond ends")
            assert self.weights is not None
            self._beyond = model.average(self._outside, self.weights)
        return self._beyond

    @property
    def ends(self) -> Tensor | None:
        """Lowest and highest preactivations where what is evaluated ends; None without ends."""
        return None

    def outside(self, y: Tensor) -> Tensor:
        """[degree + 1, ...] share of the neurons of preactivations y [..., d_mlp] beyond ends."""
        raise NotImplementedError

    def _outside(self, x: Tensor) -> Tensor:
        """`outside` at inputs x [n, d_in]."""
        assert self.weights is not None
        return self.outside(self.weights.neurons(x)["y"])

    def _model(self, what: str) -> InputModel:
        if self.weights is None or not isinstance(self.inputs, InputModel):
            raise InvalidInputError(
                f"{what} needs the layer and the input model that the polynomial was fitted to, "
                "and this one has none: a part has none, samples are not saved (read r2 before you "
                "save, then it is), and a lens file has input models only with save(path, "
                "moments=True). Fit again, or measure R2 on data"
            )
        return self.inputs

    def _measurable(self, what: str) -> InputModel:
        model = self._model(what)
        if not model.measured:
            raise InvalidInputError(
                f"{what} has no closed form under a {type(model).__name__}; measure it on data "
                "with lens.report(tokens), or fit(weights, Samples(x))"
            )
        return model

    def figures(self) -> dict[str, Tensor]:
        """What files keep of how good it is: what was read, and what is cheap to measure now."""
        if self.weights is not None and isinstance(self.inputs, InputModel) and self.inputs.quick:
            _ = self.r2, self.replacement_r2, self.beyond
        return self._known_figures()

    def _known_figures(self) -> dict[str, Tensor]:
        own = {name: getattr(self, f"_{name}") for name in FIGURES}
        return {name: value for name, value in own.items() if value is not None}

    def take_figures(self, tensors: Mapping[str, Tensor]) -> None:
        """Those that a file has."""
        there = {name: (self.degree + 1,) for name in FIGURES if name in tensors}
        for name, value in zip(there, checked(tensors, there), strict=True):
            setattr(self, f"_{name}", value)

    def _take_figures(self, other: "Approximation", degree: int | None = None) -> None:
        """Those of another one, up to a degree."""
        for name in FIGURES:
            value = getattr(other, f"_{name}")
            stop = None if degree is None else degree + 1
            setattr(self, f"_{name}", None if value is None else value[:stop])

    def how_good(self) -> str:
        """R2 of optima and replacement where they are known, and the share beyond ends."""
        try:
            figures = self.figures()
        except InvalidInputError:
            return ""
        if "r2" not in figures:
            return "" if self.ends is None else ", with ends"
        optima = ", ".join(f"{r2:.4f}" for r2 in map(float, figures["r2"][1:]))
        optima = f"optima of degree 1 ... {self.degree}: R² {optima}" if optima else ""
        if "replacement_r2" not in figures or "beyond" not in figures:
            return f", {optima}" * bool(optima)
        r2, beyond = (float(figures[name][-1]) for name in ("replacement_r2", "beyond"))
        return (
            f"\n  replacement (with ends): R² {r2:.4f}, {beyond:.2%} of preactivations beyond ends"
            f"\n  {optima} (without ends)"
        )

    def optimum_r2(self, gaussian: Gaussian) -> Tensor:
        """`r2` of the optimum of every degree under a Gaussian, in closed form."""
        raise InvalidInputError(f"a {self.kind} has no closed form of R2 under a Gaussian")

    def r2_under(self, components: list[tuple[float, Gaussian]]) -> Tensor:
        """`r2` under a mixture of these (weight, component), in closed form."""
        raise InvalidInputError(f"a {self.kind} has no closed form of R2 under a mixture")

    def optimum(self, degree: int | None = None) -> "Approximation":
        """The polynomial, without ends, that explains most of all of this form and degree."""
        return self if degree is None else self.truncate(degree)

    def truncate(self, degree: int) -> "Approximation":
        """The fit of a lower degree."""
        raise NotImplementedError

    def piece(self, x: Tensor, u: Tensor) -> Piece:
        """The ordinary polynomial that this is around one input x [d_in], along u [d_out].

        Raises:
            InvalidInputError: sizes that do not fit, or a form that is not one of neurons.
        """
        raise InvalidInputError(f"a {self.kind} is not made of pieces per neuron")

    def shares(self, x: Tensor) -> Shares:
        """What parts of inputs x [n, d_in] do in this polynomial at x, alone and two by two.

        Raises:
            InvalidInputError: sizes that do not fit, or a form that is not one of neurons.
        """
        raise InvalidInputError(f"a {self.kind} is not made of pieces per neuron")

    def _inputs(self, x: Tensor, d_in: int, device: torch.device) -> Tensor:
        """x as finite float64 vectors [n, d_in]."""
        x = real_numbers("x", x, device).double()
        if x.dim() != 2 or x.shape[1] != d_in or not torch.isfinite(x).all():
            raise InvalidInputError(
                f"x must be finite inputs of shape [n, {d_in}], got {tuple(x.shape)}"
            )
        return x

    def _one_input(self, x: Tensor, d_in: int, device: torch.device) -> Tensor:
        """x as a finite float64 vector [d_in]."""
        x = real_numbers("x", x, device).double()
        if tuple(x.shape) != (d_in,) or not torch.isfinite(x).all():
            raise InvalidInputError(
                f"x must be one finite input of shape ({d_in},), got {tuple(x.shape)}"
            )
        return x

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, in the safetensors format, in full precision.

        The layer's weights, the coefficients and a Gaussian or mixture input model are kept, and
        r2 if it was read before. Samples are not.

        Raises:
            ArtifactError, OSError: see `polylens.files.format.write`.
        """
        metadata, tensors = self.record()
        context, beside = context_record(self.weights, self.inputs)
        storage.write(path, self.kind, metadata | context, tensors | beside | self.figures())

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """The same polynomial, bit for bit, on the CPU.

        Raises:
            ArtifactError: a damaged or forged file, one of another kind, an activation that is
                not registered here (its name).
            OSError: no such file.
        """
        metadata, tensors = storage.read(path, cls.kind)
        tensors |= storage.within(tensors, "base.")  # as 0.1 wrote joint polynomials
        with reading(path):
            weights, inputs = context_of(metadata, tensors)
            loaded = cls.of_record(weights, metadata, tensors, inputs)
            loaded.take_figures(tensors)
        return loaded

    def record(self) -> Record:
        """What a file keeps of it beside the layer and the input model."""
        raise NotImplementedError

    @classmethod
    def of_record(
        cls: type[Self],
        weights: MLPWeights | GLUWeights | None,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        inputs: InputModel | None = None,
    ) -> Self:
        """Inverse of `record`; other tensors beside its own are ignored.

        Raises:
            ArtifactError, or what else comes of metadata and tensors that it cannot have.
        """
        raise NotImplementedError

    def _forget(self) -> None:
        """Let go of what was derived from tensors that are others now."""
        self._r2 = self._replacement_r2 = self._beyond = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # what is loaded would be written to tensors that the layer, or another degree, may share
        for name, tensor in self._buffers.items():
            self._buffers[name] = None if tensor is None else tensor.clone()
        module: Any = super()  # without types
        module._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _require_degree(self, degree: int, what: str) -> None:
        if self.degree < degree:
            raise InvalidInputError(
                f"{what} needs a fitted degree of at least {degree}, this one has {self.degree}"
            )

    def _direction(self, u: object, device: torch.device) -> Tensor:
        """u as a finite float64 vector [d_out]."""
        vector = real_numbers("u", u, device).double()
        if tuple(vector.shape) != (self.d_out,) or not torch.isfinite(vector).all():
            raise InvalidInputError(
                f"u must be a finite vector of shape ({self.d_out},), got {tuple(vector.shape)}; "
                "towards a token: analysis.logit_direction(lens, layer, token)"
            )
        return vector


def _is_plain() -> bool:
    """No inference_mode, no transform of torch.func, no mode that sees every operation."""
    c: Any = torch._C  # without types  # pyright: ignore[reportPrivateUsage]
    return (
        not torch.is_inference_mode_enabled()
        and c._functorch.maybe_current_level() is None
        and c._len_torch_dispatch_stack() == 0
        and c._len_torch_function_stack() == 0
    )


@contextmanager
def kept() -> Generator[None]:
    """What is computed here is for later: it has no graph, is not of inference_mode or of a
    transform of torch.func, and has values also where only shapes flow (FakeTensorMode)."""
    if _is_plain():  # as nearly always; what follows takes as long as small fits do
        with torch.no_grad():
            yield
        return
    without = torch._C._DisableFuncTorch()  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad(), without, _disable_current_modes():
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                yield
        else:
            yield


def context_record(weights: MLPWeights | GLUWeights | None, inputs: InputModel | None) -> Record:
    """The layer and the input model that an approximation belongs to."""
    layer, layer_tensors = (None, {}) if weights is None else weights.record()
    model, model_tensors = ({"model": None}, {}) if inputs is None else inputs.record()
    tensors = storage.prefixed(layer_tensors, "layer.") | storage.prefixed(model_tensors, "inputs.")
    return {"layer": layer, "inputs": model}, tensors


def context_of(
    metadata: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[MLPWeights | GLUWeights | None, InputModel | None]:
    """Inverse of `context_record`."""
    layer = metadata["layer"]
    weights = weights_of(layer, storage.within(tensors, "layer.")) if layer is not None else None
    return weights, from_record(metadata["inputs"], storage.within(tensors, "inputs."))
