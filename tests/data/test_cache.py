"""The cache's key covers the user's code: a change in anything that makes examples is a miss, any other is a hit."""

import importlib
import inspect
import linecache
import sys
import threading
from functools import lru_cache, partial
from types import ModuleType

import pytest

from oumi_pl.data import corpus, examples, store
from oumi_pl.data.code import code_of, settings_of
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.types import Text
from tests.tiny import write_jsonl

FILES = {
    "own_data.py": (
        "import own_words\n"
        "import own_package.sub.case\n"
        "from oumi_pl.data.sft import SFTData\n"
        "from oumi_pl.types import Text\n"
        "from own_base import Base\n"
        "from own_constants import ENDING\n"
        "def helper(text):\n"
        "    return text + ENDING\n"
        "def read(row):\n"
        "    from own_lazily import trimmed\n"
        "    return Text(helper(trimmed(own_words.named(own_package.sub.case.lower(row['x'])))), 'q')\n"
        "class OwnData(Base, SFTData):\n"
        "    formats = ((read, ('x',)),)\n"
        "    def encode(self, records):\n"
        "        return super().encode(records)\n"
    ),
    "own_base.py": "class Base:\n    def encode(self, records):\n        return super().encode(records)\n",
    "own_words.py": "from own_deeper import NAME\ndef named(text):\n    return NAME + text\n",
    "own_deeper.py": "NAME = 'a'\n",
    "own_constants.py": "ENDING = '.'\n",
    "own_lazily.py": "def trimmed(text):\n    return text.strip()\n",
    "own_package/__init__.py": "SIZE = 1\n",
    "own_package/sub/__init__.py": "",
    "own_package/sub/case.py": "from ..more import half\ndef lower(text):\n    return half(text.lower())\n",
    "own_package/more.py": "def half(text):\n    return text[: len(text) // 2]\n",
    "own_unrelated.py": "def read(row):\n    return None\n",
}

EDITS = {
    "the format function": ("own_data.py", "'q')", "'question')"),
    "a helper in the same file": ("own_data.py", "text + ENDING", "text + ENDING + ENDING"),
    "a method of the data class": ("own_data.py", "super().encode(records)", "super().encode(records[::-1])"),
    "a base of the data class": ("own_base.py", "super().encode(records)", "super().encode(records[::-1])"),
    "an imported module": ("own_words.py", "NAME + text", "NAME + NAME + text"),
    "a module that an imported one imports": ("own_deeper.py", "'a'", "'b'"),
    "a module of which a constant is imported": ("own_constants.py", "'.'", "'!'"),
    "a module that is imported inside a function": ("own_lazily.py", "strip()", "rstrip()"),
    "a submodule of a package": ("own_package/sub/case.py", "lower()", "upper()"),
    "the package above it": ("own_package/__init__.py", "1", "2"),
    "a relative import": ("own_package/more.py", "// 2", "// 3"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Imports `own_data` as a new process would, after a change in one of the files."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)

    def load(file=None, old="", new=""):
        if file is not None:
            text = (tmp_path / file).read_text()
            assert old in text
            (tmp_path / file).write_text(text.replace(old, new))
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("own_data")

    yield load
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.fixture
def written(monkeypatch):
    """Counts what is made because the cache lacks it."""
    counted = []
    for module, name in ((store, "write_store"), (corpus, "write_shards")):
        write = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, write=write, **kwargs: counted.append(1) or write(*a, **kwargs))
    return counted


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"x": f" Row {i}"} for i in range(4)])


def prepare(cls, rows, **source):
    data = cls(Source(rows, **source), tokenizer=ByteTokenizer(), max_length=64)
    data.prepare_data()
    return data


WAYS = {
    "the formats of a data class": lambda module, rows: prepare(module.OwnData, rows),
    "a source's format": lambda module, rows: prepare(SFTData, rows, format="own_data.read"),
    "a document's format": lambda module, rows: prepare(PretrainData, rows, format="own_data.read"),
}


@pytest.mark.parametrize("way", WAYS)
def test_unchanged_code_hits_the_cache_and_so_does_a_change_elsewhere(own, written, rows, way):
    WAYS[way](own(), rows)
    assert len(written) == 1
    for edit in ((), ("own_unrelated.py", "None", "row")):
        WAYS[way](own(*edit), rows)
        assert len(written) == 1


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", WAYS)
def test_changed_code_misses_the_cache(own, written, rows, way, edit):
    WAYS[way](own(), rows)
    module = own(*EDITS[edit])
    WAYS[way](module, rows)
    assert len(written) == 2
    assert str(module.read({"x": " Row 1"}).text)  # and it runs


def test_a_key_of_the_functions_alone_is_caught(own, written, rows, monkeypatch):
    """A planted fault: with a key of nothing but their own source, most changes hit the cache."""
    for module in (store, examples, corpus):
        monkeypatch.setattr(module, "code_of", lambda *parts: "".join(map(inspect.getsource, parts)))
    missed = []
    for edit, change in EDITS.items():
        for changed in ((), change):
            module, before = own(*changed), len(written)
            for way in WAYS.values():
                way(module, rows)
        missed += [edit] if len(written) == before + len(WAYS) else []
    assert missed == ["the format function"]


def test_libraries_and_this_package_are_left_out(own):
    assert code_of(SFTData, Text, pytest.fixture, inspect.getsource) == code_of()
    assert code_of(own().OwnData) == code_of(own().OwnData, SFTData, pytest.fixture)


def test_a_changed_file_that_does_not_parse_is_another_key(own):
    """It is imported inside a function, so that its mistake shows only when that runs."""
    before = code_of(own().read)
    assert code_of(own("own_lazily.py", "def", "def def").read) != before


