"""The command line: end to end on tiny models, and one line for every mistake."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from polylens.cli import app, parse_layers
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.loading import load_model, parse_device, parse_dtype, token_windows
from polylens.report import Report

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
    with torch.random.fork_rng():
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


def test_report_without_loss(model_dir, text_file):
    arguments = ["report", str(model_dir), "--text", str(text_file), *SIZES, "--no-loss"]
    result = run(app, [*arguments, "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    assert "KL" not in result.output


def test_demo(tmp_path):
    out = tmp_path / "report.json"
    result = run(app, ["demo", "--sequences", "4", "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = Report.from_dict(json.loads(out.read_text(encoding="utf-8")))
    assert report.degree == 3
    assert all(row.r2[1] < row.r2[3] for row in report)
    assert report.base_ce < 2.5


@pytest.fixture
def not_a_model(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("these are not weights")
    return path


def _fails(arguments, *words):
    result = run(app, ["report", *(str(a) for a in arguments)])
    message = result.stderr
    assert result.exit_code == 2, result.output
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert str(word) in message


def test_mistakes_are_one_line(model_dir, text_file, not_a_model, tmp_path):
    text = ["--text", text_file, *SIZES]
    missing = tmp_path / "missing"
    _fails([model_dir, "--text", missing], missing, "cannot be read")
    _fails([missing, *text], missing, "no such file")
    _fails([f"{missing}.gguf", *text], "no such file")
    _fails([not_a_model, *text], "is not a model", "b'thes'")
    _fails([tmp_path, *text], "config.json")
    _fails([model_dir, *text, "--dtype", "int8"], "unknown dtype 'int8'", "float32")
    _fails([model_dir, *text, "--device", "warp"], "device 'warp'")
    _fails([model_dir, *text, "--layers", "0-x"], "'0-x'", "0-5,10")
    _fails([model_dir, *text, "--layers", "5"], "no layer 5", "[0, 1]")
    _fails([model_dir, *text, "--degree", "-1"], "degree")
    _fails([model_dir, "--text", text_file], "tokens", "8,192 are needed")
    _fails([model_dir, *text, "--seq-len", "999"], "--calibration-tokens 160")
    _fails([model_dir, *text, "--json", missing / "a.json"], "no such directory")
    _fails([model_dir, *text, "--plot", tmp_path / "a.xyz"], "png")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    _fails([model_dir, "--text", tmp_path / "latin.txt"], "not UTF-8")


def test_broken_model_directories(tmp_path, model_dir, text_file):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    _fails([tmp_path, "--text", text_file], tmp_path)
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    _fails([tmp_path, "--text", text_file, *SIZES], "could not be loaded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there():
    with pytest.raises(InvalidInputError, match="'cuda' cannot be used here"):
        parse_device("cuda")


@pytest.mark.parametrize(
    ("text", "layers"),
    [(None, None), ("3", [3]), ("0-2,10", [0, 1, 2, 10]), (" 4 , 4-5", [4, 5]), ("7-7", [7])],
)
def test_layer_syntax(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "5-3", "1--2", "1;2", "0-99999999"])
def test_layer_syntax_errors(text):
    with pytest.raises(InvalidInputError, match="0-5,10"):
        parse_layers(text)


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
    for counts in ((0, 1, 8), (1, 0, 8), (1, 1, 2)):
        with pytest.raises(InvalidInputError, match="at least one window"):
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
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from polylens.cli import app\n"
        "assert 'demo' in CliRunner().invoke(app, ['--help']).output\n"
        "heavy = {'transformers', 'transformer_lens', 'matplotlib', 'nnsight'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    out = subprocess.run(
        [sys.executable, "-m", "polylens", "--help"], check=True, capture_output=True, text=True
    )
    assert "report" in out.stdout
