"""Layer by layer: each is fitted to the inputs that it has when the layers below are replaced."""

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from polylens.calibration.lockstep import Arrivals, in_step
from polylens.calibration.offload import store_for
from polylens.calibration.seen import Calibration, SeenInputs, naming
from polylens.calibration.telling import progress
from polylens.checks import Expert, Layer, label
from polylens.errors import UnsupportedModel
from polylens.fitting.estimator import Estimator
from polylens.hosts.base import Arrival, Function, MLPSite
from polylens.polynomials.joint import Fitted


@dataclass(frozen=True)
class Sequential(SeenInputs):
    """Fit layer by layer on the stream that the replaced layers below produce: to replace many.

    Each polynomial is the best for what the already replaced layers below make of its inputs, so
    that errors do not pile up. Variety of tokens counts: text of one's own and as much from
    `polylens.sample_tokens` serve better than either.

    Args:
        estimator: as in `TrueStream`; "samples" by default.
        tails: how much may lie beyond the ends of a neuron's polynomial, see `SeenInputs`; 0.05
            by default, with "gaussian" 0.0: far outside, a polynomial grows without bound.
        weighting: of the inputs: "output", by 1 / |true output|, or "equal".
        checkpoint: a file that gets the polynomials so far after each layer, for a run that may
            be interrupted. The same call finds them there and goes on behind them, after a
            forward pass through the finished layers, to the same polynomials bit for bit (without
            the Gaussians that they were fitted to, as after `load`). In the end it is the file
            that `Lens.save` writes; the same call then takes all from it.
        offload: where the activations of the batches that wait are kept, "cpu" for CPU memory (of
            a model on a GPU), or a directory, from which the files are removed at the end; None
            leaves them all where they are.

    Without tokens 256 x 128 are sampled from the model, which takes minutes on a CPU.

    Cost: as `TrueStream`, and for each layer the polynomial's output, too. All batches are in
    memory at once, with about four activations of d_model for every token. With offload one batch
    is, and they are written and read once for each layer. A checkpoint is written anew for each
    layer, and all weights of the model are hashed once.

    Raises:
        InvalidInputError: options that there are not.
    """

    estimator: str | type[Estimator] = "samples"
    tails: float | Literal["default"] | None = "default"
    weighting: str = "output"
    checkpoint: str | os.PathLike[str] | None = None
    offload: str | os.PathLike[str] | None = None

    stream: ClassVar[str] = "replaced"
    sampled: ClassVar[int] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        store_for(self.offload)

    def describe(self) -> list[str]:
        return [*super().describe(), "layer by layer"]


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
    method: Sequential,
    degree: int,
    saved: Saved | None = None,
) -> dict[Layer, Fitted]:
    """The polynomial of each layer, for the inputs it has when the layers below are replaced.

    One forward pass over all batches in step: at each MLP the polynomial is fitted to the
    true layer on what arrives there, and its output flows on. See `in_step` for the memory.

    Args:
        saved: has the layers that were fitted before, where no batch waits for the others, and
            gets each further one.

    Raises:
        InvalidInputError: NaN activations (which layer, how many).
        UnsupportedModel: layers that only some batches pass through.
        OSError: the store is full.
    """
    known: Mapping[Layer, Fitted] = {} if saved is None else saved.found
    found = dict(known)
    left = [layer for layer in sites if layer not in known]
    total, done = (n * len(calibration.mine) for n in (len(sites), len(known)))
    store = store_for(method.offload)
    with (
        store or nullcontext(),
        progress(
            title="layer by layer", show=calibration.progress, total=total, initial=done
        ) as bar,
    ):

        def flow(layer: Layer) -> Function:
            return partial(_flow, found[layer])

        def visit(layer: Layer, arrivals: Arrivals) -> Function:
            with naming(layer, sites[layer]):
                seen = method.begin(sites[layer].weights(), degree)
                for i, arrival in arrivals:
                    if i == calibration.leading:
                        calibration.settle(layer, seen)
                    method.show(seen, arrival, calibration.kept(i, layer))
                    bar.update()
            calibration.merge(layer, seen)
            found[layer] = calibration.solved(seen, layer, sites[layer])
            if saved is not None:
                saved.add(layer, found[layer])
            return flow(layer)

        with calibration.host.substitute({layer: flow(layer) for layer in known}):
            in_step(calibration.host, left, calibration.mine, visit, store)
    return {layer: found[layer] for layer in sites}


def require_ordered(sites: Iterable[Layer], uses: Mapping[Layer, int]) -> None:
    """UnsupportedModel for layers of which none is below another.

    Args:
        uses: how often a pass goes through each.
    """
    if any(isinstance(layer, Expert) for layer in sites):
        raise UnsupportedModel(
            "experts cannot be calibrated one layer after the other: replaced layers would change "
            "the routing; use method=TrueStream(), or layers= without experts"
        )
    for layer, n in uses.items():
        if n > 1:
            raise UnsupportedModel(
                f"layer {label(layer)} is used {n} times in a pass, so that it is below itself; "
                "use method=TrueStream(), which fits it to all of its inputs"
            )


def _flow(polynomial: Fitted, arrival: Arrival) -> Tensor:
    return polynomial(arrival.x)
