"""The example scripts run as they stand."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_attach_demo_prints_a_report():
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "attach_demo.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "4 layers as polynomials" in result.stdout
    assert "all MLPs quadratic" in result.stdout
