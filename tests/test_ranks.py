"""Several processes fit one lens, that of all their tokens; what goes wrong on one ends all."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import polylens
from polylens import InvalidInputError, demo
from polylens.calibration.seen import Calibration
from polylens.fitting.fit import ESTIMATORS
from polylens.hosts import host_for
from polylens.ranks import Forget
from tests.fitting.test_estimators import TAILS, Mine, batches
from tests.oracles import random_layer

TOKENS = demo.batches(demo.texts()[0], 140, 64)


class Other:
    """Adds the sums of another estimator, which are merged in the same order."""

    def __init__(self):
        self.values, self.taken = [], None

    def _both(self, value, by):
        if self.taken is None:
            self.values.append(value.clone() if isinstance(value, torch.Tensor) else value)
            return value
        return by(self.values[self.taken.pop(0)], value)

    def total(self, value):
        return self._both(value, lambda a, b: a + b)

    def lowest(self, value):
        return self._both(value, torch.minimum)

    def highest(self, value):
        return self._both(value, torch.maximum)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_sums_of_two_estimators_are_those_of_one(name, kind):
    layer, (xs, ws) = random_layer(1, kind, "silu").to(torch.float64), batches()
    pairs = [(x.double(), w) for x, w in zip(xs, ws, strict=True)]
    for tails in TAILS[name][-1:]:
        one, first, second = (ESTIMATORS[name](layer, 2, tails) for _ in range(3))
        for pair in pairs:
            one.update(*pair)
        for seen, own in ((first, pairs[16::2]), (second, pairs[17::2])):
            for pair in pairs[:16]:
                seen.update(*pair)
            if seen is second:
                seen.merge(Forget())
            for pair in own:
                seen.update(*pair)
        other = Other()
        second.merge(other)
        other.taken = list(range(len(other.values)))
        first.merge(other)
        assert not other.taken
        assert first.count == one.count == 6000
        expected, found = one.solve(), first.solve()
        x = torch.cat([x for x, _ in pairs])
        for k in range(3):
            difference = found.truncate(k)(x) - expected.truncate(k)(x)
            assert difference.norm() < 1e-11 * expected.truncate(k)(x).norm()


def test_an_estimator_that_does_not_say_how_is_refused():
    with pytest.raises(InvalidInputError, match="Mine does not say how"):
        Mine(random_layer(1), 2).merge(Forget())


def test_every_batch_has_one_rank_and_all_begin_alike():
    class Two:
        size = 2

        def __init__(self, rank):
            self.rank = rank

    host = host_for(demo.load_model(), None)
    options = {"exclude_first": True, "batch_size": 8, "progress": False}
    data = Calibration.on(host, TOKENS, None, [0], **options)
    first, second = (Calibration(host, data.steps, True, False, Two(rank)) for rank in (0, 1))
    assert first.leading == second.leading == 9  # of 8 x 63 inputs each
    assert first.mine[:9] == second.mine[:9] == data.steps[:9]
    assert first.mine[9:] == data.steps[9::2]
    assert second.mine[9:] == data.steps[10::2]
    assert data.mine == data.steps


def test_without_other_processes_there_are_no_ranks():
    with pytest.raises(InvalidInputError, match="not initialised"):
        polylens.Ranks()
    with pytest.raises(InvalidInputError, match="above 0"):
        polylens.Ranks(timeout=-1)
    with pytest.raises(InvalidInputError, match=r"must be polylens\.Ranks"):
        polylens.attach(demo.load_model(), TOKENS, ranks=2)


def test_one_rank_is_one_process():
    model = demo.load_model()
    plain = polylens.attach(model, TOKENS[:4], degree=2, layers=[1], progress=False)
    expected = plain[1].P.clone()
    plain.detach()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks = polylens.Ranks(timeout=30)
        options = {"degree": 2, "layers": [1], "ranks": ranks, "progress": False}
        with polylens.attach(model, TOKENS[:4], **options) as lens:
            assert torch.equal(lens[1].P, expected)
            one = lens.report(TOKENS[4:9], progress=False)
            assert lens.report(TOKENS[4:9], progress=False, ranks=ranks).to_dict() == one.to_dict()
            with pytest.raises(InvalidInputError, match=r"must be polylens\.Ranks"):
                lens.report(TOKENS[4:9], ranks=1)
        kept = polylens.Sequential(checkpoint="never.safetensors")
        for tokens, wrong in ((None, polylens.FromNorm()), (TOKENS[:4], kept)):
            with pytest.raises(InvalidInputError, match="leave out"):
                polylens.attach(model, tokens, method=wrong, **options)
    finally:
        torch.distributed.destroy_process_group()


BEGIN = """
import os, sys, torch, polylens
from polylens import demo
rank, size = int(sys.argv[1]), int(sys.argv[2])
where = dict(init_method="file://" + os.path.abspath("store"), rank=rank, world_size=size)
torch.distributed.init_process_group("gloo", **where)
ranks = polylens.Ranks(timeout={timeout})
model = demo.load_model().double()
tokens = demo.batches(demo.texts()[0], 140, 64)
own = tokens[:50] if rank == 0 else tokens[50:]
options = dict(progress=False, ranks=ranks, layers=[0, 1])
"""
REFUSED = """
try:
    polylens.attach(model, own, **options)
except polylens.PolylensError as error:
    print(type(error).__name__, error)
