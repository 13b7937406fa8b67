"""Tokenizes conversations: rows per second of ours and of `dataset.map` as TRL's SFTTrainer calls it, in one run.

    python benchmarks/tokenizing.py --tokenizer FOLDER [--rows 6000] [--processes 1 2]

Both render the same rows with the same chat template, mark the assistant's turns and write the tokens to disk. Ours
also checks that all parts of each trained turn are written. Rows per second are given by the clock and by the processor
time of all processes, which depends less on what else a machine does.

Ours reads the rows from the file within the time that counts. The peer's are on disk in Arrow's format by then: loading
them is not timed. Each way runs in a process of its own, with its first use of the libraries timed, and what it wrote
is deleted before the next. Memory is the peak resident set of that process, imports and the peer's loading included,
and that of the largest of its workers; pages of files that a process has mapped and pages that it shares with others
count in each. Neither the rows nor the tokens are ever all in the memory of this script: a million rows are a matter of
time and disk.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contenders import child_arguments, in_a_process, peak_memory, report, versions

WORDS = ("tide", "port", "harbour", "moon", "water", "rises", "falls", "early", "late", "north", "because", "metres")


def conversations(rows: int) -> Iterator[dict]:
    """Rows of one to three questions and answers; every third has a tool call."""
    rng = random.Random(0)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, most)))

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
        yield {"messages": messages}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of this process and its children."""

    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, before = time.perf_counter(), used()
    work()
    return time.perf_counter() - start, used() - before


# Libraries are imported where they are needed, so that the memory of each way is of its own libraries.


def ours(file: Path, tokenizer: str, processes: int) -> Callable[[], object]:
    from oumi_pl.data.sft import SFTData

    data = SFTData(str(file), tokenizer=tokenizer, template="chatml", max_length=4096, processes=processes)
    assert data.tokenizer
    return lambda: data.stores("train")


def theirs(file: Path, tokenizer: str, processes: int) -> Callable[[], object]:
    import datasets
    import transformers

    from oumi_pl.data.template import apply_template, load_template

    datasets.disable_progress_bars()
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    apply_template(loaded, load_template(loaded, "chatml"))
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=os.environ["OUMI_PL_CACHE"])

    def tokenize(example: dict, processing_class: transformers.PreTrainedTokenizerBase) -> dict:
        processed = processing_class.apply_chat_template(
            example["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": processed["input_ids"], "assistant_masks": processed["assistant_masks"]}

    number = None if processes == 1 else processes
    return lambda: rows.map(tokenize, fn_kwargs={"processing_class": loaded}, num_proc=number)


WAYS = {"ours": ours, "dataset.map, as TRL": theirs}


def child(args: argparse.Namespace) -> None:
    """Runs the way with the number of processes that `main` names, "ours: 2"."""
    name, _, processes = args.child.partition(": ")
    wall, processor = timed(WAYS[name](args.folder / "rows.jsonl", args.tokenizer, int(processes)))
    report({"wall": wall, "processor": processor, "worker": peak_memory(resource.RUSAGE_CHILDREN)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Times tokenizing, ours and as TRL does it.")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, such as GPT-2's")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    child_arguments(parser)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    used = versions(("trl", "transformers", "tokenizers", "datasets"))
    print(f"{used}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}; {args.rows:,} rows\n")
    print("| way | processes | rows/s | rows/s of processor time | peak GB | of its largest worker |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in conversations(args.rows))
        for processes in args.processes:
            for name in WAYS:
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    # the peer's temporary files go there as well
                    places = {"OUMI_PL_CACHE": cache, "TMPDIR": cache}
                    got = in_a_process(__file__, f"{name}: {processes}", Path(folder), **places)
                rates = f"{args.rows / got['wall']:,.0f} | {args.rows / got['processor']:,.0f}"
                print(f"| {name} | {processes} | {rates} | {got['peak']:.2f} | {got['worker']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
