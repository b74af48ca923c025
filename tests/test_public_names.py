"""What `import polylens` offers, and what it says of names that are gone."""

import inspect
import re
import types
from pathlib import Path

import pytest
import torch

import polylens


def test_every_name_is_there_without_another_import():
    assert set(polylens.__all__) <= set(dir(polylens))
    assert inspect.isfunction(polylens.attach)
    assert isinstance(polylens.demo, types.ModuleType)
    assert callable(polylens.analysis.eigenfeatures)


def test_what_is_public_is_in_the_list():
    modules = {name for name, value in vars(polylens).items() if inspect.ismodule(value)}
    public = {name for name in vars(polylens) if not name.startswith("_")}
    assert public - modules - {"TYPE_CHECKING", "version"} == set(polylens.__all__) - {
        "analysis",
        "demo",
    }


@pytest.mark.parametrize("name", polylens.__all__)
def test_what_is_public_says_what_it_is(name):
    assert inspect.getdoc(getattr(polylens, name))


def test_a_name_that_is_gone_names_the_new_one():
    with pytest.raises(AttributeError, match=r'load\("hf://user/name", model\)'):
        _ = polylens.from_hub
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'$"):
        _ = polylens.no_such_name


def test_what_is_public_has_a_short_repr():
    weights = polylens.MLPWeights(torch.randn(6, 9), torch.randn(9, 5), "gelu")
    gaussian = polylens.Gaussian.standard(6)
    polynomial = polylens.fit(weights, gaussian, 2)
    samples = polylens.Samples(torch.randn(500, 6))
    mixture = polylens.GaussianMixture.from_samples(torch.randn(500, 6), 2)
    model, tokens = polylens.demo.load_model(), torch.randint(256, (4, 32))
    u, data = torch.randn(5), polylens.TraceData(tokens, tokens)
    with polylens.attach(model, method=polylens.FromNorm(), progress=False) as lens:
        report = lens.report(tokens, loss=False, progress=False)
        edit = polylens.analysis.Edit(0, torch.ones(128))
        edited = polylens.analysis.intervene(lens, tokens, edit)
    found = [
        *(weights, gaussian, samples, mixture, polynomial, lens, report, data),
        polylens.fit_joint(weights, samples),
        polylens.fit_global(weights, mixture, 2),
        polynomial.quadratic_form(u),
        polylens.explained_variance(weights, gaussian, 2),
        polylens.activation("gelu"),
        lens.sites[0],
        polylens.Tracer(data),
        polylens.Expert(3, 7),
        *(polylens.TrueStream(), polylens.Sequential(), polylens.FromInputs({0: gaussian})),
        polylens.analysis.eigenfeatures(polynomial, u, 2),
        polylens.analysis.singular_features(polynomial),
        polylens.analysis.output_directions(polynomial),
        polylens.analysis.interactions(polynomial, torch.randn(3, 6), u),
        polylens.analysis.Edit(0, polynomial.part(2)),
        edited,
        edited["edit"],
        polylens.analysis.compare(lens, lens, layers=0),
        polylens.analysis.layer_features(lens, 0, 7, k=2),
    ]
    for each in found:
        text = repr(each)
        assert text.startswith(type(each).__name__)
        assert len(text) <= 300, text
        assert "tensor(" not in text


def test_the_site_has_every_public_name():
    pages = "".join(
        path.read_text() for path in (Path(__file__).parent.parent / "docs" / "api").glob("*.md")
    )
    shown = set(re.findall(r"^::: polylens\.([\w.]+)$", pages, re.MULTILINE))
    names = set(polylens.__all__) - {"analysis", "demo"}
    modules = {name for name, value in vars(polylens.analysis).items() if inspect.ismodule(value)}
    analyses = {name for name in vars(polylens.analysis) if not name.startswith("_")} - modules
    assert names | {f"analysis.{name}" for name in analyses} == shown
