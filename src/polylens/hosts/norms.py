"""Which normalisation a module computes, found from what it read and returned."""

from math import inf, log

import torch
from torch import Tensor, nn

from polylens.errors import UnsupportedModel
from polylens.hosts.base import MLPSite, Norm
from polylens.hosts.offloaded import parameter

Call = tuple[nn.Module, Tensor, Tensor]


def norm_read(site: MLPSite, calls: list[Call], x: Tensor) -> Norm:
    """The Norm among the calls (module, input, output) whose output is the site's input x.

    Raises:
        UnsupportedModel: none of them is.
    """
    found = norm_giving(calls, x)
    if found is not None:
        return found[1]
    raise UnsupportedModel(
        f"layer {site.layer} ({site.path}) does not read the output of a LayerNorm or RMSNorm, "
        "so inputs='norm' says nothing about it; give tokens="
    )


def norm_giving(calls: list[Call], x: Tensor) -> tuple[Call, Norm] | None:
    """The last call (module, input, output) whose output is x, and its Norm."""
    x = _rows(x)
    for module, before, after in reversed(calls):
        after = _rows(after)
        if after.shape == x.shape and torch.allclose(after, x, atol=1e-5):
            norm = matching_norm(module, before, after)
            if norm is not None:
                return (module, before, after), norm
    return None


def norm_behind(calls: list[Call], y: Tensor) -> Norm | None:
    """The Norm among the calls (module, input, output) that read y; None if none did."""
    for module, before, after in calls:
        if before.shape == y.shape and torch.equal(before, y):
            return matching_norm(module, before, after)
    return None


def matching_norm(module: nn.Module, before: Tensor, after: Tensor) -> Norm | None:
    """LayerNorm or RMSNorm with the module's weight w, or 1 + w, or none, and its bias.

    From what the module read and returned; None where it is neither.
    """
    before, after = _rows(before), _rows(after)
    original = getattr(module, "original_component", None) or module
    named = original.named_parameters(recurse=False)
    found = {name: parameter(original, name) for name, _ in named}
    weight, bias = found.get("weight", found.get("w")), found.get("bias", found.get("b"))
    scales = [None] if weight is None else [None, weight, 1 + weight]
    best, chosen = inf, None
    for centred in (True, False):
        plain = before - before.mean(-1, keepdim=True) if centred else before
        rms = plain.square().mean(-1).sqrt()
        largest = int(rms.argmax())
        for w in scales:
            b = None if w is None and weight is not None else bias
            shape = plain if w is None else plain * w.double()
            target = after if b is None else after - b.double()
            # Each row's size is fitted, since eps shrinks rows that are small ...
            size = (target * shape).sum(-1) / shape.square().sum(-1)
            if not (size > 0).all():
                continue
            if (size[:, None] * shape - target).norm() > 1e-2 * target.norm():
                continue
            # ... but not the largest, whose size tells w from a multiple of it.
            off = abs(log(float(size[largest] * rms[largest])))
            if off < best:
                best, chosen = off, Norm(centred, w, b)
    return chosen


def _rows(t: Tensor) -> Tensor:
    return t.detach().double().reshape(-1, t.shape[-1])
