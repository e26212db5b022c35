"""What a linter cannot see: hidden state, division of money, careless comparison, words that do not belong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("channels/**/*.py"), *ROOT.glob("mppnode/**/*.py")])
MONEY = [ROOT / "channels" / name for name in ("units.py", "model.py", "account.py", "policy.py", "verify.py", "voucher.py")] + [
    *ROOT.glob("mppnode/ledger/*.py"),
    *ROOT.glob("mppnode/pricing/*.py"),
    *ROOT.glob("mppnode/accounts/*.py"),
    ROOT / "mppnode/kernel/rates.py",
    *ROOT.glob("mppnode/treasury/*.py"),
    ROOT / "mppnode/metering/tally.py",
    ROOT / "mppnode/rails/session.py",
]
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MONEY, ids=name_of)
def test_no_true_division_or_float_in_money(path: Path) -> None:
    """Money is integers: no true division, no round(), and no float literal but of seconds that says so in its name."""
    tree = ast.parse(path.read_text())
    seconds = {
        constant
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target).lower().endswith("_s")
        for constant in ast.walk(node.value)
    }
    for node in ast.walk(tree):
        divides = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        assert not divides, f"{name_of(path)} divides: {ast.unparse(node)}"
        if isinstance(node, ast.Constant):
            assert not isinstance(node.value, float) or node in seconds, f"{name_of(path)}:{node.lineno} has a float"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("float", "round"), f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_level_mutable_state(path: Path) -> None:
    """Constants and frozen tables only: whatever can change is built in the composition root and passed."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if isinstance(node.value, MUTABLE) and target != "__all__":
                constant = target.isupper() or target.lstrip("_").isupper()
                annotated = isinstance(node, ast.AnnAssign) and "Final" in ast.unparse(node.annotation)
                assert constant or annotated, f"{name_of(path)}: {target} is mutable module state"


def test_tasks_are_started_in_one_place() -> None:
    """create_task appears in the task owner only (and in task groups, which own theirs)."""
    for path in SOURCES:
        for line in path.read_text().splitlines():
            if ".create_task(" in line and name_of(path) != "mppnode/kernel/tasks.py":
                assert "side.create_task(" in line, f"{name_of(path)}: {line.strip()}"


def test_macs_are_compared_in_constant_time() -> None:
    """Nothing compares a challenge id, a MAC or a digest with == where a stranger chose one side."""
    pattern = re.compile(r"(_mac|\bmac|_secret)\s*==|==\s*\w*(_mac|_secret)\b")
    for path in SOURCES:
        assert not pattern.search(path.read_text()), name_of(path)


def test_no_file_is_too_long() -> None:
    """A file is one idea: at most 600 lines; a function fits a screen."""
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 600, f"{name_of(path)} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 70, f"{name_of(path)}: {node.name} has {length} lines"


def test_public_names_have_docstrings() -> None:
    """Every public function and class says what it promises."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{name_of(path)} has no module docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


def test_lock_files_name_no_registry() -> None:
    """A lock file records what, never from which host."""
    for path in ROOT.rglob("package-lock.json"):
        if "node_modules" not in path.parts:
            assert '"resolved"' not in path.read_text(), path


def test_unfinished_work_is_not_marked_and_left() -> None:
    """No TODO, no NotImplementedError: what is not done is not there."""
    for path in SOURCES:
        text = path.read_text()
        for word in ("TODO", "FIXME", "NotImplementedError"):
            assert word not in text, f"{name_of(path)}: {word}"
