"""For mkdocs: what lies outside of docs/ is linked where the repository is on the web."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/polylens/polylens/blob/main/"
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
# Pages that are files of the repository: where these lie.
INCLUDED = {"benchmarks.md": "benchmarks/RESULTS.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, from where the page lies in the site."""
    here = page.file.src_uri
    if here in INCLUDED:
        markdown = (ROOT / INCLUDED[here]).read_text(encoding="utf-8")
    place = posixpath.dirname(INCLUDED.get(here, posixpath.join("docs", here)))

    def led(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, link[1]))
        if target.startswith("docs/"):
            shown = posixpath.relpath(target, posixpath.dirname(posixpath.join("docs", here)))
        else:
            shown = REPOSITORY + target.removeprefix("../")
        return f"]({shown}{link[2] or ''})"

    return LINK.sub(led, markdown)
