"""What is measured of one layer at one step."""

from dataclasses import asdict, dataclass
from typing import Any

from polylens.checks import Layer, to_json


@dataclass(frozen=True)
class TraceRow:
    """One layer of one checkpoint under one input model.

    Attributes:
        step: training step.
        layer: index, an Expert in a mixture, or None where the checkpoint failed.
        inputs: name of the input model.
        r2: degree 0, 1, ... on the held-out data, of the layer's output.
        r2_model: the same under the input model itself, in closed form; None for a language model.
        loss: held-out cross entropy [nats]; accuracy: of a classifier; None without labels.
        error: why the checkpoint could not be measured.
    """

    step: int
    layer: Layer | None = None
    inputs: str = "gaussian"
    r2: tuple[float, ...] | None = None
    r2_model: tuple[float, ...] | None = None
    loss: float | None = None
    accuracy: float | None = None
    error: str | None = None

    @property
    def degree(self) -> int:
        """Highest one measured; -1 where none was."""
        return len(self.r2 or ()) - 1


def record(row: TraceRow) -> dict[str, Any]:
    """The row as a line of JSON keeps it."""
    return {**asdict(row), "layer": to_json(row.layer)}
