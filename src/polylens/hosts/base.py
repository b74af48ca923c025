"""What a host must offer, so that everything above it knows no framework."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from polylens.activations.activation import Activation
from polylens.checks import Layer, from_the_end
from polylens.errors import AttachmentError, InvalidInputError, UnsupportedModel
from polylens.hosts.batch import TOKENS, Batch, Inputs
from polylens.hosts.offloaded import execution_device
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.factored import Polynomial

Weights = MLPWeights | GLUWeights
# Of a recomputed output, relative to its largest entry.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def without_padding(t: Tensor) -> Tensor:
    """[n, d] of a nested tensor, sequence behind sequence; any other as it is."""
    return torch.cat(t.unbind()) if t.is_nested else t


def like_nested(t: Tensor, nested: Tensor) -> Tensor:
    """[n, d] as a nested tensor of sequences that are as long as these."""
    return torch.nested.as_nested_tensor(list(t.split([len(each) for each in nested.unbind()])))


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
        parameters: by name, the tensors that the weights are read from, as the host has them now,
            before any operation; cheap.
        weights: the validated normal form over them, without copying a matrix.
        dequantised: of quantised weights, the formats that the normal form is dequantised from.
    """

    layer: Layer
    path: str
    kind: str
    activation: Activation
    d_in: int
    d_mlp: int
    d_out: int
    error: float
    parameters: Callable[[], dict[str, Tensor]] = field(repr=False)
    weights: Callable[[], Weights] = field(repr=False)
    dequantised: str = ""


@dataclass(frozen=True)
class Places:
    """Where the inputs of an expert are.

    Attributes:
        rows: [n] indices among the batch * pos inputs of the layer.
    """

    rows: Tensor

    def among(self, n_pos: int) -> Tensor:
        """[n] indices among the batch * pos inputs of the layer, of n_pos for each sequence."""
        return self.rows


