"""A replaced model is a function of its text: what tests/host_contract.py does not ask of hosts."""

import pytest
import torch

import polylens
from polylens.hosts import host_for
from tests.hf_models import build
from tests.host_contract import (
    TOKENS,
    HostContract,
    assert_checkpoints,
    assert_close,
    attach,
    inputs_of,
    logits,
)
from tests.models import HOSTS

TEXT = TOKENS[:1]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("estimator", ["joint", "gaussian"])
def test_with_other_estimators(estimator):
    test = HostContract()
    model = build("llama")
    with attach(model, degree=2, method=polylens.TrueStream(estimator=estimator)) as lens:
        test.test_a_replaced_or_exported_model_is_a_function_of_its_text((model, lens))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_generation_with_and_without_a_cache(name):
    model = build(name)
    with attach(model) as lens, lens.replaced():
        for beams in (1, 3):
            cached = model.generate(TEXT, num_beams=beams, **GREEDY)
            plain = model.generate(TEXT, num_beams=beams, use_cache=False, **GREEDY)
            assert torch.equal(cached, plain)


def test_other_ways_of_greedy_decoding():
    model, prompt = build("llama"), TEXT[:, :6].repeat(1, 3)
    with attach(model) as lens, lens.replaced():
        greedy = model.generate(prompt, **GREEDY)
        for options in (
            {"prompt_lookup_num_tokens": 4},
            {"assistant_model": model},
            {"cache_implementation": "static"},
        ):
            assert torch.equal(greedy, model.generate(prompt, **options, **GREEDY))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_compute_again_what_they_computed():
    model = build("llama")
    with attach(model) as lens:
        assert_checkpoints(model, lens)


COMPILED = {
    "llama": lambda: build("llama"),
    "t5": lambda: build("t5"),
    "bridge": HOSTS["bridge-llama"],
    "hooked": HOSTS["hooked-gated"],
}


@pytest.mark.more
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    model = COMPILED[name]()
    given = host_for(model).given(inputs_of(model))
    compiled = torch.compile(model, backend="eager")

    @torch.no_grad()
    def out():
        found = compiled(*given.args, **given.kwargs)
        return getattr(found, "logits", found)

    with attach(model) as lens:
        reference = logits(model)
        for options in ({}, {"degree": 1}, {"layers": lens.layers[0]}):
            with lens.replaced(**options):
                expected = logits(model)
                assert not torch.equal(expected, reference)
                assert_close(out(), expected)
        assert_close(out(), reference)
