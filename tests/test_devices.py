"""Memory: what is free, what is refused before the work, what an allocation that fails says."""

import pytest
import torch

import polylens
from polylens import devices
from polylens.devices import free_bytes, memory_named, require_room
from polylens.errors import InvalidInputError, OutOfMemory

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
