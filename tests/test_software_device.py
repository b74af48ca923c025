"""polylens on a second device: the figures of the CPU, and a bounded number of waits for it."""

import pytest
import torch

import polylens
from polylens import Sequential, TrueStream, analysis, demo
from tests.hf_models import build
from tests.host_contract import HostContract, Specimen
from tests.oracles import generator, random_layer, random_mixture
from tests.software_device import NAME, software_device

pytestmark = pytest.mark.more

METHODS = {
    "gaussian": TrueStream(estimator="gaussian"),
    "samples": TrueStream(),
    "joint": TrueStream(estimator="joint", weighting="output"),
    "replaced stream": Sequential(),
}

EIGENSOLVERS = ("dense", "iterative")


@pytest.fixture
def waits(monkeypatch):
    # a device gets larger blocks, in which sums are taken in another order
    monkeypatch.setattr("polylens.devices.CACHED", {"cpu", NAME})
    with software_device() as waits:
        yield waits


def figures(method, device, n=16, degree=3, layers=(1, 2), **options) -> list:
    """Of a report on the embedded model."""
    model = demo.load_model().to(device)
    training, held_out = (demo.batches(text, n, 32).to(device) for text in demo.texts())
    with polylens.attach(
        model, training, degree=degree, method=method, layers=layers, progress=False
    ) as lens:
        report = lens.report(held_out, progress=False, **options)
    return [report.base_ce, *report.rows, report.all_row, report.worst]


@pytest.mark.parametrize("name", METHODS)
def test_the_figures_are_those_of_the_cpu(name, waits):
    method = METHODS[name]
    assert figures(method, NAME) == figures(method, "cpu")


@pytest.mark.parametrize("name", METHODS)
def test_waits_do_not_grow_with_tokens_and_degree(name, waits):
    """Nor with neurons: nothing but layers, and what is shown of the worst tokens."""
    counts = []
    for n, degree in ((16, 2), (32, 2), (16, 4)):
        waits.clear()
        figures(METHODS[name], NAME, n, degree, layers=(1,), worst=0)
        counts.append(
            sum(own for (_, where), own in waits.items() if not where.startswith("hosts"))
        )
    few, *others = counts
    assert all(other <= few for other in others), counts
    assert few < 60


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_fits_and_what_is_read_off_them(kind, waits):
    x = random_mixture(1).sample(2100, generator(1))
    w = torch.rand(2100, generator=generator(2))
    inputs = {
        "gaussian": lambda move: (polylens.Gaussian.from_samples(move(x)),),
        "mixture": lambda move: (random_mixture(1),),
        "samples": lambda move: (polylens.Samples(move(x), move(w)),),
    }
    verbs = {"samples": (polylens.fit, polylens.fit_joint), "mixture": (polylens.fit,)}

    def read(move) -> list:
        found = []
        layer = random_layer(1, kind, "silu").to(move(x).device)
        u = move(torch.ones(layer.d_out))
        for name, model in inputs.items():
            for verb in verbs.get(name, (polylens.fit,)):
                p = verb(layer, *model(move), 3)
                form = p.quadratic_form(u)
                found += [p.r2, *p.linear(), form.to_dense(), p(move(x[:5])), p.piece(x[0], u).P]
        return [t.cpu() for t in found]

    assert all(map(torch.equal, read(lambda t: t.to(NAME)), read(lambda t: t)))


def test_what_is_saved_exported_and_taken_apart(waits, tmp_path):
    def read(device) -> list:
        model, tokens = demo.load_model().to(device), demo.batches(demo.texts()[0], 8, 32)
        u, x = torch.ones(128, device=device), torch.linspace(-1, 1, 128, device=device)
        with polylens.attach(model, tokens, layers=[1, 2], progress=False) as lens:
            own = lens[1]
            found = [
                *(analysis.eigenfeatures(own, u, 4, method=m).values for m in EIGENSOLVERS),
                analysis.eigenfeatures(own, u, 4, metric="covariance").values,
                analysis.singular_features(own).values,
                analysis.interactions(own, torch.stack([x, 1 - x, x * x]), u).pairs,
                lens.export()(tokens.to(device)).logits,
                lens.run_with_cache(tokens)[0],
            ]
            lens.save(tmp_path / "it.safetensors")
        with polylens.load(tmp_path / "it.safetensors", model) as lens, lens.replaced():
            return [t.cpu() for t in [*found, model(tokens.to(device)).logits]]

    # to rounding: products with factors and Horner's rule are in other blocks there
    torch.testing.assert_close(read(NAME), read("cpu"))


@pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")
class TestHost(HostContract):
    # they take most of the time, and are about what is left behind
    test_an_exception_at_any_module_leaves_nothing = None
    test_a_failure_at_any_step_of_attaching_leaves_nothing = None

    @pytest.fixture
    def specimen(self, waits):
        return Specimen("llama", lambda: build("llama").to(NAME))


def test_analyses_of_a_lens(waits):
    """Examples, interventions, gradients and comparisons, with their texts and figures."""

    def read(device) -> list:
        model = demo.load_model().to(device)
        training, text = (demo.batches(each, 8, 32).to(device) for each in demo.texts())
        method, layers = TrueStream(), (0, 2)
        options = {"degree": 2, "method": method, "layers": layers, "progress": False}
        with polylens.attach(model, training, **options) as lens:
            by_layer = {
                n: analysis.singular_features(lens[n], 2, metric="covariance") for n in layers
            }
            seen = analysis.examples(lens, by_layer, text, k=2, effects=True)
            u = analysis.logit_gradient(lens, text, 2, 7, at=5)
            along = analysis.eigenfeatures(lens[2], u[0], 2, metric="covariance")
            at = torch.tensor([3, -1, 4, 5, 6, 7, 8, 9])
            edits = {
                "degree": analysis.Edit(2, lens[2].part(2)),
                "feature": analysis.Edit(2, along.part(0), at=at),
                "vector": [analysis.Edit(0, u[0].cpu(), by=2.0)],
            }
            with lens.replaced():
                found = analysis.intervene(lens, text, edits)
            changes = analysis.compare(lens, lens, degree=1, u={2: u[0]}).to_dict()
            return [*(seen[n].to_dict() for n in layers), found.to_dict(), changes, u.tolist()]

    assert read(NAME) == read("cpu")
