"""What a layer does at one position of a prompt."""

from typing import Any

import torch

from polylens.analysis import Interactions, interactions, logit_gradient, residual_writers
from polylens.calibration.tokens import ids_of, leading_bos, token_names
from polylens.checks import check_layers, label
from polylens.errors import InvalidInputError
from polylens.lens import Lens


@torch.no_grad()
def interactions_in(
    lens: Lens,
    tokenizer: Any,
    prompt: str,
    layer: int,
    position: int = -1,
    token: int | None = None,
    against: int | None = None,
) -> Interactions:
    """The layer's contribution to a logit at a position, split over pairs of writers.

    Along the gradient of the logit by what the layer writes there, through all that follows; so
    terms are in logits, to first order in the layer's output.

    Args:
        lens: of a TransformerLens model.
        position: of the prompt's tokens, from the end where negative.
        token, against: whose logits; the model's first and second guess there by default.

    Raises:
        InvalidInputError: a prompt of fewer than two tokens, a position beyond it, or what
            `residual_writers` refuses.
    """
    ids = [*leading_bos(tokenizer), *ids_of(tokenizer, prompt)]
    if len(ids) < 2 or not -len(ids) <= position < len(ids) or position % len(ids) == 0:
        raise InvalidInputError(
            f"the prompt has {len(ids)} tokens, of which the second and later ones can be looked "
            f"at; got position {position}"
        )
    position %= len(ids)
    (layer,) = check_layers(layer, lens.layers, lens.refused, " in this lens")  # type: ignore
    read = torch.tensor([ids[: position + 1]], device=lens.host.device)
    logits, cache = lens.host.model.run_with_cache(read)
    order = logits[0, -1].argsort(descending=True).tolist()
    chosen: int = order[0] if token is None else token
    other: int = order[order[0] == chosen] if against is None else against
    (u,) = logit_gradient(lens, read, layer, chosen, other)
    writers, names = residual_writers(lens, cache, layer, position)
    name = token_names(tokenizer)
    title = (
        f"layer {label(layer)}, position {position} ({name(ids[position])}): logit of "
        f"{name(chosen)} over {name(other)}"
    )
    return interactions(lens[layer], writers, u, names, title=title)
