"""`fit` and `fit_joint`: the least-squares polynomial of a layer under a model of its inputs."""

from functools import partial
from typing import TypeVar, get_args

import torch

from polylens.checks import renamed
from polylens.errors import InvalidInputError
from polylens.fitting.estimator import Estimator, require_fit
from polylens.fitting.gaussian import GaussianEstimator, fit_gaussian
from polylens.fitting.joint import JointEstimator
from polylens.fitting.mixture import fit_mixture
from polylens.fitting.samples import SamplesEstimator
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.base import kept
from polylens.polynomials.ends import require_tails
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial

# What `fit` fits to.
Inputs = Gaussian | GaussianMixture | Samples
ESTIMATORS: dict[str, type[Estimator]] = {
    "gaussian": GaussianEstimator,
    "samples": SamplesEstimator,
    "joint": JointEstimator,
}
E = TypeVar("E", bound=Estimator)
_GLOBAL = "fit_global(weights, mixture, degree, *, outputs=None, tolerance=1e-8)"
_CLIP = "tails=None (was False), tails=0.0 (was True) or a share such as tails=0.05"


def estimator(kind: object) -> type[Estimator]:
    """The estimator of this name, or itself; InvalidInputError lists those there are."""
    if isinstance(kind, type) and issubclass(kind, Estimator):
        return kind
    if not isinstance(kind, str) or kind not in ESTIMATORS:
        hint = "; under a mixture there is polylens.fit" if kind == "mixture" else ""
        raise InvalidInputError(
            f"estimator={kind!r} is unknown; there are {', '.join(map(repr, ESTIMATORS))}, and "
            f"any subclass of Estimator{hint}"
        )
    return ESTIMATORS[kind]


@renamed(
    scope=f'fit_joint(weights, samples, degree) or {_GLOBAL} for what was "global"',
    clip=_CLIP,
    outputs=_GLOBAL,
    tolerance=_GLOBAL,
)
@kept()
def fit(
    weights: MLPWeights | GLUWeights,
    inputs: Inputs,
    degree: int = 3,
    *,
    tails: float | None = None,
) -> Polynomial:
    """The polynomial of given degree, neuron by neuron, closest to the layer in mean square.

    The best P_i(y_i) + z_i Q_i(y_i) for every neuron, f_n = h W_out + b_out: in closed form
    under a Gaussian or a mixture, from streamed Gram systems for samples; any size; factored.
    Under a Gaussian it is the optimum over *all* polynomials of degree <= n in x; under a mixture
    that is `fit_global`, and over the features of all neurons on samples `fit_joint`. The result
    has a copy of the weights: it stays as it is when they are trained.

    R2 never falls with degree under a Gaussian. Under a mixture or samples the error of every
    neuron never rises, but what the neurons add up to through W_out may lose a little; that of
    `fit_global` does not, and `fit_joint` explains at least as much of its samples as this.

    Samples that can be read twice are (moments and which of them decide the tails, then normal
    equations); memory is independent of their number.

    Args:
        weights: the layer.
        inputs: the distribution of its inputs, on any device.
        degree: 0 ... 12. Lower optima are read off the result with `truncate`.
        tails: of Samples: None for polynomials everywhere; 0.0 for ends at the lowest and
            highest preactivation of every neuron, beyond which it follows the asymptote of the
            activation (`Polynomial.with_ends`); a share, such as 0.05, to let so much of the
            layer's preactivations lie beyond, at the neurons and on the sides where it lowers
            the error most. Rare huge preactivations then do not bend the rest.

    Raises:
        InvalidInputError: degree or tails out of range, inputs of another size or type, no
            samples, NaN.

    >>> import torch, polylens
    >>> layer = polylens.MLPWeights(torch.eye(3), torch.ones(3, 1), "relu")
    >>> poly = polylens.fit(layer, polylens.Gaussian.standard(3), degree=3)
    >>> [round(float(r2), 3) for r2 in poly.r2]  # of degree 0 ... 3: ReLU has no cubic part
    [0.0, 0.733, 0.967, 0.967]
    >>> poly.truncate(1).linear()[0].squeeze()  # each input counts half
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    remedy = "for a tensor x pass Gaussian.from_samples(x) or Samples(x)"
    require_fit(weights, inputs, degree, get_args(Inputs), remedy)
    require_tails(tails)
    if isinstance(inputs, Samples):
        poly = _seen(SamplesEstimator(weights, degree, tails), inputs, torch.float64).solve()
        assert isinstance(poly, Polynomial)
        poly.inputs = inputs
        return poly.own_weights()
    if tails is not None:
        raise InvalidInputError(
            f"tails={tails!r} is for Samples: a {type(inputs).__name__} has no lowest and highest "
            "preactivation; use with_ends(ends) on the fit"
        )
    if isinstance(inputs, Gaussian):
        return fit_gaussian(weights, inputs, degree).own_weights()
    return fit_mixture(weights, inputs, degree).own_weights()


@renamed(clip=_CLIP)
@kept()
def fit_joint(
    weights: MLPWeights | GLUWeights,
    samples: Samples,
    degree: int = 3,
    *,
    tails: float | None = None,
) -> JointPolynomial:
    """Least squares over samples with the features of all neurons for every output.

    With a ridge towards the per-neuron fit; see `JointGram`. One pass over the samples; with a
    share of tails two where they can be read twice.

    Args:
        weights: the layer.
        samples: its inputs.
        degree, tails: as in `fit`.

    Raises:
        InvalidInputError: as `fit`.
        OutOfMemory: too many features (the size).

    >>> import torch, polylens
    >>> layer = polylens.MLPWeights(torch.randn(2, 8), torch.randn(8, 1), "silu")
    >>> samples = polylens.Samples(torch.randn(1000, 2))
    >>> neuron, joint = polylens.fit(layer, samples), polylens.fit_joint(layer, samples)
    >>> bool(joint.r2[-1] >= neuron.r2[-1])
    True
    """
    remedy = "under a Gaussian fit() is the optimum, under a mixture fit_global()"
    require_fit(weights, samples, degree, Samples, remedy)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    poly = _seen(JointEstimator(weights, degree, tails), samples, dtype).solve()
    assert isinstance(poly, JointPolynomial)
    poly.base.inputs = samples
    return poly.own_weights()


def _seen(estimator: E, samples: Samples, dtype: torch.dtype) -> E:
    """The estimator after all samples."""
    weights = estimator.weights
    batches = partial(samples.batches, dtype, weights.device, weights.d_in)
    if samples.reiterable:
        estimator.prepare(batches)
    for x, w in batches():
        estimator.update(x, w)
    return estimator
