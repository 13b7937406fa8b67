"""The documentation: internal links resolve, lines are short, and examples are the code that they show."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "oumi_pl/callbacks/README.md",
    "oumi_pl/core/README.md",
    "oumi_pl/data/README.md",
    "oumi_pl/rollouts/README.md",
    "recipes/notebooks/README.md",
    "recipes/serve/README.md",
)
LONGEST_LINE = 130


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_resolve(page):
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_outside_of_tables(page):
    lines = [line for line in text_of(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


def test_the_example_of_a_trainer_type_is_the_code_that_is_tested():
    section = text_of("CONTRIBUTING.md").partition("\n## Write a trainer type\n")[2].partition("\n## ")[0]
    code = {line for name in ("thumbs.py", "thumbs_data.py") for line in text_of(f"tests/own/{name}").splitlines()}
    blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    assert blocks
    assert [line for block in blocks for line in block.splitlines() if line not in code] == []
