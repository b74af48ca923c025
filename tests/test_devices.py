"""Devices that are not there or mixed; memory: what is free, refused, lacking in the middle."""

import pytest
import torch

import polylens
from polylens import devices
from polylens.devices import free_bytes, memory_named, require_room
from polylens.errors import InvalidInputError, OutOfMemory
from polylens.polynomials import monomials
from tests.software_device import software_device

CPU = torch.device("cpu")


def test_what_is_free_is_less_than_there_is():
    free = free_bytes(CPU)
    assert free is None or 1 << 20 < free < 1 << 46
    assert free_bytes(torch.device("meta")) is None


def test_more_than_is_free_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2 * 10**9)
    require_room(10**9, CPU, "sums", "take fewer")
    with pytest.raises(OutOfMemory, match="sums: 3 GB on cpu, where 2 GB are free; take fewer"):
        require_room(3 * 10**9, CPU, "sums", "take fewer")
    assert issubclass(OutOfMemory, InvalidInputError)
    assert issubclass(OutOfMemory, MemoryError)


def of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def of_python():
    raise MemoryError


@pytest.mark.parametrize("allocate", [of_cuda, of_python, lambda: torch.empty(1 << 60)])
def test_an_allocation_that_fails_says_what_to_do(allocate):
    message = r"the fit ran out of memory; take fewer \("
    with pytest.raises(OutOfMemory, match=message), memory_named("the fit", "take fewer"):
        allocate()


def test_other_errors_are_themselves():
    with pytest.raises(RuntimeError, match="size"), memory_named("the fit", "take fewer"):
        torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize("estimator", ["samples", "joint", "gaussian"])
def test_layers_whose_sums_do_not_fit_are_refused_before_the_work(estimator, monkeypatch):
    model = polylens.demo.load_model()
    tokens = polylens.demo.batches(polylens.demo.texts()[0], n_seq=4, seq_len=64)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    monkeypatch.setattr(devices, "free_bytes", lambda device: 10_000)
    method = polylens.TrueStream(estimator)
    with pytest.raises(OutOfMemory, match=r"for 4 layers at once.*Sequential"):
        polylens.attach(model, tokens, method=method, progress=False)
    assert len(ran) < 5  # to find MLPs
    assert polylens.attached(model) is None


def test_running_out_of_memory_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    from polylens.fitting.samples import SamplesEstimator

    def solve(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = polylens.demo.load_model()
    tokens = polylens.demo.batches(polylens.demo.texts()[0], n_seq=4, seq_len=64)
    names = [name for name, _ in model.named_modules()]
    monkeypatch.setattr(SamplesEstimator, "solve", solve)
    with pytest.raises(OutOfMemory, match=r"attach ran out of memory; .*batch_size.*2\.00 GiB"):
        polylens.attach(model, tokens, progress=False)
    assert polylens.attached(model) is None
    assert [name for name, _ in model.named_modules()] == names


def layer():
    generator = torch.Generator().manual_seed(0)
    W_in, W_out = (torch.randn(*size, generator=generator) for size in ((4, 8), (8, 3)))
    return polylens.MLPWeights(W_in, W_out, "silu")


def mixture():
    means = torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 1]])
    return polylens.GaussianMixture(torch.ones(2) / 2, means, torch.eye(4)[None])


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_named(device):
    takers = layer().to, polylens.Gaussian.standard(4).to, mixture().to
    takers += polylens.demo.load_model, polylens.demo.load_bridge
    for take in takers:
        with pytest.raises(InvalidInputError, match=f"device '{device}' cannot be used here.*cpu"):
            take(device)
    with pytest.raises(InvalidInputError, match="cannot be used here"):
        layer().to(device=device)


def test_what_is_on_two_devices_is_moved_or_refused_with_both():
    weights, x = layer(), torch.linspace(-1, 1, 20).reshape(5, 4)
    poly = polylens.fit(weights, polylens.Samples(x.repeat(9, 1)), 2)
    both = "on cpu, got torch.float32 .* on soft:0"
    with software_device():
        there = x.to("soft")
        for taker in (poly, weights, poly.truncate(1), poly.all_degrees):
            with pytest.raises(InvalidInputError, match=both):
                taker(there)
        with pytest.raises(InvalidInputError, match=r"W_out .* cpu, W_in .* soft:0.*one device"):
            polylens.MLPWeights(weights.W_in.to("soft"), weights.W_out, "silu")
        moved = polylens.fit(weights, polylens.Samples(there.repeat(9, 1)), 2)
        assert torch.equal(moved(x), poly(x))
        gaussian = polylens.Gaussian.standard(4)
        near, far = (polylens.fit(weights, g, 2) for g in (gaussian, gaussian.to("soft")))
        assert torch.equal(near(x), far(x))


@pytest.mark.parametrize("name", ["tokens", "attention_mask"])
def test_what_has_no_values_is_named(name):
    given = dict.fromkeys(("tokens", "attention_mask"), torch.ones(2, 9, dtype=torch.long))
    given[name] = given[name].to("meta")
    with pytest.raises(InvalidInputError, match=f"{name}: on the meta device"):
        polylens.attach(polylens.demo.load_model(), **given, progress=False)


def test_a_batch_of_inputs_elsewhere_leaves_no_lens():
    """Tokens may be anywhere; what the model cannot take is refused as it is."""
    model = polylens.demo.load_model()
    tokens = polylens.demo.batches(polylens.demo.texts()[0], n_seq=4, seq_len=64)
    with software_device():
        lens = polylens.attach(model, tokens.to("soft"), progress=False)
        assert lens[0].W_out.device == CPU
        lens.detach()
    with pytest.raises(InvalidInputError, match="meta"):
        polylens.attach(model, tokens.to("meta"), progress=False)
    assert polylens.attached(model) is None


def test_dense_forms_that_do_not_fit_are_refused_with_what_to_do(monkeypatch):
    poly, wide = polylens.fit(layer(), mixture(), 2), 40
    broad = polylens.GaussianMixture(torch.ones(2) / 2, torch.randn(2, wide), torch.eye(wide)[None])
    of_many = polylens.MLPWeights(torch.randn(wide, 8), torch.randn(8, 3), "silu")
    monkeypatch.setattr(devices, "free_bytes", lambda device: 300)
    for call, message in (
        (lambda: poly.to_dense(), r"dense tensors of degree 2 .* 300 bytes are free; truncate"),
        (lambda: poly.quadratic_form(torch.ones(3)).to_dense(), r"\[4, 4\] of 8 .* form @ X"),
        (lambda: polylens.fit_global(of_many, broad, 2), r"3 output .* 40 dim.*outputs=U \[3, k\]"),
    ):
        with pytest.raises(OutOfMemory, match=message):
            call()


def test_dense_tensors_of_many_neurons_are_added_up_some_at_a_time(monkeypatch):
    poly = polylens.fit(layer(), mixture(), 3)
    whole = poly.to_dense()
    monkeypatch.setattr(monomials, "NEURONS", 1)
    for few, all_at_once in zip(poly.to_dense(), whole, strict=True):
        torch.testing.assert_close(few, all_at_once, rtol=1e-12, atol=1e-12)


def test_a_joint_fit_has_room_for_its_solution_too(monkeypatch):
    """Two Gram matrices while inputs come; the system and its factor at the end."""
    weights = layer()
    size = 1 + 4 + 8  # features of degree 2
    monkeypatch.setattr(devices, "free_bytes", lambda device: 3 * 8 * size**2)
    with pytest.raises(OutOfMemory, match=r"13 features.*a lower degree"):
        polylens.fit_joint(weights, polylens.Samples(torch.randn(100, 4)), 2)
