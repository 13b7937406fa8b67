"""The table of Oumi's training configs: how it is made, and what the committed one refuses."""

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(ROOT))
import oumi_configs  # noqa: E402

KNOWN = ("data.train.datasets[6].subset: tatqa-arithmetic is one file of the data set, and not in the cache",)
"""What text configs may still be refused for."""


def test_configs_are_listed_with_the_kind_of_their_refusal(tmp_path):
    def write(name, tree):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def run(dataset, **training):
        return {"model": {"model_name": "m"}, "data": {"train": {"datasets": [dataset]}}, "training": training}

    alpaca = {"dataset_name": "yahma/alpaca-cleaned"}
    write("a", run(alpaca, trainer_type="TRL_SFT"))
    write("b", run({"dataset_name": "merve/vqav2-small"}, trainer_type="TRL_SFT"))
    write("c", run(alpaca, trainer_type="TRL_GOLD"))
    write("d", run(alpaca, trainer_type="TRL_SFT", eval_strategy="steps"))
    write("e", run(alpaca, trainer_type="TRL_SFT", optimizer="adamwx"))
    write("inference", {"model": {"model_name": "m"}})
    kinds = {name: kind for name, kind, _ in oumi_configs.table(tmp_path)}
    expected = ("converts", "images", "trainer type", "fails in Oumi too", "other")
    assert kinds == dict(zip(("a.yaml", "b.yaml", "c.yaml", "d.yaml", "e.yaml"), expected, strict=True))


def test_every_text_config_of_oumi_converts_or_has_a_known_reason():
    lines = (ROOT / "results" / "oumi_configs.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=1) for line in lines if not line.startswith("#")]
    assert len(rows) == 157
    others = [reason.removeprefix("other: ") for _, reason in rows if reason.startswith("other")]
    assert all(reason.startswith(KNOWN) for reason in others)
    assert sum(reason == "converts" for _, reason in rows) >= 113
