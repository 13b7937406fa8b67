"""How long training pauses for a checkpoint: while it is written, or while it is copied (`checkpoint.asynchronous`).

    python benchmarks/saving.py [--ranks 1 2] [--hidden 512] [--layers 6] [--vocabulary 16384] [--every 4]

Trains a random Llama on the CPU with AdamW, on one process and on two under FSDP2, and saves three times within a run
(and once at its end, which every run waits for). `pause` is the time of the hooks that save, the median and the largest
of the three, on the slowest rank; `on disk after` the time from the beginning of such a hook until the checkpoint has
its name, the median; `copy GB` the host memory of a copy (of one rank); `updates` the median seconds of an update while
nothing is saved and while a checkpoint is being written in the background.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import versions

SAVES = 3


def train(args: argparse.Namespace) -> None:
    """Trains in this process, and writes what its saves took."""
    import lightning as L
    import torch

    from oumi_pl.callbacks import checkpoint
    from oumi_pl.callbacks.checkpoint import Checkpoints
    from oumi_pl.data.sft import SFTData
    from oumi_pl.data.tokenizers import ByteTokenizer
    from oumi_pl.models.sharding import Sharded
    from oumi_pl.modules.sft import SFT
    from oumi_pl.runs.checkpoints import AtomicCheckpointIO

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.rank_count))
    pauses: list[float] = []
    durations: list[float] = []
    updates: dict[str, list[float]] = {"quiet": [], "writing": []}
    copies: list[float] = []
    begun: dict[str, float] = {}

    class Measured(Checkpoints):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            start = time.perf_counter()
            # the last save of a run waits for the disk in any case
            is_saving = trainer.global_step % self.every == 0 and len(pauses) < SAVES
            thread = self._background._thread
            was_writing = thread is not None and thread.is_alive()
            if trainer.global_step % self.every:
                updates["writing" if was_writing else "quiet"].append(start - self.update_begun)
            if is_saving:
                begun["last"] = start
            super().on_train_batch_end(trainer, *rest)
            if is_saving:
                pauses.append(time.perf_counter() - start)

        def on_train_batch_start(self, *_: Any) -> None:
            self.update_begun = time.perf_counter()

        def _remove_old(self, *rest: Any, **settings: Any) -> None:  # called once the newer one has its name
            if len(durations) < SAVES:
                durations.append(time.perf_counter() - begun["last"])
            super()._remove_old(*rest, **settings)

    snapshot = checkpoint.snapshot

    def measured(content: Any) -> Any:
        copied = snapshot(content)
        copies.append(sum({id(s): s.nbytes() for s in storages(copied)}.values()) / 1e9)
        return copied

    checkpoint.snapshot = measured
    config = {
        "model_type": "llama",
        **{"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers},
        **{"num_attention_heads": args.hidden // 64, "num_key_value_heads": max(1, args.hidden // 256)},
        "vocab_size": args.vocabulary,
    }
    rows = [{"messages": [{"role": "user", "content": "ab" * 40}, {"role": "assistant", "content": "cd" * 40}]}] * 64
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTData(str(args.folder / "rows.jsonl"), tokenizer=ByteTokenizer(), max_length=256, batch_size=1)
    checkpoints = Measured(every=args.every, asynchronous=bool(args.asynchronous))
    checkpoints.directory = args.folder / "checkpoints"
    checkpoints.directory.mkdir(exist_ok=True)
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.rank_count,
        strategy=Sharded(process_group_backend="gloo") if args.rank_count > 1 else "auto",
        max_steps=args.every * (SAVES + 1),
        logger=False,
        callbacks=[checkpoints],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SFT(config=config), data)
    newest = max(checkpoints.directory.glob("step-*.ckpt"))
    files = [newest] if newest.is_file() else [*newest.iterdir()]
    result = {
        "pauses": pauses,
        "durations": durations,
        "updates": {kind: statistics.median(seconds) if seconds else None for kind, seconds in updates.items()},
        "copy": max(copies, default=0.0),
        "size": sum(file.stat().st_size for file in files) / 1e9,
    }
    (args.folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


def storages(content: Any) -> list[Any]:
    """The storages of all tensors, of sharded ones those of this rank."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(content, torch.Tensor):
        return [(content.to_local() if isinstance(content, DTensor) else content).untyped_storage()]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [storage for part in parts for storage in storages(part)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--every", type=int, default=4, help="updates from one checkpoint to the next")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; a temporary folder if left out")
    parser.add_argument("--rank_count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--asynchronous", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_count:
        train(args)
        return
    print(f"{versions(('torch', 'lightning', 'transformers'))}, {os.cpu_count()} cores")
    print(
        f"{'':34}{'checkpoint GB':>14}{'pause s':>9}{'largest':>9}{'on disk after s':>17}{'copy GB':>9}"
        f"{'update s, quiet':>17}{'writing':>9}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for ranks in args.ranks:
            for asynchronous in (0, 1):
                folder = (args.folder or Path(temporary)) / f"{ranks}-{asynchronous}"
                shape = [f"--{name}={getattr(args, name)}" for name in ("hidden", "layers", "vocabulary", "every")]
                case = [f"--folder={folder}", f"--rank_count={ranks}", f"--asynchronous={asynchronous}"]
                environment = os.environ | {"OUMI_PL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
                subprocess.run([sys.executable, __file__, *shape, *case], check=True, env=environment, stderr=-3)
                results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
                pauses = [max(of_ranks) for of_ranks in zip(*(result["pauses"] for result in results), strict=True)]
                of_updates = results[0]["updates"]
                writing = "" if of_updates["writing"] is None else f"{of_updates['writing']:.2f}"
                layout = "one process" if ranks == 1 else f"FSDP2, {ranks} processes"
                print(
                    f"{layout + (', asynchronous' if asynchronous else ''):34}{results[0]['size']:14.2f}"
                    f"{statistics.median(pauses):9.2f}{max(pauses):9.2f}"
                    f"{statistics.median(results[0]['durations']):17.2f}{results[0]['copy']:9.2f}"
                    f"{of_updates['quiet']:17.2f}{writing:>9}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
