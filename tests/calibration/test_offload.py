"""Passes whose activations are kept elsewhere while they wait compute the same, in less memory."""

import errno
import functools
import weakref

import pytest
import torch
from tests.hf_models import build
from tests.host_contract import assert_same_bits, logits, module_snapshot, tables
from tests.hosts.test_hosts_agree import bridge, hooked, nnsight, plain
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import polylens
from polylens import InvalidInputError, Sequential
from polylens.calibration import offload
from polylens.calibration.lockstep import in_step
from polylens.calibration.offload import Files, Memory, Offloaded, store_for
from polylens.hosts import host_for

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

TOKENS = torch.randint(3, 50, (6, 24), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(24) < torch.tensor([24, 20, 24, 9, 24, 24])[:, None]).long()
HOSTS = [("gpt2", hooked), *((name, h) for name in ("gpt2", "llama") for h in (plain, bridge))]


def attach(model, tokens=TOKENS, estimator="samples", offload=None, **options):
    options = {"degree": 2, "batch_size": 2, "progress": False, **options}
    return polylens.attach(model, tokens, method=Sequential(estimator, offload=offload), **options)


def fitted(model, **options):
    with attach(model, **options) as lens:
        return tables(lens)


@pytest.fixture
def everywhere(monkeypatch):
    """Memory that also takes what is on the CPU, as it takes what is on a GPU."""
    monkeypatch.setattr(Memory, "takes", lambda self, storage: True)


@pytest.mark.parametrize(("name", "make"), [*HOSTS, ("gpt2", nnsight), ("llama", nnsight)])
def test_the_same_polynomials_bit_for_bit(name, make, tmp_path, everywhere):
    model = make(build(name))
    before, snapshot = logits(model), module_snapshot(host_for(model).module)
    for options in ({}, {"attention_mask": MASK, "exclude_first": False}):
        expected = fitted(model, **options)
        assert_same_bits(fitted(model, offload=tmp_path, **options), expected)
        assert_same_bits(fitted(model, offload="cpu", **options), expected)
    assert list(tmp_path.iterdir()) == []
    assert module_snapshot(host_for(model).module) == snapshot
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("estimator", ["gaussian", "joint"])
def test_every_estimator(estimator, tmp_path, everywhere):
    model = build("llama")
    expected = fitted(model, estimator=estimator)
    for place in (tmp_path, "cpu"):
        assert_same_bits(fitted(model, estimator=estimator, offload=place), expected)


