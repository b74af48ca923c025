"""The layers of the code: imports go down only, modules stay small, import is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import polylens

ROOT = Path(polylens.__file__).parent
LIMIT = 400

# Lowest first; a module may import from its own row and from rows above it here.
LAYERS = (
    ("errors", "hermite", "horner", "monomials"),
    ("activations", "inputs", "tokens", "selection", "storage", "offload"),
    ("custom", "mixture", "samples"),
    ("weights", "quadratic"),
    ("preactivation",),
    ("quality", "clipping"),
    ("records",),
    ("approximation",),
    ("polynomial", "dense"),
    ("nested", "quadratic_moments"),
    ("conjugate_gradients",),
    ("closed_form", "joint", "mixture_fit", "neuron_gram", "normal_equations"),
    ("global_fit", "joint_gram", "tails"),
    ("sample_fit",),
    ("fit",),
    ("hosts",),
    ("lockstep", "estimators", "emitter", "sampling", "scoring", "rendering"),
    ("calibration", "artifact", "export"),
    ("checkpoint", "report"),
    ("worst",),
    ("losses",),
    ("measuring",),
    ("lens",),
    ("attachment",),
    ("analysis", "hub", "trace", "training"),
    ("plots", "figures", "demo", "loading"),
    ("page",),
    ("cli", "__main__", "__init__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path):
    """(polylens submodule, at module level) of every import, deferred ones included."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "polylens":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            for name in names:
                yield name, id(node) in top


def upward_imports(path, name):
    return [
        (name, target)
        for target, at_top in imports(path)
        if at_top and target in RANK and RANK[target] > RANK[name]
    ]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path, path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_a_layer():
    assert {name for _, name in modules()} <= RANK.keys()


def test_imports_go_down_only():
    assert [pair for path, name in modules() for pair in upward_imports(path, name)] == []


def test_the_check_notices_an_upward_import(tmp_path):
    path = tmp_path / "hermite.py"
    path.write_text("from polylens.lens import attach\n")
    assert upward_imports(path, "hermite") == [("hermite", "lens")]


def test_hosts_know_no_mathematics():
    allowed = {"errors", "activations", "weights", "hosts"}
    for path in (ROOT / "hosts").glob("*.py"):
        assert {target for target, _ in imports(path)} <= allowed, path.name


def test_modules_are_small():
    long = [path.name for path, _ in modules() if len(path.read_text().splitlines()) > LIMIT]
    assert long == []


def test_import_loads_no_framework():
    code = (
        "import sys, polylens; "
        "heavy = {'transformer_lens', 'nnsight', 'transformers', 'matplotlib', 'sklearn', "
        "'scipy', 'typer'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
