"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from polylens.cli.opening import (
    keeping,
    open_model,
    quiet_libraries,
    read_text,
    windows_of,
)
from polylens.cli.options import (
    FITTING,
    Against,
    Device,
    Direction,
    Dtype,
    Heldout,
    LayerNumber,
    Measures,
    ModelName,
    OneLayer,
    SeqLen,
    Source,
    Tokens,
    spread,
)
from polylens.cli.outputs import Output, WithLens, WithPlot, check_writable
from polylens.errors import InvalidInputError, PolylensError

app = typer.Typer(
    name="polylens",
    help="The MLPs of transformers as polynomials, in closed form.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"polylens {version('polylens')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="And nothing else.")
    ] = False,
) -> None:
    """The MLPs of transformers as polynomials, in closed form."""


@app.command()
@spread
def fit(
    model: ModelName,
    save: Annotated[Path, typer.Option("--save", help="The lens, for --lens and polylens.load.")],
    source: Source,
    out: Output,
) -> None:
    """Fit polynomials to every MLP of a language model and save them."""
    with _one_line_errors():
        out.check()
        check_writable(save)
        opened = open_model(model, source, out)
        lens = opened.lens
        if opened.rank:
            return
        lens.save(save, moments=True)  # for features
        out.show(lens)
        out.figures(json.dumps(lens.header(), indent=1, ensure_ascii=False))
        out.wrote(save)


@app.command()
@spread
def report(model: ModelName, source: Source, measures: Measures, out: WithLens) -> None:
    """Fit polynomials to every MLP of a language model and show how good they are."""
    with _one_line_errors():
        _report(model, source, measures, out)


@app.command()
@spread
def demo(source: Source, measures: Measures, out: WithLens) -> None:
    """The report on a small language model that comes with polylens; needs no network."""
    with _one_line_errors():
        _report("demo", source, measures, out)


def _report(model: str, source: Source, measures: Measures, out: WithLens) -> None:
    out.check()
    measures.check()
    of_loaded = ("text", "degree", "layers")
    opened = open_model(model, source, out, measures, of_loaded=of_loaded)
    lens, tokenizer = opened.lens, opened.tokenizer
    if out.save is not None and not opened.rank:
        lens.save(out.save, moments=True)  # so that an interrupted report costs no fit
    assert opened.heldout is not None
    result = lens.report(
        opened.own(opened.heldout),
        degree=source.degree,
        layers=source.layers,
        decode=tokenizer.decode,
        loss=not measures.no_loss,
        prefixes=measures.prefixes,
        zero_ablation=measures.zero_ablation,
        worst=measures.worst,
        batch_size=source.batch_size,
        progress=out.progress,
        ranks=opened.ranks,
    )
    if opened.rank:
        return
    out.show(result)
    out.figures(result.to_json())
    out.figure(result.plot)
    if out.save is not None:
        lens.save(out.save, result, moments=True)
        out.wrote(out.save)
    if out.html is not None:
        from polylens.calibration.tokens import token_names
        from polylens.cli.page import html_page

        text = {"tokens": opened.heldout, "decode": tokenizer.decode}
        options = {"names": token_names(tokenizer), **text}
        out.write(out.html, lambda path: html_page(lens, result, path, **options))


@app.command()
@spread
def features(
    model: ModelName,
    layer: LayerNumber,
    direction: Direction,
    source: OneLayer,
    out: Output,
    against: Against = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many features.")] = 8,
) -> None:
    """The quadratic features of one layer along a token's logit, with the tokens they read."""
    with _one_line_errors():
        out.check()
        opened = open_model(
            model, source, out, layer=layer, estimator="gaussian", of_loaded=("text",)
        )
        from polylens.analysis import layer_features

        token = opened.token(direction)
        other = None if against is None else opened.token(against)
        decode = opened.tokenizer.decode
        found = layer_features(
            opened.lens, layer, token, opened.tokens, against=other, k=k, decode=decode
        )
        out.show(found, f"fitted to {opened.lens.inputs_summary}")
        out.figures(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))


