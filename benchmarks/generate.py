"""Completes the rows of a file: rows per second of `oumi_pl generate` and of a plain `transformers` loop, in one run.

    python benchmarks/generate.py [--model FOLDER] [--rows 400] [--repeats 3]

Both load the model, complete the same chat prompts greedily and write JSON lines. The loop does what its reader would
write: batches of 16 in the order of the rows, padded on the left by the tokenizer. Without `--model`, the model is a
Llama of 0.7M random weights whose completions end by chance. Completions have to be equal, but for ties in rounding.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from contenders import processor
from transformers import AutoModelForCausalLM, AutoTokenizer

from oumi_pl.__main__ import main as oumi_pl
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}


def new_model(folder: Path) -> Path:
    """Exports a model of random weights."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer().build()
    hf = build_model(None, config=LLAMA, tokenizer=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    export_model(LM(hf), folder / "model", tokenizer, stop_tokens=[end])
    return folder / "model"


def prompts(rows: int) -> list[dict]:
    """Rows with prompts of 10 to 300 characters, most of them short."""
    rng = random.Random(0)
    words = ("tide", "port", "harbour", "moon", "water", "rises", "falls", "early", "late", "north")
    return [
        {"id": i, "prompt": " ".join(rng.choices(words, k=min(50, 2 + int(rng.expovariate(0.1)))))} for i in range(rows)
    ]


def plain(model_folder: Path, rows: list[dict], output: Path, new: int) -> None:
    """The loop of batches of 16."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with output.open("w") as out:
        for start in range(0, len(rows), 16):
            chunk = rows[start : start + 16]
            turns = [[{"role": "user", "content": row["prompt"]}] for row in chunk]
            texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            ids = model.generate(**batch, max_new_tokens=new, do_sample=False)
            answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, answer in zip(chunk, answers, strict=True):
                out.write(json.dumps(row | {"completion": answer}) + "\n")


def ours(model_folder: Path, file: Path, output: Path, new: int, batch_size: int) -> None:
    """The command."""
    args = ["--file", str(file), "--output", str(output), "--max_new_tokens", str(new), "--batch_size", str(batch_size)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert oumi_pl(["generate", "--model", str(model_folder), *args]) == 0


def main() -> None:
    """Runs both in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, ",
        end="",
    )
    print(f"transformers {transformers.__version__}; {options.rows} rows, {options.new} new tokens")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = options.model or new_model(folder)
        rows = prompts(options.rows)
        file = folder / "in.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds: dict[str, list[float]] = {}
        for repeat in range(options.repeats):
            runs = {"plain loop, 16": lambda out: plain(model, rows, out, options.new)}
            for size in (16, 64):
                runs[f"oumi_pl generate, {size}"] = lambda out, size=size: ours(model, file, out, options.new, size)
            for name, run in runs.items():
                start = time.perf_counter()
                run(folder / f"{name}-{repeat}.jsonl")
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        texts = {
            name: [json.loads(line)["completion"] for line in (folder / f"{name}-0.jsonl").read_text().splitlines()]
            for name in seconds
        }
        base = statistics.median(seconds["plain loop, 16"])
        for name, times in seconds.items():
            middle = statistics.median(times)
            equal = sum(a == b for a, b in zip(texts[name], texts["plain loop, 16"], strict=True))
            print(f"{name:22} {len(rows) / middle:7.1f} rows/s  x{base / middle:.2f}  {equal}/{len(rows)} equal")


if __name__ == "__main__":
    main()
