"""Adversarial directions read off the linear part, judged on the true network."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.analysis.arguments import check_functions, check_polynomial
from polylens.analysis.figures import attacks_figure
from polylens.analysis.linear import singular_features
from polylens.brief import Brief
from polylens.checks import real_numbers
from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = Callable[[Tensor], Tensor]

ATTACKS = ("random", "singular", "linear", "gradient", "pgd")
# Directions that the network's gradient was used for.
WHITE_BOX = ("gradient", "pgd")
NAMES = {
    "singular": "top singular vector of β",
    "linear": "linear part, per class pair",
    "gradient": "gradient, one step",
    "pgd": "gradient, PGD",
}


@dataclass(frozen=True)
class AttackRow:
    """One attack at one norm.

    Attributes:
        attack: "random", "singular" and "linear" (from the polynomial, the network unseen),
            "gradient" (one step, FGSM in the L2 norm), "pgd" (10 projected steps).
        norm: L2 norm of every perturbation.
        success: share of the inputs that the network had right that it then gets wrong; with
            a target, that it then calls the target.
        accuracy: of the network on the perturbed inputs.
    """

    attack: str
    norm: float
    success: float
    accuracy: float


@dataclass(frozen=True, repr=False)
class Attacks(Brief):
    """What `evaluate_attacks` measured.

    Attributes:
        rows: one per attack and norm.
        n_inputs: inputs tried; n_right: those that the network had right unperturbed.
        mean_norm: mean L2 norm of the inputs, to compare `norm` with.
        target: class aimed at, or None.
    """

    rows: tuple[AttackRow, ...]
    n_inputs: int
    n_right: int
    mean_norm: float
    target: int | None = None

    def success(self, attack: str) -> dict[float, float]:
        """Success by norm of one attack."""
        return {row.norm: row.success for row in self.rows if row.attack == attack}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plot(self) -> "Figure":
        """Success against norm, a line per attack."""
        attacks = dict.fromkeys(row.attack for row in self.rows)
        return attacks_figure(
            {NAMES.get(attack, attack): self.success(attack) for attack in attacks},
            n_right=self.n_right,
            mean_norm=self.mean_norm,
            target=self.target,
            dashed=[NAMES[attack] for attack in WHITE_BOX],
        )


@torch.no_grad()
def linear_attack(
    polynomial: Any,
    x: Tensor,
    labels: Tensor,
    norm: float,
    *,
    target: int | None = None,
    rank: int | None = None,
) -> Tensor:
    """Perturbations [n, d_in] that raise the linear part's logit difference most at this L2 norm.

    From class y to class t that is norm * beta (e_t - e_y) / |beta (e_t - e_y)|: a combination of
    the singular vectors of beta weighted by their values and by how they read out t - y. Where
    no target is given, t is the class that the degree 1 optimum then puts furthest above y. The
    network itself is never asked.

    Args:
        polynomial: of degree 1 or more, from inputs to logits.
        x: [n, d_in]; labels: [n], true classes.
        norm: of every perturbation.
        target: class to move every input to; its own inputs stay unperturbed.
        rank: use the first `rank` singular vectors only.

    Raises:
        InvalidInputError: sizes that do not fit, a class that does not exist, a negative norm,
            a rank above that of beta.
    """
    x, labels = _checked(polynomial, x, labels, norm, target)
    beta, alpha = polynomial.linear()
    if rank is not None:
        features = singular_features(polynomial, rank)
        beta = (features.patterns * features.values) @ features.outputs.T
    if target is None:
        logits = x.double() @ beta + alpha
        gram = beta.T @ beta
        gain = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        gain = gain.clamp(min=0).sqrt()[labels]
        margins = logits + norm * gain
        margins.scatter_(1, labels[:, None], -torch.inf)
        goal = margins.argmax(1)
    else:
        goal = torch.full_like(labels, target)
    step = (beta[:, goal] - beta[:, labels]).T
    return _scaled(step, norm).to(x.dtype)


@torch.no_grad()
def singular_attack(
    polynomial: Any, x: Tensor, labels: Tensor, norm: float, index: int = 0
) -> Tensor:
    """Perturbations [n, d_in] along one singular vector of beta, the same for every input.

    beta is centred over classes, which softmax cannot see. Only the sign is chosen by input: the
    one that lowers the linear part's logit of the true class against the mean of the others.

    Args:
        polynomial, x, labels, norm: as in `linear_attack`.
        index: which singular vector, 0 for the first.

    Raises:
        InvalidInputError: as `linear_attack`; an index outside the rank.
    """
    x, labels = _checked(polynomial, x, labels, norm, None)
    beta, _ = polynomial.linear()
    Q, values, outputs = torch.linalg.svd(beta - beta.mean(1, keepdim=True), full_matrices=False)
    rank = int((values > values[0] * 1e-12).sum())
    if type(index) is not int or not 0 <= index < rank:
        raise InvalidInputError(
            f"index must be an integer in 0 ... {rank - 1}, below the rank of the centred linear "
            f"part; got {index!r}"
        )
    signs = -torch.sign(outputs[index][labels])
    signs[signs == 0] = 1
    return (norm * signs[:, None] * Q[:, index]).to(x.dtype)


def evaluate_attacks(
    network: Network,
    polynomial: Any,
    x: Tensor,
    labels: Tensor,
    norms: Iterable[float] | float,
    *,
    attacks: Sequence[str] | str = ATTACKS,
    target: int | None = None,
    draws: int = 10,
    steps: int = 10,
    seed: int = 0,
) -> Attacks:
    """How often each attack changes the TRUE network's answer, at equal L2 norm.

    Args:
        network: [n, d_in] -> logits [n, classes].
        polynomial: of the network, for "singular" and "linear".
        x: [n, d_in]; labels: [n].
        norms: L2 norms of the perturbations.
        attacks: which of "random", "singular", "linear", "gradient", "pgd".
        target: class to move every other input to; "singular" ignores it.
        draws: random directions averaged over; steps: of projected gradient descent.
        seed: of the random directions.

    Raises:
        InvalidInputError: as `linear_attack`; an unknown attack; no input that the network has
            right.
    """
    if not callable(network):
        raise InvalidInputError(
            "network must be a function from inputs [n, d_in] to logits [n, classes], got "
            f"{type(network).__name__}"
        )
    attacks = [attacks] if isinstance(attacks, str) else list(attacks)
    norms = list(norms) if isinstance(norms, Iterable) else [norms]
    unknown = set(attacks) - set(ATTACKS)
    if unknown or not attacks or not norms:
        raise InvalidInputError(
            f"attacks must be some of {', '.join(ATTACKS)}, with one norm or more; got "
            f"{attacks} and {norms}"
        )
    x, labels = _checked(polynomial, x, labels, norms[0], target)
    right = _predictions(network, x) == labels
    tried = right if target is None else right & (labels != target)
    if not tried.any():
        raise InvalidInputError(
            "the network has no input right that could be attacked, so nothing can succeed"
        )
    generator = torch.Generator(device=x.device).manual_seed(seed)

    def perturbations(attack: str, norm: float) -> list[Tensor]:
        if attack == "random":
            noise = [
                torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
                for _ in range(draws)
            ]
            return [_scaled(n, norm) for n in noise]
        if attack == "singular":
            return [singular_attack(polynomial, x, labels, norm)]
        if attack == "linear":
            return [linear_attack(polynomial, x, labels, norm, target=target)]
        return [_descend(network, x, labels, norm, target, 1 if attack == "gradient" else steps)]

    rows = []
    for norm in norms:
        _checked(polynomial, x, labels, norm, target)
        for attack in attacks:
            answers = [_predictions(network, x + d) for d in perturbations(attack, norm)]
            won = [
                a[tried] != labels[tried] if target is None else a[tried] == target for a in answers
            ]
            success = torch.stack(won).double().mean()
            accuracy = torch.stack([a == labels for a in answers]).double().mean()
            rows.append(AttackRow(attack, float(norm), float(success), float(accuracy)))
    mean_norm = float(torch.linalg.vector_norm(x.double(), dim=1).mean())
    return Attacks(tuple(rows), len(x), int(tried.sum()), mean_norm, target)


def transfer(
    networks: Sequence[Network],
    polynomials: Sequence[Any],
    x: Tensor,
    labels: Tensor,
    norm: float,
) -> Tensor:
    """Success [i, j] of the linear attack read off polynomial i against network j.

    Raises:
        InvalidInputError: as `linear_attack`; not one polynomial per network; a network that
            has no input right.
    """
    networks, polynomials = check_functions(networks, "networks"), list(polynomials)
    if len(networks) != len(polynomials):
        raise InvalidInputError(
            f"transfer needs one polynomial per network, got {len(networks)} networks and "
            f"{len(polynomials)} polynomials"
        )
    success = torch.zeros(len(polynomials), len(networks), dtype=torch.float64)
    for i, polynomial in enumerate(polynomials):
        attacked = x + linear_attack(polynomial, x, labels, norm)
        for j, network in enumerate(networks):
            right = _predictions(network, x) == labels
            if not right.any():
                raise InvalidInputError(f"network {j} has no input right")
            answers = _predictions(network, attacked)
            success[i, j] = (answers[right] != labels[right]).double().mean()
    return success


def _descend(
    network: Network, x: Tensor, labels: Tensor, norm: float, target: int | None, steps: int
) -> Tensor:
    """Projected gradient steps in the L2 ball; one step goes all the way to its surface."""
    goal = labels if target is None else torch.full_like(labels, target)
    towards = 1.0 if target is None else -1.0
    stride = norm if steps == 1 else 2.5 * norm / steps
    delta = torch.zeros_like(x)
    for _ in range(steps):
        with torch.enable_grad():
            moved = (x + delta).detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(network(moved), goal, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
        delta = delta + towards * _scaled(gradient, stride)
        length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        delta = torch.where(length > norm, delta * (norm / length.clamp(min=1e-30)), delta)
    return delta


def _scaled(step: Tensor, norm: float) -> Tensor:
    """Rows of this length; rows of zeros stay."""
    length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
    return torch.where(length > 0, step * (norm / length), 0.0)


@torch.no_grad()
def _predictions(network: Network, x: Tensor) -> Tensor:
    return network(x).argmax(1)


def _checked(
    polynomial: Any, x: Tensor, labels: Tensor, norm: float, target: int | None
) -> tuple[Tensor, Tensor]:
    check_polynomial(polynomial)
    x, labels = real_numbers("x", x), real_numbers("labels", labels)
    d_in, classes = polynomial.d_in, polynomial.d_out
    if x.dim() != 2 or x.shape[1] != d_in or labels.shape != x.shape[:1] or not len(x):
        raise InvalidInputError(
            f"attacks need inputs [n, {d_in}] and labels [n] with n >= 1; got {tuple(x.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        raise InvalidInputError(f"labels must be integers in 0 ... {classes - 1}")
    if not torch.isfinite(x).all():
        raise InvalidInputError(f"x has {int((~torch.isfinite(x)).sum())} NaN or infinite entries")
    if target is not None and (type(target) is not int or target not in range(classes)):
        raise InvalidInputError(f"target must be a class in 0 ... {classes - 1}, got {target!r}")
    if type(norm) not in (int, float) or not 0 <= norm < float("inf"):
        raise InvalidInputError(f"norm must be finite and >= 0, got {norm!r}")
    return x, labels
