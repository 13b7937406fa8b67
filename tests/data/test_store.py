"""Examples on disk: what is read is what was written, with all segments and fields."""

import ast
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.data import store
from oumi_pl.data.store import ExampleStore, cache_root, write_store
from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import DamagedError, write_list
from oumi_pl.types import Example, Segment
from tests.tiny import data
from tests.trees import naive_paths, random_example


def random_examples(n, depth=1, fields=()):
    rng = random.Random(0)
    return [random_example(rng, rng.randint(1, depth), 1000, fields) for _ in range(n)]


def assert_equal(one: Example, other: Example):
    assert (one.input_ids.dtype, one.loss_mask.dtype) == (np.int32, np.bool_)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert one.segments == other.segments
    assert all(isinstance(segment, Segment) for segment in one.segments)
    assert one.fields.keys() == other.fields.keys()
    for name, value in one.fields.items():
        assert type(value) is float
        assert np.array_equal(value, other.fields[name], equal_nan=True)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("fields", [(), ("margin",), ("label", "score of the judge")])
def test_examples_come_back_as_they_were(tmp_path, depth, fields):
    examples = random_examples(30, depth, fields)
    written = write_store(tmp_path / "store", examples, {"rows": 30})
    for opened in (written, ExampleStore(tmp_path / "store")):
        assert len(opened) == 30
        for i, example in enumerate(examples):
            assert_equal(opened[i], example)
        assert opened.report == {"rows": 30}
        assert opened.fields.keys() == set(fields)
        for name in fields:
            np.testing.assert_array_equal(opened.fields[name], [example.fields[name] for example in examples])


def test_a_changed_border_of_a_segment_is_noticed(tmp_path):
    """The comparison above has to be one of segments too, not only of tokens."""
    examples = random_examples(30, depth=3)
    with np.load(write_store(tmp_path / "store", examples, {}).directory / store.TABLES) as tables:
        changed = dict(tables)
    shared = np.flatnonzero(changed["segments"][:, 2] > 1)[0]
    changed["segments"][shared, 2] -= 1
    np.savez(tmp_path / "store" / store.TABLES, **changed)
    write_list(tmp_path / "store")  # else it would be damaged
    opened = ExampleStore(tmp_path / "store")
    assert sum(opened[i].segments != example.segments for i, example in enumerate(examples)) == 1


def test_integers_and_booleans_are_kept_as_numbers(tmp_path):
    """A label of 0 or 1 may be written as what it is; batches hold float32 in any case."""
    examples = [
        replace(example, fields={"turns": i, "desirable": i % 2 == 0}) for i, example in enumerate(random_examples(3))
    ]
    opened = write_store(tmp_path / "store", examples, {})
    assert [opened[i].fields for i in range(3)] == [{"turns": i, "desirable": i % 2 == 0} for i in range(3)]


@pytest.mark.parametrize("depth", [1, 3])
def test_counts_of_targets_and_lengths_are_those_of_the_examples(tmp_path, depth):
    examples = random_examples(50, depth)
    opened = write_store(tmp_path / "store", examples, {})
    assert opened.targets.tolist() == [example.target_tokens for example in examples]
    assert opened.target_tokens == opened.targets.sum()
    assert opened.lengths.tolist() == [len(example.input_ids) for example in examples]
    paths = [naive_paths(example.segments) for example in examples]
    assert opened.longest == max(len(path) for tree in paths for path in tree)
    # every path run alone has this many tokens more
    apart = sum(len(path) for tree in paths for path in tree)
    assert opened.shared == apart - opened.lengths.sum()
    assert (opened.shared > 0) == (depth > 1)


def test_a_store_without_examples(tmp_path):
    opened = write_store(tmp_path / "store", [], {"rows": 3})
    assert (len(opened), opened.target_tokens, opened.targets.shape, opened.lengths.shape) == (0, 0, (0,), (0,))
    assert (opened.longest, opened.shared, opened.fields) == (0, 0, {})


@pytest.mark.parametrize("names", [((), ("margin",)), (("margin",), ()), (("margin",), ("label",))])
def test_examples_with_different_fields_are_refused(tmp_path, names):
    examples = [random_examples(1, fields=fields)[0] for fields in names]
    with pytest.raises(ValueError, match=r"an example with the fields .* among others with"):
        write_store(tmp_path / "store", examples, {})
    assert not list(tmp_path.iterdir()), "half a store was left"


def tree(*segments, mask=None):
    tokens = sum(length for length, *_ in segments)
    mask = [False] + [True] * (tokens - 1) if mask is None else mask
    return Example(np.arange(tokens, dtype=np.int32), np.array(mask), tuple(Segment(*s) for s in segments))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (tree((3,), mask=[True, False, True]), "the first token carries loss"),
        (tree((3,), (2,)), "the first segment of an example has to be its only root"),
        (tree((3,), (2, 0, 4)), "can share 3 tokens at most"),
        (tree((3,), (2, 1, 1)), "a parent before it in the row"),
        (tree((3,), mask=[False, True]), r"3 tokens, 2 entries in the loss mask, segments of \[3\]"),
        (replace(tree((3,)), segments=(Segment(2),)), r"3 tokens, 3 entries in the loss mask, segments of \[2\]"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, example, message):
    """Collating would pair targets with the wrong predictors and say nothing."""
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "store", [tree((3,), (2, 0, 3)), example], {})
    assert not list(tmp_path.iterdir())


def test_all_code_that_makes_examples_is_part_of_the_caches_key(monkeypatch):
    hashed = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: hashed.append(self) or read(self))
    store.own_code()
    here = Path(store.__file__).parent
    assert {here / "pairs.py", here / "preferences.py", here / "store.py", here.parent / "types.py"} <= set(hashed)
    for file in hashed:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("oumi_pl.data."):
                assert here / f"{node.module.rpartition('.')[2]}.py" in hashed, f"{file.name} needs {node.module}"


def test_a_cache_directory_that_can_not_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match=r"can't create the cache directory .*OUMI_PL_CACHE"):
        cache_root()


# ---- damage


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def test_a_flipped_bit_anywhere_in_a_store_is_refused_when_it_is_opened(tmp_path):
    write_store(tmp_path / "store", random_examples(2, depth=1), {"rows": 2})
    for file in (tmp_path / "store").iterdir():
        for place in range(0, file.stat().st_size - 1, 7):
            flip(file, place)
            with pytest.raises(DamagedError, match="store is damaged: it"):
                ExampleStore(tmp_path / "store")
            flip(file, place)
    ExampleStore(tmp_path / "store")


@pytest.mark.parametrize("name", ["input_ids.bin", "loss_mask.bin", "tables.npz", "report.json", "checksums.json"])
@pytest.mark.parametrize("harm", [lambda file: flip(file, 20), os.unlink, lambda file: os.truncate(file, 9)])
def test_a_damaged_cache_is_written_again_with_a_line_that_says_so(tmp_path, capsys, name, harm):
    first = data(tmp_path, 3)
    first.prepare_data()
    ids = first.examples("train")[0].input_ids.tolist()
    (directory,) = (cache_root() / "examples").iterdir()
    whole = {file.name: file.read_bytes() for file in directory.iterdir()}
    harm(directory / name)
    again = data(tmp_path, 3)
    again.prepare_data()
    assert f"the cache folder {directory} is damaged: it" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == whole
    assert again.examples("train")[0].input_ids.tolist() == ids
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
