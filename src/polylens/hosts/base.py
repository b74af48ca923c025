"""What a host must offer, so that everything above it knows no framework."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.checks import Layer
from polylens.errors import UnsupportedModel
from polylens.normal_forms.weights import GLUWeights, MLPWeights

Weights = MLPWeights | GLUWeights
# Of a recomputed output, relative to its largest entry.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max |value - expected| / max |expected|, in float64."""
    expected = expected.double()
    difference = (value.double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


@dataclass(frozen=True)
class MLPSite:
    """One MLP or GLU of a model, verified to be a normal form.

    Attributes:
        layer: index of the block, or an Expert of it.
        path: dotted path of the MLP component in the host.
        kind: "mlp" or "glu".
        activation: what the host's activation was found to compute.
        d_in, d_mlp, d_out: sizes.
        error: max |normal form - host's output| / max |host's output| on captured inputs.
        tensors: the host's current parameters by role, as they are; cheap.
        weights: the validated normal form over them, without copying a matrix.
    """

    layer: Layer
    path: str
    kind: str
    activation: Activation
    d_in: int
    d_mlp: int
    d_out: int
    error: float
    tensors: Callable[[], dict[str, Tensor]] = field(repr=False)
    weights: Callable[[], Weights] = field(repr=False)


@dataclass(frozen=True)
class Places:
    """Where the inputs of an expert are.

    Attributes:
        rows: [n] indices among the batch * pos inputs of the layer.
        first: [n] of bool, True at position 0 of a sequence that has more positions.
    """

    rows: Tensor
    first: Tensor


@dataclass(frozen=True)
class Arrival:
    """What arrives at an MLP in a forward pass.

    Attributes:
        x: [batch, pos, d_in] its input; of an expert [n, d_in], what was routed to it.
        y: [batch, pos, d_out] (of an expert [n, d_out]) what the true MLP makes of it, before
            an expert's output is weighted.
        places: where an expert's inputs are in the batch; None for all others.
    """

    x: Tensor
    y: Tensor
    places: Places | None = None


Observer = Callable[[Arrival], object]
Function = Callable[[Arrival], Tensor]


@dataclass(frozen=True)
class Norm:
    """The normalisation in front of an MLP, for the data-free input model.

    Attributes:
        centred: True for LayerNorm (the mean is removed), False for RMSNorm.
        weight, bias: [d_model], or None when absent or folded into the MLP.
    """

    centred: bool
    weight: Tensor | None
    bias: Tensor | None


class Tap(Protocol):
    """The hook points of one site: `hook_poly_<name>` on the MLP component."""

    def wants(self, name: str) -> bool:
        """Whether somebody listens at the point (a forward or a backward hook)."""
        ...

    def listening(self) -> bool:
        """Whether somebody listens at any point, or may ask for what the true layer computes."""
        ...

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Pass value through the point; what comes back may have been edited by a hook."""
        ...


class Emitter(Protocol):
    """What is installed at a site: given what arrives there, says what flows on."""

    point_names: tuple[str, ...]
    replacing: int | None  # None while the true output flows on

    def __call__(self, arrival: Arrival, tap: Tap) -> Tensor: ...

    def neurons(self, y: Tensor, *others: Tensor) -> Tensor | None:
        """While replacing: what the out-projection reads instead of its h = act(y) [* z].

        Called with (y, h), for a GLU with (y, z, h), all [..., d_mlp]. None if only the call
        on x and the true output will do.
        """
        ...


class Host(Protocol):
    """One model in one framework. x is [..., d_in], y is [..., d_out] throughout."""

    name: str
    model: Any
    module: Any  # the torch module itself, where `model` wraps one

    @property
    def device(self) -> torch.device: ...

    @property
    def reads_tokens(self) -> bool:
        """Whether what the model is run on are token ids; else floats. Known after `sites`."""
        ...

    def sites(self) -> tuple[list[MLPSite], dict[Layer, str]]:
        """Verified sites by layer, and for each refused layer the reason.

        Runs one tiny forward pass. The model's training flag, hooks and RNG are as before.
        """
        ...

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, pos] token ids -> [batch, pos, d_vocab]; else floats [batch, ...]."""
        ...

    def run(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        """A forward pass for the sake of its observers; skips the unembedding where it can."""
        ...

    def sample_tokens(self, n_seq: int, seq_len: int, seed: int) -> Tensor:
        """[n_seq, seq_len] token ids sampled from the model at temperature 1."""
        ...

    def observe(self, observers: Mapping[Layer, Observer]) -> AbstractContextManager[None]:
        """Within the context, observers[layer](arrival) sees the MLP's true input and output."""
        ...

    def substitute(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        """Within the context the output of layer's MLP is functions[layer](arrival)."""
        ...

    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        """Add the emitter's hook points and route the MLP's output through it.

        Returns the undo, which restores the same objects, hook names and state_dict exactly.
        Nothing stays installed if this raises.
        """
        ...

    def norm(self, site: MLPSite) -> Norm:
        """The normalisation whose output the MLP reads; UnsupportedModel if there is none."""
        ...


def openings(n: int, bos: Any, d_vocab: int, device: torch.device) -> list[Tensor]:
    """How n sampled sequences begin, by length: any token [n, 1].

    Where there is a `bos`, half begin with it alone, the others with it and any token. Behind it
    alone a chat model writes nothing but chats; without it some models write nothing sensible.
    """
    drawn = torch.randint(d_vocab, (n, 1)).to(device)  # the same on every device
    if not isinstance(bos, int):
        return [drawn]
    both = torch.cat([torch.full_like(drawn, bos), drawn], dim=1)
    return [both[: n - n // 2, :1], both[n - n // 2 :]]


def written(starts: Iterable[Tensor], seq_len: int, go_on: Callable[..., Any], name: str) -> Tensor:
    """[n, seq_len] of sequences that begin so; go_on(start, n_new) appends n_new > 0 tokens.

    Raises:
        UnsupportedModel: `go_on` fails.
    """
    try:
        left = ((start, seq_len - start.shape[1]) for start in starts if len(start))
        return torch.cat([go_on(start, n) if n else start for start, n in left])
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        raise UnsupportedModel(
            f"{name} could not generate text to calibrate on ({error}); give tokens="
        ) from error
