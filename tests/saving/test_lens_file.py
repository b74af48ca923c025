"""A saved lens comes back bit for bit, on any host of the same weights, or not at all."""

import copy

import pytest
import torch
from tests.hf_models import ARCHITECTURES, build, from_config
from tests.host_contract import module_snapshot
from tests.hosts.test_hosts_agree import bridge, nnsight, plain

import polylens
from polylens import ArtifactError, InvalidInputError, Sequential
from polylens.files import format as storage
from polylens.installed import emitter
from polylens.normal_forms.fingerprint import fingerprint
from polylens.saving import lens_file as artifact

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

TOKENS = torch.arange(128).reshape(4, 32) * 7 % 50
MODELS = ("gpt2", "llama", "phi3", "bert")


def llama(**changes):
    config, name, given, _ = ARCHITECTURES["llama"]
    return from_config(config, name, {**given, **changes})


def attach(model, **options):
    return polylens.attach(model, TOKENS, **{"degree": 3, "progress": False, **options})


def logits(lens, degree=None):
    with torch.no_grad(), lens.replaced(degree=degree):
        return lens.host.logits(TOKENS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "llama.polylens"
    model = build("llama")
    with attach(model) as lens:
        lens.save(path)
    return path, model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"method": Sequential()}, {"method": Sequential("joint")}],
    ids=["gaussian", "samples", "joint"],
)
def test_loading_gives_the_same_bits(tmp_path, name, options):
    model = build(name)
    with attach(model, **options) as lens:
        report = lens.report(TOKENS, loss=False, progress=False)
        lens.save(tmp_path / "lens", report)
        expected = [logits(lens, degree) for degree in range(4)]
        summary, tables = lens.inputs_summary, [lens[n] for n in lens]
        shown = [repr(table) for table in tables]
    with polylens.load(tmp_path / "lens", model) as lens:
        assert lens.inputs_summary == summary
        assert lens.saved_report == report
        assert [repr(lens[n]) for n in lens] == shown
        assert all(torch.equal(logits(lens, n), out) for n, out in enumerate(expected))
        for layer, old in zip(lens, tables, strict=True):
            states = lens[layer].state_dict(), old.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("make", [plain, bridge, nnsight])
def test_it_loads_onto_every_host_of_the_same_weights(tmp_path, name, make):
    model = build(name)
    with attach(copy.deepcopy(model)) as lens:
        lens.save(tmp_path / "lens")
        tables = {layer: lens[layer] for layer in lens}
    with polylens.load(tmp_path / "lens", make(model)) as lens:
        for layer, old in tables.items():
            x = torch.randn(5, lens.sites[layer].d_in, generator=torch.Generator().manual_seed(1))
            assert torch.equal(lens[layer].P, old.P)
            torch.testing.assert_close(lens[layer](x), old(x), rtol=1e-5, atol=1e-6)


def test_another_dtype_of_the_same_weights_is_adopted(saved):
    path, model = saved
    with polylens.load(path, copy.deepcopy(model).to(torch.bfloat16)) as lens:
        assert logits(lens).isfinite().all()


def test_only_coefficients_are_stored(tmp_path):
    model = llama(intermediate_size=4096)
    with attach(model) as lens:
        lens.save(tmp_path / "lens")
        numbers = sum(site.d_mlp for site in lens.sites.values()) * (2 * (10 + 6) + 2 * 5 + 2)
    assert (tmp_path / "lens").stat().st_size < 8 * numbers + 8192


def test_degree_zero_and_some_layers(tmp_path):
    model = build("llama")
    with attach(model, degree=0, layers=1) as lens:
        lens.save(tmp_path / "lens")
        expected = logits(lens)
    with polylens.load(tmp_path / "lens", model) as lens:
        assert lens.layers == (1,)
        assert torch.equal(logits(lens), expected)


def nudge(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= 1 + 1e-6
    return model


def shortened(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nudge, "weights are not those"),
        (shortened, "layer 1"),
        (lambda model: llama(intermediate_size=44), "another model"),
        (lambda model: llama(hidden_act="gelu"), "another model"),
        (lambda model: build("gpt2"), "another model"),
    ],
)
def test_another_model_is_refused_and_nothing_attached(saved, other, message):
    path, model = saved
    model = other(copy.deepcopy(model))
    snapshot = module_snapshot(model)
    with pytest.raises(ArtifactError, match=message):
        polylens.load(path, model)
    assert polylens.attached(model) is None
    assert module_snapshot(model) == snapshot


def test_damage_is_refused(saved, tmp_path):
    path, model = saved
    contents = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = tmp_path / "damaged"
    for place in torch.randint(len(contents), (1000,), generator=generator).tolist():
        damaged.write_bytes(
            contents[:place] + bytes([contents[place] ^ 0x55]) + contents[place + 1 :]
        )
        with pytest.raises(ArtifactError):
            storage.read(damaged, "lens")
    for size in (0, 7, 100, len(contents) // 2, len(contents) - 1):
        damaged.write_bytes(contents[:size])
        with pytest.raises(ArtifactError):
            polylens.load(damaged, model)
    assert polylens.attached(model) is None


def test_a_report_of_a_later_version_does_not_cost_the_polynomials(tmp_path):
    model = build("llama")
    with attach(model) as lens:
        lens.save(tmp_path / "lens", lens.report(TOKENS, loss=False, progress=False))
        expected = logits(lens)
    header, tensors = storage.read(tmp_path / "lens", "lens")
    header["report"]["schema"] = "polylens.report/99"
    storage.write(tmp_path / "later", "lens", header, tensors)
    with pytest.warns(UserWarning, match="polylens.report/99") as caught:
        lens = polylens.load(tmp_path / "later", model)
    assert [warning.filename for warning in caught] == [__file__]
    assert lens.saved_report is None
    assert torch.equal(logits(lens), expected)


def test_saving_looks_at_the_weights_once(tmp_path, monkeypatch):
    seen = []

    def counted(weights):
        seen.append(weights)
        return fingerprint(weights)

    with attach(build("llama")) as lens:
        for module in (artifact, emitter):
            monkeypatch.setattr(module, "fingerprint", counted)
        lens.save(tmp_path / "lens")
    assert len(seen) == len(lens)


def test_a_polynomial_is_not_a_lens(tmp_path):
    model = build("llama")
    with attach(model) as lens:
        lens[0].save(tmp_path / "one")
        with pytest.raises(ArtifactError, match="not a lens"):
            polylens.load(tmp_path / "one", model)
        assert lens.is_attached
        lens.save(tmp_path / "lens")
        with pytest.warns(UserWarning, match="takes its place"):
            polylens.load(tmp_path / "lens", model).detach()
    with pytest.raises(ArtifactError, match="not a lens"):
        polylens.load(tmp_path / "one", model)


def test_a_stale_lens_is_not_saved(tmp_path):
    model = build("llama")
    with attach(model) as lens:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        with pytest.raises(polylens.StalePolynomialError):
            lens.save(tmp_path / "lens")
    assert not (tmp_path / "lens").exists()
    assert not issubclass(ArtifactError, InvalidInputError)
