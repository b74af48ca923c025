"""Which output directions carry the energy of one degree."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polylens.activations.hermite import times_linear
from polylens.analysis.arguments import check_polynomial
from polylens.analysis.metric import check_count, gaussian_of, linalg
from polylens.brief import Brief
from polylens.errors import InvalidInputError
from polylens.inputs.gaussian import Gaussian
from polylens.normal_forms.correlations import pairs
from polylens.normal_forms.preactivation import preactivation_moments
from polylens.normal_forms.weights import GLUWeights


@dataclass(frozen=True, eq=False, repr=False)
class OutputDirections(Brief):
    """Orthonormal output directions by the variance that one degree contributes along them.

    Attributes:
        degree: which.
        values: [k] variance along each, falling.
        vectors: [d_out, k].
        share: [k] cumulative share of the degree's variance over all directions.
    """

    degree: int
    values: Tensor
    vectors: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.values)


@torch.no_grad()
def output_directions(polynomial: Any, degree: int = 2, k: int | None = None) -> OutputDirections:
    """The k output directions that carry most variance of the part of this degree.

    One d_out x d_out eigenproblem over `degree_energy`. For degree 2 the variance along u is
    2 |L^T Gamma_u L|_F^2 with L L^T the covariance of the inputs.

    Raises:
        InvalidInputError: as `degree_energy`; k not in 1 ... d_out.
    """
    energy = degree_energy(polynomial, degree)
    k = check_count(len(energy) if k is None else k, len(energy), "the output directions")
    rising: tuple[Tensor, Tensor] = linalg.eigh(energy)
    values, vectors = rising[0].flip(0).clamp(min=0), rising[1].flip(1)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return OutputDirections(degree, values[:k], vectors[:, :k], share[:k])


@torch.no_grad()
def degree_energy(polynomial: Any, degree: int = 2) -> Tensor:
    """E [d_out, d_out] with u E v = Cov(f_k . u, f_k . v), f_k the part of this degree.

    E = W_out^T K W_out with, for an MLP, K_ij = c_ki c_kj rho_ij^k / k! (Mehler), rho the
    correlation of the preactivations; for a GLU also the terms with what the linear branch has
    beside the gate. At degree 2, u E v = 2 <Gamma_u, Gamma_v> in the covariance's metric.

    Raises:
        InvalidInputError: input model not Gaussian, degree outside 1 ... polynomial.degree.

    Cost: O(d_mlp^2 (d_in + d_out)), in blocks of 1024 x 1024 neurons.
    """
    check_polynomial(polynomial)
    gaussian = polynomial.inputs
    if not isinstance(gaussian, Gaussian):
        gaussian_of(gaussian)  # refuses one that was left out of a file, and says how to have it
        raise InvalidInputError(
            "energies by degree need a polynomial fitted to Gaussian inputs, where parts of "
            f"different degree are orthogonal; this one has {type(gaussian).__name__}: attach with "
            'method=TrueStream(estimator="gaussian")'
        )
    if type(degree) is not int or not 1 <= degree <= polynomial.degree:
        raise InvalidInputError(
            f"degree must be an integer in 1 ... {polynomial.degree}, the fitted degree; got "
            f"{degree!r}"
        )
    weights = polynomial.weights
    gaussian = gaussian.to(weights.device)
    moments = preactivation_moments(gaussian, weights, linear_variance=True)
    c = weights.act.hermite_coefficients(moments.m, moments.s, degree + 1)
    glu = isinstance(weights, GLUWeights)
    e = times_linear(c, moments.z_mean, moments.a) if glu else c[:-1]
    first, second = e[degree], c[degree - 1]
    W_out = weights.W_out.double()
    energy = W_out.new_zeros(weights.d_out, weights.d_out)
    for pair in pairs(weights, gaussian, moments):
        I, J, rho = pair.rows, pair.columns, pair.rho  # noqa: E741
        power = rho ** (degree - 1)
        covariance = first[I, None] * first[J] * power * rho / math.factorial(degree)
        residual = pair.residual(moments.a, rho)
        if residual is not None:
            alpha, beta, sigma = residual
            mixed = first[I, None] * second[J] * alpha + second[I, None] * first[J] * beta
            both = sigma * power
            if degree > 1:
                both = both + (degree - 1) * alpha * beta * rho ** (degree - 2)
            rest = mixed * power + second[I, None] * second[J] * both
            covariance = covariance + rest / math.factorial(degree - 1)
        energy += W_out[I].T @ covariance @ W_out[J]
    return (energy + energy.T) / 2
