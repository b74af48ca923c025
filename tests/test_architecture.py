"""The house: which folder may import which, counting every import; and that import is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import polylens

ROOT = Path(polylens.__file__).parent

# Lowest first: a room imports from those in front of it only, and its own files in no circle.
ROOMS = (
    *("errors", "checks", "devices", "ranks", "brief", "drawing", "files", "activations"),
    *("inputs", "normal_forms"),
    *("polynomials", "fitting", "hosts", "calibration", "installed", "report", "saving"),
    *("lens", "attachment", "demo", "analysis", "training", "cli", "__init__", "__main__"),
)


def modules():
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def imports(path, known):
    """Modules of polylens that a file imports, anywhere in it: deferred, or for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        yield from (name for name in names if name in known)


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def upward(graph):
    rank = {name: i for i, name in enumerate(ROOMS)}
    pairs = ((a, b) for a, targets in graph.items() for b in targets)
    return [(a, b) for a, b in pairs if rank[room(a)] < rank[room(b)]]


def circles(graph):
    """What is left when modules that import no other one are taken away, again and again."""
    left = {module: set(targets) - {module} for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        left = {module: targets for module, targets in left.items() if module not in free}
    return sorted(left)


def graph_of_source():
    found = modules()
    return {module: set(imports(path, found)) for module, path in found.items()}


def test_every_file_has_a_room():
    assert {room(module) for module in modules()} == set(ROOMS)


def test_few_modules_are_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_imports_go_down_only():
    assert upward(graph_of_source()) == []


def test_no_circle_among_files():
    assert circles(graph_of_source()) == []


def test_the_checks_notice_deferred_imports_and_circles(tmp_path):
    path = tmp_path / "errors.py"
    path.write_text("def f():\n    from polylens.lens import Lens\n    return Lens\n")
    found = set(imports(path, modules()))
    assert found == {"polylens.lens"}
    graph = {"polylens.errors": found, "polylens.lens": {"polylens.errors"}}
    assert upward(graph) == [("polylens.errors", "polylens.lens")]
    assert circles(graph) == ["polylens.errors", "polylens.lens"]


def test_import_loads_no_framework_and_no_analysis():
    code = (
        "import sys, polylens; "
        "heavy = {'transformer_lens', 'nnsight', 'transformers', 'matplotlib', 'sklearn', "
        "'scipy', 'typer', 'huggingface_hub', 'rich', 'polylens.analysis'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
