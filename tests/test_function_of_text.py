"""A replaced model is a function of its text: however the text reaches it, the same logits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import polylens
from polylens.hosts import host_for
from tests.hf_models import D_VOCAB, build
from tests.models import BRIDGES

TEXT = torch.randint(3, D_VOCAB, (1, 12), generator=torch.Generator().manual_seed(5))
TOKENS = torch.randint(3, D_VOCAB, (32, 24), generator=torch.Generator().manual_seed(3))
# Of float32, over logits of size 1 to 10.
ROUNDING = 2e-4
NAMES = ("llama", "gpt2", "gemma2", "phi3")


def ways(model):
    """Logits [12, d_vocab] of TEXT by every way in which it is read."""
    pad, n = torch.zeros(1, 5, dtype=torch.long), TEXT.shape[1]
    mask = torch.cat([pad, torch.ones_like(TEXT)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"attention_mask": mask, "position_ids": positions}
    yield "left", model(torch.cat([pad, TEXT], 1), **padded).logits[0, 5:]
    mask = mask.flip(1)
    yield "right", model(torch.cat([TEXT, pad], 1), attention_mask=mask).logits[0, :n]
    yield "batch", model(torch.cat([TEXT.flip(1), TEXT])).logits[1]
    for sizes in ([5, 7], [1] * n, [11, 1]):
        found, cache = [], None
        for part in TEXT.split(sizes, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            found.append(out.logits[0])
            cache = out.past_key_values
        yield f"in {len(sizes)} parts", torch.cat(found)


def packed(model):
    """Logits of TEXT as the second of two sequences in one."""
    n = TEXT.shape[1]
    both = torch.cat([TEXT.flip(1), TEXT], 1)
    mask = torch.full((2 * n, 2 * n), torch.finfo(torch.float32).min).triu(1)
    mask[n:, :n] = torch.finfo(torch.float32).min
    positions = torch.arange(n).repeat(2)[None]
    return model(both, attention_mask=mask[None, None], position_ids=positions).logits[0, n:]


def assert_function_of_text(model, is_packable=True):
    with torch.no_grad():
        expected = model(TEXT, use_cache=False).logits[0]
        for name, found in ways(model):
            assert (found - expected).abs().max() < ROUNDING, name
        if is_packable:
            assert (packed(model) - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["samples", "joint", "gaussian"])
def test_replaced_and_exported(name, estimator):
    model = build(name)
    is_packable = name in ("llama", "gpt2")  # others do not take a mask of four axes
    assert_function_of_text(model, is_packable)
    method = polylens.TrueStream(estimator=estimator)
    with polylens.attach(model, TOKENS, degree=2, method=method, progress=False) as lens:
        with torch.no_grad():
            true = model(TEXT).logits
        with lens.replaced():
            assert_function_of_text(model, is_packable)
            with torch.no_grad():
                assert (model(TEXT).logits - true).abs().max() > 1e-3
        if estimator != "joint":
            assert_function_of_text(lens.export(), is_packable)


def test_generation_with_and_without_a_cache():
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_decoder_layers": 2}
    config = transformers.T5Config(
        vocab_size=D_VOCAB, num_heads=4, decoder_start_token_id=0, pad_token_id=0, **sizes
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    options = {"max_new_tokens": 8, "do_sample": False}
    given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with polylens.attach(model, given, progress=False) as lens, lens.replaced():
        cached = model.generate(TEXT, **options)
        assert torch.equal(cached, model.generate(TEXT, use_cache=False, **options))


def test_lookup_decoding_is_greedy_decoding():
    model, prompt = build("llama"), TEXT[:, :6].repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with polylens.attach(model, TOKENS, progress=False) as lens, lens.replaced():
        greedy = model.generate(prompt, **options)
        assert torch.equal(greedy, model.generate(prompt, prompt_lookup_num_tokens=4, **options))


@pytest.mark.parametrize("make", [lambda: build("llama"), BRIDGES["llama"]], ids=["hf", "bridge"])
def test_in_several_threads(make):
    model = make()
    texts = [torch.randint(3, D_VOCAB, (2, 24)) for _ in range(4)]

    def logits(text):
        with torch.no_grad():
            return host_for(model).logits(text)

    with polylens.attach(model, TOKENS, progress=False) as lens, lens.replaced():
        expected = [logits(text) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(logits, texts * 25))
    for one, other in zip(found, expected * 25, strict=True):
        assert (one - other).abs().max() < ROUNDING


def gradient(model):
    (found,) = (model.get_input_embeddings().weight.grad.clone(),)
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_compute_again_what_they_computed(reentrant):
    model = build("llama")
    options = {"labels": TEXT, "use_cache": False}
    with polylens.attach(model, TOKENS, progress=False) as lens:
        model(TEXT, **options).loss.backward()
        true = gradient(model)
        with lens.replaced():
            model(TEXT, **options).loss.backward()
        replaced = gradient(model)
        assert (replaced - true).norm() > 1e-3 * true.norm()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        first = model(TEXT, **options).loss
        with lens.replaced():
            second = model(TEXT, **options).loss
        with lens.replaced(degree=1):
            second.backward()
            torch.testing.assert_close(gradient(model), replaced)
            first.backward()
        torch.testing.assert_close(gradient(model), true)
        with lens.replaced(), torch.no_grad():
            model(TEXT, **options)
