"""Tokenizing in several processes: the same stores for any number, and errors as in one."""

import json
import os
import signal
import time

import pytest

from oumi_pl.data import processes, store
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.processes import mapped
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import Text
from tests.tiny import conversations, pairs, trainer, write_jsonl


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(store, "ENCODE_BATCH", 5)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stored(tmp_path, monkeypatch, source, number, cls=SFTData, **kwargs):
    """The files of the store that this number of processes writes, and its name in the cache."""
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / f"cache-{number}"))
    data = cls(source, tokenizer=ByteTokenizer(), max_length=64, processes=number, **kwargs)
    (written,) = data.stores("train")
    return written.directory.name, bytes_of(written.directory)


@pytest.mark.parametrize(("cls", "rows"), [(SFTData, conversations), (DPOData, pairs)], ids=["SFT", "DPO"])
def test_stores_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, cls, rows):
    numbered = [row | {"score_chosen": float(i)} for i, row in enumerate(rows(33))]
    file = write_jsonl(tmp_path / "rows.jsonl", numbered)
    one, two, three = (
        stored(tmp_path, monkeypatch, file, n, cls, fields=["score_chosen"] if cls is SFTData else [])
        for n in (1, 2, 3)
    )
    assert one == two == three
    assert len(one[1]) >= 4


def test_any_user_function_works(tmp_path, monkeypatch):
    """Formats are called in the main process, so they may be closures and keep state."""
    seen = []

    def shouting(row):
        seen.append(row)
        return Text(row["messages"][1]["content"].upper(), row["messages"][0]["content"])

    source = Source(write_jsonl(tmp_path / "rows.jsonl", conversations(17)), format=shouting)
    _, one = stored(tmp_path, monkeypatch, source, 1)
    assert stored(tmp_path, monkeypatch, source, 2)[1] == one  # under another name: the function's list has changed
    assert len(seen) == 2 * 17


def test_bad_rows_have_their_file_and_number(tmp_path, monkeypatch):
    rows = conversations(33)
    rows[3] = {"messages": [{"role": "wizard", "content": "?"}]}  # refused by the format
    rows[22] = {"messages": [{"role": "user", "content": "a"}], "weight": 0}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    class Choosy(SFTData):
        def encode(self, records):
            if any(len(record.messages) == 1 for record in records):
                raise UserError("there is no answer")
            return super().encode(records)

    messages = []
    for number in (1, 2, 3):
        with pytest.raises(UserError) as error:
            stored(tmp_path, monkeypatch, file, number, Choosy)
        messages.append(str(error.value))
    assert f"{file}:23" in messages[0]
    assert f"{file}:4" in messages[0]
    assert "there is no answer" in messages[0]
    assert messages[1:] == messages[:1] * 2
    names = [stored(tmp_path, monkeypatch, file, number, Choosy, bad_rows="drop") for number in (1, 2, 3)]
    assert names[1:] == names[:1] * 2
    assert json.loads(names[0][1]["report.json"])["kept"] == 31


def test_a_killed_process_gives_one_message(tmp_path, monkeypatch):
    main = os.getpid()

    class Dying(SFTData):
        def encode(self, records):
            if os.getpid() != main:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(records)

    file = write_jsonl(tmp_path / "rows.jsonl", conversations(33))
    message = "data.processes: one of 2 processes ended before its work did; if memory ran out, use fewer"
    with pytest.raises(UserError, match=message):
        stored(tmp_path, monkeypatch, file, 2, Dying)
    assert not list((tmp_path / "cache-2" / "examples").glob("*")), "a partial store"


def test_processes_end_with_their_parent():
    """A killed run leaves no process behind."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        results = mapped(lambda item: (os.write(write, f"{os.getpid()} ".encode()), time.sleep(0.05)), range(99), 2)
        for _ in results:
            pass
        os._exit(0)
    os.close(write)
    pids = set()
    while len(pids) < 3:
        pids |= {int(pid) for pid in os.read(read, 1000).decode().split()}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until = time.monotonic() + 5
    while os.read(read, 1000) and time.monotonic() < until:  # ends once no process holds the other end
        pass
    assert time.monotonic() < until


def test_a_function_that_can_not_be_pickled_is_named(monkeypatch):
    monkeypatch.setattr(processes, "START", "spawn")
    with pytest.raises(UserError, match=r"data\.processes: what they need can't be sent to other processes"):
        list(mapped(lambda item: item, range(3), 2, "data.processes"))


def test_a_number_below_1_is_refused():
    with pytest.raises(UserError, match=r"data\.processes is 0, but has to be at least 1"):
        SFTData("rows.jsonl", processes=0)


def test_a_run_tokenizes_in_processes_although_its_trainer_can_not_be_pickled(tmp_path, monkeypatch):
    from tests.tiny import module

    monkeypatch.setattr(processes, "_begin", _without_trainer)
    data = SFTData(write_jsonl(tmp_path / "rows.jsonl", conversations(16)), tokenizer=ByteTokenizer(), processes=2)
    loop = trainer(max_steps=1)
    loop.fit(module(), data)
    assert loop.global_step == 1


def _without_trainer(function, begin=processes._begin):
    encode = function.args[0]
    assert encode.__self__.trainer is None
    begin(function)