@app.command()
@spread
def interactions(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="The text that is looked at.")],
    layer: LayerNumber,
    source: OneLayer,
    out: WithPlot,
    direction: Annotated[
        str | None, typer.Option(help="A token; by default the model's first guess there.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another token; by default the model's next guess.")
    ] = None,
    position: Annotated[int, typer.Option(help="Of the prompt's tokens; -1 is the last.")] = -1,
    k: Annotated[int, typer.Option("-k", min=1, help="How many terms.")] = 12,
) -> None:
    """What one layer adds to a token's logit at one position, split over pairs of writers."""
    with _one_line_errors():
        out.check()
        opened = open_model(model, source, out, layer=layer)
        from polylens.cli.prompts import interactions_in

        token = None if direction is None else opened.token(direction)
        other = None if against is None else opened.token(against)
        found = interactions_in(
            opened.lens, opened.tokenizer, prompt, layer, position, token, other
        )
        out.show(found.table(k))
        out.figures(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        out.figure(lambda: found.plot(k))


@app.command()
@spread
def compare(
    model: ModelName,
    other: Annotated[str, typer.Argument(help="Another model of the same shape, or the same.")],
    source: Source,
    out: Output,
    other_lens: Annotated[
        str | None, typer.Option(help="The other's lens; nothing is fitted for it.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many features of each layer.")] = 8,
) -> None:
    """How far the polynomials of two models are apart, and which features appear, turn, vanish."""
    with _one_line_errors():
        out.check()
        from polylens.analysis import compare

        both = source.lens is not None and other_lens is not None
        of_loaded = ("degree", "layers") if both else FITTING
        first = open_model(model, source, out, of_loaded=of_loaded)
        second = replace(source, lens=other_lens, checkpoint=None)
        second = open_model(other, second, out, of_loaded=of_loaded)
        degree = source.degree if both else None  # else the fitted one has it
        found = compare(first.lens, second.lens, layers=source.layers, degree=degree, k=k)
        out.show(found)
        out.figures(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))


@app.command()
@spread
def trace(
    model: Annotated[
        str, typer.Argument(help="Directory of checkpoints (checkpoint-500, ...), or hub name.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text to calibrate and measure on.")],
    out: WithPlot,
    steps: Annotated[
        str | None, typer.Option(help="Such as 0,1,2,512; all of a directory by default.")
    ] = None,
    revisions: Annotated[str, typer.Option(help="Of a hub name, {} for the step.")] = "step{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub name or directory; by default the model's.")
    ] = None,
    degree: Annotated[int, typer.Option(help="Highest degree.")] = 3,
    rows: Annotated[
        Path | None,
        typer.Option("--out", help="JSON lines, appended as it goes; resumes from them."),
    ] = None,
    calibration_tokens: Tokens = 4096,
    heldout_tokens: Heldout = 4096,
    seq_len: SeqLen = 128,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """R2 by degree over the checkpoints of a training run, loaded one at a time."""
    with _one_line_errors():
        out.check()
        if rows is not None:
            check_writable(rows)
        content, wanted = read_text(text), parse_steps(steps)
        counts = (
            windows_of("calibration", calibration_tokens, seq_len),
            windows_of("heldout", heldout_tokens, seq_len),
        )
        from polylens.cli.loading import checkpoints, token_windows, tokenizer_beside
        from polylens.fitting.estimator import require_degree
        from polylens.training.tracer import TraceData, TraceWarning, trace_training

        require_degree(degree)
        sources = checkpoints(model, wanted, revisions, device, dtype)
        quiet_libraries()
        found = tokenizer_beside(tokenizer or model)
        data = token_windows(found, content, *counts, seq_len)
        with warnings.catch_warnings(), keeping(rows, "what was measured is in"):
            warnings.simplefilter("ignore", TraceWarning)  # shown in the table
            result = trace_training(
                sources, TraceData(*data), degree, path=rows, progress=out.progress
            )
        out.show(result)
        if not result.steps:
            raise InvalidInputError("no checkpoint could be measured; the table says why")
        out.figures(json.dumps(result.to_dict(), indent=1))
        out.figure(result.plot)
        if rows is not None:
            out.wrote(rows)


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
    if not sys.stderr.isatty():  # bars of libraries too, which read this when they are imported
        os.environ.setdefault("TQDM_DISABLE", "1")
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
