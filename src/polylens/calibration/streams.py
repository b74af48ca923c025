"""The polynomials of all layers of a model, from what it is seen to compute on some inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from polylens.calibration.lockstep import Arrivals, Step, in_step
from polylens.calibration.offload import Store
from polylens.calibration.tokens import batches, counted, kept_rows, rows, validate_inputs
from polylens.checks import Expert, Layer, label
from polylens.errors import AttachmentError, InvalidInputError, PolylensError, UnsupportedModel
from polylens.fitting.estimator import Estimator
from polylens.hosts.base import Arrival, Function, Host, MLPSite, Norm, Observer
from polylens.inputs.gaussian import Gaussian
from polylens.installed.emitter import Fitted, keep_first

FEW_TOKENS = 64
WEIGHTINGS = {"equal": "", "output": "weighted by 1 / |output|"}
# Norms of outputs below this share of the largest weigh no more than it.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What a model is run on to see the inputs of its layers.

    Attributes:
        host: the model.
        steps: (inputs, attention mask) of each batch.
        exclude_first: leave out position 0, and keep it true where a polynomial flows on.
        weighting: of the inputs, "equal" or "output".
        tails: where the polynomials end, see `Estimator`.
        progress: show a progress bar.
    """

    host: Host
    steps: Sequence[Step]
    exclude_first: bool
    weighting: str
    tails: float | None
    progress: bool

    @classmethod
    def on(
        cls,
        host: Host,
        tokens: Tensor,
        attention_mask: Tensor | None,
        *,
        exclude_first: bool,
        weighting: str,
        tails: float | None,
        batch_size: int,
        progress: bool,
    ) -> "Calibration":
        """On these tokens [batch, pos] (floats, where the model reads those).

        Raises:
            InvalidInputError: unusable tokens, mask, batch size or weighting.
        """
        if weighting not in WEIGHTINGS:
            raise InvalidInputError(
                f"weighting={weighting!r} is unknown; there are {', '.join(map(repr, WEIGHTINGS))}"
            )
        tokens, mask = validate_inputs(tokens, attention_mask, reads_tokens=host.reads_tokens)
        order = visiting_order(len(tokens)).to(tokens.device)
        steps = list(batches(tokens[order], None if mask is None else mask[order], batch_size))
        return cls(host, steps, exclude_first, weighting, tails, progress)

    def describe(self, origin: str) -> list[str]:
        """How many inputs there are, of which origin, and what was left out."""
        if self.host.reads_tokens:
            count = sum(int(counted(*step, exclude_first=False).sum()) for step in self.steps)
        else:
            count, origin = sum(len(batch) for batch, _ in self.steps), "inputs"
        options = {
            "position 0 excluded": self.exclude_first,
            WEIGHTINGS[self.weighting]: self.weighting != "equal",
            "asymptotes beyond the preactivations seen": self.tails is not None,
        }
        described = [text for text, true in options.items() if true]
        if self.tails:
            described[-1] += f" and in tails of {self.tails:.3g}"
        return [f"{count} {origin}", *described]

    def kept(self, i: int) -> Tensor | None:
        """Rows of batch i that count, None for all."""
        return kept_rows(*self.steps[i], exclude_first=self.exclude_first)

    def sample_weights(self, y: Tensor) -> Tensor | None:
        """[n] of inputs with true outputs y [n, d_out]; None for equal ones."""
        if self.weighting == "equal" or not len(y):
            return None
        size = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64)
        floor = SMALLEST * float(size.max())
        return 1 / size.clamp(min=floor) if floor > 0 else None


