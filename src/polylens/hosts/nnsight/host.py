"""nnsight models (0.8 or newer): the polynomial as a traceable child of each MLP."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from torch import nn

from polylens.errors import AttachmentError, UnsupportedModel
from polylens.hosts.base import Emitter, MLPSite
from polylens.hosts.moe import ExpertSite
from polylens.hosts.nnsight.inline import InlinePolynomial
from polylens.hosts.passage import Emitting, PolyPoint, Taps
from polylens.hosts.torch.dataflow import Block
from polylens.hosts.torch.host import TorchHost
from polylens.polynomials.evaluation import PerNeuron
from polylens.polynomials.factored import Polynomial

_CHILD = "poly"


class NNsightHost(TorchHost):
    """`nnsight.NNsight` and its subclasses.

    Each site's component `mlp` gets a child `mlp.poly`, to be read in a trace after the true
    output (which stays `mlp.output`; where the component adds a residual or a normalisation,
    and where there is no component, that of the out-projection):

        with model.trace(tokens):
            true = mlp.output.save()
            by_degree = mlp.poly.degree_2.output.save()
            polynomial = mlp.poly.output.save()
            error = mlp.poly.error.output.save()

    `mlp.poly.x.output` is the polynomial's input; requests follow the order x, degree_0 ...,
    poly, error. Writing to `mlp.poly.output` while replaced changes what flows on. The points of
    an expert, whose parameters are in no module of its own, are read with `lens.run_with_cache`.

    Args:
        model: the root of an nnsight model; dispatched here if its weights are not loaded yet.
        example_inputs: as for TorchHost.

    Raises:
        UnsupportedModel: not a root, or older than nnsight 0.8.
    """

    def __init__(self, model: Any, example_inputs: Any = None) -> None:
        if not hasattr(getattr(model, "interleaver", None), "interleaving"):
            raise UnsupportedModel(
                f"{type(model).__name__} is not a model of nnsight >= 0.8; polylens reads "
                "nnsight.NNsight, TransformersModel and what derives from them"
            )
        if getattr(model, "parent", None) is not None:
            raise UnsupportedModel(
                f"{model.path} is a part of an nnsight model; give the model itself, and layers="
            )
        if not getattr(model, "dispatched", True):
            model.dispatch()  # would make a new module tree later, without what was attached
        super().__init__(model._module, example_inputs)
        self.model = model
        self.name = "nnsight"

    @property
    def module(self) -> nn.Module:
        return self.model._module

    def _end(self, block: Block) -> nn.Module:
        return block.exit

    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        if isinstance(site, ExpertSite):
            return super().install(site, emitter)
        block = self._block(site.layer)  # type: ignore[arg-type]
        if hasattr(block.owner, _CHILD):
            raise AttachmentError(
                f"layer {site.layer} ({site.path}) has an attribute {_CHILD!r} of its own, which "
                "is where polylens would put the polynomial"
            )
        owner = next(e for e in self.model.modules() if e._module is block.owner)
        child = TraceablePoint(_CHILD)
        points: dict[str, PolyPoint] = {"out": child}
        for name in emitter.point_names:
            if name != "out":
                label = "x" if name == "in" else name
                points[name] = TraceablePoint(label)
                child.add_module(label, points[name])
        with ExitStack() as undo:
            undo.callback(_detach, owner, block.owner)
            setattr(owner, _CHILD, child)
            taps = _Taps(points, self.model.interleaver, f"{owner.path}.{_CHILD}.")
            undo.callback(self._join(site.layer, Emitting(emitter, taps), False).remove)
            self._points[site.layer] = points
            undo.callback(self._points.pop, site.layer, None)
            return undo.pop_all().close

    def inline(self, polynomial: Polynomial) -> InlinePolynomial:
        """Sent by value, so that polylens need not be installed where it runs."""
        import nnsight

        for part in (InlinePolynomial, PerNeuron):
            nnsight.register(part.__module__)
        return InlinePolynomial(polynomial.weights.tensors(), polynomial.evaluation_tables())


class TraceablePoint(PolyPoint):
    """A point that refuses to be referred to in a request to another machine."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_persistent_id":  # nnsight names the modules that it does not send
            value = _NotRemote()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_persistent_id"}


class _NotRemote:
    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AttachmentError(
            "a lens is attached to this model, and the model on the remote machine has none: "
            "detach() first; f = lens.inline(layer) is a function that travels, as in "
            "mlp.output = f(mlp.input)"
        )


class _Taps(Taps):
    """Taps over points that a trace may ask for too."""

    def __init__(self, points: dict[str, PolyPoint], interleaver: Any, prefix: str) -> None:
        super().__init__(points)
        self.interleaver = interleaver
        self.prefix = prefix

    def __getstate__(self) -> dict:
        # a run in progress cannot be copied; the copy computes all that may be asked for
        return {**self.__dict__, "interleaver": None}

    def wants(self, name: str) -> bool:
        return super().wants(name) or self._traced()

    def listening(self) -> bool:
        # a trace may yet ask for the true output
        return self.interleaver is None or self.interleaver.interleaving or super().listening()

    def _traced(self) -> bool:
        run = self.interleaver
        if run is None:
            return True
        if not run.interleaving:
            return False
        # workers ask in the order of execution: what they want here they wait for by now
        return any(
            place.startswith(self.prefix)
            for places in (run.parked, run.observers)
            for place in places
        )


def _detach(envoy: Any, module: nn.Module) -> None:
    if module._modules.pop(_CHILD, None) is not None:
        envoy._update(module)
