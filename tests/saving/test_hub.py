"""Polynomials on the Hugging Face Hub, which is a directory here."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tests.hf_models import build
from tests.saving.test_lens_file import TOKENS, attach, logits

import polylens
from polylens import ArtifactError
from polylens.saving import hub

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

REPO = "someone/polynomials"
ADDRESS = f"hf://{REPO}"


class Directory:
    """HfApi and hf_hub_download over directories root/revision/repo; `calls` is what was asked."""

    def __init__(self, root):
        self.root, self.calls, self.offline = Path(root), [], False

    def folder(self, repo_id, revision):
        return self.root / (revision or "main") / repo_id

    def HfApi(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create_repo", private))
        self.folder(repo_id, None).mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id, *, branch, exist_ok=False):
        self.folder(repo_id, branch).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message):
        folder = self.folder(repo_id, revision)
        assert folder.is_dir(), "no such revision"
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        self.calls.append(("commit", commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(self, repo_id, filename, *, revision=None, token=None):
        self.calls.append(("download", token))
        path = self.folder(repo_id, revision) / filename
        if self.offline:
            raise LocalEntryNotFoundError("no connection")
        if not path.exists():
            raise EntryNotFoundError(f"404: {path}")
        return str(path)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    stand_in = Directory(tmp_path)
    monkeypatch.setattr(hub, "HfApi", stand_in.HfApi)
    monkeypatch.setattr(hub, "hf_hub_download", stand_in.hf_hub_download)
    return stand_in


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def pushed(directory, model):
    with attach(model) as lens:
        lens.push_to_hub(REPO)
    return directory


def test_the_stand_in_takes_what_the_hub_takes():
    import inspect

    for name in ("create_repo", "create_branch", "upload_folder"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        mine = inspect.signature(getattr(Directory, name)).parameters
        assert set(mine) <= set(real), name
    real = inspect.signature(huggingface_hub.hf_hub_download).parameters
    assert {"repo_id", "filename", "revision", "token"} <= set(real)


def test_what_was_pushed_comes_back(directory, model):
    with attach(model) as lens:
        report = lens.report(TOKENS, progress=False)
        url = lens.push_to_hub(REPO, report, token="secret", private=True, commit_message="mine")
        expected, summary = logits(lens), lens.inputs_summary
    assert url == f"https://hub/{REPO}/commit/1"
    assert directory.calls == [
        ("token", "secret"),
        ("create_repo", True),
        ("download", "secret"),
        ("commit", "mine"),
    ]
    assert {p.name for p in directory.folder(REPO, None).iterdir()} == {hub.FILE, "README.md"}
    with polylens.load(ADDRESS, model, token="mine") as lens:
        assert torch.equal(logits(lens), expected)
        assert (lens.inputs_summary, lens.saved_report) == (summary, report)
    assert directory.calls[-1] == ("download", "mine")


def test_the_card_tells_what_a_reader_needs(directory, model):
    named = copy.deepcopy(model)
    named.config.name_or_path = "someone/llama"
    with attach(named) as lens:
        report = lens.report(TOKENS, progress=False)
        lens.push_to_hub(REPO, report)
        summary = lens.inputs_summary
    found = huggingface_hub.ModelCard.load(directory.folder(REPO, None) / "README.md")
    assert found.data.base_model == "someone/llama"
    assert found.data.library_name == "polylens"
    assert "polylens" in found.data.tags
    assert f'polylens.load("{ADDRESS}", model)' in found.text
    assert summary in found.text
    assert polylens.__version__ in found.text
    table = [line for line in found.text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0][:4] == ["layer", "R² deg 1", "R² deg 2", "R² deg 3"]
    assert [row[0] for row in cells[2:]] == ["0", "1", "all"]
    for row in report:
        shown = next(c for c in cells if c[0] == str(row.layer))
        assert float(shown[1]) == pytest.approx(row.r2[1], abs=5e-5)
        delta = shown[cells[0].index("ΔCE deg 3")]
        assert float(delta) == pytest.approx(row.delta_ce, abs=5e-5)
    assert report.worst
    assert "seq:pos" not in found.text


def test_without_a_report_or_an_origin(directory, model, tmp_path):
    local = copy.deepcopy(model)
    local.config.name_or_path = str(tmp_path)
    with attach(local) as lens:
        lens.push_to_hub(REPO)
        path = directory.folder(REPO, None) / "README.md"
        assert huggingface_hub.ModelCard.load(path).data.base_model is None
        lens.push_to_hub(REPO, base_model="someone/llama")
        assert huggingface_hub.ModelCard.load(path).data.base_model == "someone/llama"
    assert "No report" in path.read_text()


@pytest.mark.parametrize(
    "text", ["# Mine", "---\nlibrary_name: transformers\n---\n# Mine", "---\n[\n---\n", ""]
)
def test_a_card_by_somebody_else_stays(directory, model, text):
    folder = directory.folder(REPO, None)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(text)
    with attach(model) as lens:
        lens.push_to_hub(REPO)
        expected = logits(lens)
    assert (folder / "README.md").read_text() == text
    with polylens.load(ADDRESS, model) as lens:
        assert torch.equal(logits(lens), expected)


def test_a_loaded_lens_keeps_its_report_when_pushed(directory, model):
    with attach(model) as lens:
        report = lens.report(TOKENS, loss=False, progress=False)
        lens.push_to_hub(REPO, report)
    with polylens.load(ADDRESS, model) as lens:
        lens.push_to_hub("someone/else")
    with polylens.load("hf://someone/else", model) as lens:
        assert lens.saved_report == report


def test_revisions_are_apart(directory, model):
    with attach(model, degree=1) as lens:
        lens.push_to_hub(REPO, revision="linear")
    with polylens.load(ADDRESS, model, revision="linear") as lens:
        assert lens.degree == 1
    with pytest.raises(ArtifactError, match=rf"{REPO} has no {hub.FILE}; upload"):
        polylens.load(ADDRESS, model)
    with pytest.raises(ArtifactError, match="at revision other"):
        polylens.load(ADDRESS, model, revision="other")
    assert polylens.attached(model) is None


def test_no_connection_is_not_taken_for_a_missing_file(pushed, model):
    pushed.offline = True
    with pytest.raises(LocalEntryNotFoundError):
        polylens.load(ADDRESS, model)


def test_a_damaged_file_is_refused(pushed, model):
    path = pushed.folder(REPO, None) / hub.FILE
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{REPO}: .*damaged"):
        polylens.load(ADDRESS, model)
    assert polylens.attached(model) is None


def test_another_model_is_refused(pushed):
    with pytest.raises(ArtifactError, match=rf"{REPO}: .*another model"):
        polylens.load(ADDRESS, build("gpt2"))


def test_a_stale_lens_uploads_nothing(directory, model):
    model = copy.deepcopy(model)
    with attach(model) as lens:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        with pytest.raises(polylens.StalePolynomialError):
            lens.push_to_hub(REPO)
    assert not directory.folder(REPO, None).exists()


def test_what_is_no_repository_is_refused(directory, model, tmp_path):
    with pytest.raises(polylens.InvalidInputError, match="give hf://user/name"):
        polylens.load("hf://one/two/three", model)
    with pytest.raises(polylens.InvalidInputError, match="of a repository on the Hub"):
        polylens.load(tmp_path / "lens", model, revision="main")
    assert polylens.attached(model) is None
