"""The example scripts run as they stand."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST_LINES = {
    "hooked_transformer": "detached:",
    "transformer_bridge": "quadratic form towards 'e'",
    "nnsight_model": "layer 1 a cubic:",
    "huggingface": "cubic layers:",
}


@pytest.mark.parametrize("name", LAST_LINES)
def test_each_host_has_a_short_example_that_prints_a_report(name):
    if name == "hooked_transformer" and not importlib.util.find_spec(
        "transformer_lens.HookedTransformer"
    ):
        pytest.skip("this TransformerLens has no HookedTransformer")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "4 layers as polynomials" in result.stdout
    assert LAST_LINES[name] in result.stdout.splitlines()[-1]
