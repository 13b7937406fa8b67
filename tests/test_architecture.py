"""The shape of the code: small files and functions, no TRL in native training, nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "oumi_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 330
LONGEST_FUNCTION = 60


def test_files_and_functions_are_short():
    long = [
        f"{f.relative_to(PACKAGE)}: {n} lines" for f in FILES if (n := len(f.read_text().splitlines())) > LONGEST_FILE
    ]
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                # a constructor's arguments are the schema of a recipe: its length is theirs
                if lines > LONGEST_FUNCTION and node.name != "__init__":
                    long.append(f"{file.relative_to(PACKAGE)}: {node.name} has {lines} lines")
    assert not long


def imported(code):
    heavy = ("torch", "lightning", "transformers", "trl", "datasets", "peft")
    script = f"import sys; {code}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import oumi_pl.__main__", {"torch", "lightning", "transformers", "trl", "datasets", "peft"}),
        ("import oumi_pl.cli", {"trl", "datasets", "peft"}),
    ],
)
def test_imports_are_lazy(code, forbidden):
    assert not forbidden & set(imported(code))
