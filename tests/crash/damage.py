"""Damages the files that a command reads, at every place, and looks at what the command does.

    python -m tests.crash.damage --minutes 5

Each trial copies a folder, damages a file in it, or puts a hostile one in its place, and runs a command. Allowed are
success and exit code 2 with one message. A traceback, another end, a run of more than a minute, an escape sequence on
the terminal, weights that are used although they are damaged, code that ran, and files that were read or written
through links of a run folder are printed.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml

from tests.crash.harness import Child, copy, prepare, works

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**400,
    1e999,
    float("nan"),
    "",
    "\x1b[31m\ud800",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
)
"""What a value in a JSON file is replaced by."""
DEEP = "[" * 100_000
SECONDS = 60.0
WEIGHTS = "model.safetensors"
"""A file that is never used if it is damaged."""


def of_bytes(content: bytes, rng: random.Random, places: int) -> Iterator[tuple[str, bytes]]:
    """Flipped bits, cuts, swapped and repeated pieces, other encodings: `places` of each."""
    size = len(content)
    for place in sorted(rng.sample(range(size), min(places, size))):
        bit = 1 << rng.randrange(8)
        yield f"bit of byte {place}", content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        yield f"cut at {place}", content[:place]
        other = rng.randrange(size)
        first, second = sorted((place, other))
        yield f"swapped at {first}", content[second:] + content[first:second] + content[:first]
        yield f"bytes in at {place}", content[:place] + b"\xff\xfe\x00\x1b[2J" + content[place:]
    yield "empty", b""
    yield "twice", content * 2
    yield "UTF-16", content.decode(errors="replace").encode("utf-16")
    yield "zeros", bytes(size)
    yield "deep", DEEP.encode()


def of_json(content: bytes, rng: random.Random, places: int) -> Iterator[tuple[str, bytes]]:
    """Each value replaced by others, each key removed or repeated."""
    tree = json.loads(content)
    spots = list(paths(tree))
    for path in rng.sample(spots, min(places, len(spots))):
        for value in rng.sample(VALUES, 3):
            yield f"{'.'.join(map(str, path))} = {str(value)[:20]}", dumped(changed(tree, path, value))
        if path:
            yield f"without {'.'.join(map(str, path))}", dumped(changed(tree, path, removed=True))
    for value in VALUES:
        yield f"all = {str(value)[:20]}", dumped(value)


def paths(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths(value, (*above, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any = None, removed: bool = False) -> Any:
    """A copy of a tree with another value at a place, or none."""
    copied = json.loads(json.dumps(tree))
    level = copied
    for key in path[:-1]:
        level = level[key]
    if removed:
        del level[path[-1]]
    else:
        level[path[-1]] = value
    return copied


def dumped(value: Any) -> bytes:
    """JSON, with NaN and infinity as Python writes them."""
    return json.dumps(value).encode()


def damages(file: Path, rng: random.Random, places: int) -> Iterator[tuple[str, bytes]]:
    """All kinds of damage of a file."""
    content = file.read_bytes()
    yield from of_bytes(content, rng, places)
    if file.suffix == ".json":
        yield from of_json(content, rng, places)
    if file.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        place = rng.randrange(len(lines))
        for what, line in of_json(lines[place], rng, places):
            yield f"line {place + 1}: {what}", b"".join([*lines[:place], line + b"\n", *lines[place + 1 :]])


SECRET = "a secret that no output may have"


def hostile(file: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What somebody else may have put in the place of a file."""
    yield "link to a secret", as_link
    yield "link to itself", lambda file: (file.unlink(), file.symlink_to(file.name))
    yield "pipe", as_pipe
    yield "folder", lambda file: (file.unlink(), file.mkdir())
    yield "code", as_code
    if file.suffix == ".ckpt":
        yield "folder with code", as_folder_with_code
        yield "optimizer that runs a command", with_command


def as_link(file: Path) -> None:
    """A link to a file that this user can read and write, and nobody should see or change."""
    victim(file).write_text(SECRET)
    file.unlink()
    file.symlink_to(victim(file))


def victim(file: Path) -> Path:
    """A file outside the run folder."""
    return next(above for above in file.parents if above.name == "trial").with_name("victim.txt")


def as_pipe(file: Path) -> None:
    """Reading it waits for ever."""
    file.unlink()
    os.mkfifo(file)


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "code ran")


def as_code(file: Path) -> None:
    """A pickle that runs code."""
    torch.save({"state_dict": {}, "more": Code(victim(file))}, file)


def as_folder_with_code(file: Path) -> None:
    """A sharded checkpoint whose index runs code."""
    file.unlink()
    file.mkdir()
    (file / ".metadata").write_bytes(pickle.dumps(Code(victim(file))))
    (file / "__0_0.distcp").write_bytes(b"")
    torch.save({"more": Code(victim(file))}, file / "meta.pt")


def with_command(file: Path) -> None:
    """A checkpoint whose recipe has an optimizer, a schedule and a callback that run a command."""
    content = torch.load(file, weights_only=True)
    config = yaml.safe_load(content["config"])
    command = {"class_path": "os.system", "init_args": {"command": f"echo code ran > {victim(file)}"}}
    config["model"]["init_args"] |= {"optimizer": command, "schedule": command}
    config["trainer"]["callbacks"] = [command]
    content["config"] = yaml.safe_dump(config)
    torch.save(content, file)


