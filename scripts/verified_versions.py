"""The table of verified versions, from the results of test runs.

    python scripts/verified_versions.py [--write] ENVIRONMENT...

Each ENVIRONMENT is a virtual environment with the results of its test run in `tests.xml`
(pytest --junitxml=ENVIRONMENT/tests.xml). Prints the table; --write puts it into
docs/guide/hosts.md.
Exits with 1 if a test of any host failed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "hosts.md"
BEGIN, END = "<!-- verified versions: begin -->", "<!-- verified versions: end -->"
PACKAGES = ("transformer-lens", "nnsight", "transformers", "torch")
ROWS = (*PACKAGES[1:], "Python")

# (file of the tests, name of the test) -> whether it is about the host
HOSTS: dict[str, Callable[[str, str], bool]] = {
    "`HookedTransformer`": lambda file, name: "transformer_lens" in file and "hooked" in name,
    "`TransformerBridge`": lambda file, name: "transformer_lens" in file and "bridge" in name,
    "Hugging Face and torch modules": lambda file, name: file.endswith(
        ("test_torch", "test_moe", "dataflow", "float_inputs")
    ),
    "`nnsight`": lambda file, name: file.endswith("test_nnsight"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environments", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    args = parser.parse_args()
    columns = [column(environment) for environment in args.environments]
    rows = [[label, *(c[label] for c in columns)] for label in columns[0]]
    rule = ["---"] * len(rows[0])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [rows[0], rule, *rows[1:]])
    print(table)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    if any("failed" in cell for row in rows for cell in row):
        sys.exit(1)


def column(environment: Path) -> dict[str, str]:
    """Versions in this environment, and what its tests say about every host."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps([*map(version, {PACKAGES}), platform.python_version()]))"
    )
    command = [str(environment / "bin" / "python"), "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lens, *versions = json.loads(output)
    cells = {"": f"TransformerLens {lens}", **dict(zip(ROWS, versions, strict=True))}
    cases = list(ElementTree.parse(environment / "tests.xml").iter("testcase"))
    for host, about in HOSTS.items():
        results = [outcome(c) for c in cases if about(test_file(c), c.attrib["name"])]
        failed = results.count("failed")
        passed = "✓" if "passed" in results else "–"
        cells[host] = f"{failed} of {len(results)} failed" if failed else passed
    return cells


def test_file(case: ElementTree.Element) -> str:
    parts = case.attrib["classname"].split(".")
    return next((part for part in parts if part.startswith("test_")), "")


def outcome(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


if __name__ == "__main__":
    main()
