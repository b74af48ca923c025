"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from polylens.checks import layers_in
from polylens.errors import InvalidInputError, PolylensError

if TYPE_CHECKING:
    from polylens.lens import Lens
    from polylens.report.report import Report

app = typer.Typer(
    name="polylens",
    help="The MLPs of transformers as polynomials, in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

DEMO_SEQUENCES, DEMO_LENGTH = 32, 128

ModelName = Annotated[
    str, typer.Argument(help='Hub name, local directory, .gguf file, or "demo", the embedded one.')
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16.")]
Stream = Annotated[
    str,
    typer.Option(
        help='"true": fitted to what the model itself computes. "sequential": layer by layer to '
        "what the replaced layers below produce, to replace all at once.",
    ),
]
FitTo = Annotated[
    str | None,
    typer.Option(
        "--estimator",
        help='"samples" (default): least squares over the inputs, neuron by neuron. "joint": over '
        'all neurons\' features. "gaussian": in closed form under a Gaussian, to study layers.',
    ),
]
OldStream = Annotated[str | None, typer.Option("--calibration", hidden=True)]
Calibration = Annotated[int, typer.Option(help="From the start of the text.")]
Heldout = Annotated[int, typer.Option(help="From what follows.")]
SeqLen = Annotated[int, typer.Option(help="Positions per sequence.")]
Degree = Annotated[int, typer.Option(help="Highest degree that is fitted, and replaces the MLPs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Write the figure (.png, .pdf, .svg).")
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", help="Write one page with everything about the layers.")
]
NoLoss = Annotated[bool, typer.Option("--no-loss", help="R2 only: much faster.")]
Prefixes = Annotated[
    bool, typer.Option("--prefixes", help="Loss of the first 2, 3, ... layers replaced, too.")
]
Worst = Annotated[int, typer.Option(min=0, help="Tokens listed that lose most.")]


@app.command()
def report(
    model: ModelName,
    text: Annotated[Path, typer.Option(help="UTF-8 text to calibrate and measure on.")],
    heldout_text: Annotated[
        Path | None, typer.Option(help="UTF-8 text of another source, to measure on instead.")
    ] = None,
    degree: Degree = 3,
    layers: Annotated[str | None, typer.Option(help="Such as 0-5,10; all by default.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    stream: Stream = "true",
    estimator: FitTo = None,
    calibration: OldStream = None,
    calibration_tokens: Calibration = 4096,
    sampled_tokens: Annotated[
        int, typer.Option(min=0, help="Calibrate on this many that the model writes, too.")
    ] = 0,
    heldout_tokens: Heldout = 4096,
    seq_len: SeqLen = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    html_file: HtmlFile = None,
    no_loss: NoLoss = False,
    prefixes: Prefixes = False,
    worst: Worst = 10,
) -> None:
    """Fit polynomials to every MLP of a language model and show how good they are."""
    with _one_line_errors():
        _check_outputs(json_file, plot_file, html_file)
        _check_losses(no_loss, prefixes)
        chosen, method = (
            None if layers in (None, "all") else layers_in(layers),
            _method(stream, estimator, calibration),
        )
        content = _read(text)
        other = None if heldout_text is None else _read(heldout_text)
        more = _windows("sampled", sampled_tokens, seq_len) if sampled_tokens else 0
        import torch

        from polylens.attachment import attach
        from polylens.calibration.sampling import sample_tokens
        from polylens.cli.loading import load_model, token_windows

        _quiet_libraries()
        bridge, tokenizer = load_model(model, device, dtype)
        tokens, heldout = token_windows(
            tokenizer,
            content,
            _windows("calibration", calibration_tokens, seq_len),
            _windows("heldout", heldout_tokens, seq_len),
            seq_len,
            other,
        )
        options = {"batch_size": batch_size, "progress": sys.stderr.isatty()}
        if more:
            written = sample_tokens(bridge, more, seq_len, progress=options["progress"])
            tokens = torch.cat([tokens, written.to(tokens.device)])
        lens = attach(bridge, tokens, degree=degree, method=method, layers=chosen, **options)
        measures = {"loss": not no_loss, "prefixes": prefixes, "worst": worst}
        result = lens.report(heldout, decode=tokenizer.decode, **measures, **options)
        _show(result, json_file, plot_file)
        _page(lens, result, tokenizer, html_file)


@app.command()
def demo(
    degree: Degree = 3,
    stream: Stream = "true",
    estimator: FitTo = None,
    calibration: OldStream = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    html_file: HtmlFile = None,
    no_loss: NoLoss = False,
    prefixes: Prefixes = False,
    worst: Worst = 10,
    sequences: Annotated[
        int, typer.Option(min=1, help=f"Sequences of {DEMO_LENGTH} bytes, twice.")
    ] = DEMO_SEQUENCES,
) -> None:
    """The report on a small language model that comes with polylens; needs no network."""
    with _one_line_errors():
        _check_outputs(json_file, plot_file, html_file)
        _check_losses(no_loss, prefixes)
        from polylens import demo as embedded
        from polylens.attachment import attach

        method = _method(stream, estimator, calibration)
        training, heldout = (
            embedded.batches(text, sequences, DEMO_LENGTH) for text in embedded.texts()
        )
        progress = sys.stderr.isatty()
        bridge = embedded.load_bridge()
        lens = attach(bridge, training, degree=degree, method=method, progress=progress)
        tokenizer = embedded.ByteTokenizer()
        measures = {"loss": not no_loss, "prefixes": prefixes, "worst": worst}
        result = lens.report(heldout, decode=tokenizer.decode, progress=progress, **measures)
        _show(result, json_file, plot_file)
        _page(lens, result, tokenizer, html_file)


@app.command()
def features(
    model: ModelName,
    layer: Annotated[int, typer.Option(help="Which layer's MLP.")],
    direction: Annotated[str, typer.Option(help="A token, whose logit is the output direction.")],
    against: Annotated[
        str | None, typer.Option(help="Another token; the mean of all by default.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many features.")] = 8,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate on; sampled from the model by default."),
    ] = None,
    calibration_tokens: Calibration = 4096,
    seq_len: SeqLen = 128,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
) -> None:
    """The quadratic features of one layer along a token's logit, with the tokens they read."""
    with _one_line_errors():
        _check_outputs(json_file, None)
        content = None if text is None else _read(text)
        from polylens.analysis import layer_features, single_token
        from polylens.attachment import attach
        from polylens.cli.loading import load_model, token_windows

        _quiet_libraries()
        bridge, tokenizer = load_model(model, device, dtype)

        def encode(token: str) -> list[int]:
            return tokenizer.encode(token, add_special_tokens=False)

        token = single_token(direction, encode)
        other = None if against is None else single_token(against, encode)
        tokens = None
        if content is not None:
            sequences = _windows("calibration", calibration_tokens, seq_len)
            tokens = token_windows(tokenizer, content, sequences, 1, seq_len)[0]
        method = _method("true", "gaussian", None)
        options = {"layers": layer, "progress": sys.stderr.isatty()}
        lens = attach(bridge, tokens, degree=2, method=method, **options)
        options = {"against": other, "k": k, "decode": tokenizer.decode}
        found = layer_features(lens, layer, token, tokens, **options)
        Console().print(found, f"fitted to {lens.inputs_summary}")
        if json_file is not None:
            json_file.write_text(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
            _wrote(json_file)


@app.command()
def trace(
    model: Annotated[
        str, typer.Argument(help="Directory of checkpoints (checkpoint-500, ...), or hub name.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text to calibrate and measure on.")],
    steps: Annotated[
        str | None, typer.Option(help="Such as 0,1,2,512; all of a directory by default.")
    ] = None,
    revisions: Annotated[str, typer.Option(help="Of a hub name, {} for the step.")] = "step{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub name or directory; by default the model's.")
    ] = None,
    degree: Annotated[int, typer.Option(help="Highest degree.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, appended as it goes; resumes from them.")
    ] = None,
    plot_file: PlotFile = None,
    calibration_tokens: Calibration = 4096,
    heldout_tokens: Heldout = 4096,
    seq_len: SeqLen = 128,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """R2 by degree over the checkpoints of a training run, loaded one at a time."""
    with _one_line_errors():
        _check_outputs(out, plot_file)
        content, wanted = _read(text), parse_steps(steps)
        from polylens.cli.loading import checkpoints, load_tokenizer, token_windows
        from polylens.training.tracer import TraceData, TraceWarning, trace_training

        sources = checkpoints(model, wanted, revisions, device, dtype)
        _quiet_libraries()
        data = token_windows(
            load_tokenizer(tokenizer or model),
            content,
            _windows("calibration", calibration_tokens, seq_len),
            _windows("heldout", heldout_tokens, seq_len),
            seq_len,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TraceWarning)  # shown in the table
            result = trace_training(
                sources, TraceData(*data), degree, path=out, progress=sys.stderr.isatty()
            )
        Console().print(result)
        if not result.steps:
            raise InvalidInputError("no checkpoint could be measured; the table says why")
        if plot_file is not None:
            result.plot().savefig(plot_file)
        for path in (out, plot_file):
            if path is not None:
                _wrote(path)


def _method(stream: str, estimator: str | None, old: str | None) -> Any:
    """What `attach` takes for a stream and an estimator.

    Raises:
        InvalidInputError: neither "true" nor "sequential", another estimator, or the option's
            old name.
    """
    if old is not None:
        raise InvalidInputError(f"--calibration is called --stream now: --stream {old}")
    from polylens.calibration.sequential import Sequential
    from polylens.calibration.true_stream import TrueStream

    methods = {"true": TrueStream, "sequential": Sequential}
    if stream not in methods:
        raise InvalidInputError(f"--stream {stream!r} is unknown; there are {', '.join(methods)}")
    return methods[stream](**({} if estimator is None else {"estimator": estimator}))


def parse_steps(text: str | None) -> list[int] | None:
    """ "0,1,512" -> [0, 1, 512]; None stays None.

    Raises:
        InvalidInputError: anything else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InvalidInputError(f"steps {text!r} must be numbers with commas, such as 0,1,512")
    return [int(part) for part in parts]


def main() -> None:
    """Entry point of the `polylens` command."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can put right is said in one line, with exit code 2."""
    try:
        yield
    except (PolylensError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        raise typer.Exit(2) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from error


def _check_outputs(
    data_file: Path | None, plot_file: Path | None, html_file: Path | None = None
) -> None:
    """Before hours of work: can the results be written?"""
    for path in (data_file, plot_file, html_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidInputError(f"{path} cannot be written: there is no such directory")
    if plot_file is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if plot_file.suffix[1:].lower() not in known:
            raise InvalidInputError(
                f"{plot_file}: figures are written as {', '.join(sorted(known))}, by the name's end"
            )


def _check_losses(no_loss: bool, prefixes: bool) -> None:
    if no_loss and prefixes:
        raise InvalidInputError("--prefixes measures losses and --no-loss leaves them out")


def _windows(name: str, tokens: int, seq_len: int) -> int:
    if seq_len < 3 or tokens < seq_len:
        raise InvalidInputError(
            f"--{name}-tokens {tokens} must be at least one sequence of --seq-len {seq_len}, "
            "which must be 3 or more"
        )
    return tokens // seq_len


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(result: "Report", json_file: Path | None, plot_file: Path | None) -> None:
    console = Console()
    console.print(result)
    if json_file is not None:
        result.to_json(json_file)
    if plot_file is not None:
        result.plot().savefig(plot_file)
    for path in (json_file, plot_file):
        if path is not None:
            _wrote(path)


def _page(lens: "Lens", result: "Report", tokenizer: Any, path: Path | None) -> None:
    if path is not None:
        from polylens.calibration.tokens import token_names
        from polylens.cli.page import html_page

        html_page(lens, result, path, names=token_names(tokenizer))
        _wrote(path)


def _wrote(path: Path) -> None:
    Console().print(f"wrote {escape(str(path))}", soft_wrap=True, highlight=False)
