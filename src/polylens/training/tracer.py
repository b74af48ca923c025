"""How well polynomials explain a network while it learns."""

import json
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polylens.attachment import attach
from polylens.calibration.given import FromInputs
from polylens.calibration.telling import progress as told
from polylens.calibration.true_stream import TrueStream
from polylens.checks import Layer, check_at_least, renamed
from polylens.errors import AttachmentError, InvalidInputError, PolylensError
from polylens.files.whole import beside
from polylens.hosts.base import Arrival, Observer
from polylens.hosts.quiet import quiet
from polylens.lens import Lens, attached
from polylens.report.scores import lead_of, score
from polylens.training.rows import TraceRow as TraceRow
from polylens.training.rows import record
from polylens.training.trace import Trace as Trace
from polylens.training.trace import TraceData as TraceData

# Inputs of a model that reads no tokens, in one forward pass.
BATCH = 4096
PAIRS = "checkpoints must be pairs (step, model or function that returns one)"
# What the growth of complexity over training is about.
CLOSED_FORM = TrueStream(estimator="gaussian")
FOUND = "nothing: the MLPs of any torch module are found by what flows through them"


class TraceWarning(UserWarning):
    """A checkpoint could not be measured; the trace went on without it."""


class Tracer:
    """Measures a model as it trains, from a plain loop or from a Hugging Face Trainer.

        tracer = Tracer(data, degree=3)
        for step, batch in enumerate(loader):
            tracer(step, model)         # measures when the step is due
            ...
        tracer.trace.plot()

    `Trainer(callbacks=[tracer])` measures before the first step and after each due one.

    Args:
        data: a TraceData, or the tuple of its fields.
        degree: highest degree.
        path: JSON-lines file that rows are appended to; what it holds already is kept, and its
            measured steps are not measured again.
        steps: steps to measure, or a function that says whether one is due; 0 and the powers of
            two by default.

    Raises:
        InvalidInputError: a degree that cannot be fitted; a file of another degree.
    """

    @renamed(layers=FOUND)
    def __init__(
        self,
        data: TraceData | tuple[Any, ...],
        degree: int = 3,
        *,
        path: str | Path | None = None,
        steps: Container[int] | Callable[[int], bool] | None = None,
    ) -> None:
        check_at_least("degree", degree, 0)
        data = _trace_data(data)
        if not (steps is None or callable(steps) or isinstance(steps, Container)):
            raise InvalidInputError(
                f"steps must be those to measure, such as {{0, 100}}, or a function from a step to "
                f"bool, got {steps!r}"
            )
        self.data, self.degree = data, degree
        self.path = None if path is None else Path(path)
        self._due = _power_of_two if steps is None else steps
        self._rows: list[TraceRow] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._resume(self.path)

    def __repr__(self) -> str:
        return f"Tracer(degree={self.degree}, {len(self.trace.steps)} steps, path={self.path})"

    @property
    def trace(self) -> Trace:
        return Trace(tuple(sorted(self._rows, key=lambda row: row.step)))

    def is_due(self, step: int) -> bool:
        """Whether the step is to be measured and has not been."""
        due = self._due(step) if callable(self._due) else step in self._due
        return due and all(row.step != step for row in self._rows)

    def __call__(self, step: int, model: Any) -> list[TraceRow]:
        """Measure the model if the step is due; the new rows.

        What polylens refuses, such as weights that became NaN, is recorded and warned about.
        """
        if not self.is_due(step):
            return []
        return self.measure(step, lambda: model)

    def measure(self, step: int, load: Callable[[], Any]) -> list[TraceRow]:
        """Load and measure, due or not; a failure becomes a row with its error, and a warning."""
        try:
            model = load()
        except Exception as error:  # whatever a hub, a disk or a pickle may raise
            return self._failed(step, "loading", error)
        try:
            rows = measure(step, model, self.data, self.degree)
        except PolylensError as error:
            return self._failed(step, "measuring", error)
        self._keep(rows)
        return rows

    def _failed(self, step: int, doing: str, error: Exception) -> list[TraceRow]:
        rows = [TraceRow(step, error=f"{doing}: {type(error).__name__}: {error}")]
        warnings.warn(f"step {step}, {rows[0].error}", TraceWarning, stacklevel=4)
        self._keep(rows)
        return rows

    def _keep(self, rows: list[TraceRow]) -> None:
        self._rows += rows
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(record(row)) + "\n" for row in rows))

    def _resume(self, path: Path) -> None:
        rows = [row for row in Trace.load(path).rows if row.error is None]
        degrees = {len(row.r2) - 1 for row in rows if row.r2 is not None}
        if degrees - {self.degree}:
            raise InvalidInputError(
                f"{path} holds a trace of degree {sorted(degrees)}, not {self.degree}; give "
                "another path or the same degree"
            )
        # Failed steps are tried again, and a line cut short must not glue to the next.
        with beside(path) as new:
            new.write_text("".join(json.dumps(record(row)) + "\n" for row in rows))
        self._rows = rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self(state.global_step, kwargs["model"])

    def __getattr__(self, name: str) -> Any:
        """The Trainer calls every event by name; the others mean nothing here."""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@renamed(layers=FOUND)