# ---- what was typed into a notebook or an interpreter

CELL = "import own_words\ndef helper(text):\n    return text\ndef read(row):\n    return helper(row['x'])\n"


@pytest.fixture
def typed(own, monkeypatch):
    """Runs a cell in a `__main__` without a file; its source is known as a notebook's is, or not."""
    own()

    def run(source, readable=True):
        main = ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", main)
        name = f"<cell {abs(hash(source))}>"
        linecache.cache.pop(name, None)
        if readable:
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), main.__dict__)
        return main.read

    return run


def test_what_was_typed_is_hashed_with_the_functions_and_modules_that_it_may_use(typed, own):
    before = code_of(typed(CELL))
    assert code_of(typed(CELL)) == before
    assert code_of(typed(CELL.replace("return text", "return text + text"))) != before
    assert code_of(typed(CELL.replace("row['x']", "row['y']"))) != before
    own("own_deeper.py", "'a'", "'b'")
    assert code_of(typed(CELL)) != before


def test_code_whose_source_is_unknown_never_hits_the_cache(typed):
    read = typed(CELL, readable=False)
    assert code_of(read) != code_of(read)


def test_a_class_of_an_interpreter_without_source_trains(typed, rows):
    source = "from oumi_pl.data.sft import SFTData\nfrom oumi_pl.types import Text\n" + CELL.replace(
        "return helper(row['x'])", "return Text(helper(row['x']), 'q')"
    )
    typed(source + "class Own(SFTData):\n    formats = ((read, ('x',)),)\n", readable=False)
    data = prepare(sys.modules["__main__"].Own, rows)
    data.setup("fit")
    assert data.report()["train"]["kept"] == 4


# ---- values that no file shows


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("a constant", "ENDING = '.'", "ENDING = '!'"),
        ("a set", "KEPT = {'a', 'b'}", "KEPT = {'a', 'c'}"),
        ("a table", "TABLE = {'a': [1, 2]}", "TABLE = {'a': [1, 3]}"),
        ("a function in a table", "TABLE = {'a': [1, 2]}", "TABLE = {'a': lambda x: x}"),
        ("a default", "def helper(text, n=1)", "def helper(text, n=2)"),
        ("an object", "rule = Rule(3)", "rule = Rule(4)"),
        ("an array", "array = np.arange(3)", "array = np.arange(4)"),
    ],
)
def test_values_that_a_typed_function_uses_are_part_of_the_key(typed, name, old, new):
    cell = (
        "import numpy as np\n"
        "ENDING = '.'\nKEPT = {'a', 'b'}\nTABLE = {'a': [1, 2]}\narray = np.arange(3)\nunused = 1\n"
        "class Rule:\n    def __init__(self, n):\n        self.n = n\n"
        "def helper(text, n=1):\n    return text * n\n"
        "rule = Rule(3)\n"
        "def read(row):\n    return helper(row['x']) + ENDING, row in KEPT, TABLE, rule.n, array\n"
    )
    assert old in cell
    before = code_of(typed(cell))
    assert code_of(typed(cell)) == before
    assert code_of(typed(cell.replace("unused = 1", "unused = 2"))) == before
    assert code_of(typed(cell.replace(old, new))) != before, name


def test_a_constant_that_is_set_while_running_is_part_of_the_key(own):
    module = own()
    before = code_of(module.read)
    module.own_words.NAME, module.ENDING = "b", "?"
    assert code_of(module.read) != before


def test_partial_functions_methods_and_callable_objects_have_keys_of_their_own(own):
    read = own().read

    class Reader:
        def __init__(self, n):
            self.n = n

        def read(self, row):
            return row[: self.n]

        __call__ = read

    one, two = Reader(1), Reader(2)
    keys = [code_of(x) for x in (read, partial(read, n=1), partial(read, n=2), one, two, one.read, two.read)]
    assert len(set(keys)) == len(keys)
    assert keys[2:4] == [code_of(partial(read, n=2)), code_of(Reader(1))]
    cached = lru_cache(read)
    assert code_of(cached) == code_of(lru_cache(own().read))
    assert code_of(cached) != code_of(lru_cache(Reader(1).read))


def test_functions_that_differ_only_in_the_order_of_what_they_use_have_other_keys():
    a, b = (lambda x: x), (lambda x: -x)

    def both(*functions):
        return lambda x: [f(x) for f in functions]

    assert len({code_of(both(a, b, a)), code_of(both(a, b, b)), code_of(both(b, a, b))}) == 3


def test_what_can_not_be_hashed_never_hits_the_cache():
    lock = threading.Lock()

    def read(row):
        return lock

    assert code_of(read) != code_of(read)


def test_attributes_that_the_own_methods_read_are_part_of_the_key_and_others_are_not(own):
    class Data(SFTData):
        def __init__(self, *args, suffix, note="", **kwargs):
            super().__init__(*args, **kwargs)
            self.suffix, self.note = suffix, note

        @property
        def ending(self):
            return self.suffix * 2

        def encode(self, records):
            return super().encode([Text(record.text + self.ending, record.prompt) for record in records])

    first = settings_of(Data(suffix="."))
    assert settings_of(Data("other.jsonl", suffix=".", note="x", batch_size=2)) == first
    assert settings_of(Data(suffix="!")) != first


def test_functions_of_a_namespace_without_a_module_have_keys(own):
    def made(ending):
        names = {"__name__": "a_namespace"}
        exec(f"ENDING = {ending!r}\ndef read(row):\n    return row + ENDING\n", names)
        return names["read"]

    assert code_of(made(".")) == code_of(made(".")) != code_of(made("!"))
