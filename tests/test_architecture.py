"""The shape of the code: short functions, few modules at the root, no TRL in native training, lazy heavy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "oumi_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 60


def test_functions_fit_on_a_screen():
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                # the arguments of a constructor are the schema of a recipe: its length is theirs
                if lines > LONGEST_FUNCTION and node.name != "__init__":
                    long.append(f"{file.relative_to(PACKAGE)}: {node.name} has {lines} lines")
    assert not long


def test_the_root_of_the_package_is_small():
    modules = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert modules == {"__main__.py", "errors.py", "train.py", "types.py"}


def imported(code):
    heavy = ("torch", "lightning", "transformers", "trl", "datasets", "peft")
    script = f"import sys; {code}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import oumi_pl.__main__", {"torch", "lightning", "transformers", "trl", "datasets", "peft"}),
        ("import oumi_pl.config.cli", {"trl", "datasets", "peft"}),
    ],
)
def test_imports_are_lazy(code, forbidden):
    assert not forbidden & set(imported(code))


WRITERS = {
    "terminal/screen.py": "moves the cursor",
    "terminal/text.py": "defines `echo`",
    "callbacks/progress.py": "prints numbers, and what `wrapped` or `visible` returned",
    "callbacks/samples.py": "prints what `printable` returned, in colours",
    "callbacks/start.py": "prints what `wrapped` returned, in colours",
    "commands/chat.py": "prints what `visible` returned",
    "commands/convert.py": "prints YAML, which escapes control characters, and comments that `visible` returned",
    "commands/generate.py": "pipes completions as they are",
    "commands/help.py": "prints documentation",
    "commands/recipes.py": "prints what is shipped, in colours",
    "preview/terminal.py": "prints what `visible` returned, in colours",
    "__main__.py": "prints the error as `visible`",
}
"""Files that may print text that they compose without `echo`, and why it holds no escape sequence of anybody else."""


def test_names_and_values_are_printed_without_their_escape_sequences():
    printing = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or all(isinstance(arg, ast.Constant) for arg in node.args):
                continue
            function = ast.unparse(node.func)
            if function == "print" or function in {"sys.stderr.write", "sys.stdout.write", "sys.stdout.writelines"}:
                printing.append(f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert {line.partition(":")[0] for line in printing} == {*WRITERS}
