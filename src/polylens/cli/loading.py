"""Models and token windows for the command line: from the hub, a directory or a GGUF file."""

import re
import socket
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from polylens.calibration.tokens import ids_of, leading_bos, windows
from polylens.devices import usable_device
from polylens.errors import InvalidInputError, UnsupportedModel

DEMO = "demo"
DTYPES = ("float32", "float64", "bfloat16", "float16")

# For a connection to the Hub.
SECONDS = 5

_STEP = re.compile(r"(?<![0-9])([0-9]+)$")
# Of which a directory with a tokenizer has at least one.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_NAME = re.compile(r"(?![.-])[\w.-]+(/(?![.-])[\w.-]+)?")


def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    *,
    with_tokenizer: bool = True,
) -> tuple[Any, Any]:
    """A TransformerBridge around the model, and its tokenizer.

    Args:
        source: a hub name (org/model), a directory with config.json, or a .gguf file; "demo" is
            the embedded model.
        device: "cpu", "cuda", "cuda:1", "mps", ...
        dtype: one of DTYPES; a quantised GGUF is dequantised to it.
        revision: of a hub name: a branch, tag or commit, such as "step1000".
        with_tokenizer: False gives None for it, and does not look for one.

    Raises:
        InvalidInputError: no such file, directory, model, device or dtype.
        UnsupportedModel: a model that transformers or TransformerLens cannot build.
    """
    torch_dtype, torch_device = parse_dtype(dtype), usable_device(device)
    if source == DEMO and not Path(source).exists():
        from polylens import demo

        return demo.load_bridge(torch_device, torch_dtype), demo.ByteTokenizer()
    location, options = _locate(source)
    if revision is not None:
        options = {**options, "revision": revision}
    tokenizer = None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if with_tokenizer and not options and Path(location).is_dir():
        tokenizer = load_tokenizer(location)
    try:
        if tokenizer is None and with_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype=torch_dtype, attn_implementation="eager", **options
        )
    except OSError as error:
        raise InvalidInputError(f"{source} could not be loaded: {_first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UnsupportedModel(
            f"{source} is no causal language model that transformers can build: "
            f"{_first_line(error)}"
        ) from error
    return _bridge(model.to(torch_device).eval(), tokenizer, Path(source).stem, source), tokenizer


def checkpoints(
    source: str,
    steps: Iterable[int] | None = None,
    revisions: str = "step{}",
    device: str = "cpu",
    dtype: str = "float32",
) -> list[tuple[int, Callable[[], Any]]]:
    """(step, function that loads the model) for `trace_training`; nothing is loaded here.

    Args:
        source: a directory with subdirectories whose names end in the step, such as those that
            a Hugging Face Trainer writes (checkpoint-500), or a hub name.
        steps: which; all of a directory by default, and needed for a hub name.
        revisions: of a hub name, with {} for the step.

    Raises:
        InvalidInputError: neither, no checkpoint, a step that is not there, a pattern without {}.
    """
    folder = Path(source).expanduser()
    wanted = None if steps is None else sorted(set(steps))
    if folder.is_dir():
        there = {int(m[1]): str(p) for p in folder.iterdir() if (m := _STEP.search(p.name))}
        missing = [step for step in wanted or () if step not in there]
        if not there or missing:
            what = f"steps {missing}" if missing else "a directory named by its step"
            raise InvalidInputError(
                f"{source} has no {what}; there are {sorted(there) or 'none'}, and names end in "
                "the step, such as checkpoint-500"
            )
        chosen = sorted(there) if wanted is None else wanted
        return [(s, partial(_model_only, there[s], device, dtype)) for s in chosen]
    if not _HUB_NAME.fullmatch(source):
        raise InvalidInputError(f"{source}: no such directory, and not a hub name either")
    if not wanted or revisions.count("{}") != 1:
        raise InvalidInputError(
            f"{source} is a hub name, which needs steps, and revisions with one {{}} for the step; "
            f"got steps {wanted or 'none'} and {revisions!r}"
        )
    return [
        (step, partial(_model_only, source, device, dtype, revisions.format(step)))
        for step in wanted
    ]


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a hub name or directory.

    Raises:
        InvalidInputError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InvalidInputError(
            f"{source} has no tokenizer: none of {', '.join(_TOKENIZERS)} is in it; copy it there "
            "from the model that this one was trained from"
        )
    try:
        location, options = _locate(source) if not folder.is_dir() else (source, {})
        return AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(
            f"the tokenizer of {source} could not be loaded: {_first_line(error)}"
        ) from error


