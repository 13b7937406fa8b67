"""Losses and gradient norms of Oumi itself, update by update, for the settings of `tests/core/per_step.py`.

    python benchmarks/oumi_losses.py [SETTING ...] > benchmarks/results/oumi_losses.txt

Runs in an environment of Oumi's own (`pip install oumi`), and prints the numbers that `tests/core/test_per_step.py`
compares with ours. LoRA's matrices A, which each version of the libraries would draw otherwise, begin with the same
numbers on both sides.
"""

import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

FILE = Path(__file__).parents[1] / "tests" / "core" / "per_step.py"
# not from sys.path, on which the folder's oumi.py would hide the package
per_step = SourceFileLoader("per_step", str(FILE)).load_module()

PACKAGES = ("oumi", "torch", "transformers", "trl", "peft")


def main() -> None:
    """Runs the settings, and prints their numbers as JSON."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "DO_NOT_TRACK": "1"}
    fix_adapters()
    lines = ["# python benchmarks/oumi_losses.py", "# " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)]
    for name in sys.argv[1:] or per_step.SETTINGS:
        with redirect_stdout(sys.stderr):  # Oumi prints there too
            columns = losses(name)
        lines.append(json.dumps({name: {key: values for key, values in columns.items() if values}}))
    print("\n".join(lines))


def losses(name: str) -> dict[str, list[float]]:
    """The columns `loss` and `grad_norm` of a setting."""
    import transformers
    from oumi.core.configs import TrainingConfig
    from oumi.train import train

    rows: list[dict[str, float]] = []
    log = transformers.Trainer.log

    def logged(self, logs, *args, **kwargs):
        rows.append(dict(logs))
        return log(self, logs, *args, **kwargs)

    transformers.Trainer.log = logged
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            per_step.write(Path(folder))
            Path("oumi.yaml").write_text(yaml.safe_dump(per_step.config(name)))
            train(TrainingConfig.from_yaml("oumi.yaml"))
            metrics = Path("out/run/metrics_rank0000.jsonl")
            rows = rows or [json.loads(line) for line in metrics.read_text().splitlines()]
        finally:
            os.chdir(here)
            transformers.Trainer.log = log
    trained = [row for row in rows if "loss" in row or "train/loss" in row]
    return {
        key: [float(row[k]) for row in trained for k in (key, f"train/{key}") if k in row]
        for key in ("loss", "grad_norm")
    }


def fix_adapters() -> None:
    """Has LoRA begin with the numbers of `per_step.adapter_weights`."""
    from peft.tuners.lora import LoraLayer

    reset = LoraLayer.reset_lora_parameters

    def fixed(self, adapter_name, init_lora_weights):
        reset(self, adapter_name, init_lora_weights)
        weight = self.lora_A[adapter_name].weight
        weight.data = torch.from_numpy(per_step.adapter_weights(tuple(weight.shape)))

    LoraLayer.reset_lora_parameters = fixed


if __name__ == "__main__":
    main()
