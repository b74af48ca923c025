"""Ready lenses: fit, measure and push one for each of a list of models.

    python scripts/publish.py openai-community/gpt2 EleutherAI/pythia-70m --text corpus.txt \
        --owner polylens [--heldout-text other.txt] [--sequential] [--private]

Each becomes the repository OWNER/NAME-polylens with the lens, its report inside, a card, and the
page of all layers. Models that are done are skipped unless --again; one that fails is named, and
the others go on. HF_ENDPOINT leads to another Hub than huggingface.co.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

import polylens
from polylens.cli.loading import load_model, token_windows
from polylens.cli.page import html_page
from polylens.saving import hub

PAGE = "page.html"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="hub names or directories")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout-text", type=Path, help="by default what follows in the text")
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--windows", type=int, default=256, help="of --length, to fit and measure")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sequential", action="store_true", help="to replace all layers at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    options = parser.parse_args(arguments)
    api, failed = HfApi(), 0
    for name in options.models:
        repo = f"{options.owner}/{Path(name).name}-polylens"
        try:
            if not options.again and api.file_exists(repo, hub.FILE):
                print(f"{repo}: there already")
                continue
            print(f"{repo}: {publish(name, repo, options)}")
        except Exception as error:  # whatever one model or one upload trips over
            failed += 1
            print(f"{repo}: {type(error).__name__}: {error}", file=sys.stderr)
    return failed


def publish(name: str, repo: str, options: argparse.Namespace) -> str:
    """Fit, measure and push the lens of one model; the address of the commit."""
    model, tokenizer = load_model(name, options.device, options.dtype)
    other = options.heldout_text
    tokens, held_out = token_windows(
        tokenizer,
        options.text.read_text(encoding="utf-8"),
        options.windows,
        options.windows,
        options.length,
        None if other is None else other.read_text(encoding="utf-8"),
    )
    method = polylens.Sequential() if options.sequential else None
    with polylens.attach(model, tokens, degree=options.degree, method=method) as lens:
        report = lens.report(held_out, decode=tokenizer.decode, worst=0)
        base = None if Path(name).exists() else name
        address = lens.push_to_hub(repo, report, base_model=base, private=options.private)
        with TemporaryDirectory() as folder:
            page = Path(folder) / PAGE
            html_page(lens, report, page)
            HfApi().upload_file(
                path_or_fileobj=page,
                path_in_repo=PAGE,
                repo_id=repo,
                commit_message="The page of all layers",
            )
    return address


if __name__ == "__main__":
    sys.exit(main())
