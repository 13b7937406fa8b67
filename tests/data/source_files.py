"""What the tests of sources share: writing small files, and reading them back through `rows`."""

import json
from pathlib import Path

import pytest

from oumi_pl.data.sources import Source, rows
from oumi_pl.errors import UserError

ROWS = [{"text": f"row {i}", "n": i} for i in range(10)]


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


def read(path, **fields):
    return list(rows(Source(path, **fields)))


def values(path, **fields):
    return [row["n"] for _, row in read(path, **fields)]


def mistake(path, **fields):
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message
