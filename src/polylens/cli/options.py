"""The options that several commands share, in groups: what is fitted, and what is measured."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from polylens.errors import InvalidInputError

ModelName = Annotated[
    str,
    typer.Argument(help='Hub name, local directory, .gguf file, or "demo", the embedded model.'),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16.")]
Tokens = Annotated[int, typer.Option(help="Calibrate on so many, from the start of the text.")]
Heldout = Annotated[int, typer.Option(help="Measure on so many of what follows.")]
SeqLen = Annotated[int, typer.Option(help="Positions per sequence.")]
LayerNumber = Annotated[int, typer.Option(help="Which layer's MLP; -1 is the last.")]
Direction = Annotated[str, typer.Option(help="A token, whose logit is the output direction.")]
Against = Annotated[
    str | None, typer.Option(help="Against another token's; the mean of all by default.")
]


DEGREE = 3
# What says how to fit; some commands read some of it with a loaded lens, too.
FITTING = ("text", "degree", "stream", "estimator", "sampled_tokens", "layers", "checkpoint")


@dataclass(frozen=True)
class OneLayer:
    """The lens that a command is about: fitted, or with `--lens` loaded.

    Fields are the options of the command line, with their help.
    """

    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate on; sampled from the model by default."),
    ] = None
    lens: Annotated[
        str | None,
        typer.Option(help="A lens that `fit` saved, or hf://user/name; nothing is fitted."),
    ] = None
    degree: Annotated[
        int | None, typer.Option(help="Highest degree that is fitted.", show_default=str(DEGREE))
    ] = None
    stream: Annotated[
        str | None,
        typer.Option(
            help='"true" (default): fitted to what the model itself computes. "sequential": layer '
            "by layer to what the replaced layers below produce, to replace all at once.",
        ),
    ] = None
    estimator: Annotated[
        str | None,
        typer.Option(
            help='"samples" (default): least squares over the inputs, neuron by neuron. "joint": '
            'over all neurons\' features. "gaussian": in closed form, to study layers.',
        ),
    ] = None
    calibration_tokens: Tokens = 4096
    sampled_tokens: Annotated[
        int | None, typer.Option(min=0, help="Calibrate on so many that the model writes, too.")
    ] = None
    seq_len: SeqLen = 128
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8
    device: Device = "cpu"
    dtype: Dtype = "float32"
    calibration: Annotated[str | None, typer.Option("--calibration", hidden=True)] = None

    # What a command about a single layer has no options for.
    layers = None
    checkpoint = None

    def check_loaded(self, read: Collection[str]) -> None:
        """Refuse what says how to fit where the lens is loaded.

        Args:
            read: the options that mean something of a loaded lens, too.

        Raises:
            InvalidInputError: an option that would be passed over.
        """
        given = {name: getattr(self, name) for name in FITTING if name not in read}
        for name, value in given.items():
            if self.lens is not None and value is not None:
                raise InvalidInputError(
                    f"--{name.replace('_', '-')} {value} says how to fit, and the polynomials of "
                    f"--lens {self.lens} are fitted: leave one of the two away"
                )


@dataclass(frozen=True)
class Source(OneLayer):
    """The lens that a command is about, of several layers."""

    layers: Annotated[str | None, typer.Option(help="Such as 0-5,10; all by default.")] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="With --stream sequential: keeps layers as they are done, and resumes."),
    ] = None


@dataclass(frozen=True)
class Measures:
    """What is measured of a lens on held-out text."""

    heldout_text: Annotated[
        Path | None, typer.Option(help="UTF-8 text of another source, to measure on instead.")
    ] = None
    heldout_tokens: Heldout = 4096
    no_loss: Annotated[bool, typer.Option("--no-loss", help="R2 only: much faster.")] = False
    prefixes: Annotated[
        bool, typer.Option("--prefixes", help="Loss of the first 2, 3, ... layers replaced, too.")
    ] = False
    zero_ablation: Annotated[
        bool, typer.Option("--zero-ablation", help="Loss with nothing in place of each MLP, too.")
    ] = False
    worst: Annotated[int, typer.Option(min=0, help="Tokens listed that lose most.")] = 10

    def check(self) -> None:
        """InvalidInputError for options that exclude each other."""
        for name in ("prefixes", "zero_ablation"):
            if self.no_loss and getattr(self, name):
                option = name.replace("_", "-")
                raise InvalidInputError(f"--{option} measures losses and --no-loss leaves them out")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a parameter that is a group of options stand for the options in it."""
    own = get_type_hints(command, include_extras=True)
    taken: dict[str, list[str]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = own[parameter.name]
        if not (is_dataclass(kind) and isinstance(kind, type)):
            parameters.append(parameter.replace(annotation=kind))
            continue
        hints = get_type_hints(kind, include_extras=True)
        taken[parameter.name] = [each.name for each in fields(kind)]
        parameters += [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=each.default,
                annotation=hints[each.name],
            )
            for each in fields(kind)
        ]
    required = [p for p in parameters if p.default is p.empty]
    ordered = [*required, *(p for p in parameters if p.default is not p.empty)]
    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered]

    @wraps(command)
    def called(**values: Any) -> None:
        for name, members in taken.items():
            values[name] = own[name](**{each: values.pop(each) for each in members})
        command(**values)

    called.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in ordered}
    del called.__wrapped__
    return called
