"""The model, the text and the lens that a command is about."""

import gc
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from polylens.checks import layers_in
from polylens.cli.options import DEGREE, Measures, OneLayer
from polylens.cli.outputs import Output, check_writable
from polylens.devices import usable_device
from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from polylens.lens import Lens
    from polylens.ranks import Ranks

HUB = "hf://"
DEMO = "demo"


@dataclass
class Opened:
    """A model, and its lens as soon as it is asked for.

    Attributes:
        tokenizer: of the model.
        tokens: [n, seq_len] of the text to calibrate on, None without one.
        heldout: [n, seq_len] to measure on; of commands without measures None.
        attached: fits the lens, or loads it.
        ranks: those that torchrun started, of which rank 0 prints and saves; None of one process.
    """

    tokenizer: Any
    tokens: "Tensor | None"
    heldout: "Tensor | None"
    attached: "Callable[[], Lens]"
    ranks: "Ranks | None" = None

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    def own(self, tokens: "Tensor") -> "Tensor":
        """The share of this rank."""
        return tokens if self.ranks is None else tokens.tensor_split(self.ranks.size)[self.rank]

    @cached_property
    def lens(self) -> "Lens":
        return self.attached()

    def token(self, text: str) -> int:
        """The id of a text that is one token; InvalidInputError for another."""
        from polylens.analysis import single_token

        return single_token(text, partial(self.tokenizer.encode, add_special_tokens=False))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would look again and again at all that was just loaded."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def open_model(
    model: str,
    source: OneLayer,
    out: Output,
    measures: Measures | None = None,
    *,
    layer: int | None = None,
    estimator: str | None = None,
    of_loaded: Collection[str] = (),
) -> Opened:
    """The model and the lens of a command. What can be checked is, before the model loads.

    Of one text the first `calibration_tokens` are for the fit and what follows is held out, also
    where the lens is loaded: it may have been fitted to them.

    Args:
        layer: the only one that is fitted; `source.layers` otherwise.
        estimator: where the command line names none.
        of_loaded: options of a fit that mean something of a loaded lens, too.

    Raises:
        PolylensError, OSError: options, texts, models and lenses that cannot be used.
    """
    layers = source.layers if layer is None else layer
    if isinstance(layers, str) and layers != "all":
        layers_in(layers)
    source.check_loaded(of_loaded)
    method = method_of(source, estimator)
    content, other = _texts(model, source, measures)
    calibration = windows_of("calibration", source.calibration_tokens, source.seq_len)
    heldout = 0
    if measures is not None:
        heldout = windows_of("heldout", measures.heldout_tokens, source.seq_len)
    more = (
        windows_of("sampled", source.sampled_tokens, source.seq_len) if source.sampled_tokens else 0
    )
    _check_lens(source.lens)
    import torch

    from polylens.attachment import attach, load
    from polylens.calibration.sampling import sample_tokens
    from polylens.cli.loading import load_model, parse_dtype, token_windows
    from polylens.fitting.estimator import require_degree
    from polylens.ranks import Ranks

    degree = DEGREE if source.degree is None else source.degree
    require_degree(degree)
    parse_dtype(source.dtype)
    usable_device(source.device)
    quiet_libraries()
    ranks = Ranks.of_launcher()
    device = source.device
    if ranks is not None and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}"
    bridge, tokenizer = load_model(model, device, source.dtype)
    tokens = held = None
    if content is not None:
        tokens, held = token_windows(
            tokenizer, content, calibration, heldout, source.seq_len, other
        )
    elif other is not None:
        held = token_windows(tokenizer, other, 0, heldout, source.seq_len)[1]

    def attached() -> "Lens":
        if source.lens is not None:
            return load(source.lens, bridge)
        seen, progress = tokens, out.progress and not opened.rank
        if more:
            written = sample_tokens(bridge, more, source.seq_len, progress=progress).cpu()
            seen = written if seen is None else torch.cat([seen, written])
        seen = None if seen is None else opened.own(seen)
        with keeping(source.checkpoint, "the layers that were done are in"):
            return attach(
                bridge,
                seen,
                degree=degree,
                method=method,
                layers=layers,
                batch_size=source.batch_size,
                ranks=ranks,
                progress=progress,
            )

    opened = Opened(tokenizer, tokens, held, attached, ranks)
    return opened


def method_of(source: OneLayer, estimator: str | None = None) -> Any:
    """What `attach` takes for a stream, an estimator and a checkpoint.

    Raises:
        InvalidInputError: neither "true" nor "sequential", another estimator, a checkpoint of
            what is not done layer by layer, or an option's old name.
    """
    if source.calibration is not None:
        raise InvalidInputError(
            f"--calibration is called --stream now: --stream {source.calibration}"
        )
    from polylens.calibration.sequential import Sequential
    from polylens.calibration.true_stream import TrueStream

    methods = {"true": TrueStream, "sequential": Sequential}
    stream = source.stream or "true"
    if stream not in methods:
        raise InvalidInputError(f"--stream {stream!r} is unknown; there are {', '.join(methods)}")
    chosen = source.estimator or estimator
    options: dict[str, Any] = {} if chosen is None else {"estimator": chosen}
    if source.checkpoint is not None:
        if stream != "sequential":
            raise InvalidInputError(
                "--checkpoint keeps layers as they are done, one after the other: give --stream "
                "sequential with it; the true stream is one pass, and --save keeps its lens"
            )
        if not source.checkpoint.exists():
            check_writable(source.checkpoint)
        options["checkpoint"] = source.checkpoint
    return methods[stream](**options)


def windows_of(name: str, tokens: int, seq_len: int) -> int:
    """How many windows so many tokens are.

    Raises:
        InvalidInputError: fewer than one.
    """
    if seq_len < 3 or tokens < seq_len:
        raise InvalidInputError(
            f"--{name}-tokens {tokens} must be at least one sequence of --seq-len {seq_len}, "
            "which must be 3 or more"
        )
    return tokens // seq_len


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InvalidInputError: it is none, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from error


def quiet_libraries() -> None:
    """No log lines and bars of transformers between our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def keeping(path: Path | None, what: str) -> Iterator[None]:
    """After Ctrl-C, say where what is finished was kept."""
    try:
        yield
    except KeyboardInterrupt:
        if path is not None:
            Console(stderr=True).print(
                f"interrupted; {what} {escape(str(path))}, and the same command goes on from there",
                soft_wrap=True,
                highlight=False,
            )
        raise


def _texts(
    model: str, source: OneLayer, measures: Measures | None
) -> tuple[str | None, str | None]:
    """(to calibrate on, to measure on instead of what follows)."""
    content = None if source.text is None else read_text(source.text)
    other = None
    if measures is not None and measures.heldout_text is not None:
        other = read_text(measures.heldout_text)
    if model == DEMO and content is None:
        from polylens import demo

        training, heldout = demo.texts()
        return training, heldout if other is None else other
    if measures is not None and content is None and (other is None or source.lens is None):
        raise InvalidInputError(
            "give a text to fit to and to measure on: --text FILE; with --lens, --heldout-text "
            "FILE is enough"
        )
    return content, other


def _check_lens(address: str | None) -> None:
    """InvalidInputError for a lens that is no file, before the model loads."""
    if address is not None and not address.startswith(HUB) and not Path(address).is_file():
        raise InvalidInputError(
            f"--lens {address}: no such file; `polylens fit MODEL --save FILE` makes one, and "
            f"{HUB}user/name is one on the Hub"
        )