def visiting_order(n: int) -> Tensor:
    """A permutation of n sequences, so that the first are like all where texts follow texts."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def on_true_stream(
    calibration: Calibration,
    sites: Mapping[Layer, MLPSite],
    kind: type[Estimator],
    degree: int,
    refused: dict[Layer, str],
) -> Iterator[tuple[Layer, Fitted]]:
    """(layer, polynomial fitted to the inputs that it has in the unchanged model).

    One forward pass over the batches for all layers. Layers are handed out one at a time and
    their sums freed. An expert is fitted to the tokens that are routed to it. One that saw
    fewer than FEW_TOKENS is left out, and why is put into `refused`.

    Raises:
        InvalidInputError: NaN activations (which layer, how many).
    """
    tails = calibration.tails
    estimators = {layer: kind(site.weights(), degree, tails) for layer, site in sites.items()}

    def see(layer: Layer, arrival: Arrival, kept: Tensor | None) -> None:
        x, y = rows(arrival, kept)
        estimators[layer].update(x, calibration.sample_weights(y))

    steps = tqdm(calibration.steps, "calibrating", disable=not calibration.progress)
    watch(calibration.host, sites, steps, calibration.exclude_first, see)
    for layer, site in tqdm(sites.items(), "fitting", disable=not calibration.progress):
        seen = estimators.pop(layer)
        if isinstance(layer, Expert) and seen.count < FEW_TOKENS:
            refused[layer] = (
                f"{site.path}: the router sent {seen.count} of these tokens there, at least "
                f"{FEW_TOKENS} are needed to fit an expert; give more tokens"
            )
            continue
        with naming(layer, site):
            yield layer, seen.solve()


class Saved(Protocol):
    """Polynomials that outlive an interruption."""

    @property
    def found(self) -> Mapping[Layer, Fitted]:
        """Those of the first layers, from an earlier run."""
        ...

    def add(self, layer: Layer, polynomial: Fitted) -> None:
        """Keep that of one more layer."""
        ...


def on_replaced_stream(
    calibration: Calibration,
    sites: Mapping[Layer, MLPSite],
    kind: type[Estimator],
    degree: int,
    *,
    store: Store | None = None,
    saved: Saved | None = None,
) -> dict[Layer, Fitted]:
    """The polynomial of each layer, for the inputs it has when the layers below are replaced.

    One forward pass over all batches in step: at each MLP the polynomial is fitted to the
    true layer on what arrives there, and its output flows on. See `in_step` for the memory.

    Args:
        store: of what waiting passes hold; None leaves it in memory.
        saved: has the layers that were fitted before, where no batch waits for the others, and
            gets each further one.

    Raises:
        InvalidInputError: as `on_true_stream`.
        UnsupportedModel: layers that only some batches pass through.
        OSError: the store is full.
    """
    known = {} if saved is None else saved.found
    found = dict(known)
    flow = partial(partial, _flow, calibration.exclude_first)
    left = [layer for layer in sites if layer not in known]
    total, done = (n * len(calibration.steps) for n in (len(sites), len(known)))
    off = not calibration.progress
    with tqdm(total=total, initial=done, desc="layer by layer", disable=off) as bar:

        def visit(layer: Layer, arrivals: Arrivals) -> Function:
            with naming(layer, sites[layer]):
                seen = kind(sites[layer].weights(), degree, calibration.tails)
                for i, arrival in arrivals:
                    x, y = rows(arrival, calibration.kept(i))
                    seen.update(x, calibration.sample_weights(y))
                    bar.update()
                found[layer] = seen.solve()
                if saved is not None:
                    saved.add(layer, found[layer])
            return flow(found[layer])

        with calibration.host.substitute({layer: flow(known[layer]) for layer in known}):
            in_step(calibration.host, left, calibration.steps, visit, store)
    return {layer: found[layer] for layer in sites}


def require_ordered(sites: Iterable[Layer]) -> None:
    """UnsupportedModel for layers of which none is below another."""
    if any(isinstance(layer, Expert) for layer in sites):
        raise UnsupportedModel(
            "experts cannot be calibrated one layer after the other: replaced layers would change "
            'the routing; use calibration="true", or layers= without experts'
        )


def _flow(exclude_first: bool, polynomial: Fitted, arrival: Arrival) -> Tensor:
    out = polynomial(arrival.x)
    return keep_first(out, arrival) if exclude_first else out


@torch.no_grad()
def watch(
    host: Host,
    layers: Iterable[Layer],
    steps: Iterable[Step],
    exclude_first: bool,
    see: Callable[[Layer, Arrival, Tensor | None], None],
) -> None:
    """One forward pass over the batches; see(layer, arrival, kept) at every layer of every batch.

    `rows(arrival, kept)` are the true inputs and outputs that count.
    """
    kept: Tensor | None = None

    def observer(layer: Layer) -> Observer:
        return lambda arrival: see(layer, arrival, kept)

    with host.observe({layer: observer(layer) for layer in layers}):
        for step in steps:
            kept = kept_rows(*step, exclude_first=exclude_first)
            host.run(*step)


def norm_inputs(host: Host, sites: Mapping[Layer, MLPSite]) -> dict[Layer, Gaussian]:
    """The maximum-entropy Gaussian that the normalisation in front of a layer implies.

    RMSNorm outputs have mean square one: N(0, I); LayerNorm removes the mean direction too:
    N(0, I - 11^T / d). Weight w and bias b that are not folded give diag(w) cov diag(w) and b.
    """
    device = host.device
    return {n: _gaussian_after(host.norm(site), site.d_in, device) for n, site in sites.items()}


def _gaussian_after(norm: Norm, d: int, device: torch.device) -> Gaussian:
    weight = torch.ones(d, device=device) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros(d, device=device) if norm.bias is None else norm.bias.detach()
    weight, bias = weight.double(), bias.double()
    if not norm.centred:
        return Gaussian(bias, weight.square())
    return Gaussian(bias, torch.diag(weight.square()) - torch.outer(weight, weight) / d)


def require_deterministic(model: nn.Module) -> None:
    """AttachmentError if a forward pass would apply dropout."""
    if not model.training:
        return
    active = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]
    if active:
        raise AttachmentError(
            f"the model is in training mode with dropout ({active[0]} and {len(active) - 1} more), "
            "so its MLP inputs are random; call model.eval() first"
        )


@contextmanager
def naming(layer: Layer, site: MLPSite) -> Iterator[None]:
    """Add layer and path to whatever polylens raises inside."""
    try:
        yield
    except UnsupportedModel:
        raise
    except PolylensError as error:
        raise type(error)(f"layer {label(layer)} ({site.path}): {error}") from error
