"""A small trained language model inside the package, so that everything runs offline.

A byte-level GPT-2 (4 layers, d_model 128, d_mlp 512, erf-GELU, 256 positions) trained by
`scripts/train_demo.py` on the English prose of Python's own language reference and standard
library docstrings. `training.json` beside the weights holds the figures of the run.
"""

import ast
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.devices import usable_device
from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

HOLD_OUT_EVERY = 10
WITH_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


def load_model(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "GPT2LMHeadModel":
    """The trained model in eval mode, as Hugging Face's GPT2LMHeadModel; `tokenizer` is its."""
    from safetensors.torch import load
    from transformers import GPT2Config, GPT2LMHeadModel

    device = None if device is None else usable_device(device)
    folder = files(__name__)
    config = GPT2Config(**json.loads((folder / "config.json").read_text()))
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    state = load((folder / "model.safetensors").read_bytes())
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise InvalidInputError(f"damaged demo model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.tokenizer = ByteTokenizer()  # type: ignore
    return model.to(device=device, dtype=dtype).eval()  # type: ignore


def load_bridge(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """The trained model as a TransformerLens TransformerBridge (3.9 or later).

    Its `tokenizer` is a ByteTokenizer; `encode(text)[None]` are tokens to run it on.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = load_model(device, dtype)
    bridge = build_bridge_from_module(
        model, "GPT2LMHeadModel", hf_config=model.config, tokenizer=None
    )
    bridge.cfg.model_name = "polylens-demo"
    bridge.tokenizer = ByteTokenizer()
    return bridge


def training_figures() -> dict[str, Any]:
    """What `scripts/train_demo.py` recorded: versions, hashes of the text, losses, time."""
    return json.loads((files(__name__) / "training.json").read_text())


@cache
def texts() -> tuple[str, str]:
    """(training text, held-out text), from any CPython.

    Every tenth topic of the language reference in `pydoc_data.topics`, by sorted name, is held
    out; the other topics and the docstrings of the standard library are for training. Topics
    quote each other, so paragraphs that training has too are dropped from what is held out.
    The first call reads the sources of the standard library, about a second.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    training = [topics[name] for i, name in enumerate(names) if i % HOLD_OUT_EVERY]
    known = "\n\n".join([*training, *_docstrings()])
    paragraphs = [p for name in names[::HOLD_OUT_EVERY] for p in topics[name].split("\n\n")]
    return known, "\n\n".join(p for p in paragraphs if p not in known)


def _docstrings() -> list[str]:
    """Docstrings over 200 characters of the standard library's top-level modules, each once."""
    found: dict[str, None] = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        statements: list[ast.AST] = [tree]
        for node in statements:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    found[text] = None
            children = ast.iter_child_nodes(node)
            statements += (n for n in children if isinstance(n, WITH_STATEMENTS))
    return list(found)


def encode(text: str) -> Tensor:
    """UTF-8 bytes of the text as token ids, int64 [n_bytes]."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def decode(tokens: Tensor) -> str:
    """The text of token ids [n_bytes]; bytes that are not UTF-8 are shown as replacements."""
    return bytes(tokens.reshape(-1).tolist()).decode(errors="replace")


class ByteTokenizer:
    """What TransformerLens and polylens ask of a Hugging Face tokenizer; tokens are bytes.

    Called with a text it gives `input_ids`; with several it pads them, on the right, with an
    `attention_mask`.
    """

    bos_token = eos_token = pad_token = None
    bos_token_id = eos_token_id = pad_token_id = None
    padding_side = "right"

    def __call__(
        self, text: str | list[str], return_tensors: str | None = None, **_: Any
    ) -> dict[str, Any]:
        if isinstance(text, str) and return_tensors is None:
            return {"input_ids": self.encode(text)}
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        longest = max(map(len, rows), default=0)
        found = {
            "input_ids": [row + [0] * (longest - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        }
        return found if return_tensors is None else {k: torch.tensor(v) for k, v in found.items()}

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int] | Tensor | int, *_: Any, **__: Any) -> str:
        return bytes(torch.as_tensor(ids).reshape(-1).tolist()).decode(errors="backslashreplace")

    def batch_decode(self, rows: Any, *_: Any, **__: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def batches(text: str, n_seq: int, seq_len: int) -> Tensor:
    """Consecutive windows of the text, int64 [n_seq, seq_len].

    Raises:
        InvalidInputError: the text has fewer than n_seq * seq_len bytes.
    """
    tokens = encode(text)
    if len(tokens) < n_seq * seq_len:
        raise InvalidInputError(
            f"the text has {len(tokens)} bytes, {n_seq} windows of {seq_len} need "
            f"{n_seq * seq_len}; ask for fewer or shorter windows"
        )
    return tokens[: n_seq * seq_len].reshape(n_seq, seq_len)
