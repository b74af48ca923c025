"""Passes of polylens' own leave no trace: training flags, generators, the default dtype."""

import pytest
import torch
from tests.hf_models import build
from tests.models import hooked
from torch import nn

import polylens
from polylens.hosts.quiet import quiet


def test_training_flags_and_generators_come_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.ReLU())
    model[1].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    inside = []

    def fail():
        inside.extend(m.training for m in model.modules())
        inside.extend([torch.is_grad_enabled(), torch.initial_seed() != 1])
        torch.randn(3)
        raise KeyError

    with pytest.raises(KeyError), quiet(model, seed=1):
        fail()
    assert len(inside) == 6
    assert not any(inside)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [lambda: build("llama"), hooked])
def test_sampling_touches_no_generator_of_a_device_that_the_model_is_not_on(make, monkeypatch):
    seeded, model = [], make()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    polylens.sample_tokens(model, 2, 4, progress=False)
    assert seeded == []


def test_mlps_are_found_whatever_the_default_dtype():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 600), nn.Linear(600, 8)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    llama, functional, x = build("llama"), Functional(), torch.randn(20, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert len(polylens.find_mlps(llama)) == 2
        assert len(polylens.find_mlps(functional, example_inputs=x)) == 1
    finally:
        torch.set_default_dtype(torch.float32)
