"""Turn the MLPs and GLUs of transformers into polynomials in closed form.

    lens = polylens.attach(model, tokens)   # HookedTransformer or TransformerBridge
    print(lens.report(heldout_tokens))
    with lens.replaced(degree=2):
        ...

The mathematics is Belrose & Rigg 2025, "Converting MLPs into Polynomials in Closed Form",
arXiv 2502.01032. No host framework is imported until a model of it is attached.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from polylens.activations.activation import Activation as Activation
from polylens.activations.activation import activation as activation
from polylens.activations.activation import known_activations as known_activations
from polylens.activations.registered import register_activation as register_activation
from polylens.errors import ArtifactError as ArtifactError
from polylens.errors import AttachmentError as AttachmentError
from polylens.errors import ConvergenceError as ConvergenceError
from polylens.errors import InvalidInputError as InvalidInputError
from polylens.errors import NumericalWarning as NumericalWarning
from polylens.errors import PolylensError as PolylensError
from polylens.errors import StalePolynomialError as StalePolynomialError
from polylens.errors import UnsupportedActivation as UnsupportedActivation
from polylens.errors import UnsupportedModel as UnsupportedModel
from polylens.fitting.fit import fit as fit
from polylens.fitting.neuron_gram import NeuronGram as NeuronGram
from polylens.inputs.gaussian import Gaussian as Gaussian
from polylens.inputs.mixture import GaussianMixture as GaussianMixture
from polylens.inputs.samples import Samples as Samples
from polylens.normal_forms.weights import GLUWeights as GLUWeights
from polylens.normal_forms.weights import MLPWeights as MLPWeights
from polylens.polynomials.dense import DensePolynomial as DensePolynomial
from polylens.polynomials.explained_variance import ExplainedVariance as ExplainedVariance
from polylens.polynomials.explained_variance import explained_variance as explained_variance
from polylens.polynomials.factored import Polynomial as Polynomial
from polylens.polynomials.joint import JointPolynomial as JointPolynomial
from polylens.polynomials.quadratic_form import QuadraticForm as QuadraticForm

__version__ = version("polylens")

_LAZY = {
    "Lens": "polylens.lens",
    "MLPSite": "polylens.hosts.base",
    "Report": "polylens.report.report",
    "attach": "polylens.attachment",
    "attached": "polylens.lens",
    "find_mlps": "polylens.attachment",
    "load": "polylens.attachment",
    "load_exported": "polylens.saving.export",
    "sample_tokens": "polylens.calibration.sampling",
    "trace_training": "polylens.training.tracer",
    "TraceData": "polylens.training.tracer",
    "Tracer": "polylens.training.tracer",
}


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module("polylens.analysis")
    if name not in _LAZY:
        raise AttributeError(f"module 'polylens' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
