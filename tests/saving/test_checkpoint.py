"""An interrupted calibration goes on where it was, to the same bits, or says why it cannot."""

import copy
import os

import pytest
import torch
from tests.hf_models import ARCHITECTURES, MIXTURES, from_config
from tests.host_contract import assert_same_bits, module_snapshot, tables
from tests.hosts.test_hosts_agree import bridge, nnsight, plain

import polylens
from polylens import ArtifactError, InvalidInputError, Sequential, UnsupportedModel
from polylens.files import format as storage
from polylens.fitting.neuron_gram import NeuronGram
from polylens.saving.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

LAYERS = 3
TOKENS = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(16) < torch.tensor([16, 12, 16, 9])[:, None]).long()


def small(layers=LAYERS):
    config, name, given, _ = ARCHITECTURES["llama"]
    return from_config(config, name, {**given, "num_hidden_layers": layers})


def attach(model, path, estimator="samples", tails="default", offload=None, **options):
    method = Sequential(estimator, tails, checkpoint=path, offload=offload)
    options = {"tokens": TOKENS, "degree": 2, "batch_size": 2, "progress": False, **options}
    return polylens.attach(model, method=method, **options)


def interrupted(monkeypatch, model, path, after, **options):
    """attach, stopped by Ctrl-C when `after` layers are in the file."""
    add = Checkpoint.add

    def stopping(self, layer, polynomial):
        if len(self._entries) == after:
            raise KeyboardInterrupt
        add(self, layer, polynomial)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            attach(model, path, **options)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(model, bytes of a file that has one of its layers)."""
    path, model = tmp_path_factory.mktemp("half") / "x", small()
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, model, path, 1)
    return model, path.read_bytes()


@pytest.mark.parametrize("after", range(LAYERS))
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "samples", "attention_mask": MASK},
        {"estimator": "gaussian"},
        {"estimator": "joint"},
    ],
    ids=["samples", "gaussian", "joint"],
)
def test_it_goes_on_to_the_same_file(after, options, tmp_path, monkeypatch):
    model = small()
    snapshot = module_snapshot(model)
    with attach(model, tmp_path / "whole", **options) as lens:
        expected = tables(lens)
    with attach(model, None, **options) as lens:
        assert_same_bits(tables(lens), expected)
    interrupted(monkeypatch, model, tmp_path / "x", after, **options)
    assert module_snapshot(model) == snapshot
    assert polylens.attached(model) is None
    with pytest.raises(ArtifactError, match=f"{after} of 3 layers, .* attach.*checkpoint="):
        polylens.load(tmp_path / "x", model)
    with attach(model, tmp_path / "x", **options) as lens:
        assert_same_bits(tables(lens), expected)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["whole", "x"]


@pytest.mark.parametrize("make", [plain, bridge, nnsight])
def test_finished_layers_are_not_fitted_again_on_any_host(make, tmp_path, monkeypatch):
    model, fits, solve = make(small()), [], NeuronGram.solve
    monkeypatch.setattr(NeuronGram, "solve", lambda self, **o: fits.append(1) or solve(self, **o))
    with attach(model, None) as lens:
        expected, of_one = tables(lens), len(fits) // len(lens)
    interrupted(monkeypatch, model, tmp_path / "x", 2)
    fits.clear()
    with attach(model, tmp_path / "x", offload=tmp_path) as lens:
        assert_same_bits(tables(lens), expected)
    assert len(fits) == of_one
    contents = (tmp_path / "x").read_bytes()
    with attach(model, tmp_path / "x") as lens:
        assert_same_bits(tables(lens), expected)
        summary = lens.inputs_summary
    assert len(fits) == of_one
    assert (tmp_path / "x").read_bytes() == contents
    with polylens.load(tmp_path / "x", model) as lens:
        assert_same_bits(tables(lens), expected)
        assert lens.inputs_summary == summary


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interruption_at_any_write_leaves_a_usable_file(call, tmp_path, monkeypatch):
    model, path, real = small(), tmp_path / "x", getattr(os, call)
    snapshot = module_snapshot(model)
    with attach(model, tmp_path / "whole"):
        pass

    def limited(*args):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return real(*args)

    for n in range(1, 20):
        left = n
        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            try:
                attach(model, path).detach()
                break
            except KeyboardInterrupt:
                assert module_snapshot(model) == snapshot
                assert polylens.attached(model) is None
                assert sorted(os.listdir(tmp_path)) == ["whole", "x"]
                storage.read(path, "lens")
    assert n > 1
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("calls", [0, 3, 5, 11])
def test_an_interruption_within_a_pass(calls, tmp_path, half):
    model, _ = half
    with attach(model, tmp_path / "whole", batch_size=1):
        pass
    snapshot, left = module_snapshot(model), calls

    def stop(module, args):
        nonlocal left
        if os.path.exists(tmp_path / "x"):  # calibration has begun
            left -= 1
        if left < 0:
            raise KeyboardInterrupt

    handles = [m.register_forward_pre_hook(stop) for m in model.model.layers]
    with pytest.raises(KeyboardInterrupt):
        attach(model, tmp_path / "x", offload=tmp_path, batch_size=1)
    for handle in handles:
        handle.remove()
    assert module_snapshot(model) == snapshot
    assert sorted(os.listdir(tmp_path)) == ["whole", "x"]
    attach(model, tmp_path / "x", batch_size=1).detach()
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


def nudged(model):
    model = copy.deepcopy(model)
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 3}, "degree was 2, now it is 3"),
        ({"estimator": "joint"}, "estimator was samples per neuron, now it is samples, jointly"),
        ({"tails": 0.0}, "tails was 0.05, now it is 0.0"),
        ({"exclude_first": False}, "starts_left_out was True"),
        ({"batch_size": 4}, "batch_size was 2, now it is 4"),
        ({"layers": [0, 1]}, r"layers was \['0', '1', '2'\], now it is \['0', '1'\]"),
        ({"tokens": TOKENS.flip(0)}, r"tokens was torch.int64 \[4, 16\] with SHA-256 [0-9a-f]{64}"),
        ({"tokens": TOKENS.reshape(8, 8)}, r"now it is torch.int64 \[8, 8\]"),
        ({"attention_mask": MASK}, "attention_mask was None"),
        ({"model": nudged}, r"other weights \(model.layers.1.self_attn.q_proj.weight\)"),
        ({"model": lambda model: copy.deepcopy(model).double()}, r"other weights .* more"),
        ({"model": nnsight}, "host was Hugging Face, now it is nnsight"),
    ],
)
def test_another_calibration_is_refused_by_name(half, options, message, tmp_path):
    model, contents = half
    options = dict(options)
    other = options.pop("model", lambda model: model)(model)
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(ArtifactError, match=message) as caught:
        attach(other, tmp_path / "x", **options)
    assert str(caught.value).count(" was ") + str(caught.value).count("other weights") == 1
    assert (tmp_path / "x").read_bytes() == contents
    assert polylens.attached(other) is None


def test_a_file_in_earlier_words_is_gone_on_with(half, tmp_path):
    model, contents = half
    (tmp_path / "x").write_bytes(contents)
    header, tensors = storage.read(tmp_path / "x", "lens")
    before = header["calibration"]
    before["inputs"], before["clip"] = before.pop("estimator"), before.pop("tails")
    kept = {name: header[name] for name in ("calibration", "unfinished", "layers")}
    storage.write(tmp_path / "x", "lens", kept, tensors)
    with attach(model, None) as lens:
        expected = tables(lens)
    with attach(model, tmp_path / "x") as lens:
        assert_same_bits(tables(lens), expected)


def test_a_damaged_file_is_refused_and_left_alone(half, tmp_path):
    model, contents = half
    for place in torch.randint(len(contents), (20,)).tolist():
        damaged = bytearray(contents)
        damaged[place] ^= 0x55
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(ArtifactError):
            attach(model, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == damaged
    (tmp_path / "x").write_bytes(contents[:-9])
    with pytest.raises(ArtifactError, match="cut short"):
        attach(model, tmp_path / "x")
    assert polylens.attached(model) is None


def test_a_saved_lens_is_no_checkpoint(tmp_path):
    model = small(1)
    with attach(model, None) as lens:
        lens.save(tmp_path / "x")
    with pytest.raises(ArtifactError, match="a lens that was saved, not a calibration"):
        attach(model, tmp_path / "x")


def test_refused_before_a_file_is_made(tmp_path):
    for options in ({"estimator": "gausian"}, {"tails": 0.5}, {"degree": 13}, {"layers": [7]}):
        with pytest.raises(InvalidInputError):
            attach(small(1), tmp_path / "x", **options)
        assert not (tmp_path / "x").exists()


def test_experts_and_places_that_cannot_be_written(tmp_path):
    config, name, changes, _ = MIXTURES["mixtral"]
    with pytest.raises(UnsupportedModel, match="routing"):
        attach(from_config(config, name, changes), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model = small(1)
    for place in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(OSError, match=str(place.parent)):
            attach(model, place)
    assert polylens.attached(model) is None


def test_a_last_write_that_fails_leaves_nothing_attached(tmp_path, monkeypatch):
    model = small(1)

    def full(self, header, layers):
        raise OSError("full")

    snapshot = module_snapshot(model)
    monkeypatch.setattr(Checkpoint, "finish", full)
    with pytest.raises(OSError, match="full"):
        attach(model, tmp_path / "x")
    assert module_snapshot(model) == snapshot
    assert polylens.attached(model) is None
