"""A replaced model is a function of its text: what tests/host_contract.py does not ask of hosts."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

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

    try:
        out()
    except Exception as error:  # of the model alone, by no fault of a lens
        pytest.skip(f"torch {torch.__version__} does not compile it: {type(error).__name__}")
    with attach(model) as lens:
        reference = logits(model)
        for options in ({}, {"degree": 1}, {"layers": lens.layers[0]}):
            with lens.replaced(**options):
                expected = logits(model)
                assert not torch.equal(expected, reference)
                assert_close(out(), expected)
        assert_close(out(), reference)


def living():
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def every_kind_of_pass(model, lens):
    logits(model)
    lens.run_with_cache(TOKENS)
    with lens.replaced():
        logits(model, TOKENS[:1, :3])
        model(TOKENS, use_cache=False).logits.sum().backward()
        model.zero_grad()
        lens.run_with_cache(TOKENS, names="error")
    with lens.replaced(degree=1, layers=0), ThreadPoolExecutor(1) as pool:
        pool.submit(logits, model).result()


def test_passes_leave_no_memory_behind():
    model = build("llama")
    with attach(model) as lens:
        every_kind_of_pass(model, lens)
        before = living()
        for _ in range(5):
            every_kind_of_pass(model, lens)
        assert living() < before + 5  # one a pass would be five
    gone = weakref.ref(model)
    del model, lens
    gc.collect()
    assert gone() is None
