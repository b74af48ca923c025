"""Text that the model itself writes."""

import pytest
import torch

import polylens
from polylens import InvalidInputError, UnsupportedModel, sampling
from polylens.hosts.base import first_tokens
from tests.hf_models import build


def test_every_other_sequence_begins_with_bos_the_others_with_any_token():
    torch.manual_seed(0)
    start = first_tokens(2001, 7, 50)
    assert start.shape == (2001, 1)
    assert (start[::2] == 7).all()
    assert set(start[1::2].flatten().tolist()) == set(range(50))
    assert len(set(first_tokens(2001, None, 50)[::2].flatten().tolist())) == 50


def test_batches_differ_and_are_those_of_the_seed(monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 4)
    model, state = build("llama"), torch.get_rng_state()
    text = polylens.sample_tokens(model, 10, 6, progress=False)
    assert text.shape == (10, 6)
    assert torch.equal(text, polylens.sample_tokens(model, 10, 6, progress=False))
    assert torch.equal(text[:4], polylens.sample_tokens(model, 4, 6, progress=False))
    assert not torch.equal(text[:4, 1:], text[4:8, 1:])
    assert not torch.equal(text, polylens.sample_tokens(model, 10, 6, seed=3, progress=False))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_sampled_follows_the_model():
    """Counts of the second token after bos against the model's probabilities."""
    model = build("gpt2").double()
    with torch.no_grad():
        model.lm_head.weight *= 30
        text = polylens.sample_tokens(model, 4000, 2, progress=False)[::2]
        assert (text[:, 0] == model.config.bos_token_id).all()
        p = model(text[:1, :1]).logits[0, 0].softmax(-1)
    eos = model.config.eos_token_id  # never drawn before the end of the text
    p[eos] = 0
    p /= p.sum()
    share = torch.bincount(text[:, 1], minlength=len(p)) / len(text)
    assert p.max() > 0.05
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(text)).sqrt() + 1e-9).all()


@pytest.mark.parametrize("options", [{"sequences": 0}, {"length": 1}, {"sequences": 2.5}])
def test_refused(options):
    with pytest.raises(InvalidInputError, match="must be an integer >="):
        polylens.sample_tokens(build("gpt2"), progress=False, **options)


def test_models_that_cannot_write():
    with pytest.raises(UnsupportedModel, match="give tokens="):
        polylens.sample_tokens(build("bert"), progress=False)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    with pytest.raises(UnsupportedModel, match="no token ids"):
        polylens.sample_tokens(layers, example_inputs=torch.randn(2, 4), progress=False)
