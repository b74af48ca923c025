"""The example scripts run as they stand."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST_LINES = {
    "hooked_transformer": "detached:",
    "transformer_bridge": "quadratic form towards 'e'",
    "nnsight_model": "layer 1 a cubic:",
    "huggingface": "cubic layers:",
}


@pytest.mark.parametrize("name", LAST_LINES)
def test_each_host_has_a_short_example_that_prints_a_report(name, capsys):
    if name == "hooked_transformer" and not importlib.util.find_spec(
        "transformer_lens.HookedTransformer"
    ):
        pytest.skip("this TransformerLens has no HookedTransformer")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    with torch.set_grad_enabled(True):  # a script may turn gradients off for good
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert any("4 layers as polynomials" in line for line in lines)
    assert LAST_LINES[name] in lines[-1]
