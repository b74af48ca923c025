"""The examples in docstrings run, and every public verb has one."""

import doctest
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

import polylens
from polylens.activations import table

ROOT = Path(polylens.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# What a reader of the documentation calls first.
VERBS = (
    *("Gaussian", "GaussianMixture", "Samples", "MLPWeights", "GLUWeights"),
    *("fit", "fit_joint", "fit_global", "explained_variance", "register_activation"),
    *(
        "attach",
        "load",
        "analysis.eigenfeatures",
        "analysis.distance",
        "analysis.examples",
        "analysis.intervene",
    ),
)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text():
            yield ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = (test for name in modules() for test in finder.find(import_module(name), name))
    return [test for test in found if test.examples]


def run(test):
    printed = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    result = runner.run(test, out=printed.append)
    assert not result.failed, "".join(printed)


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_example(test, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    registered = dict(table.TABLE)
    try:
        run(test)
    finally:
        table.TABLE.clear()
        table.TABLE.update(registered)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_have_an_example(verb):
    assert ">>> " in attrgetter(verb)(polylens).__doc__


def test_an_example_that_prints_something_else_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    with pytest.raises(AssertionError, match="Expected"):
        run(test)
