"""Turn the MLPs and GLUs of transformers into polynomials in closed form.

    lens = polylens.attach(model, tokens)   # HookedTransformer or TransformerBridge
    print(lens.report(heldout_tokens))
    with lens.replaced(degree=2):
        ...

The mathematics is Belrose & Rigg 2025, "Converting MLPs into Polynomials in Closed Form",
arXiv 2502.01032. No host framework is imported until a model of it is attached.
"""

import importlib
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from polylens import demo
from polylens.activations.activation import Activation
from polylens.activations.recognition import activation
from polylens.activations.registered import register_activation
from polylens.activations.table import known_activations
from polylens.attachment import attach, find_mlps, load
from polylens.calibration.given import FromInputs, FromNorm
from polylens.calibration.sampling import sample_tokens
from polylens.calibration.sequential import Sequential
from polylens.calibration.tokens import tokenize
from polylens.calibration.true_stream import TrueStream
from polylens.checks import Expert
from polylens.errors import (
    ArtifactError,
    AttachmentError,
    ConvergenceError,
    InvalidInputError,
    NumericalWarning,
    PolylensError,
    RankError,
    StalePolynomialError,
    UnsupportedActivation,
    UnsupportedModel,
)
from polylens.fitting.estimator import Estimator
from polylens.fitting.fit import fit, fit_joint
from polylens.fitting.global_optimum.fit import fit_global
from polylens.hosts.base import MLPSite
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from polylens.lens import Lens, attached
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.dense import DensePolynomial
from polylens.polynomials.explained_variance import ExplainedVariance, explained_variance
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial
from polylens.polynomials.quadratic_form import QuadraticForm
from polylens.ranks import Ranks
from polylens.report.remote import remote_report
from polylens.report.report import Report
from polylens.saving.export import load_exported
from polylens.training.tracer import Trace, TraceData, Tracer, trace_training

if TYPE_CHECKING:
    from polylens import analysis

__version__ = version("polylens")

__all__ = [
    "Activation",
    "ArtifactError",
    "AttachmentError",
    "ConvergenceError",
    "DensePolynomial",
    "Estimator",
    "Expert",
    "ExplainedVariance",
    "FromInputs",
    "FromNorm",
    "GLUWeights",
    "Gaussian",
    "GaussianMixture",
    "InvalidInputError",
    "JointPolynomial",
    "Lens",
    "MLPSite",
    "MLPWeights",
    "NumericalWarning",
    "PolylensError",
    "Polynomial",
    "QuadraticForm",
    "RankError",
    "Ranks",
    "Report",
    "Samples",
    "Sequential",
    "StalePolynomialError",
    "Trace",
    "TraceData",
    "Tracer",
    "TrueStream",
    "UnsupportedActivation",
    "UnsupportedModel",
    "activation",
    "analysis",
    "attach",
    "attached",
    "demo",
    "explained_variance",
    "find_mlps",
    "fit",
    "fit_global",
    "fit_joint",
    "known_activations",
    "load",
    "load_exported",
    "register_activation",
    "remote_report",
    "sample_tokens",
    "tokenize",
    "trace_training",
]

# Names that were public, and what to write now.
_REMOVED = {
    "NeuronGram": "fit(weights, Samples(batches), degree)",
    "from_hub": 'load("hf://user/name", model)',
}


if not TYPE_CHECKING:  # for a checker an unknown name is an error

    def __getattr__(name: str) -> object:
        if name == "analysis":  # a sixth of what there is to import, and nothing else needs it
            return importlib.import_module("polylens.analysis")
        hint = f"; write polylens.{_REMOVED[name]}" if name in _REMOVED else ""
        raise AttributeError(
            f"module 'polylens' has no attribute {name!r}{hint}",
            name=name,
            obj=sys.modules[__name__],
        )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
