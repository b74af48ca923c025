"""The per-neuron fit under a Gaussian mixture."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polylens.activations.hermite import factorials, hermite_change_of_variable, times_linear
from polylens.fitting.nested import glu_tables, nested_solutions, triangularise
from polylens.inputs.mixture import GaussianMixture
from polylens.normal_forms.preactivation import Preactivations, preactivation_moments
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.factored import Polynomial

# Numbers in one batch of neurons' systems.
BUDGET = 1 << 23


@torch.no_grad()
def fit_mixture(
    weights: MLPWeights | GLUWeights, mixture: GaussianMixture, degree: int
) -> Polynomial:
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i under the mixture, per neuron.

    In component p the neuron is its Hermite series in the component's own standardised
    variables, He_k(t) is a short one too, and both are orthogonal systems: the normal equations
    of the mixture are those of a least-squares problem with k (2 n + 1) rows per neuron. It is
    solved by orthogonalisation, for every degree at once. Not the optimum over polynomials in
    x, which is `fit_global`.

    Cost: one product cov @ W per component, and O(k n^3) per neuron.
    """
    mixture = mixture.to(weights.device)
    glu = isinstance(weights, GLUWeights)
    parts = [
        (weight, preactivation_moments(component, weights, linear_variance=True))
        for weight, component in mixture.weighted_components()
    ]
    m, s = _total(parts, "m", lambda p: p.s.square())
    z_mean, _ = _total(parts, "z_mean", lambda p: p.r_variance + p.a.square())
    P: list[Tensor] = []
    Q: list[Tensor] = []
    columns = 2 * degree + 1
    step = max(1, BUDGET // (len(parts) * columns * (columns + 1)))
    for i in range(0, len(m), step):
        chunk = slice(i, i + step)
        A, b = _systems(weights, parts, m, s, z_mean, degree, chunk)
        R, Qb = triangularise(A, b)
        sizes = range(1, columns + 1, 2) if glu else range(1, degree + 2)
        solutions = nested_solutions(R, Qb, sizes).squeeze(3)
        if glu:
            p, q = glu_tables(solutions, degree, z_mean[chunk])
            Q.append(q)
        else:
            p = solutions.transpose(1, 2)
        P.append(p)
    return Polynomial(
        weights, m, s, torch.cat(P, 2), torch.cat(Q, 2) if glu else None, inputs=mixture
    )


def _total(
    parts: list[tuple[float, Preactivations]], name: str, within: Callable[[Preactivations], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the mixture, from those of its components."""
    mean = sum(w * getattr(p, name) for w, p in parts)
    variance = sum(w * (within(p) + (getattr(p, name) - mean).square()) for w, p in parts)
    scale = sum(w * getattr(p, name).square() for w, p in parts)
    return mean, torch.where(variance > 1e-28 * scale, variance, 0.0).sqrt()  # type: ignore


def _systems(
    weights: MLPWeights | GLUWeights,
    parts: list[tuple[float, Preactivations]],
    m: Tensor,
    s: Tensor,
    z_mean: Tensor,
    n: int,
    chunk: slice,
) -> tuple[Tensor, Tensor]:
    """Least-squares systems [neurons, rows, columns] and right sides [neurons, rows, 1]."""
    glu = isinstance(weights, GLUWeights)
    scale = factorials(n + 1, m).sqrt()
    inverse = torch.where(s[chunk] > 0, 1 / s[chunk], 0.0)
    A: list[Tensor] = []
    b: list[Tensor] = []
    for weight, part in parts:
        pm, ps, pz, pa, pr = (value[chunk] for value in part)
        root = math.sqrt(weight)
        basis = hermite_change_of_variable((pm - m[chunk]) * inverse, ps * inverse, n + 1)
        # Rows are He_j(tau) / sqrt(j!), then r He_j(tau) / sqrt(j!) at unit norm.
        gates = basis[: n + 1, : n + 1] * scale
        c = weights.act.hermite_coefficients(pm, ps, n + 1)
        if not glu:
            A.append(root * gates)
            b.append(root * c[: n + 1] / scale)
            continue
        r = pr.sqrt()
        columns, residuals = [gates[0]], [torch.zeros_like(gates[0, :n])]
        for k in range(1, n + 1):
            ordinary = basis[k - 1, : n + 2] * factorials(n + 2, m)
            with_z = times_linear(ordinary, pz - z_mean[chunk], pa) / scale
            columns += [gates[k], with_z]
            residuals += [torch.zeros_like(gates[k, :n]), r * gates[k - 1, :n]]
        A.append(root * torch.cat([torch.stack(columns), torch.stack(residuals)], dim=1))
        e = times_linear(c, pz, pa) / scale
        b.append(root * torch.cat([e, r * c[:n] / scale[:n]]))
    return torch.cat(A, 1).permute(2, 1, 0).contiguous(), torch.cat(b).T.unsqueeze(2)
