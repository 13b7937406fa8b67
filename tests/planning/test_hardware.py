"""The hardware lines of the recipes are those that a plan gives."""

import re

import pytest

from oumi_pl.config import files
from oumi_pl.planning.hardware import gigabytes, hardware, in_words

FAST = ("pretrain/c4_10m",)
HARDWARE = {name: files.header(files.shipped() / f"{name}.yaml").hardware for name in files.names()}
PLANNED = [name for name, words in HARDWARE.items() if re.match(r"1 GPU with \d+ GB, |1 to 8 GPUs with", words)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PLANNED]
)
def test_the_hardware_of_a_recipe_is_what_its_plan_needs(name):
    assert HARDWARE[name] == hardware(files.shipped() / f"{name}.yaml"), "python benchmarks/hardware.py writes it"


def test_the_hardware_of_all_recipes_for_gpus_is_planned():
    assert {name for name, words in HARDWARE.items() if "GPU" in words} == set(PLANNED)
    assert set(FAST) <= set(PLANNED)


def test_the_readme_names_the_hardware_of_the_recipes():
    readme = (files.shipped().parent / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `") and "/" in line]
    for name in PLANNED:
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert HARDWARE[name] in row.split("|")[3], name


def test_the_words():
    assert in_words({1: 12, 2: 12, 8: 12}) == "1 to 8 GPUs with 12 GB each"
    assert in_words({1: 12, 2: 13, 8: 13}) == "1 GPU with 12 GB, 2 to 8 with 13 GB each"
    longest = in_words({1: 139, 2: 105, 8: 100})
    assert longest == "1 GPU with 139 GB, 2 with 105 GB, 8 with 100 GB"
    assert gigabytes(19_000_000_000) == 20
    assert gigabytes(19_000_000_001) == 21
