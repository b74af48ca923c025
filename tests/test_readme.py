"""The README's ten lines run as they stand; notebooks are what their scripts say."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

import polylens

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.py"))


def test_the_ten_lines_run_as_they_stand():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert sum(bool(line.strip()) and "import" not in line for line in code.splitlines()) <= 12
    names, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, names)
    assert "R²" in shown.getvalue()
    assert "along the logit of 'e'" in shown.getvalue()
    assert re.search("value .* share .* one end .* other end", shown.getvalue())
    assert names["error"].shape == (*names["held_out"].shape, names["model"].cfg.d_model)
    assert not torch.equal(names["quadratic_logits"], names["logits"])
    assert names["u"].norm() > 0
    assert polylens.attached(names["model"]) is None


def test_the_site_has_them_too():
    page = (PROJECT / "docs" / "start.md").read_text(encoding="utf-8")
    assert '\n\n--8<-- "README.md:ten-lines"\n\n' in page  # in a fence it would be formatted


def test_it_is_short():
    assert len(README.split()) <= 900


def cells(script):
    """(kind, source) of each cell of a script in the percent format."""
    for part in script.split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            yield "markdown", re.sub("^# ?", "", body, flags=re.MULTILINE).strip()
        else:
            yield "code", re.sub("^# !", "!", body, flags=re.MULTILINE).strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script_and_what_they_show(path):
    made = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in made]
    assert found == list(cells(path.read_text(encoding="utf-8")))
    sources = "\n".join(source for _, source in found)
    assert f"polylens/polylens/blob/main/notebooks/{path.stem}.ipynb)" in sources
    assert sources.count("\n!") == 2  # the two lines that install
    shown = [output for cell in made for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert all(output["output_type"] != "error" for output in shown)