@dataclass(frozen=True)
class Unpadded(Places):
    """Where the inputs are of sequences that come without their padding, one behind the other.

    Attributes:
        rows: [batch] how many there are of each.
    """

    def among(self, n_pos: int) -> Tensor:
        return torch.cat([i * n_pos + torch.arange(int(n)) for i, n in enumerate(self.rows)])


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

    def rows(self, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [n, d_in] and y [n, d_out] where it counts; at an expert those among its inputs.

        Args:
            counted: [batch, pos] of bool, see `Batch.counted`; None for all.

        Raises:
            InvalidInputError: what arrives is not one input for each of these positions.
        """
        x, y = (rearrange(t, "... d -> (...) d") for t in (self.x, self.y))
        if counted is None:
            return x, y
        kept = self._kept(counted, len(x))
        return x[kept.to(x.device)], y[kept.to(y.device)]

    def indices(self, counted: Tensor | None, n_pos: int | None) -> Tensor:
        """[n] where `rows` are among the batch * pos inputs of the layer, n_pos a sequence."""
        n = self.x[..., 0].numel()
        here = torch.arange(n)
        if self.places is not None and n_pos is not None:
            here = self.places.among(n_pos)
        return here if counted is None else here[self._kept(counted, n).to(here.device)]

    def _kept(self, counted: Tensor, n: int) -> Tensor:
        """[.] indices of those of n rows that count."""
        if self.places is None:
            if n != counted.numel():
                raise InvalidInputError(
                    f"{n} inputs arrive where the given ones have {counted.numel()} positions "
                    f"({' x '.join(map(str, counted.shape))}), so that nothing says which of them "
                    "are padding or starts of sequences: is something put in front of the tokens "
                    "(a learned prompt), do frames become fewer, or is the layer run on a chunk at "
                    "a time (chunk_size_feed_forward)? Give exclude_first=False and inputs without "
                    "padding to count all"
                )
            flags = counted.reshape(-1)
        else:
            flags = counted.reshape(-1)[self.places.among(counted.shape[1]).to(counted.device)]
        return flags.nonzero().squeeze(1)  # flags as an index would be waited for on a GPU


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

    @property
    def replacing(self) -> int | None:
        """The degree that flows; None while the true output does."""
        ...

    def __call__(self, arrival: Arrival, tap: Tap) -> Tensor: ...

    def takes(self, value: Tensor) -> bool:
        """Whether `neurons` can be computed of preactivations of this dtype, where this one is."""
        ...

    def neurons(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """While replacing: what the out-projection reads instead of its h = act(y) [* z].

        All are [..., d_mlp], z of a GLU.
        """
        ...


class Values(dict[tuple[str, Layer], Tensor]):
    """What flowed through hook points, by (name, layer); -1 is the last layer."""

    def _axes(self) -> tuple[list[str], list[Layer]]:
        """The names and the layers of the keys."""
        return list(dict.fromkeys(n for n, _ in self)), list(dict.fromkeys(n for _, n in self))

    def __repr__(self) -> str:
        names, layers = self._axes()
        return f"Values of {', '.join(names)} of layers {layers}, by (name, layer)"

    def __missing__(self, key: object) -> Tensor:
        names, layers = self._axes()
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], int):
            counted = (key[0], from_the_end(key[1], layers))
            if counted != key and counted in self:
                return self[counted]
        other = "; TransformerLens' own cache has 'poly_' names" if "poly_" in str(key) else ""
        raise KeyError(
            f"{key!r}: keys are (name, layer), with name one of {', '.join(map(str, names))} and "
            f"layer one of {layers}{other}"
        )


class Host(ABC):
    """One model in one framework. x is [..., d_in], y is [..., d_out] throughout.

    What every host does is abstract. What not every framework can do refuses by default, with
    what to do instead, and a host that can overrides it.

    Attributes:
        model: what the user has.
        name: of the framework, as reports show it.
        rounding: how far outputs may be off, of the largest, for what other tokens there are:
            formats that round inputs to 8 bits look at all of a batch. Known after `sites`.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.rounding = 0.0
        self._points: dict[Layer, Mapping[str, nn.Module]] = {}
        # whether a stream is read both ways, by its name and what else is given
        self.both_ways: dict[tuple[str, frozenset[str]], bool] = {}

    @property
    def module(self) -> nn.Module:
        """The torch module that is hooked and called: the model itself, or what it wraps."""
        return self.model

    @property
    def device(self) -> torch.device:
        return execution_device(self.module)

    @property
    def model_name(self) -> str:
        return type(self.module).__name__

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer that came with the model, if one did."""
        return None

    @property
    def d_vocab(self) -> int | None:
        """How many token ids the model knows; None where nothing says so."""
        return None

    @property
    def n_positions(self) -> int | None:
        """The longest sequence that it has positions for; None where nothing limits it."""
        return None

    @property
    @abstractmethod
    def reads_tokens(self) -> bool:
        """Whether what the model is run on are token ids; else floats. Known after `sites`."""

    def stream(self, layer: Layer) -> str:
        """The name of the stream of a Batch whose positions arrive at a layer."""
        return TOKENS

    def given(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Batch:
        """What the model is run on, as it takes it; a Batch is one already.

        Args:
            inputs: token ids [batch, pos] (floats [batch, ...] for a model that reads those), or
                a mapping of everything that a forward pass takes.
            attention_mask: [batch, pos], 0 at padding.

        Raises:
            InvalidInputError: rows that do not go together, names that the model does not take,
                or too little for a forward pass.
        """
        if isinstance(inputs, Batch):
            return inputs
        return self._given(inputs, attention_mask)

    @abstractmethod
    def _given(self, inputs: Inputs, attention_mask: Tensor | None) -> Batch:
        """`given`, of what is no Batch."""

    def offer(self, inputs: Any) -> None:  # noqa: B027
        """What the model is going to be run on, for a host that has to guess what it reads."""

    @abstractmethod
    def sites(self) -> tuple[list[MLPSite], dict[Layer, str]]:
        """Verified sites by layer, and for each refused layer the reason.

        Runs one tiny forward pass. The model's training flag, hooks and RNG are as before.
        """

    @abstractmethod
    def forward(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Any:
        """The logits, or what a model without logits returns.

        Args:
            inputs, attention_mask: as `given` takes them.
        """

    @abstractmethod
    def logits(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, pos, d_vocab] of token ids [batch, pos]; else floats [batch, ...]."""

    @abstractmethod
    def run(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> None:
        """A forward pass for the sake of its observers; skips the unembedding where it can."""

    @abstractmethod
    def observe(self, observers: Mapping[Layer, Observer]) -> AbstractContextManager[None]:
        """Within the context, observers[layer](arrival) sees the MLP's true input and output."""

    @abstractmethod
    def substitute(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        """Within the context the output of layer's MLP is functions[layer](arrival)."""

    @abstractmethod
    def edit(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        """Within the context functions[layer](arrival) flows on, with what flowed in arrival.y.

        In a replaced layer that is its polynomial's output, else the true one.
        """

    @abstractmethod
    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        """Add the emitter's hook points and route the MLP's output through it.

        Returns the undo, which restores the same objects, hook names and state_dict exactly.
        Nothing stays installed if this raises. While it is installed its hook points are in
        `_points`.
        """

    @contextmanager
    def reading(
        self, layers: Iterable[Layer], names: Iterable[str] | None = None
    ) -> Iterator[dict[tuple[str, Layer], Tensor]]:
        """Within the context, values at the hook points are collected as the model runs.

        Args:
            layers: installed ones.
            names: "in", "out", "error", "degree_k"; all by default.

        Yields:
            {(name, layer): [batch, pos, d]}, of the latest pass through each point.

        Raises:
            InvalidInputError: a layer that is not installed, or an unknown name.
        """
        values = Values()
        if callable(names):
            raise InvalidInputError("names are one or several hook points, not a filter of them")
        wanted = [names] if isinstance(names, str) else names if names is None else list(names)
        with ExitStack() as stack:
            for layer in layers:
                if layer not in self._points:
                    raise InvalidInputError(
                        f"no layer {layer!r} is attached; there are {list(self._points)}"
                    )
                points = self._points[layer]
                for name in points if wanted is None else wanted:
                    if name not in points:
                        raise InvalidInputError(
                            f"no hook point {name!r}; there are {', '.join(points)}"
                        )
                    hook = partial(_collect, values, (name, layer))
                    stack.callback(points[name].register_forward_hook(hook).remove)
            yield values

    def norm(self, site: MLPSite) -> Norm:
        """The normalisation whose output the MLP reads; UnsupportedModel if there is none."""
        raise UnsupportedModel(
            f"layer {site.layer} ({site.path}): a {self.name} does not say which normalisation it "
            "reads; give tokens="
        )

    def final_norm(self) -> Norm:
        """The normalisation in front of the unembedding; UnsupportedModel if there is none."""
        raise self._nameless()

    def norms_behind(self, layers: Iterable[Layer], part: str) -> dict[Layer, Norm]:
        """By layer, what the output of "attn" or "mlp" passes on its way to the residual stream.

        Layers where it passes nothing are not in it.
        """
        raise self._nameless()

    @property
    def embedding(self) -> Tensor:
        """W_E [d_vocab, d_model]."""
        raise self._nameless()

    @property
    def unembedding(self) -> Tensor:
        """W_U [d_model, d_vocab]."""
        raise self._nameless()

    def _nameless(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.model_name} ({self.name}) has no embedding and unembedding that polylens "
            "knows; use eigenfeatures with a direction of your own"
        )

    def sample_tokens(self, n_seq: int, seq_len: int, seed: int) -> Tensor:
        """[n_seq, seq_len] token ids sampled from the model at temperature 1."""
        raise UnsupportedModel(f"a {self.name} cannot generate text to calibrate on; give tokens=")

    def inline(self, polynomial: Polynomial) -> nn.Module:
        """The polynomial as a module of its own that travels with a remote trace."""
        raise AttachmentError(
            f"a {self.name} has no remote traces; use lens[layer], or lens.replaced()"
        )

    def copied(self, layers: Iterable[Layer]) -> tuple[nn.Module, Mapping[Layer, Any]]:
        """A copy of the module without a lens, and where in it these layers' activations are."""
        raise self._no_export()

    def example_outputs(self, module: nn.Module) -> list[Tensor]:
        """What a module like the host's returns for some small inputs, floats only."""
        raise self._no_export()

    def _no_export(self) -> AttachmentError:
        return AttachmentError(
            f"a {self.name} cannot be exported; attach to the Hugging Face model that it was made "
            "from (lens.save and polylens.load carry the polynomials over)"
        )


def _collect(
    values: dict[tuple[str, Layer], Tensor],
    key: tuple[str, Layer],
    module: nn.Module,
    args: tuple,
    out: Tensor,
) -> None:
    values[key] = out


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
