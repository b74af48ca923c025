"""Inputs that a report names: R2 is about them, or the calibration saw none like them."""

import pytest
import torch
from tests.report.test_report import TinyHost, TinyLens
from tests.report.test_report import measure as measured

import polylens
from polylens.calibration.overlap import TokenSketch
from polylens.hosts.batch import batch_of
from polylens.inputs.residuals import ResidualSums
from polylens.report.standing_out import StandingOut, remarks


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_in_two_batches(y, f, gate=None, seen=None):
    sums, found = ResidualSums(), StandingOut(seen)
    for rows in (slice(0, 40), slice(40, None)):
        sums.update(y[rows], f[rows][None])
        errors = (y[rows] - f[rows]).square().sum(1)
        own = None if gate is None else gate[rows]
        size = sums.centred(y[rows]).square().sum(1)
        found.update(torch.arange(len(y))[rows], y[rows], size, errors, own)
    return found, sums


def test_inputs_of_much_variance_are_named_with_the_r2_of_the_others():
    y = normal(100, 5)
    f = y + 0.1 * normal(100, 5, seed=1)
    y[[7, 60]] *= 60
    f[7] = y[7]  # it adorns R2
    found, sums = seen_in_two_batches(y, f)
    inputs, without = found.heavy(sums)
    assert {index for index, _ in inputs} == {7, 60}
    left = torch.tensor([i for i in range(100) if i not in (7, 60)])
    centred = y[left] - y[left].mean(0)
    expected = 1 - (y - f)[left].square().sum() / centred.square().sum()
    assert without == pytest.approx(float(expected), abs=1e-10)
    (remark,) = remarks({3: (found, sums)}, lambda index: f"input {index}")
    assert "input 7 (" in remark
    assert f"of layer 3, R² {without:.4f} without" in remark


def test_ordinary_inputs_are_not_named():
    y = normal(100, 5)
    found, sums = seen_in_two_batches(y, y, y, torch.stack([y.amin(0), y.amax(0)]))
    assert list(remarks({0: (found, sums)}, str)) == []
    assert (found.unlike, found.unseen) == (0, 0)


def test_inputs_unlike_those_of_calibration():
    y, gate = normal(100, 5), normal(100, 40)
    seen = torch.stack([gate.amin(0), gate.amax(0)])
    gate[3, :10] += 20
    gate[50, :2] -= 20
    gate[51, :1] -= 20  # 2.5 % of its preactivations
    found, sums = seen_in_two_batches(y, y, gate, seen)
    assert found.unlike == 1
    assert found.unseen == pytest.approx(13 / 4000)
    assert list(found.far()) == [(3, 0.25)]
    (remark,) = remarks({0: (found, sums)}, lambda index: f"input {index}")
    assert "input 3 (25% of layer 0)" in remark


def test_a_report_names_the_token():
    host = TinyHost()
    host.model.embed[5] *= 40
    tokens = torch.randint(6, 11, (4, 30), generator=torch.Generator().manual_seed(0))
    tokens[2, 17] = 5
    report = measured(TinyLens(host), tokens, decode=lambda ids: f"<{ids[0]}>", progress=False)
    assert any("'<5>' at 2:17" in note for note in report.notes)


def ids(n_seq, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (n_seq, length), generator=generator)


@pytest.mark.parametrize("n_seq", [2, 300])  # all passages remembered, or some
def test_the_share_of_text_that_two_have_in_common(n_seq):
    text, other = ids(n_seq, 50, 0), ids(n_seq, 50, 1)
    sketch = TokenSketch.of([batch_of((text,), {})])
    again = TokenSketch.from_json(sketch.to_json())
    for each in (sketch, again):
        assert each.share_of(batch_of((text,), {})) == 1
        assert each.share_of(batch_of((other,), {})) == 0
        shifted = text.flatten()[20:-30].view(-1, 50)
        assert each.share_of(batch_of((shifted,), {})) > 0.45  # no passages across sequences
        half = torch.cat([text, other])
        assert each.share_of(batch_of((half,), {})) == pytest.approx(0.5, abs=0.05)


def test_padding_and_what_is_no_text_have_no_passages():
    text, mask = ids(3, 40, 0), torch.ones(3, 40, dtype=torch.long)
    mask[:, 20:] = 0
    sketch = TokenSketch.of([batch_of((text[:, :20],), {})])
    changed = text.clone()
    changed[:, 20:] = 0
    padded = batch_of((changed,), {"attention_mask": mask})
    assert sketch.share_of(padded) == 1
    images = batch_of((torch.zeros(3, 4, 8, 8),), {})
    assert TokenSketch.of([images]) is None
    assert sketch.share_of(images) == 0
    assert [TokenSketch.from_json(damaged) for damaged in (None, 3, "xyz")] == [None] * 3


def test_calibration_text_as_held_out_text_is_noticed(tmp_path):
    model = polylens.demo.load_model()
    tokens = polylens.demo.batches(polylens.demo.texts()[0], n_seq=6, seq_len=32)
    held_out = polylens.demo.batches(polylens.demo.texts()[1], n_seq=3, seq_len=32)

    def noticed(lens, tokens):
        notes = lens.report(tokens, loss=False, progress=False).notes
        return [note for note in notes if note.startswith("NOT HELD OUT: 100%")]

    with polylens.attach(model, tokens[:4], degree=1, progress=False) as lens:
        assert noticed(lens, tokens[1:3])
        assert not noticed(lens, tokens[4:])
        assert not noticed(lens, held_out)
        lens.save(tmp_path / "lens")
    with polylens.load(tmp_path / "lens", model) as lens:
        assert noticed(lens, tokens[1:3])
        assert not noticed(lens, held_out)
