"""Gaussian mixtures as models of a layer's inputs, and the per-neuron fit under them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.inputs import Gaussian
from polylens.nested import glu_tables, nested_solutions, triangularise
from polylens.polynomial import Polynomial
from polylens.preactivation import Preactivations, preactivation_moments
from polylens.weights import GLUWeights, MLPWeights

# Numbers in one batch of neurons' systems.
BUDGET = 1 << 23


@dataclass(frozen=True)
class GaussianMixture:
    """x ~ sum_j weights[j] N(means[j], covs[j]), in float64.

    Args:
        weights: [k], non-negative, summing to one.
        means: [k, d_in].
        covs: [k, d_in, d_in], one shared [d_in, d_in], or diagonals [k, d_in]. Any rank. Where
            k = d_in, a symmetric matrix of non-negative entries could be either, and is refused.

    Raises:
        InvalidInputError: weights that are no distribution, sizes that do not fit, NaN, a
            covariance that is not symmetric positive semidefinite (which component).
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    components: tuple[Gaussian, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weights, means, covs = (torch.as_tensor(v) for v in (self.weights, self.means, self.covs))
        weights, means, covs = (v.detach().double() for v in (weights, means, covs))
        if weights.dim() != 1 or means.dim() != 2 or len(weights) != len(means) or not len(weights):
            raise InvalidInputError(
                "a mixture needs weights [k] and means [k, d_in] with k >= 1; got "
                f"{tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise InvalidInputError(
                f"mixture weights must be finite and >= 0, got {weights.tolist()}; a component "
                "of weight zero is allowed"
            )
        total = float(weights.sum())
        if abs(total - 1) > 1e-6:
            raise InvalidInputError(
                f"mixture weights must sum to one, got a sum of {total:.9g}; divide them by it"
            )
        k, d = means.shape
        shape = tuple(covs.shape)
        if shape not in ((k, d, d), (d, d), (k, d)):
            raise InvalidInputError(
                f"covs must be [{k}, {d}, {d}], a shared [{d}, {d}] or diagonals [{k}, {d}] to "
                f"fit means [{k}, {d}]; got {shape}"
            )
        if k == d and d > 1 and shape == (d, d) and _is_shared(covs):
            covs = covs.expand(k, d, d)
        object.__setattr__(self, "weights", weights / total)
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covs", covs)
        object.__setattr__(self, "components", tuple(self._build()))

    def _build(self) -> Iterator[Gaussian]:
        k, d = self.means.shape
        shared = self.covs.shape == (d, d) and k != d
        first: Gaussian | None = None
        for j in range(k):
            try:
                if not shared:
                    yield Gaussian(self.means[j], self.covs[j])
                elif first is None:
                    first = Gaussian(self.means[j], self.covs)
                    yield first
                else:
                    yield _with_mean(first, self.means[j])
            except InvalidInputError as error:
                raise InvalidInputError(f"mixture component {j}: {error}") from error

    @classmethod
    def from_labels(cls, x: Tensor, labels: Tensor) -> "GaussianMixture":
        """One component per distinct label: mean and covariance (divided by n) of its samples.

        Args:
            x: [n, d_in].
            labels: [n] integers.
        """
        x, labels = torch.as_tensor(x), torch.as_tensor(labels)
        if x.dim() != 2 or labels.dim() != 1 or len(x) != len(labels) or not len(x):
            raise InvalidInputError(
                f"from_labels needs x [n, d_in] and labels [n] with n >= 1; got {tuple(x.shape)} "
                f"and {tuple(labels.shape)}"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InvalidInputError(f"x has {bad} NaN or infinite entries")
        x = x.detach().double()
        weights, means, covs = [], [], []
        for label in labels.unique():
            group = x[(labels == label).to(x.device)]
            centred = group - group.mean(0)
            weights.append(len(group) / len(x))
            means.append(group.mean(0))
            covs.append(centred.T @ centred / len(group))
        return cls(x.new_tensor(weights), torch.stack(means), torch.stack(covs))

    @classmethod
    def from_samples(
        cls, x: Tensor, k: int, method: str = "kmeans", seed: int = 0
    ) -> "GaussianMixture":
        """k components from samples x [n, d_in]: k-means clusters, or EM started from them.

        The moments are those of the samples themselves; scikit-learn finds the clusters.
        """
        x = torch.as_tensor(x)
        if x.dim() != 2 or not 1 <= k <= len(x):
            raise InvalidInputError(
                f"from_samples needs x [n, d_in] and 1 <= k <= n; got {tuple(x.shape)}, k={k}"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InvalidInputError(f"x has {bad} NaN or infinite entries")
        data = x.detach().double().cpu().numpy()
        if method == "kmeans":
            from sklearn.cluster import KMeans

            labels = KMeans(k, n_init=4, random_state=seed).fit_predict(data)
            return cls.from_labels(x, torch.as_tensor(labels))
        if method == "em":
            from sklearn.mixture import GaussianMixture as EM

            em = EM(k, covariance_type="full", random_state=seed, reg_covar=1e-6).fit(data)
            parts = (em.weights_, em.means_, em.covariances_)
            return cls(*(torch.as_tensor(part, device=x.device) for part in parts))
        raise InvalidInputError(f"method must be 'kmeans' or 'em', got {method!r}")

    @property
    def d_in(self) -> int:
        return self.means.shape[1]

    @property
    def device(self) -> torch.device:
        return self.means.device

    def to(self, device: torch.device | str) -> "GaussianMixture":
        if torch.device(device) == self.device:
            return self
        moved = object.__new__(GaussianMixture)
        for name in ("weights", "means", "covs"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        object.__setattr__(moved, "components", tuple(c.to(device) for c in self.components))
        return moved

    def weighted_components(self) -> list[tuple[float, Gaussian]]:
        """(weight, Gaussian) of every component whose weight is not zero."""
        pairs = zip(self.weights.tolist(), self.components, strict=True)
        return [(weight, component) for weight, component in pairs if weight > 0]

    def gaussian(self) -> Gaussian:
        """The single Gaussian with the mixture's mean and covariance (total covariance)."""
        mean = self.weights @ self.means
        spread = self.means - mean
        cov = (spread.T * self.weights) @ spread
        for weight, component in self.weighted_components():
            within = component.cov
            cov = cov + weight * (torch.diag(within) if within.dim() == 1 else within)
        return Gaussian(mean, (cov + cov.T) / 2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n, d_in] draws in float64, components in random order."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        out = self.means.new_empty(n, self.d_in)
        for j, component in enumerate(self.components):
            rows = (chosen == j).nonzero().squeeze(1)
            if len(rows):
                out[rows] = component.sample(len(rows), generator)
        return out

    def __deepcopy__(self, memo: dict) -> "GaussianMixture":
        return self  # immutable, and k d_in^2 large

    def __repr__(self) -> str:
        k = len(self.weights)
        return f"GaussianMixture({k} components, d_in={self.d_in}, {self.device})"


def _is_shared(covs: Tensor) -> bool:
    """Whether a [d, d] given for d components is one covariance, or d diagonals."""
    if not torch.allclose(covs, covs.T, rtol=1e-8, atol=0.0):
        return False
    if (covs < 0).any() or not (covs - torch.diag(covs.diagonal())).any():
        return True
    d = len(covs)
    raise InvalidInputError(
        f"covs [{d}, {d}] with {d} components could be one shared covariance or diagonals; pass "
        f"covs.expand({d}, {d}, {d}) for the first, torch.diag_embed(covs) for the second"
    )


def _with_mean(gaussian: Gaussian, mean: Tensor) -> Gaussian:
    if not torch.isfinite(mean).all():
        raise InvalidInputError("mean has NaN or infinite entries")
    shifted = object.__new__(Gaussian)
    object.__setattr__(shifted, "mean", mean)
    object.__setattr__(shifted, "cov", gaussian.cov)
    return shifted


def hermite_change_of_variable(mu: Tensor, sigma: Tensor, degree: int) -> Tensor:
    """A [degree + 1, degree + 1, ...] with He_k(mu + sigma tau) = sum_j A[k, j] He_j(tau).

    A[k, j] = C(k, j) sigma^j h_{k-j}, where h_m = E[He_m(mu + sigma xi)] obeys
    h_{m+1} = mu h_m + m (sigma^2 - 1) h_{m-1}.
    """
    h = [torch.ones_like(mu), mu]
    for m in range(1, degree):
        h.append(mu * h[m] + m * (sigma * sigma - 1) * h[m - 1])
    A = mu.new_zeros(degree + 1, degree + 1, *mu.shape)
    for k in range(degree + 1):
        for j in range(k + 1):
            A[k, j] = math.comb(k, j) * sigma**j * h[k - j]
    return A


def times_linear(c: Tensor, mean: Tensor, a: Tensor) -> Tensor:
    """Coefficients of g(t) (mean + a t) from those of g, one fewer of them.

    e_k = mean c_k + a (c_{k+1} + k c_{k-1}).
    """
    e = mean * c[:-1] + a * c[1:]
    for k in range(1, len(e)):
        e[k] += a * k * c[k - 1]
    return e


@torch.no_grad()
def fit_mixture(
    weights: MLPWeights | GLUWeights, mixture: GaussianMixture, degree: int
) -> Polynomial:
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i under the mixture, per neuron.

    In component p the neuron is its Hermite series in the component's own standardised
    variables, He_k(t) is a short one too, and both are orthogonal systems: the normal equations
    of the mixture are those of a least-squares problem with k (2 n + 1) rows per neuron. It is
    solved by orthogonalisation, for every degree at once. Not the optimum over polynomials in
    x, which is scope="global".

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
    P, Q = [], []
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


def _total(parts: list[tuple[float, Preactivations]], name: str, within) -> tuple[Tensor, Tensor]:
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
    scale = _factorials(n + 1, m).sqrt()
    inverse = torch.where(s[chunk] > 0, 1 / s[chunk], 0.0)
    A, b = [], []
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
            ordinary = basis[k - 1, : n + 2] * _factorials(n + 2, m)
            with_z = times_linear(ordinary, pz - z_mean[chunk], pa) / scale
            columns += [gates[k], with_z]
            residuals += [torch.zeros_like(gates[k, :n]), r * gates[k - 1, :n]]
        A.append(root * torch.cat([torch.stack(columns), torch.stack(residuals)], dim=1))
        e = times_linear(c, pz, pa) / scale
        b.append(root * torch.cat([e, r * c[:n] / scale[:n]]))
    return torch.cat(A, 1).permute(2, 1, 0).contiguous(), torch.cat(b).T.unsqueeze(2)


def _factorials(n: int, like: Tensor) -> Tensor:
    values = [math.factorial(k) for k in range(n)]
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
