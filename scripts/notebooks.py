"""Make the notebooks of notebooks/*.py, and run them.

    python scripts/notebooks.py [--write] [NAME...]

Each is run from its first cell to its last in a kernel of its own; an error in a cell is an error
here. --write keeps what they show in notebooks/*.ipynb, which is what is committed.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
# Seconds for a cell; a whole notebook takes less than two minutes on two cores.
LIMIT = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="all by default")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    for path in sorted(FOLDER.glob("*.py")):
        if options.names and path.stem not in options.names:
            continue
        began = time.perf_counter()
        notebook = read(path)
        NotebookClient(notebook, timeout=LIMIT, kernel_name="python3").execute()
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s")
        if options.write:
            write(notebook, path.with_suffix(".ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a script, with cells of the same names each time."""
    notebook = jupytext.read(path)
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{path.stem}-{i}".replace("_", "-")[-64:]
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Without times and counters of this run, so that a new run differs where results do."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["execution_count"] = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output["execution_count"] = None
    notebook.metadata.pop("language_info", None)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
