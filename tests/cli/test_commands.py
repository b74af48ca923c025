"""The command line: end to end on tiny models, and one line for every mistake."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import polylens
from polylens import analysis, demo
from polylens.checks import layers_in
from polylens.cli import loading
from polylens.cli.commands import app
from polylens.cli.loading import load_model, parse_dtype, token_windows
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.report.report import Report
from polylens.training.tracer import Trace

run = CliRunner().invoke

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it . " * 40


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A random two-layer Llama with a word tokenizer, as a local directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    ).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        ).save_pretrained(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


SIZES = ["--calibration-tokens", "160", "--heldout-tokens", "96", "--seq-len", "16"]


def test_report_end_to_end(model_dir, text_file, tmp_path):
    out, plot = tmp_path / "report.json", tmp_path / "figure.png"
    arguments = ["report", model_dir, "--text", text_file, *SIZES, "--degree", 3, "--layers", "1"]
    result = run(app, [str(a) for a in (*arguments, "--json", out, "--plot", plot)])
    assert result.exit_code == 0, result.output
    report = Report.from_dict(json.loads(out.read_text(encoding="utf-8")))
    assert [row.layer for row in report] == [1]
    assert report.degree == 3
    assert report.n_tokens == 6 * 15
    assert report.n_targets == 6 * 15
    assert 0 < report[1].r2[1] <= report[1].r2[3] + 0.05
    assert f"{report[1].r2[3]:.4f}"[:5] in result.output or ">0.9999" in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_prefixes_worst_tokens_and_a_text_of_another_source(model_dir, text_file, tmp_path):
    out, other = tmp_path / "report.json", tmp_path / "other.txt"
    other.write_text("away from the lazy dog it runs . " * 40, encoding="utf-8")
    arguments = ["report", model_dir, "--text", text_file, "--heldout-text", other, *SIZES]
    arguments += ["--prefixes", "--worst", 2, "--degree", 1, "--json", out]
    result = run(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    report = Report.from_dict(json.loads(out.read_text(encoding="utf-8")))
    assert report[1].prefix_delta_ce == report.all_row.delta_ce
    assert len(report.worst) == 2
    for token in report.worst:
        assert f"'{token.text}'" in result.output
        assert set(f"{token.context} {token.text}".split()) <= set(other.read_text().split())
    other.write_text("too short", encoding="utf-8")
    _fails(arguments[1:], "the text has 2 tokens and 96 are needed (6 held-out windows of 16)")
    _fails([*arguments[1:], "--no-loss"], "--prefixes measures losses")


def test_report_without_loss(model_dir, text_file):
    arguments = ["report", str(model_dir), "--text", str(text_file), *SIZES, "--no-loss"]
    result = run(app, [*arguments, "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    assert "KL" not in result.output


def test_report_layer_by_layer_on_text_of_the_model_too(model_dir, text_file, tmp_path):
    arguments = ["report", model_dir, "--text", text_file, *SIZES, "--json", tmp_path / "a.json"]
    arguments += ["--stream", "sequential", "--sampled-tokens", 64, "--no-loss"]
    result = run(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    report = Report.from_dict(json.loads((tmp_path / "a.json").read_text(encoding="utf-8")))
    assert report.inputs.startswith("samples per neuron, 224 tokens")  # 160 and 64
    assert report.inputs.endswith("layer by layer")


DEMO_SIZES = ["--calibration-tokens", "512", "--heldout-tokens", "512"]


def test_demo(tmp_path):
    out, page = tmp_path / "report.json", tmp_path / "page.html"
    files = ["--json", str(out), "--html", str(page)]
    result = run(app, ["demo", *DEMO_SIZES, "--stream", "sequential", *files])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "<h3>Layer 3</h3>" in text
    assert "<code>&#x27;e&#x27;</code>" in text
    assert f"wrote {page}" in result.output.replace("\n", " ")
    report = Report.from_dict(json.loads(out.read_text(encoding="utf-8")))
    assert report.degree == 3
    assert all(row.r2[1] < row.r2[3] for row in report)
    assert report.base_ce < 2.5


def test_a_saved_lens_is_reported_as_it_was_fitted(tmp_path):
    saved, page = tmp_path / "demo.lens", tmp_path / "page.html"
    result = run(app, ["demo", *DEMO_SIZES, "--no-loss", "--json", "-", "--save", str(saved)])
    assert result.exit_code == 0, result.output
    fitted = json.loads(result.stdout)  # and nothing else
    assert "polylens-demo" in result.stderr
    arguments = ["report", "demo", *DEMO_SIZES, "--no-loss", "--lens", str(saved), "--quiet"]
    result = run(app, [*arguments, "--json", "-"])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert json.loads(result.stdout) == fitted
    lower = run(app, [*arguments, "--degree", "2", "--layers", "1-2", "--json", "-"])
    lower = Report.from_dict(json.loads(lower.stdout))
    assert (lower.degree, [row.layer for row in lower]) == (2, [1, 2])
    assert run(app, [*arguments, "--html", str(page)]).output == ""
    assert "<h3>Layer 3</h3>" in page.read_text(encoding="utf-8")
    with polylens.load(saved, demo.load_bridge()) as lens:
        assert lens.saved_report.to_dict() == fitted
    words = ["features", "demo", "--lens", str(saved), "--layer", "1", "--direction", "e"]
    result = run(app, [*words, "-k", "2"])
    assert result.exit_code == 0, result.output
    assert "layer 1 along the logit of 'e'" in " ".join(result.stdout.split())


def test_interactions_of_a_prompt_sum_to_what_the_layer_writes(tmp_path):
    out, plot, saved = tmp_path / "found.json", tmp_path / "found.png", tmp_path / "demo.lens"
    assert run(app, ["fit", "demo", *DEMO_SIZES[:2], "--save", str(saved), "-q"]).exit_code == 0
    arguments = ["interactions", "demo", "--lens", str(saved), "--layer", "-2", "--prompt", "a fox"]
    result = run(app, [*arguments, "--json", str(out), "--plot", str(plot), "-k", "4"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "layer 2, position 4 ('x'): logit of" in found["title"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    terms = [value for *_, value in (*found["first order"], *found["pairs"])]
    assert found["constant"] + sum(terms) == pytest.approx(found["total"], rel=1e-6)
    # The same from the library.
    model = demo.load_bridge()
    read = demo.encode("a fox")[None]
    with polylens.load(saved, model) as lens:
        logits = model(read)[0, -1]
        u = analysis.logit_gradient(lens, read, 2, *logits.topk(2).indices.tolist())[0]
        x = lens.run_with_cache(read, names="in")[1]["in", 2][0, -1]
        assert float(lens[2](x).detach().double() @ u) == pytest.approx(found["total"], rel=1e-3)
    words = {"--layer": "2", "--lens": saved, "--prompt": "a fox"}
    for option, value, said in (
        ("--layer", "9", "no layer 9"),
        ("--position", "7", "5 tokens"),
        ("--prompt", "a", "1 tokens"),
        ("--lens", tmp_path / "none", "no such file"),
    ):
        mistaken = {**words, option: value}
        given = [each for pair in mistaken.items() for each in pair]
        _fails(["demo", *given], said, command="interactions")


def test_two_lenses_of_one_model_are_compared(tmp_path):
    saved = [str(tmp_path / name) for name in ("a", "b")]
    for path, degree in zip(saved, "31", strict=True):
        fitted = ["fit", "demo", *DEMO_SIZES[:2], "--layers", "1-2", "--save", path]
        assert run(app, [*fitted, "--degree", degree, "-q"]).exit_code == 0
    arguments = ["compare", "demo", "demo", "--lens", saved[0], "--other-lens"]
    same = run(app, [*arguments, saved[0], "--json", "-"])
    assert same.exit_code == 0, same.output
    other = run(app, [*arguments, saved[1], "--json", "-"])
    distances = [
        [row["distance"] for row in json.loads(result.stdout)["rows"]] for result in (same, other)
    ]
    assert max(distances[0]) < 1e-6
    lower = run(app, [*arguments, saved[1], "--degree", "1", "--layers", "1"])
    assert "deg 1  kept" in lower.output
    assert "deg 2" not in lower.output
    _fails(["demo", "demo", *arguments[3:], saved[1], "--degree", "2"], "got 2", command="compare")
    assert min(distances[1]) > 0.01


def test_version_and_help():
    assert run(app, ["--version"]).stdout == f"polylens {polylens.__version__}\n"
    for command in ("fit", "report", "demo", "features", "interactions", "compare", "trace"):
        assert "--quiet" in run(app, [command, "-h"], env={"COLUMNS": "200"}).stdout


def test_outputs_are_checked_before_anything_is_loaded(tmp_path, text_file):
    missing = tmp_path / "no model"
    _fails([missing, "--save", tmp_path], "is a directory", command="fit")
    _fails([missing, "--save", missing / "a"], "no such directory", command="fit")
    _fails([missing, "--text", text_file, "--html", "-"], "only --json goes to a pipe")
    _fails([missing, "--text", text_file, "--degree", 99], "degree must be")
    _fails([missing, "--text", text_file, "--checkpoint", "c"], "--stream sequential")
    for command, option, value in (
        ("report", "--estimator", "gaussian"),
        ("features", "--degree", "2"),
        ("interactions", "--text", text_file),
        ("fit", "--layers", "1"),
        ("compare", "--stream", "true"),
    ):
        words = {"features": ["--layer", 0, "--direction", "a"], "fit": ["--save", tmp_path / "b"]}
        words |= {"interactions": ["--layer", 0, "--prompt", "a"]}
        words |= {"compare": [missing, "--other-lens", "b"]}
        given = [missing, *words.get(command, []), "--lens", "a", option, value]
        _fails(given, f"{option} {value} says how to fit", "--lens a", command=command)
    _fails(["org/model"], "--text FILE")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        _fails([missing, "--save", tmp_path / "locked" / "a"], "cannot be written", command="fit")


def test_an_interrupted_fit_says_where_it_goes_on(tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(polylens.attachment, "attach", interrupt)
    kept = tmp_path / "kept"
    arguments = ["fit", "demo", "--save", str(tmp_path / "a"), "--stream", "sequential"]
    result = run(app, [*arguments, "--checkpoint", str(kept)])
    assert result.exit_code in (1, 130)
    assert f"the layers that were done are in {kept}" in result.stderr


def test_a_hub_name_without_a_network_fails_at_once(monkeypatch, text_file, tmp_path):
    def unreachable(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(loading.socket, "create_connection", unreachable)
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    _fails(["org/model", "--text", text_file, *SIZES], "org/model could not be loaded")
    assert time.perf_counter() - began < 10


@pytest.fixture
def not_a_model(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("these are not weights")
    return path


def _fails(arguments, *words, command="report"):
    result = run(app, [command, *(str(a) for a in arguments)])
    message = result.stderr
    assert result.exit_code == 2, result.output
    assert message.startswith("error: "), message
    assert len(message.splitlines()) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert str(word) in message


def test_mistakes_are_one_line(model_dir, text_file, not_a_model, tmp_path):
    text = ["--text", text_file, *SIZES]
    missing = tmp_path / "missing"
    _fails([model_dir, "--text", missing], missing, "cannot be read")
    _fails([missing, *text], missing, "no such file")
    for relative in ("./nowhere", "../nowhere", "nowhere/.."):
        _fails([relative, *text], relative, "no such file")
    _fails([f"{missing}.gguf", *text], "no such file")
    _fails([not_a_model, *text], "is not a model", "b'thes'")
    _fails([tmp_path, *text], "config.json")
    _fails([model_dir, *text, "--dtype", "int8"], "unknown dtype 'int8'", "float32")
    _fails([model_dir, *text, "--device", "warp"], "device 'warp'")
    _fails([model_dir, *text, "--layers", "0-x"], "'0-x'", "0-5,10")
    _fails([model_dir, *text, "--layers", "5"], "no layer 5", "[0, 1]")
    _fails([model_dir, *text, "--degree", "-1"], "degree")
    _fails([model_dir, *text, "--stream", "parallel"], "--stream 'parallel'", "sequential")
    _fails([model_dir, *text, "--calibration", "sequential"], "--stream")
    _fails([model_dir, *text, "--sampled-tokens", "9"], "--sampled-tokens 9")
    _fails([model_dir, "--text", text_file], "tokens", "8,192 are needed")
    _fails([model_dir, *text, "--seq-len", "999"], "--calibration-tokens 160")
    _fails([model_dir, *text, "--json", missing / "a.json"], "no such directory")
    _fails([model_dir, *text, "--html", missing / "a.html"], "no such directory")
    _fails([model_dir, *text, "--plot", tmp_path / "a.xyz"], "png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        for option in ("--json", "--html", "--save"):
            _fails([model_dir, *text, option, tmp_path / "pipe"], "is a device, pipe or socket")
        assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    _fails([model_dir, "--text", tmp_path / "latin.txt"], "not UTF-8")


def test_broken_model_directories(tmp_path, model_dir, text_file):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    _fails([tmp_path, "--text", text_file], tmp_path)
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    _fails([tmp_path, "--text", text_file, *SIZES], "could not be loaded")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    _fails([tmp_path, "--text", text_file, *SIZES], "has no tokenizer", "tokenizer.json")


def test_features_of_the_embedded_model(tmp_path):
    out = tmp_path / "features.json"
    arguments = ["features", "demo", "--layer", "2", "--direction", "e", "--against", "a"]
    result = run(app, [*arguments, "-k", "3", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "layer 2 along the logit of 'e' against 'a'" in " ".join(result.output.split())
    found = json.loads(out.read_text(encoding="utf-8"))
    # The same from the library.
    model = demo.load_bridge()
    method = polylens.TrueStream(estimator="gaussian")
    tokens = polylens.tokenize(demo.texts()[0][: 32 * 128], model)
    options = {"degree": 2, "layers": 2, "method": method, "progress": False}
    with polylens.attach(model, tokens, **options) as lens:
        norm = lens.host.final_norm()
        u = analysis.token_direction(
            model.W_U, ord("e"), ord("a"), centred=norm.centred, weight=norm.weight
        )
        features = analysis.eigenfeatures(lens[2], u, 3, metric="covariance")
        with torch.no_grad():
            inputs = lens.run_with_cache(tokens, names="in")[1]["in", 2]
    assert [row["value"] for row in found["rows"]] == pytest.approx(features.values.tolist())
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(float(features.share[-1]))
    # The activation where it is highest in the text, by hand.
    most = found["rows"][0]["highest"][0]
    place = most["sequence"], most["position"]
    assert chr(tokens[place]) == most["token"].replace("⏎", "\n")
    activations = (inputs.double() - lens[2].inputs.mean) @ features.vectors[:, 0]
    assert float(activations[place]) == pytest.approx(most["activation"], rel=1e-3)


def test_final_norm_is_that_of_the_model():
    model = demo.load_bridge()
    norm = polylens.hosts.host_for(model).final_norm()
    last = model.original_model.transformer.ln_f
    assert norm.centred
    assert torch.equal(norm.weight, last.weight)
    assert torch.equal(norm.bias, last.bias)


def test_features_calibrated_on_text(model_dir, text_file):
    arguments = ["features", model_dir, "--layer", 1, "--direction", "fox", "--text", text_file]
    result = run(app, [str(a) for a in (*arguments, *SIZES[:2], *SIZES[4:])])
    assert result.exit_code == 0, result.output
    assert "fitted to Gaussian, 160 tokens" in result.output
    assert "'dog'" in result.output


def test_mistakes_in_features_are_one_line(model_dir, tmp_path):
    _fails(["demo", "--layer", 2, "--direction", "the"], "'the' is 3 tokens", command="features")
    _fails(["demo", "--layer", 2, "--direction", ""], "'' is 0 tokens", command="features")
    _fails(["demo", "--layer", 2, "--direction", "e", "--against", "e"], "zero", command="features")
    _fails(["demo", "--layer", 7, "--direction", "e"], "no layer 7", "3]", command="features")
    _fails(["demo", "--layer", 2, "--direction", "e", "-k", 999], "k must", command="features")
    _fails([tmp_path, "--layer", 2, "--direction", "e"], "config.json", command="features")
    _fails([model_dir, "--layer", 1, "--direction", "fox dog"], "2 tokens", command="features")


@pytest.fixture
def run_dir(tmp_path, model_dir):
    """Checkpoints 0, 20 and 100 of the same model, scaled; the tokenizer lies beside them."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_dir)
    for step in (100, 0, 20):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        model.lm_head.weight.data *= 2
    for file in model_dir.glob("tokenizer*"):
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def test_trace_over_a_directory_of_checkpoints(run_dir, text_file, tmp_path):
    out, plot = tmp_path / "trace.jsonl", tmp_path / "trace.svg"
    arguments = [str(a) for a in ("trace", run_dir, "--text", text_file, *SIZES, "--degree", 2)]
    arguments += ["--out", str(out)]
    result = run(app, [*arguments, "--steps", "0,100", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert plot.read_text().startswith("<?xml")
    first = Trace.load(out)
    assert first.steps == [0, 100]
    # A broken checkpoint is named, and what was measured is kept and not measured again.
    (run_dir / "checkpoint-20" / "model.safetensors").write_bytes(b"broken")
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    trace = Trace.load(out)
    assert trace.rows[: len(first)] == first.rows
    assert list(trace.errors) == [20]
    assert "loading" in result.output
    shutil.copytree(run_dir / "checkpoint-100", run_dir / "checkpoint-20", dirs_exist_ok=True)
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    trace = Trace.load(out)
    assert (trace.steps, trace.errors) == ([0, 20, 100], {})
    torch.testing.assert_close(trace.series(1)[1], trace.series(1)[2])


def test_the_tokenizer_of_a_run_may_lie_in_its_checkpoints(run_dir):
    for file in run_dir.glob("tokenizer*"):
        file.rename(run_dir / "checkpoint-20" / file.name)
    assert loading.tokenizer_beside(str(run_dir))("the dog")["input_ids"]


def test_mistakes_in_trace_are_one_line(run_dir, model_dir, text_file, tmp_path):
    text = ["--text", text_file, *SIZES]
    _fails([run_dir, *text, "--steps", "0,7"], "steps [7]", "[0, 20, 100]", command="trace")
    _fails([run_dir, *text, "--steps", "0,x"], "such as 0,1,512", command="trace")
    _fails([run_dir, *text, "--degree", "-1"], "degree", command="trace")
    _fails([run_dir, *text, "--tokenizer", tmp_path], "has no tokenizer", command="trace")
    _fails([tmp_path / "run" / "none", *text], "no such directory", command="trace")
    _fails([model_dir, *text], "checkpoint-500", command="trace")
    _fails(["org/name", *text], "needs steps", command="trace")
    _fails(["org/name", *text, "--steps", "1", "--revisions", "main"], "{}", command="trace")
    for folder in run_dir.glob("checkpoint-*"):
        (folder / "config.json").unlink()
    _fails([run_dir, *text], "no checkpoint could be measured", command="trace")


def test_hub_revisions_are_loaded_lazily_by_name(monkeypatch):
    asked = []

    def load(source, device, dtype, revision=None, with_tokenizer=True):
        asked.append((source, dtype, revision, with_tokenizer))
        return "model", None

    monkeypatch.setattr(loading, "load_model", load)
    found = loading.checkpoints("EleutherAI/pythia-14m", [512, 1, 512], dtype="float64")
    assert [step for step, _ in found] == [1, 512]
    assert asked == []
    assert found[1][1]() == "model"
    assert asked == [("EleutherAI/pythia-14m", "float64", "step512", False)]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("0-2,10", [0, 1, 2, 10]), (" 4 , 4-5", [4, 5]), ("7-7", [7])],
)
def test_layer_syntax(text, layers):
    assert layers_in(text) == layers


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "5-3", "1--2", "1;2", "0-99999999"])
def test_layer_syntax_errors(text):
    with pytest.raises(InvalidInputError, match="0-5,10"):
        layers_in(text)


