"""Models that accelerate offloads or spreads over devices, against the same in one place."""

import weakref

import pytest
import torch
from tests.hf_models import build
from tests.host_contract import TOKENS, assert_same_bits, attach, logits, tables
from tests.software_device import NAME, software_device

import polylens
from polylens import ArtifactError, AttachmentError, InvalidInputError, Sequential, TrueStream
from polylens.errors import UnsupportedModel
from polylens.hosts import offloaded
from polylens.hosts.torch.host import TorchHost

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.more,
    pytest.mark.filterwarnings("ignore::polylens.NumericalWarning"),
]

METHODS = {
    "gaussian": TrueStream(estimator="gaussian"),
    "samples": TrueStream(),
    "joint": TrueStream(estimator="joint"),
    "replaced stream": Sequential(),
}
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")


def on_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def mixed(model, folder):
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


PLACES = {"disk": on_disk, "cpu": on_cpu, "one layer on disk": mixed}


def tour(model, method, path):
    """Outputs, a report, and the coefficients."""
    with attach(model, method=method) as lens:
        report = lens.report(TOKENS, progress=False)
        with lens.replaced():
            found = [logits(model)]
        lens.save(path)
        found += [lens[0](torch.ones(1, lens[0].d_in)), lens[1].linear()[0]]
        coefficients = tables(lens)
    with polylens.load(path, model) as lens, lens.replaced():
        found.append(logits(model))
    return found, report, coefficients


@pytest.mark.parametrize(
    ("name", "place"), [*((name, "disk") for name in METHODS), *(("samples", p) for p in PLACES)]
)
def test_an_offloaded_model_has_the_figures_of_a_resident_one(name, place, tmp_path):
    method = METHODS[name]
    model = PLACES[place](build("llama"), tmp_path / "weights")
    assert offloaded.is_offloaded(model.model.layers[1].mlp.down_proj)
    found, report, own = tour(model, method, tmp_path / "it")
    expected, its_report, its_own = tour(build("llama"), method, tmp_path / "its")
    assert all(map(torch.equal, found, expected))
    assert report == its_report
    # those of an offloaded layer are without the weights
    assert_same_bits(own, {n: {k: its_own[n][k] for k in own[n]} for n in its_own})
    assert all(p.is_meta for p in model.model.layers[1].mlp.parameters())


class Watched(dict):
    """Weights on disk, and how many bytes of them were alive at each fetch."""

    alive, sizes = weakref.WeakSet(), []

    def __init__(self, source):
        self.source = source

    def __contains__(self, name):
        return name in self.source

    def __getitem__(self, name):
        tensor = self.source[name]
        self.alive.add(tensor.untyped_storage())
        self.sizes.append(sum(each.nbytes() for each in self.alive))
        return tensor


@pytest.mark.parametrize("name", METHODS)
def test_no_more_than_one_layer_of_weights_is_in_memory(name, tmp_path):
    model = on_disk(build("llama"), tmp_path / "weights")
    mlps = [layer.mlp for layer in model.model.layers]
    one = sum(p.numel() * p.element_size() for p in mlps[0].parameters())
    for module in filter(offloaded.is_offloaded, model.model.layers.modules()):
        module._hf_hook.weights_map = Watched(module._hf_hook.weights_map)
    Watched.sizes.clear()
    tour(model, METHODS[name], tmp_path / "it")
    assert 0 < max(Watched.sizes) <= one
    # what is kept is noticed
    kept = [
        offloaded.parameter(part, "weight")
        for mlp in mlps
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    assert Watched.sizes[-1] == len(mlps) * one == sum(each.nbytes for each in kept)


def test_layers_on_two_devices(tmp_path):
    with software_device():
        places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": f"{NAME}:0"}
        model = accelerate.dispatch_model(build("llama"), places, main_device="cpu")
        assert {p.device.type for p in model.parameters()} == {"cpu", NAME}
        found, report, _ = tour(model, TrueStream(), tmp_path / "it")
        found = [t.cpu() for t in found]
    expected, its_report, _ = tour(build("llama"), TrueStream(), tmp_path / "its")
    torch.testing.assert_close(found, expected)
    assert report.base_ce == its_report.base_ce


def test_a_checkpoint_knows_offloaded_weights(tmp_path):
    path = tmp_path / "checkpoint"
    method = Sequential(checkpoint=path)
    attach(on_disk(build("llama"), tmp_path / "weights"), method=method).detach()
    attach(build("llama"), method=method).detach()  # the same weights
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1
    with pytest.raises(ArtifactError, match=r"other weights \(model.layers.1.mlp.up_proj"):
        attach(on_disk(other, tmp_path / "others"), method=method)


def test_what_an_offloaded_model_cannot_do_is_said(tmp_path):
    model = on_disk(build("llama"), tmp_path / "weights")
    with attach(model) as lens:
        with pytest.raises(AttachmentError, match="load the model in one place"):
            lens.export()
        with pytest.raises(InvalidInputError, match=r"own_weights\(\) has them in memory"):
            lens[0].double()
        x, own = torch.ones(1, 24), lens[0].own_weights().double()
        assert own.W_in.dtype == torch.float64
        torch.testing.assert_close(lens[0].part(1)(x), own.part(1).float()(x))
    with pytest.raises(UnsupportedModel, match=r"meta device \(model.embed_tokens.weight and"):
        TorchHost(build("llama").to("meta")).sites()
