"""Models that read no token ids: images and feature vectors calibrate and are reported on."""

import pytest
import torch
from tests.hf_models import build
from tests.host_contract import TOKENS, attach
from torch import nn

import polylens
from polylens.errors import InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")


def plain(module):
    return module


def nnsight(module):
    return pytest.importorskip("nnsight", minversion="0.8").NNsight(module)


def classifier():
    torch.manual_seed(0)
    layers = [nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 21), nn.GELU(), nn.Linear(21, 3)]
    return nn.Sequential(*layers).double(), torch.randn(500, 10)


def vit():
    return build("vit").double(), torch.randn(40, 3, 16, 16)


@pytest.fixture(params=[classifier, vit])
def case(request):
    return request.param()


@pytest.mark.parametrize("host", [plain, nnsight])
def test_every_activation_is_calibrated_on_and_reported_on(case, host):
    module, data = case
    held_out = data.flip(0)[: len(data) // 2] + 0.1
    seen = {}
    with polylens.attach(host(module), data, degree=3, progress=False, batch_size=7) as lens:
        assert "position 0" not in lens.inputs_summary
        assert f"{len(data)} inputs" in lens.inputs_summary
        report = lens.report(held_out, progress=False, batch_size=9)
        with lens.host.observe({layer: keep(seen, layer) for layer in lens}), torch.no_grad():
            lens.host.run(data)
            calibration = dict(seen)
            lens.host.run(held_out)
        for layer in lens:
            x = calibration[layer][0].reshape(-1, lens.sites[layer].d_in)
            torch.testing.assert_close(lens[layer].inputs.mean, x.mean(0))
            torch.testing.assert_close(lens[layer].inputs.cov, torch.cov(x.T, correction=0))
            x, y = (t.reshape(-1, t.shape[-1]) for t in seen[layer])
            residual = (lens[layer](x) - y).square().sum() / (y - y.mean(0)).square().sum()
            assert report[layer].r2_replacement == pytest.approx(1 - float(residual), abs=1e-9)
            assert report.n_tokens == len(x)
    assert report.base_ce is report.n_targets is None


def test_kl_and_top_1_of_a_classifier_need_no_labels():
    module, data = classifier()
    module[4].weight.data *= 10
    with polylens.attach(module, data, degree=1, progress=False) as lens:
        report = lens.report(data[:90], prefixes=True, progress=False, batch_size=40)
        true = module(data[:90].double()).log_softmax(-1).detach()
        for layers, row in ((0, report[0]), (1, report[1]), (None, report.all_row)):
            with lens.replaced(layers=layers), torch.no_grad():
                found = module(data[:90].double()).log_softmax(-1)
            kl = (true.exp() * (true - found)).sum(-1).mean()
            assert row.kl == pytest.approx(float(kl))
            assert row.kl > 1e-4
            same = (found.argmax(-1) == true.argmax(-1)).double().mean()
            assert row.agreement == pytest.approx(float(same))
            assert row.delta_ce is row.ablation_delta_ce is row.loss_recovered is None
        assert report[1].prefix_kl == report.all_row.kl
        assert "3 numbers that the model returns" in str(report)
        assert report.plot()
        assert polylens.Report.from_dict(report.to_dict()) == report


def test_what_is_returned_is_no_class_without_two_of_them():
    module, data = classifier()
    module[4] = nn.Linear(21, 1).double()
    with polylens.attach(module, data, degree=2, progress=False) as lens:
        report = lens.report(data[:90], progress=False)
    assert report.all_row is None
    assert "no loss columns" in str(report)


def keep(seen, layer):
    return lambda a: seen.update({layer: (a.x, a.y)})


def test_position_zero_is_replaced_too(case):
    module, data = case
    given = {s.layer: polylens.Gaussian.standard(s.d_in) for s in polylens.find_mlps(module)}
    outputs = []
    seen = dict(tokens=data, method=polylens.TrueStream("gaussian"))
    for options in (seen, dict(method=polylens.FromInputs(given))):
        with polylens.attach(module, **options, layers=0, progress=False) as lens:
            out = lens.host._block(0).out.module
            handle = out.register_forward_hook(lambda module, args, y: outputs.append(y))
            with lens.replaced(degree=0):
                lens.host.run(data)
            handle.remove()
    for y in outputs:
        torch.testing.assert_close(y, y.reshape(-1, y.shape[-1])[0].expand_as(y))


@pytest.mark.parametrize(
    ("make", "tokens", "mask", "message"),
    [
        (classifier, torch.arange(20).reshape(2, 10), None, "reads no token ids.*int64"),
        (classifier, torch.randn(10), None, "reads no token ids.*10"),
        (classifier, torch.randn(0, 10), None, "reads no token ids.*0, 10"),
        (classifier, torch.randn(5, 10), torch.ones(5, 10), "attention_mask"),
        (lambda: (build("gpt2"), None), torch.randn(5, 10), None, "integer token ids"),
    ],
)
def test_inputs_of_the_other_kind_are_refused(make, tokens, mask, message):
    module, _ = make()
    with pytest.raises(InvalidInputError, match=message):
        polylens.attach(module, tokens, attention_mask=mask, progress=False)
    assert polylens.attached(module) is None


def test_a_classifier_of_texts_has_no_loss_columns():
    with attach(build("roberta")) as lens:
        assert len(lens.report(TOKENS, loss=False, progress=False)) == 2
        with pytest.raises(InvalidInputError, match="loss=False"):
            lens.report(TOKENS, progress=False)