assert polylens.attached(model) is None
"""


def run(tmp_path, code, timeout=300, size=2):
    """What each of two processes printed, and their exit codes."""
    file = tmp_path / "script.py"
    end = "\ntorch.distributed.destroy_process_group()\n"
    file.write_text(BEGIN.format(timeout=timeout) + textwrap.dedent(code) + end)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(size)], env=env, cwd=tmp_path, **pipes
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return said, [process.returncode for process in processes]


@pytest.mark.more
@pytest.mark.parametrize("method", ["TrueStream()", "Sequential()", "TrueStream('gaussian')"])
def test_two_ranks_have_the_lens_of_one_process(tmp_path, method):
    code = f"""
    lens = polylens.attach(model, own, method=polylens.{method}, **options)
    torch.save([dict(lens[n].named_buffers()) for n in lens.layers], f"rank{{rank}}.pt")
    assert "{{n}} tokens".format(n=140 * 64) in lens.inputs_summary, lens.inputs_summary
    """
    said, codes = run(tmp_path, code)
    assert codes == [0, 0], said
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    model = demo.load_model().double()
    method = eval(f"polylens.{method}")
    with polylens.attach(model, TOKENS, method=method, layers=[0, 1], progress=False) as lens:
        for n in lens.layers:
            for name, tensor in lens[n].named_buffers():
                assert torch.allclose(first[n][name], tensor, rtol=1e-9, atol=1e-12), name
            x = torch.randn(500, 128, dtype=torch.float64)
            expected = lens[n](x)
            lens[n].load_state_dict(first[n], strict=False)
            assert (lens[n](x) - expected).norm() < 1e-12 * expected.norm()


def close(found, expected, where=""):
    """Equal, numbers up to the rounding of sums."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert found == expected, where


@pytest.mark.more
@pytest.mark.parametrize("options", ["", "prefixes=True, zero_ablation=True, degree=2"])
def test_two_ranks_have_the_report_of_one_process(tmp_path, options):
    code = f"""
    import json
    lens = polylens.attach(model, own, **options)
    heldout = demo.batches(demo.texts()[1], 21, 64)
    mine = heldout[:2] if rank == 0 else heldout[2:]
    report = lens.report(mine, ranks=ranks, progress=False, batch_size=2, {options})
    with open(f"report{{rank}}", "w") as file:
        json.dump(report.to_dict(), file)
    if rank == 0:
        lens.save("lens")
        again = lens.report(heldout, progress=False, batch_size=2, {options})
        with open("one", "w") as file:
            json.dump(again.to_dict(), file)
    """
    said, codes = run(tmp_path, code)
    assert codes == [0, 0], said
    first, second, one = (
        json.loads((tmp_path / name).read_text()) for name in ("report0", "report1", "one")
    )
    assert first == second
    close(first, one)


@pytest.mark.more
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("mine = mine[: 5 - 5 * rank]", ["RankError rank 1 failed", "InvalidInputError.*empty"]),
        ("degree = 2 + rank", ["degree, loss, .* on rank 0 and .* on rank 1"] * 2),
        ("lens[1].P[1, 0] += rank", [r"other polynomials than rank 0 \(1\)"] * 2),
    ],
)
def test_reports_of_what_differs_are_errors_on_all_ranks(tmp_path, change, expected):
    code = f"""
    lens = polylens.attach(model, own, **options)
    mine, degree = demo.batches(demo.texts()[1], 5, 64), 3
    {change}
    try:
        lens.report(mine, ranks=ranks, progress=False, degree=degree)
    except polylens.PolylensError as error:
        print(type(error).__name__, error)
    """
    said, codes = run(tmp_path, code)
    assert codes == [0, 0], said
    for text, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, text, re.S), said


@pytest.mark.more
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("own = own if rank else own[:0]", ["InvalidInputError.*empty", "RankError rank 0 failed"]),
        ("options['degree'] = 2 + rank", ["degree is 2 on rank 0 and 3 on rank 1"] * 2),
        (
            "next(model.parameters()).data[0, 0] += rank",
            [r"rank 1 has other weights than rank 0 \(transformer.wte.weight"] * 2,
        ),
        ("own = own[:, : 64 - rank]", [r"tokens is \[64\].* on rank 0 and \[63\]"] * 2),
    ],
)
def test_what_differs_between_ranks_is_an_error_on_all(tmp_path, change, expected):
    said, codes = run(tmp_path, change + "\n" + REFUSED)
    assert codes == [0, 0], said
    for text, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, text, re.S), said


@pytest.mark.more
@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path, late):
    code = f"""
    if rank:
        seen = []
        def dying(*args):
            seen.append(0)
            if len(seen) > 12:
                import time
                {"time.sleep(20)" if late else ""}
                os._exit(7)
        next(model.children()).register_forward_pre_hook(dying)
    try:
        polylens.attach(model, own, **options)
    except polylens.PolylensError as error:
        print(type(error).__name__, error)
    assert polylens.attached(model) is None
    os._exit(0)
    """
    timeout = 4 if late else 300
    said, codes = run(tmp_path, code, timeout=timeout)
    assert codes == [0, 7], said
    assert "RankError rank 0 got no answer" in said[0], said
    assert f"timeout={timeout} seconds" in said[0]


@pytest.mark.more
def test_the_command_prints_and_saves_once(tmp_path):
    arguments = ["demo", "--calibration-tokens", "8192", "--layers", "0", "--save", "lens"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "polylens", "fit", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote lens") == 1
    assert "error" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lens"]
    model = demo.load_bridge()
    with polylens.load(tmp_path / "lens", model) as lens:
        assert "8192 tokens" in lens.inputs_summary