class WordTokenizer:
    """One id per word; puts `bos` in front when asked for special tokens."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [2 + i for i, _ in enumerate(text.split())]
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + ids}


@pytest.mark.parametrize("bos", [None, 1])
def test_windows_are_disjoint_and_start_with_bos(bos):
    calibration, heldout = token_windows(WordTokenizer(bos), "w " * 100, 3, 2, 8)
    assert calibration.shape == (3, 8)
    assert heldout.shape == (2, 8)
    assert calibration.dtype == torch.long
    body = slice(0 if bos is None else 1, None)
    seen = torch.cat([calibration[:, body].flatten(), heldout[:, body].flatten()])
    assert seen.tolist() == list(range(2, 2 + len(seen)))
    if bos is not None:
        assert (calibration[:, 0] == bos).all()
        assert (heldout[:, 0] == bos).all()


def test_short_text_says_what_is_needed():
    with pytest.raises(InvalidInputError, match="has 10 tokens and 40 are needed"):
        token_windows(WordTokenizer(None), "w " * 10, 3, 2, 8)
    for counts in ((-1, 1, 8), (1, 1, 2)):
        with pytest.raises(InvalidInputError, match="3 positions or more"):
            token_windows(WordTokenizer(None), "w " * 10, *counts)


def test_loading(model_dir):
    bridge, tokenizer = load_model(str(model_dir), dtype="bfloat16")
    assert type(bridge).__name__ == "TransformerBridge"
    assert next(bridge.parameters()).dtype == parse_dtype("bfloat16") == torch.bfloat16
    assert not bridge.training
    assert tokenizer("the dog")["input_ids"]


def test_model_without_a_bridge_is_named(monkeypatch, model_dir):
    import transformer_lens.model_bridge.sources as sources

    def refuse(*args, **kwargs):
        raise KeyError("LlamaForCausalLM")

    monkeypatch.setattr(sources, "build_bridge_from_module", refuse)
    with pytest.raises(UnsupportedModel, match="no bridge for LlamaForCausalLM"):
        load_model(str(model_dir))


def test_help_is_there_without_loading_a_framework():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['polylens', '--help']\n"
        "try:\n"
        "    runpy.run_module('polylens', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert not done.code\n"
        "heavy = {'transformers', 'transformer_lens', 'matplotlib', 'nnsight'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "demo" in out.stdout
    assert "report" in out.stdout
