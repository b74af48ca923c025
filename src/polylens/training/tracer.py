"""How well polynomials explain a network while it learns."""

import json
import warnings
from collections.abc import Callable, Container, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from polylens.checks import check_at_least, to_json
from polylens.errors import InvalidInputError, PolylensError, UnsupportedModel
from polylens.fitting.fit import fit
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.residuals import ResidualSums
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.report.scores import lead_of, score
from polylens.training.rows import TraceRow as TraceRow
from polylens.training.trace import Trace as Trace
from polylens.training.trace import TraceData as TraceData

Layers = dict[int, tuple[MLPWeights | GLUWeights, Callable[[Tensor], Tensor]]]
Readers = Callable[[nn.Module], Layers]


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
        data: a TraceData.
        degree: highest degree.
        path: JSON-lines file that rows are appended to; what it holds already is kept, and its
            measured steps are not measured again.
        steps: steps to measure, or a function that says whether one is due; 0 and the powers of
            two by default.
        layers: of a classifier: model -> {layer: (weights, function from the model's input to the
            layer's)}, for models that `sequential_layers` cannot read.

    Raises:
        InvalidInputError: a degree that cannot be fitted; a file of another degree.
    """

    def __init__(
        self,
        data: TraceData,
        degree: int,
        *,
        path: str | Path | None = None,
        steps: Container[int] | Callable[[int], bool] | None = None,
        layers: Readers | None = None,
    ) -> None:
        check_at_least("degree", degree, 0)
        self.data, self.degree, self.layers = data, degree, layers
        self.path = None if path is None else Path(path)
        self._due = _power_of_two if steps is None else steps
        self._rows: list[TraceRow] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._resume(self.path)

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
            rows = measure(step, model, self.data, self.degree, self.layers)
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
                file.write("".join(json.dumps(_record(row)) + "\n" for row in rows))

    def _resume(self, path: Path) -> None:
        rows = [row for row in Trace.load(path).rows if row.error is None]
        degrees = {len(row.r2) - 1 for row in rows if row.r2 is not None}
        if degrees - {self.degree}:
            raise InvalidInputError(
                f"{path} holds a trace of degree {sorted(degrees)}, not {self.degree}; give "
                "another path or the same degree"
            )
        # Failed steps are tried again, and a line cut short must not glue to the next.
        path.write_text("".join(json.dumps(_record(row)) + "\n" for row in rows))
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


def trace_training(
    checkpoints: Iterable[tuple[int, Any]],
    data: TraceData | tuple,
    degree: int,
    *,
    path: str | Path | None = None,
    layers: Readers | None = None,
    progress: bool = True,
) -> Trace:
    """R2 of every degree up to `degree`, by layer, and the loss, over checkpoints.

    Args:
        checkpoints: (step, model) or (step, function that returns a model), taken one at a time,
            for instance ((s, lambda s=s: load(revision=f"step{s}")) for s in steps).
        data: a TraceData, or the tuple of its fields.
        degree: highest degree.
        path: JSON-lines file to append to and resume from; checkpoints that it holds are not
            loaded again, failed ones are tried again.
        layers: as in `Tracer`.
        progress: show a progress bar.

    Returns:
        A Trace; `trace.plot()`. A checkpoint that fails to load or to be measured is recorded
        with its error, warned about, and the trace goes on.

    Raises:
        InvalidInputError: data, degree or file that cannot be used.

    Source: Belrose & Rigg 2025, on the growth of complexity over training.
    """
    data = data if isinstance(data, TraceData) else TraceData(*data)
    tracer = Tracer(data, degree, path=path, steps=lambda step: True, layers=layers)
    for step, source in tqdm(checkpoints, "tracing", disable=not progress):
        if tracer.is_due(step):
            is_model = isinstance(source, nn.Module) or not callable(source)
            tracer.measure(step, (lambda source=source: source) if is_model else source)
    return tracer.trace


def measure(
    step: int, model: Any, data: TraceData, degree: int, layers: Readers | None = None
) -> list[TraceRow]:
    """One row per layer and input model; the model's training flags are as before."""
    with _evaluating(model):
        if data.is_text:
            return _language_model_rows(step, model, data, degree)
        return _classifier_rows(step, model, data, degree, layers or sequential_layers)


def sequential_layers(model: nn.Module) -> Layers:
    """The normal forms of an nn.Sequential: every Linear, activation, Linear in a row.

    A model with a method `normal_form()` that returns MLPWeights or GLUWeights counts as one
    layer that reads the model's input.

    Raises:
        UnsupportedModel: neither; pass layers= then.
    """
    normal_form: Any = getattr(model, "normal_form", None)
    if normal_form is not None:
        return {0: (normal_form(), lambda x: x)}
    found: Layers = {}
    modules = list(model) if isinstance(model, nn.Sequential) else []
    for i, (first, act, last) in enumerate(zip(modules, modules[1:], modules[2:], strict=False)):
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
            W_in, W_out = first.weight.T, last.weight.T
            weights = MLPWeights(W_in, W_out, act, first.bias, last.bias)  # type: ignore[arg-type]
            found[len(found)] = (weights, nn.Sequential(*modules[:i]))
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} is no nn.Sequential with Linear, activation, Linear and has "
            "no normal_form(); pass layers=, a function from the model to its layers"
        )
    return found


@torch.no_grad()
def _classifier_rows(
    step: int, model: nn.Module, data: TraceData, degree: int, layers: Readers
) -> list[TraceRow]:
    loss = accuracy = None
    if data.labels is not None:
        logits = model(data.held_out)
        loss = float(nn.functional.cross_entropy(logits, data.labels))
        accuracy = float((logits.argmax(1) == data.labels).double().mean())
    rows = []
    for layer, (weights, before) in layers(model).items():
        x, held_out = before(data.calibration), before(data.held_out)
        first = x is data.calibration or torch.equal(x, data.calibration)
        named = dict(data.inputs) if first else {}
        for name, inputs in (named or {"gaussian": Gaussian.from_samples(x)}).items():
            polynomial = fit(weights, inputs, degree)
            sums = ResidualSums()
            sums.update(weights(held_out), polynomial.all_degrees(held_out))
            both = sums.r2(f"layer {layer}"), tuple(polynomial.r2.tolist())
            rows.append(TraceRow(step, layer, name, *both, loss, accuracy))
    return rows


def _language_model_rows(step: int, model: Any, data: TraceData, degree: int) -> list[TraceRow]:
    from polylens.attachment import attach

    total = 0.0
    with torch.no_grad(), attach(model, data.calibration, degree=degree, progress=False) as lens:
        report = lens.report(data.held_out, loss=False, progress=False)
        lead = lead_of(lens.host, data.held_out)
        for tokens in data.held_out.split(8):
            real = torch.ones_like(tokens, dtype=torch.bool)
            total += float(score(lens.host.logits(tokens), None, tokens, real, lead).ce.sum())
    loss = total / data.held_out[:, lead:].numel()
    return [TraceRow(step, row.layer, "gaussian", row.r2, loss=loss) for row in report]


@contextmanager
def _evaluating(model: Any):
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        if modules:
            model.eval()
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def _record(row: TraceRow) -> dict[str, Any]:
    return {**asdict(row), "layer": to_json(row.layer)}


def _power_of_two(step: int) -> bool:
    return step & (step - 1) == 0
