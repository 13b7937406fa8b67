"""Examples on disk: what is read is what was written, whatever a kind of example adds."""

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.data import cache, store
from oumi_pl.data.store import ExampleStore, cache_root, write_store
from oumi_pl.errors import UserError
from oumi_pl.types import Example, PreferenceExample


@dataclass(frozen=True)
class Scored(Example):
    """A kind of example of one's own."""

    score: float = 0.0
    turns: int = 0
    checked: bool = False


def random_example(rng, kind=Example, **added):
    length = int(rng.integers(2, 9))
    ids = rng.integers(0, 1000, length).astype(np.int32)
    return kind(ids, np.concatenate([[False], rng.random(length - 1) < 0.5]), **added)


def equal(one, other):
    same = one.input_ids.tolist() == other.input_ids.tolist() and one.loss_mask.tolist() == other.loss_mask.tolist()
    return same and type(one) is type(other)


def test_examples_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    examples = [random_example(rng) for _ in range(20)]
    made = write_store(tmp_path / "store", examples, {"rows": 20})
    for opened in (made, ExampleStore(tmp_path / "store")):
        assert all(equal(a, b) for a, b in zip(examples, map(opened.__getitem__, range(20)), strict=True))
        assert opened.report == {"rows": 20}
        assert opened.added == {}


@pytest.mark.parametrize(
    "added",
    [
        [{"score": 0.5, "turns": 3, "checked": True}, {"score": -1.0}, {"turns": 7}],
        [{"score": 1.5}] * 3,
    ],
)
def test_fields_that_a_kind_of_example_adds_are_kept(tmp_path, added):
    rng = np.random.default_rng(0)
    examples = [random_example(rng, Scored, **fields) for fields in added]
    opened = write_store(tmp_path / "store", examples, {})
    for i, example in enumerate(examples):
        assert equal(opened[i], example)
        for name in ("score", "turns", "checked"):
            value = getattr(opened[i], name)
            assert value == getattr(example, name)
            assert type(value) is type(getattr(example, name))
    assert opened.added["turns"].tolist() == [example.turns for example in examples]


def test_pairs_come_back_with_their_borders_and_margins(tmp_path):
    rng = np.random.default_rng(0)
    fields = [{"chosen_start": 1, "rejected_start": 2 + i % 2, "margin": [0.25, float("nan")][i % 2]} for i in range(6)]
    examples = [random_example(rng, PreferenceExample, **added) for added in fields]
    opened = write_store(tmp_path / "store", examples, {})
    assert [opened[i].lengths for i in range(6)] == [example.lengths for example in examples]
    assert np.array_equal([opened[i].margin for i in range(6)], [f["margin"] for f in fields], equal_nan=True)


@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_target_counts(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(store, "COUNTED_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    examples = [random_example(rng) for _ in range(50)]
    opened = write_store(tmp_path / "store", examples, {})
    assert opened.target_counts.tolist() == [example.target_tokens for example in examples]
    assert opened.target_counts.sum() == opened.target_tokens


def test_a_store_without_examples(tmp_path):
    opened = write_store(tmp_path / "store", [], {"rows": 3})
    assert (len(opened), opened.target_tokens, opened.target_counts.shape) == (0, 0, (0,))


def test_kinds_are_not_mixed(tmp_path):
    rng = np.random.default_rng(0)
    for kinds in ((Example, Scored), (Scored, Example)):
        with pytest.raises(TypeError, match=f"a {kinds[1].__name__} among examples of class {kinds[0].__name__}"):
            write_store(tmp_path / "store", [random_example(rng, kind) for kind in kinds], {})
    assert not list(tmp_path.iterdir()), "half a store was left"


def test_all_code_that_makes_examples_is_part_of_the_caches_key(monkeypatch):
    hashed = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: hashed.append(self) or read(self))
    cache._own_code()
    here = Path(store.__file__).parent
    assert {here / "pairs.py", here / "preferences.py", here / "store.py", here.parent / "types.py"} <= set(hashed)
    for file in hashed:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("oumi_pl.data."):
                assert here / f"{node.module.rpartition('.')[2]}.py" in hashed, f"{file.name} needs {node.module}"


def test_a_cache_that_can_not_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match=r"can't make the cache directory .*OUMI_PL_CACHE"):
        cache_root()
