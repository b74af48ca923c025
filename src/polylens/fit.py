"""The closed-form least-squares polynomial of an MLP or GLU."""

import math

import torch
from torch import Tensor

from polylens.activations import MAX_DEGREE
from polylens.errors import InvalidInputError
from polylens.inputs import Gaussian
from polylens.polynomial import Polynomial
from polylens.weights import GLUWeights, MLPWeights

CHUNK = 4096


@torch.no_grad()
def fit(
    weights: MLPWeights | GLUWeights, inputs: Gaussian, degree: int, scope: str = "neuron"
) -> Polynomial:
    r"""The polynomial of given degree closest to the layer in mean squared error.

    With y = x W + b the activated preactivation, m and s its mean and standard deviation under
    the inputs, t = (y - m) / s and c_k = E[act(m + s xi) He_k(xi)]:

        MLP   f_n = sum_{k<=n} (c_k / k!) He_k(t) W_out + b_out
        GLU   f_n = (sum_{k<=n} (e_k / k!) He_k(t) + r sum_{k<n} (c_k / k!) He_k(t)) W_out + b_out

    where z is the linear branch, a = Cov(y, z) / s, r = z - E[z] - a t is independent of t and
    e_k = E[z] c_k + a (c_{k+1} + k c_{k-1}). Both are the optimum over *all* polynomials of
    degree <= n in x, because He_k(t) is orthogonal to every polynomial of lower degree
    (Belrose & Rigg 2025, arXiv 2502.01032).

    Args:
        weights: the layer.
        inputs: the distribution of its inputs, on any device.
        degree: 0 ... 12. Lower optima are read off the result with `truncate`.
        scope: "neuron" or "global"; for a Gaussian they coincide.

    Returns:
        A Polynomial that shares the weights' tensors; only (degree + 1)^2 numbers per neuron
        are new.

    Raises:
        InvalidInputError: degree or scope out of range, inputs of another size.

    Cost: one product cov @ W in float64, O(d_in^2 d_mlp), on the weights' device; memory
    O(d_in * 4096) beyond the covariance. Nothing of size d_out d_in^2 is formed.
    """
    if scope not in ("neuron", "global"):
        raise InvalidInputError(f"scope must be 'neuron' or 'global', got {scope!r}")
    if isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= MAX_DEGREE:
        raise InvalidInputError(f"degree must be an integer in 0 ... {MAX_DEGREE}, got {degree!r}")
    if not isinstance(inputs, Gaussian):
        raise InvalidInputError(
            f"inputs must be a polylens input model such as Gaussian, got {type(inputs).__name__}; "
            "for a tensor of samples pass Gaussian.from_samples(x)"
        )
    if inputs.d_in != weights.d_in:
        raise InvalidInputError(
            f"the layer reads {weights.d_in} features, the input model has {inputs.d_in}"
        )
    inputs_here = inputs.to(weights.device)
    if isinstance(weights, GLUWeights):
        m, s, P, Q = _fit_glu(weights, inputs_here, degree)
    else:
        m, s, P = _fit_mlp(weights, inputs_here, degree)
        Q = None
    return Polynomial(weights, m, s, P, Q, inputs=inputs)


def _fit_mlp(weights: MLPWeights, inputs: Gaussian, n: int) -> tuple[Tensor, Tensor, Tensor]:
    m, s, _, _ = _preactivation_moments(inputs, weights.W_in, weights.b_in)
    c = weights.act.hermite_coefficients(m, s, n)
    P = torch.zeros(n + 1, n + 1, len(m), dtype=m.dtype, device=m.device)
    for k in range(n + 1):
        P[k:, k] = c[k] / math.factorial(k)
    return m, s, P


def _fit_glu(
    weights: GLUWeights, inputs: Gaussian, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, s, z_mean, a = _preactivation_moments(
        inputs, weights.W_gate, weights.b_gate, weights.W_in, weights.b_in
    )
    c = weights.act.hermite_coefficients(m, s, n + 1)
    P = torch.zeros(n + 1, n + 1, len(m), dtype=m.dtype, device=m.device)
    Q = torch.zeros(n + 1, n, len(m), dtype=m.dtype, device=m.device)
    # Substituting r = z - E[z] - a t, everything below He_{n-1} cancels out of P.
    for k in range(n + 1):
        if k:
            P[k, k - 1] = a * c[k] / math.factorial(k - 1)
            Q[k:, k - 1] = c[k - 1] / math.factorial(k - 1)
        P[k, k] = (z_mean * c[k] + a * c[k + 1]) / math.factorial(k)
    return m, s, P, Q


def _preactivation_moments(
    inputs: Gaussian,
    W: Tensor,
    b: Tensor | None,
    V: Tensor | None = None,
    b_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and deviation of y = x W + b, and for z = x V + b_V the mean and Cov(y, z) / s."""
    deviations = inputs.variances().sqrt()
    columns: list[list[Tensor]] = [[], [], [], []]
    for i in range(0, W.shape[1], CHUNK):
        Wi = W[:, i : i + CHUNK].double()
        cov_W = inputs.cov_matmul(Wi)
        variance = torch.linalg.vecdot(Wi, cov_W, dim=0)
        # A variance below the rounding of its own sum is that of a constant.
        rounding = 1e-15 * (deviations @ Wi.abs()).square()
        s = torch.where(variance > rounding, variance, 0.0).sqrt()
        columns[0].append(inputs.mean @ Wi)
        columns[1].append(s)
        if V is not None:
            Vi = V[:, i : i + CHUNK].double()
            covariance = torch.linalg.vecdot(Vi, cov_W, dim=0)
            columns[2].append(inputs.mean @ Vi)
            columns[3].append(torch.where(s > 0, covariance / s, 0.0))
    m, s = torch.cat(columns[0]), torch.cat(columns[1])
    z_mean = torch.cat(columns[2]) if columns[2] else torch.zeros_like(m)
    a = torch.cat(columns[3]) if columns[3] else torch.zeros_like(m)
    return (
        m if b is None else m + b.double(),
        s,
        z_mean if b_V is None else z_mean + b_V.double(),
        a,
    )
