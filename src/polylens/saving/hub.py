"""The polynomials of a model on the Hugging Face Hub: the file of `Lens.save` and a model card."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from polylens import __version__
from polylens.attachment import load
from polylens.errors import ArtifactError
from polylens.report.rendering import to_markdown
from polylens.report.report import Report

if TYPE_CHECKING:
    from polylens.lens import Lens

FILE = "polylens.safetensors"
CARD = "README.md"
LIBRARY = "polylens"
TAGS = ["polylens", "interpretability", "polynomial"]


def from_hub(
    repo_id: str,
    model: Any,
    *,
    example_inputs: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "Lens":
    """Attach the polynomials that `Lens.push_to_hub` uploaded; `polylens.load` from the Hub.

    Args:
        repo_id: "user/name".
        model, example_inputs: as in `attach`; any host with the weights they were fitted to.
        revision: branch, tag or commit.
        token: of the Hub; by default the one of `hf auth login`.

    Raises:
        ArtifactError: a repository without polynomials; otherwise as `polylens.load`.
        OSError: no such repository or revision, no access to it, or no connection.
    """
    path = _download(repo_id, FILE, revision, token)
    if path is None:
        raise ArtifactError(
            f"{repo_id} has no {FILE}"
            f"{'' if revision is None else f' at revision {revision}'}; upload one with "
            "lens.push_to_hub, or load an exported model with polylens.load_exported"
        )
    try:
        return load(path, model, example_inputs)
    except ArtifactError as error:
        raise ArtifactError(f"{repo_id}: {error}") from error


def push(
    lens: "Lens",
    repo_id: str,
    report: Report | None,
    *,
    base_model: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """`Lens.push_to_hub`."""
    report = lens.saved_report if report is None else report
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        lens.save(Path(folder) / FILE, report)
        made = card(lens, repo_id, report, base_model or _base_model(lens))
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not _has_a_card_of_its_own(repo_id, revision, token):
            made.save(Path(folder) / CARD)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(done.commit_url)


def _download(
    repo_id: str, name: str, revision: str | None, token: str | bool | None
) -> str | None:
    """Where a file of the repository is now, None if it has none of that name."""
    try:
        return hf_hub_download(repo_id, name, revision=revision, token=token)
    except LocalEntryNotFoundError:  # also an EntryNotFoundError: the Hub could not be asked
        raise
    except EntryNotFoundError:
        return None


def _has_a_card_of_its_own(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the repository has a model card that polylens did not write."""
    path = _download(repo_id, CARD, revision, token)
    if path is None:
        return False
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return f"library_name: {LIBRARY}" not in lines


def card(lens: "Lens", repo_id: str, report: Report | None, base_model: str | None) -> ModelCard:
    """What the polynomials are of and fitted to, how good they are, and how to load them."""
    data = ModelCardData(base_model=base_model, library_name=LIBRARY, tags=TAGS)
    first = "stays true under `replaced`" if lens.exclude_first else "is replaced like the others"
    lines = [
        f"# Polynomials of the MLPs of {base_model or lens.model_name}",
        "",
        f"Polynomials of degree {lens.degree} (and every lower one) of {len(lens)} MLPs, made by "
        f"polylens {__version__}. They belong to the weights they were fitted to, which are not "
        "in this repository; loading onto others is refused.",
        "",
        "```python",
        "import polylens",
        f'lens = polylens.from_hub("{repo_id}", model)  # model: {base_model or lens.model_name}',
        "```",
        "",
        f"- Input model: {lens.inputs_summary}.",
        f"- Position 0 of a sequence {first}.",
        "",
        "## How good they are",
        "",
        "No report was made." if report is None else to_markdown(report),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _base_model(lens: "Lens") -> str | None:
    """Where on the Hub the model is from, if it says so."""
    config = getattr(lens.host.module, "config", None)
    name = getattr(config, "name_or_path", None)
    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
