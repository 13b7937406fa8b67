"""Which of Oumi's training configs convert, and why the others are refused.

    python benchmarks/oumi_configs.py CONFIGS [--version TEXT] > benchmarks/results/oumi_configs.txt

`CONFIGS` is the folder `configs` of a copy of Oumi. Every YAML file in it with a section `training` is loaded and
converted. Nothing is fetched: a config of random weights, whose shape Oumi reads from the hub, is converted with a
stand-in of the same architecture.
"""

import argparse
import os
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import yaml

STAND_INS = {"gpt2": "gpt2", "meta-llama/Llama-3.1-8B": "llama", "HuggingFaceFW/ablation-model-fineweb-v1": "llama"}
"""Model of a config with random weights -> its architecture."""
KINDS = (
    ("images", "images are not trained on|is for images"),
    ("trainer type", "is not among the trainer types"),
    ("fails in Oumi too", "needs a dataset in data.validation|Oumi has no template|streamed have no known end"),
)
"""Kind of a refusal -> what its message matches; others are `other`."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, help="the folder `configs` of a copy of Oumi")
    parser.add_argument("--version", default="", help="which version it is, for the header")
    options = parser.parse_args()
    rows = table(options.configs)
    counts = Counter(kind for _, kind, _ in rows)
    print("# python benchmarks/oumi_configs.py CONFIGS")
    print(f"# {options.version or options.configs}: {len(rows)} training configs")
    print("".join(f"# {kind}: {count}\n" for kind, count in counts.most_common()), end="")
    width = max(len(name) for name, _, _ in rows)
    for name, kind, reason in rows:
        print(f"{name:{width}}  {kind}{f': {reason}' if reason else ''}")


def table(folder: Path) -> list[tuple[str, str, str]]:
    """Name, `converts` or the kind of the refusal, and its reason, of each training config in a folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        stand_ins = _stand_ins(Path(scratch))
        files = sorted(file for file in folder.rglob("*.yaml") if _trains(file))
        return [(str(file.relative_to(folder)), *_result(file, stand_ins)) for file in files]


def _trains(file: Path) -> bool:
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    return isinstance(tree, dict) and "training" in tree


def _result(file: Path, stand_ins: dict[str, str]) -> tuple[str, str]:
    from oumi_pl.core.configs import TrainingConfig
    from oumi_pl.core.recipe import to_recipe
    from oumi_pl.errors import UserError

    try:
        with warnings.catch_warnings(action="ignore"):
            config = TrainingConfig.from_yaml(file)
            if not config.model.load_pretrained_weights:
                config.model.model_name = stand_ins.get(config.model.model_name, config.model.model_name)
            to_recipe(config)
    except UserError as error:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, str(error))), "other")
        return kind, str(error)
    return "converts", ""


def _stand_ins(folder: Path) -> dict[str, str]:
    from transformers import AutoConfig

    for architecture in set(STAND_INS.values()):
        AutoConfig.for_model(architecture).save_pretrained(folder / architecture)
    return {name: str(folder / architecture) for name, architecture in STAND_INS.items()}


if __name__ == "__main__":
    main()
