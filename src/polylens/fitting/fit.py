"""`fit`: the least-squares polynomial of a layer, whatever the model of its inputs."""

from typing import Any, Literal, overload

from torch import Tensor

from polylens.activations.activation import MAX_DEGREE
from polylens.errors import InvalidInputError
from polylens.fitting.gaussian import fit_gaussian
from polylens.fitting.global_optimum.fit import fit_global
from polylens.fitting.mixture import fit_mixture
from polylens.fitting.samples import fit_joint, fit_samples
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.dense import DensePolynomial
from polylens.polynomials.ends import Clip, require_clip
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial


@overload
def fit(
    weights: MLPWeights | GLUWeights,
    inputs: Gaussian,
    degree: int,
    scope: str = "neuron",
    *,
    outputs: None = None,
    tolerance: float = 1e-8,
    clip: Clip = False,
) -> Polynomial: ...


@overload
def fit(
    weights: MLPWeights | GLUWeights,
    inputs: Gaussian | GaussianMixture | Samples,
    degree: int,
    scope: Literal["neuron"] = "neuron",
    *,
    outputs: None = None,
    tolerance: float = 1e-8,
    clip: Clip = False,
) -> Polynomial: ...


@overload
def fit(
    weights: MLPWeights | GLUWeights,
    inputs: Gaussian | GaussianMixture | Samples,
    degree: int,
    scope: str = "neuron",
    *,
    outputs: Tensor | None = None,
    tolerance: float = 1e-8,
    clip: Clip = False,
) -> Polynomial | DensePolynomial | JointPolynomial: ...


def fit(
    weights: MLPWeights | GLUWeights,
    inputs: Gaussian | GaussianMixture | Samples,
    degree: int,
    scope: str = "neuron",
    *,
    outputs: Tensor | None = None,
    tolerance: float = 1e-8,
    clip: Clip = False,
) -> Polynomial | DensePolynomial | JointPolynomial:
    """The polynomial of given degree closest to the layer in mean squared error.

    scope="neuron": the best P_i(y_i) + z_i Q_i(y_i) for every neuron, f_n = h W_out + b_out.
    Closed form under a Gaussian or a mixture, streamed Gram systems for samples; any size;
    factored. Under a Gaussian it is the optimum over *all* polynomials of degree <= n in x.

    scope="global": the optimum over all polynomials of degree <= n in x under a mixture (a
    DensePolynomial; degree 1 at any size, degree 2 by conjugate gradients, more where the
    monomials are few), and for samples over the span of all neurons' features (a
    JointPolynomial). For a Gaussian the two scopes coincide.

    Args:
        weights: the layer.
        inputs: the distribution of its inputs, on any device.
        degree: 0 ... 12. Lower optima are read off the result with `truncate`.
        scope: "neuron" or "global".
        outputs: [d_out, k] output directions; global fits under a mixture only. None is all.
        tolerance: relative residual at which conjugate gradients stop.
        clip: of Samples: False for polynomials everywhere; True for ends at the lowest and
            highest preactivation of every neuron, beyond which it follows the asymptote of the
            activation (`Polynomial.clipped`); a share, such as 0.05, to let so much of the
            layer's preactivations lie beyond, at the neurons and on the sides where it lowers
            the error most. Rare huge preactivations then do not bend the rest.

    Raises:
        InvalidInputError: degree or scope out of range, inputs of another size or type.
        ConvergenceError: conjugate gradients did not reach the tolerance.
    """
    if scope not in ("neuron", "global"):
        raise InvalidInputError(f"scope must be 'neuron' or 'global', got {scope!r}")
    require_degree(degree)
    if not isinstance(inputs, (Gaussian, GaussianMixture, Samples)):
        raise InvalidInputError(
            "inputs must be a Gaussian, GaussianMixture or Samples, got "
            f"{type(inputs).__name__}; for a tensor x pass Gaussian.from_samples(x) or Samples(x)"
        )
    d_in: int | None = inputs.d_in
    if d_in is not None and d_in != weights.d_in:
        raise InvalidInputError(
            f"the layer reads {weights.d_in} features, the input model has {d_in}"
        )
    if outputs is not None and not (isinstance(inputs, GaussianMixture) and scope == "global"):
        raise InvalidInputError(
            "outputs= is for scope='global' under a GaussianMixture; every other fit gives all "
            "output directions at once"
        )
    require_clip(clip)
    if clip and not isinstance(inputs, Samples):
        raise InvalidInputError(
            f"clip={clip!r} is for Samples: a {type(inputs).__name__} has no lowest and highest "
            "preactivation; use clipped(y_range) on the fit"
        )
    options: dict[str, Any] = {"outputs": outputs, "tolerance": tolerance}
    if isinstance(inputs, Gaussian):
        return fit_gaussian(weights, inputs, degree)
    if isinstance(inputs, GaussianMixture):
        if scope == "neuron":
            return fit_mixture(weights, inputs, degree)
        return fit_global(weights, inputs, degree, **options)
    if scope == "neuron":
        return fit_samples(weights, inputs, degree, clip)
    return fit_joint(weights, inputs, degree, clip)


def require_degree(degree: int) -> None:
    """InvalidInputError for a degree that cannot be fitted."""
    if isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= MAX_DEGREE:
        raise InvalidInputError(
            f"degree must be an integer in 0 ... {MAX_DEGREE} (beyond, He_k and k! cancel more "
            f"digits than float64 has), got {degree!r}"
        )