class Meter(TorchDispatchMode):
    """Most bytes at a time of all that operations within it have made."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.made[leaf.untyped_storage()] = True
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.made))
        return out


def peak(model, n, directory=None):
    """Bytes held at most by n batches in step, of which nothing is kept."""
    host = host_for(model)
    layers = [site.layer for site in host.sites()[0]]
    step = host.given(TOKENS.repeat(2, 1))

    def visit(layer, arrivals):
        assert sum(1 for _ in arrivals) == n
        return lambda arrival: arrival.y.clone()

    with Meter() as meter, store_for(directory) or Memory() as store:
        in_step(host, layers, [step] * n, visit, None if directory is None else store)
    return meter.peak


@pytest.mark.parametrize("make", [plain, bridge, nnsight])
def test_one_batch_at_a_time_is_in_memory(make, tmp_path):
    model = make(build("llama"))
    alone = peak(model, 1)
    assert peak(model, 12) > 3 * alone
    assert peak(model, 12, tmp_path) < 1.25 * alone


@functools.cache
def table(n):
    """Kept in no module."""
    return torch.linspace(0, 1, n).exp()


class Sharing(nn.Module):
    """Keeps tables from their first use on, and works in place on views.

    Args:
        seen: gets what every block reads.
    """

    def __init__(self, seen, d=8):
        super().__init__()
        self.note = seen.append  # no module holds the list
        self.embed = nn.Embedding(50, d)
        self.up = nn.ModuleList(nn.Linear(d, 12) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(12, d) for _ in range(3))
        self.act = nn.GELU()
        self.positions, self.scales, self.last = torch.zeros(0), {}, None

    def forward(self, tokens):
        n = tokens.shape[1]
        if len(self.positions) < n:
            self.positions = torch.arange(n).float().sin()
        h = self.embed(tokens)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            if (i, n) not in self.scales:
                self.scales[i, n] = torch.full((n, 1), 0.5 + i).cos()
            kept = (self.positions, *self.scales.values())
            sizes = [t.untyped_storage().nbytes() for t in kept]
            assert all(sizes)
            h = h + self.positions[:n, None] * table(n)[:, None]
            view, both, self.last = h[:, :, ::2], torch.stack([h, 2 * h]), h
            out = down(self.act(up(h)))
            self.note(view)
            view.add_(out[:, :, ::2])
            both[1].mul_(self.scales[i, n])
            h = both.sum(0) + view.repeat_interleave(2, -1) + out
        return h


def test_what_outlives_a_pass_is_left_alone_or_comes_back(tmp_path, everywhere):
    torch.manual_seed(0)
    model = Sharing(seen := [])
    options = {"example_inputs": TOKENS[:1, :5], "tokens": TOKENS}
    expected, views = fitted(model, **options), list(seen)
    for place in (tmp_path, "cpu"):
        model.positions, model.scales = torch.zeros(0), {}
        table.cache_clear()
        seen.clear()
        assert_same_bits(fitted(model, offload=place, **options), expected)
        assert all(view.untyped_storage().nbytes() for view in (*seen, table(24)))
        assert all(map(torch.equal, seen, views))
        kept = table(24)
        table.cache_clear()
        assert torch.equal(kept, table(24))
        after, model.positions, model.scales = model(TOKENS), torch.zeros(0), {}
        assert torch.equal(after, model(TOKENS))


def test_views_of_what_was_emptied_are_as_before(tmp_path):
    with Files(tmp_path) as store:
        passes = Offloaded(store, nn.Identity(), 2)
        with passes.running(0):
            x = torch.randn(4, 6).to(torch.bfloat16)
            view, odd = x.T[1:, ::2], x.view(torch.int16)
            empty = torch.empty(0)
        alive, expected = weakref.ref(x.untyped_storage()), view.clone()
        passes.empty(0)
        assert alive().nbytes() == 0
        passes.fill(0)
        assert torch.equal(view, expected)
        assert odd.data_ptr() == x.data_ptr()
        assert view._version == x._version == 0
        passes.empty(0)
        with passes.running(1):
            assert torch.equal(view + 0, expected)
        passes.empty(0)
        assert alive().nbytes(), "shared, so no longer of pass 0"
        assert torch.equal(view, expected)
        del x, view, odd
        assert alive() is None
        assert len(empty) == 0


@pytest.mark.parametrize("when", [1, 3, 5])
def test_a_full_disk_is_said_and_leaves_nothing(when, tmp_path, monkeypatch):
    model, left = build("llama"), when
    before, snapshot = logits(model), module_snapshot(model)

    def full(path, mode):
        nonlocal left
        left -= mode == "wb"
        if mode == "wb" and not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode)

    monkeypatch.setattr(offload, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device.*another directory") as caught:
        attach(model, offload=tmp_path, estimator="joint")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert polylens.attached(model) is None
    assert module_snapshot(model) == snapshot
    assert torch.equal(logits(model), before)


def test_what_runs_while_an_interrupted_pass_ends_finds_its_tensors(tmp_path):
    model, seen = build("gpt2"), []
    block = model.transformer.h[0]
    forward = block.forward

    def noted(x, *args, **kwargs):
        expected = x.sum()
        try:
            return forward(x, *args, **kwargs)
        finally:
            seen.append(torch.equal(x.sum(), expected))

    def stop(layer, arrivals):
        list(arrivals)
        raise KeyboardInterrupt

    host = host_for(model)
    layers = [site.layer for site in host.sites()[0]]
    block.forward = noted
    with pytest.raises(KeyboardInterrupt), Files(tmp_path) as store:
        in_step(host, layers, [host.given(TOKENS[:3]), host.given(TOKENS[3:])], stop, store)
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "nowhere/at/all"}, "'cpu' or an existing directory"),
        ({"offload": 3}, "is no directory"),
    ],
)
def test_refused(options, message):
    model = build("gpt2")
    with pytest.raises(InvalidInputError, match=message):
        attach(model, **options)
    assert polylens.attached(model) is None