def trace_training(
    checkpoints: Iterable[tuple[int, Any]] | Mapping[int, Any],
    data: TraceData | tuple[Any, ...],
    degree: int = 3,
    *,
    path: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """R2 of every degree up to `degree`, by layer, and the loss, over checkpoints.

    Args:
        checkpoints: by step, or as pairs: (step, model) or (step, function that returns a model),
            taken one at a time, for instance
            ((s, lambda s=s: load(revision=f"step{s}")) for s in steps).
        data: a TraceData, or the tuple of its fields.
        degree: highest degree.
        path: JSON-lines file to append to and resume from; checkpoints that it holds are not
            loaded again, failed ones are tried again.
        progress: show a progress bar.

    Returns:
        A Trace; `trace.plot()`. A checkpoint that fails to load or to be measured is recorded
        with its error, warned about, and the trace goes on.

    Raises:
        InvalidInputError: data, degree or file that cannot be used.

    Source: Belrose & Rigg 2025, on the growth of complexity over training.
    """
    pairs: Any = checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints
    if not isinstance(pairs, Iterable):
        raise InvalidInputError(f"{PAIRS}, got {type(checkpoints).__name__}")
    tracer = Tracer(data, degree, path=path, steps=lambda step: True)
    for checkpoint in told(pairs, "tracing", show=progress):
        if not isinstance(checkpoint, tuple | list) or len(checkpoint) != 2:
            raise InvalidInputError(f"{PAIRS}, got {type(checkpoint).__name__} in it")
        step, source = checkpoint
        if tracer.is_due(step):
            is_model = isinstance(source, nn.Module) or not callable(source)
            tracer.measure(step, (lambda source=source: source) if is_model else source)
    return tracer.trace


def measure(step: int, model: Any, data: TraceData, degree: int) -> list[TraceRow]:
    """One row per layer and input model; the model's training flags are as before.

    Raises:
        InvalidInputError: weights that are not finite; input models where no layer reads the
            model's own input; otherwise as `attach` and `Lens.report`.
    """
    if attached(model) is not None:
        raise AttachmentError(
            "the model has a lens, which a trace would have to take off; detach() it"
        )
    with quiet(model) if isinstance(model, nn.Module) else torch.no_grad():
        _require_finite(model)
        if data.is_text:
            with attach(
                model, data.calibration, degree=degree, method=CLOSED_FORM, progress=False
            ) as lens:
                report = lens.report(data.held_out, loss=False, progress=False)
                loss = _text_loss(lens, data.held_out)
            return [TraceRow(step, row.layer, "gaussian", row.r2, loss=loss) for row in report]
        loss, accuracy = _scores(model, data)
        return [
            TraceRow(step, layer, name, r2, polynomial_r2, loss, accuracy)
            for layer, name, r2, polynomial_r2 in _of_features(model, data, degree)
        ]


Measured = tuple[Layer, str, tuple[float, ...] | None, tuple[float, ...]]


def _of_features(model: nn.Module, data: TraceData, degree: int) -> list[Measured]:
    """(layer, input model, R2 held out, R2 under it), by layer."""
    options: dict[str, Any] = {"degree": degree, "progress": False}
    options["example_inputs"] = data.calibration[:2]

    def measured(lens: Lens, name: str, layers: Collection[Layer]) -> list[Measured]:
        if not layers:
            return []
        report = lens.report(
            data.held_out, layers=layers, loss=False, batch_size=BATCH, progress=False
        )
        return [(n, name, report[n].r2, tuple(lens[n].r2.tolist())) for n in layers]

    with attach(model, data.calibration, method=CLOSED_FORM, batch_size=BATCH, **options) as lens:
        first = _readers(lens, data.held_out) if data.inputs else []
        rows = measured(lens, "gaussian", [n for n in lens.layers if n not in first])
    if data.inputs and not first:
        raise InvalidInputError(
            "inputs= are of the layers that read the model's own input, and none does: each has "
            "the Gaussian of what reaches it; leave inputs= out"
        )
    named: list[Measured] = []
    for name, inputs in data.inputs.items():
        with attach(model, method=FromInputs(inputs), layers=first, **options) as lens:
            named += measured(lens, name, first)
    return [*sorted(named, key=lambda row: first.index(row[0])), *rows]


def _readers(lens: Lens, x: Tensor) -> list[Layer]:
    """The layers that read the model's own input."""
    found: list[Layer] = []
    x = x[:2].to(lens.host.device)

    def observer(layer: Layer) -> Observer:
        def look(arrival: Arrival) -> None:
            if torch.equal(arrival.x.flatten(), x.flatten()):
                found.append(layer)

        return look

    with lens.host.observe({layer: observer(layer) for layer in lens.layers}):
        lens.host.run(x)
    return found


def _scores(model: nn.Module, data: TraceData) -> tuple[float | None, float | None]:
    """(cross entropy, accuracy) of a classifier on what is held out, where there are labels."""
    if data.labels is None:
        return None, None
    logits = model(data.held_out)
    accuracy = float((logits.argmax(1) == data.labels).double().mean())
    return float(nn.functional.cross_entropy(logits, data.labels)), accuracy


def _text_loss(lens: Lens, tokens: Tensor) -> float:
    """Cross entropy of a language model, nats per token."""
    data = lens.host.given(tokens)
    total, lead = 0.0, lead_of(lens.host, data)
    for batch in data.split(8):
        total += float(score(lens.host.logits(batch), None, batch, lead).ce.sum())
    return total / tokens[:, lead:].numel()


def _trace_data(data: Any) -> TraceData:
    if isinstance(data, TraceData):
        return data
    if not isinstance(data, tuple) or not 2 <= len(data) <= 4:
        raise InvalidInputError(
            "data must be a TraceData, or (calibration, held_out), (..., labels) or (..., inputs), "
            f"got {type(data).__name__}"
        )
    return TraceData(*data)


def _require_finite(model: Any) -> None:
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if not parameter.isfinite().all():
            raise InvalidInputError(f"the weights {name} are NaN or infinite somewhere")


def _power_of_two(step: int) -> bool:
    return step & (step - 1) == 0
