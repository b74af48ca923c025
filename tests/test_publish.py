"""Ready lenses: the script that makes and pushes them, on a stand-in for the Hub."""

import importlib.util
import inspect
from pathlib import Path

import huggingface_hub
import pytest

import polylens
from polylens import demo
from polylens.saving import hub
from tests.saving.test_hub import Directory

SCRIPT = Path(__file__).parent.parent / "scripts" / "publish.py"


@pytest.fixture
def publish():
    spec = importlib.util.spec_from_file_location("publish", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hub(Directory):
    def file_exists(self, repo_id, filename):
        return (self.folder(repo_id, None) / filename).exists()

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        (self.folder(repo_id, None) / path_in_repo).write_bytes(path_or_fileobj.read_bytes())


def test_a_list_of_models_is_published_and_what_is_there_is_left(
    publish, tmp_path, monkeypatch, capsys
):
    stand_in = Hub(tmp_path)
    for name in ("file_exists", "upload_file"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert set(inspect.signature(getattr(Hub, name)).parameters) <= set(real)
    for module in (publish, hub):
        monkeypatch.setattr(module, "HfApi", stand_in.HfApi)
    monkeypatch.setattr(hub, "hf_hub_download", stand_in.hf_hub_download)
    text = tmp_path / "text.txt"
    text.write_text(demo.texts()[0][:20_000], encoding="utf-8")
    arguments = ["demo", str(tmp_path / "none"), "--text", str(text), "--owner", "someone"]
    arguments += ["--windows", "4", "--length", "32"]
    assert publish.main(arguments) == 1
    said = capsys.readouterr()
    assert "someone/demo-polylens: https://hub/someone/demo-polylens/commit/1" in said.out
    assert "none-polylens: InvalidInputError" in said.err
    folder = stand_in.folder("someone/demo-polylens", None)
    assert {path.name for path in folder.iterdir()} == {hub.FILE, "README.md", "page.html"}
    assert "Layer 3" in (folder / "page.html").read_text(encoding="utf-8")
    assert "## How good they are" in (folder / "README.md").read_text(encoding="utf-8")
    with polylens.load("hf://someone/demo-polylens", demo.load_model()) as lens:
        assert lens.saved_report.degree == 3
    publish.main(arguments)
    assert "someone/demo-polylens: there already" in capsys.readouterr().out
