"""Every layer is fitted to the inputs that it has in the unchanged model."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from polylens.calibration.seen import NOT_REACHED, Calibration, SeenInputs, watch
from polylens.calibration.telling import progress
from polylens.checks import Expert, Layer
from polylens.devices import require_room
from polylens.errors import UnsupportedModel
from polylens.fitting.estimator import Estimator
from polylens.hosts.base import Arrival, MLPSite
from polylens.hosts.batch import Batch
from polylens.polynomials.joint import Fitted

FEW_TOKENS = 64


@dataclass(frozen=True)
class TrueStream(SeenInputs):
    """Fit every layer to the inputs that it has in the unchanged model.

    `attach(model, tokens)` takes it. Each polynomial is the best one of its layer as it is. At
    degree 3 all layers may be replaced at once; at degree 2 errors pile up, and `Sequential`
    costs less loss.

    Args:
        estimator: "samples": least squares over the inputs themselves, neuron by neuron, which
            heavier tails than a Gaussian's do not mislead (default); "joint": the same with the
            features of all neurons for every output, closer and dearer; "gaussian": under the
            Gaussian with the moments of the inputs, in closed form the optimum over all
            polynomials, which the theory is about and no replacement for inputs far out; or a
            subclass of `Estimator`.
        tails: how much may lie beyond the ends of a neuron's polynomial, see `SeenInputs`; none
            has ends by default with "gaussian", 0.05 with the others.
        weighting: of the inputs: "equal", or "output", by 1 / |true output|.

    Without tokens 32 x 128 are sampled from the model.

    Cost: one forward pass over the tokens, in which each layer takes
    - "gaussian": d_in^2 float64 of memory and one product cov @ W;
    - "samples": (2 degree + 2)^2 float64 per neuron and about the layer's own products;
    - "joint": two Gram matrices of 1 + d_in + 2 (degree - 1) d_mlp features in float64 (half of
      the d_mlp without a gate), and as many multiplications for each token as one has entries.
    """

    estimator: str | type[Estimator] = "samples"
    tails: float | Literal["default"] | None = "default"
    weighting: str = "equal"

    stream: ClassVar[str] = "true"
    sampled: ClassVar[int] = 32


def on_true_stream(
    calibration: Calibration,
    sites: Mapping[Layer, MLPSite],
    method: TrueStream,
    degree: int,
    refused: dict[Layer, str],
) -> Iterator[tuple[Layer, Fitted]]:
    """(layer, polynomial fitted to the inputs that it has in the unchanged model).

    One forward pass over the batches for all layers. Layers are handed out one at a time and
    their sums freed. An expert is fitted to the tokens that are routed to it. One that saw
    fewer than FEW_TOKENS is left out, and why is put into `refused`.

    Raises:
        InvalidInputError: NaN activations (which layer, how many).
        OutOfMemory: the sums of all layers together need more memory than is free.
    """
    if calibration.ranks is not None and any(isinstance(layer, Expert) for layer in sites):
        raise UnsupportedModel(
            "experts are not fitted over ranks: each sees tokens of its own, too few of the first "
            "to decide by; attach in one process, or leave them out with layers="
        )
    estimators = _begun(sites, method, degree)

    def see(layer: Layer, arrival: Arrival, kept: Tensor | None) -> None:
        method.show(estimators[layer], arrival, kept)

    def steps() -> Iterator[Batch]:
        bar = progress(calibration.mine, "calibrating", show=calibration.progress)
        for i, step in enumerate(bar):
            if i == calibration.leading:
                for layer, seen in estimators.items():
                    calibration.settle(layer, seen)
            yield step

    watch(calibration.host, sites, steps(), calibration.exclude_first, see)
    for layer, site in progress(sites.items(), "fitting", show=calibration.progress):
        seen = estimators.pop(layer)
        calibration.merge(layer, seen)
        if not seen.count:
            refused[layer] = NOT_REACHED.format(site.path)
            continue
        if isinstance(layer, Expert) and seen.count < FEW_TOKENS:
            refused[layer] = (
                f"{site.path}: the router sent {seen.count} of these tokens there, at least "
                f"{FEW_TOKENS} are needed to fit an expert; give more tokens"
            )
            continue
        yield layer, calibration.solved(seen, layer, site)


def _begun(
    sites: Mapping[Layer, MLPSite], method: TrueStream, degree: int
) -> dict[Layer, Estimator]:
    """Estimators that have seen nothing yet, of all layers at once.

    Raises:
        OutOfMemory: they keep more than is free on the layers' devices.
    """
    weights = {layer: site.weights() for layer, site in sites.items()}
    kept, solving = Counter[torch.device](), Counter[torch.device]()
    for each in weights.values():
        at, size = each.device, method.kind.solving_bytes(each, degree)
        kept[at] += method.kind.kept_bytes(each, degree)
        solving[at] = max(solving[at], size)  # one layer after the other
    for device, size in (kept + solving).items():
        what = f"{method.kind.name}, degree {degree}, for {len(weights)} layers at once"
        remedy = "Sequential() keeps one layer at a time; or fewer layers, or a lower degree"
        require_room(size, device, what, remedy)
    return {layer: method.begin(each, degree) for layer, each in weights.items()}
