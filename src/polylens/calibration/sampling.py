"""Text to calibrate on, written by the model itself."""

from typing import Any

import torch
from torch import Tensor

from polylens.calibration.telling import progress as told
from polylens.checks import check_at_least
from polylens.errors import UnsupportedModel
from polylens.hosts import host_for
from polylens.hosts.base import Host

# Sequences sampled at a time.
BATCH = 128


def sample_tokens(
    model: Any,
    sequences: int = 256,
    length: int = 128,
    *,
    seed: int = 0,
    example_inputs: Any = None,
    progress: bool = True,
) -> Tensor:
    """[sequences, length] token ids that the model writes at temperature 1.

    They begin with the beginning-of-sequence token, where there is one, which half go on from
    with any token: variety is what counts in calibration text, and no text of one's own has as
    much. To calibrate on both: torch.cat([tokens, polylens.sample_tokens(model)]).

    Args:
        model, example_inputs: as in `attach`.
        sequences, length: their number, and the tokens of each (at most the model's context).
        seed: of the draws; the random state is left as it was.
        progress: show a progress bar.

    Raises:
        InvalidInputError: fewer than one sequence of two tokens.
        UnsupportedModel: a model that cannot generate text.

    Cost: length forward passes over one position of all sequences, in batches of 128.
    """
    return sampled(host_for(model, example_inputs), sequences, length, seed, progress)


def sampled(host: Host, sequences: int, length: int, seed: int, progress: bool) -> Tensor:
    """`sample_tokens` of a model whose host is known."""
    check_at_least("sequences", sequences, 1)
    check_at_least("length", length, 2)
    if not host.reads_tokens:
        raise UnsupportedModel("a model that reads no token ids cannot write text")
    sizes = [min(BATCH, sequences - i) for i in range(0, sequences, BATCH)]
    with told(title="sampling text", show=progress, total=sequences) as bar:
        batches: list[Tensor] = []
        for i, size in enumerate(sizes):
            batches.append(host.sample_tokens(size, length, seed + i))
            bar.update(size)
    return torch.cat(batches)
