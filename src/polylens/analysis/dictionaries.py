"""Features of sparse autoencoders and transcoders as writers of what a layer reads."""

from typing import Any

import torch
from torch import Tensor

from polylens.checks import real_numbers
from polylens.errors import InvalidInputError

# Of what decode returns, in float32.
ROUNDING = 1e-4


@torch.no_grad()
def sae_writers(sae: Any, x: Tensor, name: str = "SAE") -> tuple[Tensor, tuple[str, ...]]:
    """(writers [n, d_in], names) whose sum is x: active features, the bias, and what is left.

    x = sum_i a_i d_i + bias + error, with a = sae.encode(x). Of any dictionary whose `encode` and
    `decode` are so, such as an SAE or a transcoder of SAELens; nothing is imported. A feature is
    named by its number, "SAE 1234".

    Args:
        sae: with `encode` [n, d_in] -> [n, d_sae] and `decode`, affine, [n, d_sae] -> [n, d_in].
        x: [d_in], one activation at the place of the SAE, such as `cache[hook][0, position]`.
        name: in front of the numbers.

    Raises:
        InvalidInputError: an SAE of another width, one that does not decode activations into a sum,
            or no SAE.

    Cost: decodes one activation for each active feature.
    """
    encode: Any = getattr(sae, "encode", None)
    decode: Any = getattr(sae, "decode", None)
    if not callable(encode) or not callable(decode):
        raise InvalidInputError(
            f"sae must have encode and decode, such as one of SAELens, got {type(sae).__name__}"
        )
    x = real_numbers("x", x)
    width = getattr(getattr(sae, "W_enc", None), "shape", (len(x) if x.dim() else 0,))[0]
    if x.dim() != 1 or len(x) != width:
        raise InvalidInputError(
            f"this SAE reads vectors ({width},), got {tuple(x.shape)}; one activation at its place"
        )
    decoder = getattr(sae, "W_dec", None)
    like = decoder if isinstance(decoder, Tensor) else x
    acts: Any = encode(x.to(like)[None])
    if not isinstance(acts, Tensor) or acts.dim() != 2 or len(acts) != 1:
        raise InvalidInputError(
            f"encode must return activations [n, d_sae], got {getattr(acts, 'shape', acts)!r}"
        )
    active = acts[0].nonzero()[:, 0]
    single = torch.zeros(len(active) + 1, acts.shape[1]).to(acts)
    single[torch.arange(len(active)), active] = acts[0, active]
    decoded: Any = decode(single)
    of_all: Any = decode(acts)
    whole = of_all[0].double()
    if decoded.shape[-1:] != x.shape:
        raise InvalidInputError(
            f"it writes vectors ({decoded.shape[-1]},) and reads ({len(x)},): a transcoder's "
            "features are not in the space that it reads; give rows of its decoder as directions"
        )
    bias = decoded[-1].double()
    features = decoded[:-1].double() - bias
    summed = features.sum(0) + bias
    if float((summed - whole).norm()) > ROUNDING * float(whole.norm() + features.norm()):
        raise InvalidInputError(
            "decode does not return a sum of features and a bias, so that they are no writers"
        )
    error = x.to(summed) - summed
    names = (*(f"{name} {i}" for i in active.tolist()), f"{name} bias", f"{name} error")
    return torch.cat([features, bias[None], error[None]]), names


def hook_of(sae: Any) -> str:
    """The name of the hook point that an SAE of SAELens was trained at."""
    cfg = getattr(sae, "cfg", None)
    for place in (getattr(cfg, "metadata", None), cfg):
        if isinstance(name := getattr(place, "hook_name", None), str):
            return name
    raise InvalidInputError(
        f"{type(sae).__name__} does not say at which hook point it was trained "
        "(cfg.metadata.hook_name); sae_writers(sae, activation) needs none"
    )
