"""Tokenizes conversations: rows per second of ours and of `dataset.map` as TRL's SFTTrainer calls it, in one run.

    python benchmarks/tokenizing.py --tokenizer FOLDER [--rows 6000] [--processes 1 2]

Both render the same rows with the same chat template, mark the assistant's turns and write the tokens to disk. Ours
also checks that all parts of each trained turn are written. Rows per second are given by the clock and by the processor
time of all processes, which depends less on what else a machine does.
"""

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import tokenizers
import transformers
import trl

from oumi_pl.data.sft import SFTData
from oumi_pl.data.template import apply_template, load_template

WORDS = ("tide", "port", "harbour", "moon", "water", "rises", "falls", "early", "late", "north", "because", "metres")


def conversations(rows: int) -> list[dict]:
    """Rows of one to three questions and answers; every third has a tool call."""
    rng = random.Random(0)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, most)))

    rows_written = []
    for i in range(rows):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": text(40)}, {"role": "assistant", "content": text(120)}]
        if i % 3 == 0:
            call = {"type": "function", "function": {"name": "tide", "arguments": {"port": text(3)}}}
            messages[-1:] = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "4.2 m"},
                messages[-1],
            ]
        rows_written.append({"messages": messages})
    return rows_written


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of this process and its children."""

    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, before = time.perf_counter(), used()
    work()
    return time.perf_counter() - start, used() - before


def ours(file: Path, tokenizer: str, processes: int) -> Callable[[], object]:
    data = SFTData(str(file), tokenizer=tokenizer, template="chatml", max_length=4096, processes=processes)
    assert data.tokenizer
    return lambda: data.stores("train")


def theirs(file: Path, tokenizer: str, processes: int) -> Callable[[], object]:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    apply_template(loaded, load_template(loaded, "chatml"))
    rows = datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])

    def tokenize(example: dict, processing_class: transformers.PreTrainedTokenizerBase) -> dict:
        processed = processing_class.apply_chat_template(
            example["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": processed["input_ids"], "assistant_masks": processed["assistant_masks"]}

    number = None if processes == 1 else processes
    return lambda: rows.map(tokenize, fn_kwargs={"processing_class": loaded}, num_proc=number)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times tokenizing, ours and as TRL does it.")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, such as GPT-2's")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    datasets.disable_progress_bars()
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (trl, transformers, tokenizers, datasets))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}")
    print(f"python {platform.python_version()}, {versions}; {args.rows:,} rows\n")
    print("| way | processes | rows/s | rows/s of processor time |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in conversations(args.rows)))
        for processes in args.processes:
            for name, way in (("ours", ours), ("dataset.map, as TRL", theirs)):
                os.environ["OUMI_PL_CACHE"] = tempfile.mkdtemp(dir=folder)
                wall, cpu = timed(way(file, args.tokenizer, processes))
                print(f"| {name} | {processes} | {args.rows / wall:,.0f} | {args.rows / cpu:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
