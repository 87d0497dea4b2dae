"""Imports point one way, and the core stays light."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT

SOURCE = ROOT / "src" / "slimming"
FREE = {"errors", "files", "options", "quiet"}  # all may import them
ROOMS = {  # room -> rooms it may import, beside the free ones
    "errors": set(),
    "files": set(),
    "options": set(),
    "quiet": set(),
    "channels": set(),
    "detection": set(),
    "models": {"detection"},
    "data": set(),
    "records": set(),
    "report": {"channels", "records"},
    "untrusted": set(),
    "checkpoint": {"channels", "models", "records", "untrusted"},
    "reference": {"channels", "checkpoint", "untrusted"},
    "deploy": {"channels", "checkpoint", "records"},
    "training": {"channels", "checkpoint", "records"},
    "config": {"channels", "folders", "ranks"},
    "folders": {"ranks"},
    "ranks": set(),
    "stages": {
        *("channels", "models", "data", "report", "checkpoint", "reference", "training", "config", "folders", "ranks"),
        *("records", "deploy", "detection"),
    },
    "entry": {"config", "folders", "ranks", "records", "stages"},
    "__init__": set(),
}
HEAVY = {
    "channels": {"torch"},
    "detection": {"torch", "torchvision"},
    "models": {"torch", "torchvision", "timm"},
    "checkpoint": {"torch"},
    "untrusted": {"torch"},
}  # all they may import


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "slimming":
                yield from (f"slimming.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in _imports(path):
        top, _, rest = name.partition(".")
        if top == "slimming":
            target = rest.split(".")[0]
            assert target in ROOMS[room] | {room} | FREE, f"{room} must not import {name}"
        elif room in HEAVY and top not in sys.stdlib_module_names:
            assert top in HEAVY[room] | {"PIL"}, f"{room} must not import {name}"


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_torch():
    assert _run("import sys, slimming; print('torch' in sys.modules)").strip() == "False"


def test_the_core_needs_neither_lightning_nor_hydra():
    code = "import sys, slimming; slimming.load, slimming.cost, slimming.Penalty; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in _run(code).split()}
    assert "torch" in loaded
    assert not loaded & {"lightning", "hydra", "omegaconf", "matplotlib"}


@pytest.mark.parametrize("argument", ["--cfg job", "--help", "sparsity=-1"])
def test_help_and_config_errors_do_not_wait_for_torch(argument):
    code = (
        f"import sys, atexit; sys.argv = ['train.py', *{argument.split()!r}]\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
        "import runpy; runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "TORCH False" in done.stdout
