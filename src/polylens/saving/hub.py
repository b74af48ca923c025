"""The polynomials of a model on the Hugging Face Hub: the file of `Lens.save` and a model card."""

import os
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from polylens.errors import ArtifactError, InvalidInputError
from polylens.installed.installation import Installation
from polylens.report.report import Report

FILE = "polylens.safetensors"
CARD = "README.md"
LIBRARY = "polylens"
TAGS = ["polylens", "interpretability", "polynomial"]


def download(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """Where the file that `upload` put there is now.

    Raises:
        InvalidInputError: not the name of a repository.
        ArtifactError: a repository without polynomials.
        OSError: no such repository or revision, no access to it, or no connection.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidInputError(
            f"{repo_id!r} is no repository on the Hub ({error}); give hf://user/name"
        ) from error
    path = _download(repo_id, FILE, revision, token)
    if path is None:
        raise ArtifactError(
            f"{repo_id} has no {FILE}"
            f"{'' if revision is None else f' at revision {revision}'}; upload one with "
            "lens.push_to_hub, or load an exported model with polylens.load_exported"
        )
    return path


def upload(
    path: Path,
    card: ModelCard,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Put a file into a repository, with this card unless it has one; the commit's address.

    Args:
        path: of the file, named FILE, alone in its folder.
        private, token, revision, commit_message: as in `Lens.push_to_hub`.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not _has_a_card_of_its_own(repo_id, revision, token):
        card.save(path.with_name(CARD))
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=path.parent,
        revision=revision,
        commit_message=commit_message,
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


def card(
    lens: Installation, repo_id: str, report: Report | None, base_model: str | None
) -> ModelCard:
    """What the polynomials are of and fitted to, how good they are, and how to load them."""
    base_model = base_model or _base_model(lens)
    data = ModelCardData(base_model=base_model, library_name=LIBRARY, tags=TAGS)
    lines = [
        f"# Polynomials of the MLPs of {base_model or lens.model_name}",
        "",
        f"Polynomials of degree {lens.degree} (and every lower one) of {len(lens)} MLPs, made by "
        f"polylens {version('polylens')}. They belong to the weights they were fitted to, which "
        "are not in this repository; loading onto others is refused.",
        "",
        "```python",
        "import polylens",
        f'lens = polylens.load("hf://{repo_id}", model)  # model: {base_model or lens.model_name}',
        "```",
        "",
        f"- Input model: {lens.inputs_summary}.",
        "",
        "## How good they are",
        "",
        "No report was made." if report is None else report.to_markdown(),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _base_model(lens: Installation) -> str | None:
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
