"""What several files of the project say is the same in all of them."""

import re
from pathlib import Path

import pytest

from tests.test_architecture import ROOMS

PROJECT = Path(__file__).parent.parent
SOURCE = PROJECT / "src" / "polylens"
SPECIFIER = re.compile(r'^ {4}"([\w-]+)>=([\d.]+)"', re.MULTILINE)


def text(path):
    return (PROJECT / path).read_text(encoding="utf-8")


def pins(path):
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text(path), re.MULTILINE))


def dependencies():
    return dict(SPECIFIER.findall(text("pyproject.toml").partition("[project.urls]")[0]))


@pytest.mark.parametrize("name", sorted(dependencies()))
def test_the_lowest_version_allowed_is_the_one_tested(name):
    lowest, tested = dependencies()[name], pins("constraints-lowest.txt")[name]
    assert f"{tested}.".startswith(f"{lowest}.")
    assert not tested.removeprefix(lowest).strip(".0")


def test_one_version_of_ruff():
    assert f"rev: v{pins('constraints.txt')['ruff']}\n" in text(".pre-commit-config.yaml")
    assert pins("constraints-lowest.txt")["ruff"] == pins("constraints.txt")["ruff"]


def test_one_version_of_polylens():
    (version,) = re.findall(r'^version = "(.*)"', text("pyproject.toml"), re.MULTILINE)
    assert f"\nversion: {version}\n" in text("CITATION.cff")
    assert f"\n## {version} " in text("CHANGELOG.md")


@pytest.mark.parametrize(
    "path", [".ci/run", "CONTRIBUTING.md", "README.md", ".github/workflows/ci.yml"]
)
def test_make_targets_exist(path):
    targets = re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE)
    called = re.findall(r"\bmake ([a-z]+)(?=$|[` ])", text(path), re.MULTILINE)
    assert called
    assert set(called) <= set(targets)


def test_each_check_of_ci_is_in_the_workflow():
    called = re.findall(r"^make ([a-z]+)", text(".ci/run"), re.MULTILINE)
    there = set(re.findall(r"- run: make ([a-z]+)", text(".github/workflows/ci.yml")))
    assert there == {"coverage" if each == "test" else each for each in called}  # the same tests


def named_in_architecture():
    """(path, name or "") of whatever ARCHITECTURE.md names as `path` or `path::name`."""
    return re.findall(r"`([\w/.]+(?:\.py|/))(?:::(\w+))?`", text("ARCHITECTURE.md"))


def missing(path, name):
    """What does not exist of a path, or a name in it; None if all does."""
    found = [place / path for place in (PROJECT, SOURCE) if (place / path).exists()]
    if not found:
        return path
    pattern = rf"^(?:class|def) {name}\b|^{name}\b.*="
    if name and not re.search(pattern, found[-1].read_text(encoding="utf-8"), re.MULTILINE):
        return f"{path}::{name}"
    return None


def test_what_architecture_names_exists():
    named = named_in_architecture()
    assert len(named) > 50
    assert [gone for path, name in named if (gone := missing(path, name))] == []


def test_a_path_or_name_that_is_gone_is_noticed():
    assert missing("polynomials/horner.py", "") == "polynomials/horner.py"
    assert missing("polynomials/ends.py", "Growth") == "polynomials/ends.py::Growth"
    assert missing("polynomials/ends.py", "Ends") is None


def test_architecture_lists_the_rooms_in_order():
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text("ARCHITECTURE.md"), re.MULTILINE)
    assert tuple(rows) == ROOMS
