"""Packs one million lengths: time and fill of ours and of TRL's best-fit decreasing, in one run on the same lengths.

    python benchmarks/packing.py [--rows 1000000] [--capacity 2048]

TRL packs whole examples, so its time includes moving the tokens (one byte each here). By default it packs every 1,000
rows on their own; `whole` gives it all rows at once, as ours always has them.
"""

import argparse
import platform
import time

import datasets
import numpy as np
import pyarrow as pa
import trl
from contenders import processor
from trl.data_utils import pack_dataset

from oumi_pl.data.plan import pack


def chat_lengths(rows: int, capacity: int) -> np.ndarray:
    """Lengths like those of chat data, `[rows]`: log-normal with a median of 270 tokens, cut at the capacity."""
    drawn = np.random.default_rng(0).lognormal(mean=5.6, sigma=0.8, size=rows)
    return np.clip(drawn, 1, capacity).astype(np.int64)


def ours(lengths: np.ndarray, capacity: int) -> tuple[float, int]:
    order = np.random.default_rng(1).permutation(len(lengths))
    start = time.perf_counter()
    _, starts = pack(lengths, capacity, order)
    return time.perf_counter() - start, len(starts) - 1


def theirs(lengths: np.ndarray, capacity: int, batch_size: int) -> tuple[float, int]:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int8))
    dataset = datasets.Dataset(pa.table({"input_ids": tokens}))
    start = time.perf_counter()
    packed = pack_dataset(dataset, capacity, strategy="bfd", map_kwargs={"batch_size": batch_size})
    return time.perf_counter() - start, len(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times packing, ours and TRL's.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=2048)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    lengths = chat_lengths(args.rows, args.capacity)
    versions = f"trl {trl.__version__}, datasets {datasets.__version__}, numpy {np.__version__}"
    print(f"{processor()}; python {platform.python_version()}, {versions}")
    print(f"{args.rows:,} rows, {lengths.mean():.0f} tokens on average, packs of {args.capacity:,} tokens\n")
    results = {
        "ours": ours(lengths, args.capacity),
        "TRL, 1,000 rows at a time": theirs(lengths, args.capacity, 1000),
        "TRL, whole": theirs(lengths, args.capacity, args.rows),
    }
    base = results["ours"][0]
    print(f"{'':28}{'seconds':>9}{'packs':>10}{'fill':>9}{'time / ours':>13}")
    for name, (seconds, packs) in results.items():
        fill = lengths.sum() / (packs * args.capacity)
        print(f"{name:28}{seconds:9.2f}{packs:10,}{fill:9.2%}{seconds / base:13.1f}")


if __name__ == "__main__":
    main()