def tokenizer_beside(source: str) -> Any:
    """That of a training run: in its directory, or in the last checkpoint that has one.

    Raises:
        InvalidInputError: as `load_tokenizer`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        steps = sorted(p for p in folder.iterdir() if p.is_dir() and _STEP.search(p.name))
        for path in (folder, *reversed(steps)):
            if any((path / name).is_file() for name in _TOKENIZERS):
                return load_tokenizer(str(path))
    return load_tokenizer(source)


def token_windows(
    tokenizer: Any,
    text: str,
    calibration: int,
    heldout: int,
    seq_len: int,
    heldout_text: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two sets of windows without a token in common, of one text or of two.

    The first `calibration` windows of the text come first; the `heldout` ones follow, or are
    the first of `heldout_text`. Every window starts with the tokenizer's BOS token if it puts
    one in front of texts.

    Args:
        calibration, heldout: number of windows.
        seq_len: positions of each, BOS included.

    Returns:
        int64 [calibration, seq_len] and [heldout, seq_len].

    Raises:
        InvalidInputError: a text is too short (how many tokens it has and how many it needs).
    """
    if min(calibration, heldout) < 0 or seq_len < 3:
        raise InvalidInputError(
            "windows have 3 positions or more; got "
            f"{calibration} and {heldout} windows of {seq_len}"
        )
    if heldout_text is None:
        use = f"{calibration} calibration and {heldout} held-out"
        found = _first_windows(tokenizer, text, calibration + heldout, seq_len, use)
        return found[:calibration], found[calibration:]
    return (
        _first_windows(tokenizer, text, calibration, seq_len, f"{calibration} calibration"),
        _first_windows(tokenizer, heldout_text, heldout, seq_len, f"{heldout} held-out"),
    )


def _first_windows(tokenizer: Any, text: str, n: int, seq_len: int, use: str) -> Tensor:
    fresh = seq_len - len(leading_bos(tokenizer))
    ids = ids_of(tokenizer, text)
    if len(ids) < n * fresh:
        raise InvalidInputError(
            f"the text has {len(ids):,} tokens and {n * fresh:,} are needed ({use} windows of "
            f"{fresh}); give a longer text or ask for fewer"
        )
    return windows(tokenizer, ids[: n * fresh], seq_len)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name; InvalidInputError lists the possible ones."""
    if name not in DTYPES:
        raise InvalidInputError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return getattr(torch, name)


def _model_only(source: str, device: str, dtype: str, revision: str | None = None) -> Any:
    return load_model(source, device, dtype, revision, with_tokenizer=False)[0]


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for this source."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInputError(
                f"{source} is no model directory: there is no config.json in it"
            )
        return str(path), {}
    if path.is_file():
        _require_gguf(path, source)
        return str(path.parent), {"gguf_file": path.name}
    if path.suffix == ".gguf" or not _HUB_NAME.fullmatch(source):
        raise InvalidInputError(f"{source}: no such file or directory, and not a hub name either")
    return source, {"local_files_only": True} if _no_hub() else {}


def _no_hub() -> bool:
    """Whether the Hub is out of reach; the client itself would try for a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return False
    address = urlsplit(ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return True
    return False


def _require_gguf(path: Path, source: str) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InvalidInputError(
            f"{source} is not a model: give a hub name, a directory with config.json, or a GGUF "
            f"file (this file starts with {magic!r})"
        )
    if find_spec("gguf") is None:
        raise InvalidInputError("reading GGUF needs the gguf package: pip install gguf")


def _bridge(model: Any, tokenizer: Any, name: str, source: str) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(model).__name__
    try:
        return build_bridge_from_module(
            model, architecture, hf_config=model.config, tokenizer=tokenizer, model_name=name
        )
    except Exception as error:  # whatever an adapter trips over
        raise UnsupportedModel(
            f"{source}: TransformerLens has no bridge for {architecture}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
