"""Text that the model itself writes."""

import pytest
import torch
from tests.hf_models import build

import polylens
from polylens import InvalidInputError, UnsupportedModel
from polylens.calibration import sampling
from polylens.hosts.base import openings

CPU = torch.device("cpu")


def test_half_of_the_sequences_go_on_from_bos_with_any_token():
    torch.manual_seed(0)
    alone, followed = openings(2001, 7, 50, CPU)
    assert alone.shape == (1001, 1)
    assert followed.shape == (1000, 2)
    assert (torch.cat([alone[:, 0], followed[:, 0]]) == 7).all()
    assert set(followed[:, 1].tolist()) == set(range(50))
    (drawn,) = openings(2001, None, 50, CPU)
    assert drawn.shape == (2001, 1)
    assert set(drawn.flatten().tolist()) == set(range(50))


@pytest.mark.parametrize("sequences", [1, 2, 5])
@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_few_and_short_sequences(name, sequences, length):
    text = polylens.sample_tokens(build(name), sequences, length, progress=False)
    assert text.shape == (sequences, length)


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
        model.lm_head.weight *= 4
        text = polylens.sample_tokens(model, 4096, 2, progress=False)
        assert (text[:, 0] == model.config.bos_token_id).all()
        text = torch.cat([block[:64] for block in text.split(128)])  # the others go on with any
        p = model(text[:1, :1]).logits[0, 0].softmax(-1)
    eos = model.config.eos_token_id  # never drawn before the end of the text
    p[eos] = 0
    p /= p.sum()
    share = torch.bincount(text[:, 1], minlength=len(p)) / len(text)
    often = p * len(text) > 20
    assert 5 < often.sum() < len(p) - 5
    share, p = (torch.cat([x[often], x[~often].sum()[None]]) for x in (share, p))
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(text)).sqrt()).all()


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
