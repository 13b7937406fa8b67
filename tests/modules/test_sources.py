"""Validation of several sources: the loss of each, for every trainer type, as if it were validated alone."""

import pytest
import torch

from oumi_pl.data.distill import DistillData
from oumi_pl.data.tokenizers import ByteTokenizer
from tests import tiny
from tests.tiny import write_jsonl

KINDS = {
    "sft": (tiny.data, tiny.module, tiny.conversations),
    "dpo": (tiny.dpo_data, tiny.dpo, tiny.pairs),
    "kto": (tiny.kto_data, lambda: tiny.kto(kl=False), tiny.feedback),
    "reward": (tiny.reward_data, tiny.reward, tiny.pairs),
}


def validated(module, data):
    """The metrics after two updates: before, policies equal their reference."""
    loop = tiny.trainer(max_steps=2)
    torch.manual_seed(0)
    loop.fit(module(), data)
    return {name: float(value) for name, value in loop.callback_metrics.items()}


@pytest.mark.parametrize(("kind", "packing"), [("sft", True), ("dpo", False), ("kto", False), ("reward", True)])
def test_the_loss_of_each_source_is_that_of_the_source_alone(tmp_path, kind, packing):
    data, module, rows = KINDS[kind]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows(n, seed=n)) for name, n in (("easy", 7), ("hard", 5))]
    how = {"batch_size": 8, "eval_batch_size": 2, "packing": packing}
    both = validated(module, data(tmp_path, validation=files, **how))
    alone = [validated(module, data(tmp_path, validation=file, **how)) for file in files]
    assert not any(name.startswith("val/loss/") for name in alone[0]), (
        "of a single source, there is nothing to tell apart"
    )
    for name, metrics in zip(("easy", "hard"), alone, strict=True):
        assert both[f"val/loss/{name}"] == pytest.approx(metrics["val/loss"], rel=1e-6)
    assert both["val/loss/easy"] != both["val/loss/hard"]
    low, high = sorted((both["val/loss/easy"], both["val/loss/hard"]))
    assert low < both["val/loss"] < high


def test_the_loss_of_a_source_can_be_monitored(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", tiny.conversations(3)) for name in ("a", "b")]
    assert tiny.data(tmp_path, validation=files).validation_metrics == ["val/loss/a", "val/loss/b"]
    assert tiny.data(tmp_path, validation=files[0]).validation_metrics == []
    assert tiny.data(tmp_path).validation_metrics == []
    distilled = DistillData(files[0], files, tokenizer=ByteTokenizer())
    assert distilled.validation_metrics == ["val/loss/a", "val/loss/b"]
