"""The embedded trained model."""

from importlib.resources import files

import pytest
import torch

import polylens
from polylens import demo


def test_it_is_small_and_trained():
    figures = demo.training_figures()
    assert (files(demo) / "model.safetensors").stat().st_size <= 4_000_000
    assert figures["held_out_nats_per_byte"] < 1.7
    # other Python versions word some topics differently
    windows = demo.batches(demo.texts()[1], 64, 256)
    with torch.no_grad():
        loss = float(demo.load_model()(windows, labels=windows).loss)
    assert loss == pytest.approx(figures["held_out_nats_per_byte"], abs=0.1)


def test_held_out_text_is_not_training_text():
    training, held_out = demo.texts()
    paragraphs = [p for p in held_out.split("\n\n") if len(p) > 200]
    assert len(paragraphs) > 20
    assert not any(p in training for p in paragraphs)


def test_bridge_computes_the_same():
    tokens = demo.batches(demo.texts()[1], 2, 32)
    with torch.no_grad():
        assert torch.allclose(
            demo.load_bridge()(tokens), demo.load_model()(tokens).logits, atol=1e-3
        )


def test_encode_decode_and_too_short_a_text():
    assert demo.decode(demo.encode("naïve – text")) == "naïve – text"
    with pytest.raises(polylens.InvalidInputError, match="8 bytes"):
        demo.batches("8 bytes!", 2, 256)
