"""All batches pass through a model in step: each waits at every MLP for the others."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from polylens.calibration.offload import Offloaded, Resident, Store
from polylens.checks import Layer
from polylens.errors import UnsupportedModel
from polylens.hosts.base import Arrival, Function, Host
from polylens.hosts.batch import Batch

Arrivals = Iterator[tuple[int, Arrival]]


@torch.no_grad()
def in_step(
    host: Host,
    layers: Sequence[Layer],
    steps: Sequence[Batch],
    visit: Callable[[Layer, Arrivals], Function],
    store: Store | None = None,
) -> None:
    """One forward pass over all batches, MLP by MLP: no batch is ahead of the others.

    At each MLP `visit(layer, arrivals)` reads (index of the batch, Arrival) of every batch as it
    arrives, and returns the function of an Arrival whose value flows on in all of them. Every
    batch is a coroutine, suspended inside its own forward pass, so that nothing need be known
    about the model's blocks.

    Cost: one forward pass and one call of the flow for each batch. Memory: what a suspended
    pass holds, about four activations [batch, pos, d_model] for each batch; with a store only
    that of the batch that is going on, at one write and one read of it for each MLP.

    Args:
        host: the model.
        layers: of the MLPs that are visited; the passes end behind the last one.
        steps: the batches.
        visit: must exhaust arrivals, and keep none.
        store: where what a waiting pass holds is kept; None leaves it in memory.

    Raises:
        UnsupportedModel: the batches do not all meet at the same MLPs.
        OSError: the store is full.
    """
    column = _Column(host, steps, store)
    try:
        with host.substitute({layer: partial(column.wait, layer) for layer in layers}):
            for _ in layers:
                layer = column.advance(0)
                column.flow = visit(layer, column.arrivals(layer))
    finally:
        column.disband()


class _Column:
    """Forward passes that march in step.

    Attributes:
        flow: what the MLP at which all wait returns when they go on.
    """

    flow: Function

    def __init__(self, host: Host, steps: Sequence[Batch], store: Store | None) -> None:
        self._main = getcurrent()
        self._steps = steps
        self._passes = [greenlet(host.run) for _ in steps]
        self._held: list[Arrival | None] = [None] * len(steps)
        self._memory = Resident()
        if store is not None and len(steps) > 1:
            self._memory = Offloaded(store, host.module, len(steps))

    def wait(self, layer: Layer, arrival: Arrival) -> Tensor:
        """Called inside a forward pass at an MLP; returns what flows on, when it may go on."""
        return self._main.switch(layer, arrival)

    def advance(self, i: int) -> Layer:
        """Batch i goes on to its next MLP, which is returned."""
        self._memory.fill(i)
        with self._memory.running(i):
            place = self._passes[i].switch(*self._given(i))
        if self._passes[i].dead:
            raise UnsupportedModel(
                "a forward pass ended before it had passed through every attached MLP: layers "
                "that run for some inputs only cannot be calibrated one after the other; use "
                "method=TrueStream()"
            )
        layer, self._held[i] = place
        return layer

    def _given(self, i: int) -> tuple[Any, ...]:
        """What batch i starts with, or goes on with."""
        held, self._held[i] = self._held[i], None
        return (self._steps[i],) if held is None else (self.flow(held),)

    def _arrived(self, i: int) -> Arrival:
        """With what batch i waits."""
        held = self._held[i]
        assert held is not None
        return held

    def arrivals(self, layer: Layer) -> Arrivals:
        for i in range(len(self._passes)):
            place = self.advance(i) if i else layer
            if place != layer:
                raise UnsupportedModel(
                    f"batch {i} reaches layer {place} when batch 0 reaches layer {layer}: the "
                    "order of the layers depends on the input; use method=TrueStream()"
                )
            yield i, self._arrived(i)
            self._memory.empty(i)

    def disband(self) -> None:
        self._held = []
        for i, each in enumerate(self._passes):
            if each:
                with self._memory.running(i):
                    each.throw(GreenletExit)
        self._memory.close()
