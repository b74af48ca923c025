"""Polynomials with the true errors: the true model where nothing is changed."""

import pytest
import torch

import polylens
from polylens import InvalidInputError
from tests.hf_models import build
from tests.hosts.test_hosts_agree import bridge, nnsight

TOKENS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [lambda model: model, bridge, nnsight])
def test_true_on_the_inputs_and_moved_by_the_polynomials(make):
    model = build("llama")
    with polylens.attach(make(model), TOKENS, degree=2, progress=False) as lens, torch.no_grad():
        logits = lens.host.logits
        true = logits(TOKENS)
        with lens.replaced_around(TOKENS, layers=1):
            torch.testing.assert_close(logits(TOKENS), true, rtol=1e-4, atol=1e-4)
            moved = []
            step = 0.3 * torch.randn(24)
            path = lens.sites[1].path
            hook = model.model.layers[0].register_forward_hook(lambda m, x, y: y + step)
            with lens.host.observe({1: lambda a: moved.append(a.x)}):
                changed = logits(TOKENS)
            hook.remove()
        seen = []
        with lens.host.observe({1: lambda a: seen.append((a.x, a.y))}):
            logits(TOKENS)
        ((x, y),) = seen
        assert not torch.allclose(changed, true, atol=1e-3), path
        expected = lens[1](moved[0]) - lens[1](x) + y
        hook = model.model.layers[0].register_forward_hook(lambda m, x, y: y + step)
        with lens.host.substitute({1: lambda arrival: expected}):
            torch.testing.assert_close(logits(TOKENS), changed, rtol=1e-4, atol=1e-4)
        hook.remove()
        assert torch.equal(logits(TOKENS), true)


def test_other_inputs_are_refused():
    model = build("gpt2")
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        with lens.replaced_around(TOKENS), pytest.raises(InvalidInputError, match="same inputs"):
            model(TOKENS[:2])
        with torch.no_grad(), lens.replaced():
            model(TOKENS[:2])
