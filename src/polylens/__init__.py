"""Turn the MLPs and GLUs of transformers into polynomials in closed form.

    lens = polylens.attach(model, tokens)   # HookedTransformer or TransformerBridge
    print(lens.report(heldout_tokens))
    with lens.replaced(degree=2):
        ...

The mathematics is Belrose & Rigg 2025, "Converting MLPs into Polynomials in Closed Form",
arXiv 2502.01032. No host framework is imported until a model of it is attached.
"""

from polylens.activations import Activation as Activation
from polylens.activations import activation as activation
from polylens.activations import known_activations as known_activations
from polylens.errors import AttachmentError as AttachmentError
from polylens.errors import InvalidInputError as InvalidInputError
from polylens.errors import NumericalWarning as NumericalWarning
from polylens.errors import PolylensError as PolylensError
from polylens.errors import StalePolynomialError as StalePolynomialError
from polylens.errors import UnsupportedActivation as UnsupportedActivation
from polylens.errors import UnsupportedModel as UnsupportedModel
from polylens.fit import fit as fit
from polylens.inputs import Gaussian as Gaussian
from polylens.polynomial import Polynomial as Polynomial
from polylens.quadratic import QuadraticForm as QuadraticForm
from polylens.weights import GLUWeights as GLUWeights
from polylens.weights import MLPWeights as MLPWeights