FIT = ("fit", "--config", "r.yaml", "--name", "again", "--trainer.max_steps", "1", "--val_every", "null")
FROM_MODEL = (*FIT, "--model.model", "model", "--model.config", "null", "--data.tokenizer", "null")
EXPORT = ("export", "--checkpoint", "runs/r", "--output", "out")
GENERATE = ("generate", "--model", "model", "--prompt", "a", "--max_new_tokens", "2")
CASES: dict[str, tuple[str, ...]] = {
    "model/config.json": FROM_MODEL,
    "model/generation_config.json": FROM_MODEL,
    "model/tokenizer.json": FROM_MODEL,
    "model/tokenizer_config.json": FROM_MODEL,
    "model/model.safetensors": FROM_MODEL,
    "runs/r/run.json": ("runs",),
    "runs/r/run.json#report": ("runs", "report", "r"),
    "runs/r/run.json#resume": ("fit", "--resume", "runs/r"),
    "runs/r/metrics.csv": ("runs",),
    "runs/r/metrics.csv#report": ("runs", "report", "r"),
    "runs/r/metrics.csv#compare": ("runs", "compare", "r", "s"),
    "runs/r/metrics.csv#resume": ("fit", "--resume", "runs/r"),
    "runs/r/data.json": ("runs", "report", "r"),
    "runs/r/samples.jsonl": ("runs", "report", "r"),
    "runs/r/config.yaml": ("fit", "--resume", "runs/r"),
    "runs/r/config.yaml#compare": ("runs", "compare", "r", "s"),
    "runs/r/checkpoints/step-00000004.ckpt": ("fit", "--resume", "runs/r"),
    "runs/r/checkpoints/step-00000004.ckpt#export": EXPORT,
    "model/model.safetensors#generate": GENERATE,
    "model/config.json#generate": GENERATE,
    "model/generation_config.json#generate": GENERATE,
    "model/tokenizer.json#generate": GENERATE,
    "model/tokenizer_config.json#generate": GENERATE,
    "rows.jsonl": FIT,
    "rows.jsonl#preview": ("preview", "--config", "r.yaml"),
    "rows.jsonl#generate": ("generate", "--model", "model", "--file", "rows.jsonl", "--max_new_tokens", "2"),
    "r.yaml": FIT,
}
"""File, and after `#` what for -> the command that reads it."""


def world(folder: Path) -> Path:
    """Files that commands read: rows, recipe, a model, a killed run, and a finished one."""
    prepare(folder, changes={"checkpoint.monitor": None, "trainer.max_steps": 4})
    works(folder, "fit", "--config", "r.yaml", "--name", "s")
    shutil.copytree(folder / "runs/s/model", folder / "model")
    shutil.copytree(folder / "runs/s", folder / "runs/r")
    state = json.loads((folder / "runs/r/run.json").read_text())
    state |= {"status": "running", "phases": ["prepare", "reference"]}
    (folder / "runs/r/run.json").write_text(json.dumps(state))
    return folder


def trial(base: Path, place: Path, case: str, content: bytes | Callable[[Path], None]) -> tuple[str, str]:
    """Runs a command on damaged files. Returns what came of it, `refused`, `success` or a deviation, and its output."""
    folder = copy(base, place / "trial")
    file = folder / case.partition("#")[0]
    outside = victim(file)
    outside.write_text(SECRET)
    try:
        if callable(content):
            content(file)
        else:
            file.write_bytes(content)
        try:
            code = (child := Child(folder, *CASES[case])).wait(SECONDS)
        except TimeoutError as error:
            return "hang", str(error)
        text = child.text
        if "Traceback (most recent call last)" in text:
            return "traceback", text
        if "\x1b[2J" in text or "\x1b[31m" in text:
            return "escape sequence", text
        if outside.read_text() != SECRET:
            return f"the file outside was changed to {outside.read_text()[:100]!r}", text
        if case.startswith("runs/") and is_in(folder, SECRET):
            return "the file outside was copied", text
        if code == 0 and file.name == WEIGHTS:
            return "silent", text
        return {0: "success", 2: "refused"}.get(code, f"exit code {code}"), text
    finally:
        shutil.rmtree(folder)


def is_in(folder: Path, text: str) -> bool:
    """Whether a file of a folder has a text; links are not followed."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return any(text.encode() in path.read_bytes() for path in files)


def main() -> None:
    """Runs trials for some minutes, and prints deviations and counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--places", type=int, default=6)
    options = parser.parse_args()
    rng, end, counts = random.Random(options.seed), time.monotonic() + 60 * options.minutes, Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        base = world(Path(temporary) / "base")
        every = [
            (case, what, content)
            for case in CASES
            if options.only in case
            for of_kind in (damages(base / case.partition("#")[0], rng, options.places), hostile(Path(case)))
            for what, content in of_kind
        ]
        rng.shuffle(every)
        for case, what, content in every:
            if time.monotonic() > end:
                break
            result, text = trial(base, Path(temporary), case, content)
            counts[f"{case}: {result}"] += 1
            if result not in ("success", "refused"):
                shown = text[-1500:].encode("ascii", "backslashreplace").decode()
                print(f"--- {case}: {what!a}: {result}\n{shown}", flush=True)
    for name in sorted(counts):
        print(f"{counts[name]:5} {name}")
    print(f"{sum(counts.values()):5} of {len(every)}")


if __name__ == "__main__":
    main()
