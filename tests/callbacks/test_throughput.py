"""Speed, padding and FLOPs against counts by hand."""

import csv

import pytest
import torch

from oumi_pl.callbacks import throughput
from oumi_pl.callbacks.throughput import Throughput, flops_per_token, peak_flops
from oumi_pl.models.lm import padded
from oumi_pl.modules import base
from oumi_pl.runs.metrics import MetricsCSV
from tests.tiny import data, module, trainer


@pytest.mark.parametrize("is_padded", [False, True])
def test_tokens_and_padding_are_those_of_the_batches(tmp_path, monkeypatch, is_padded):
    """Rows are padded only for a model that needs it."""
    if is_padded:
        monkeypatch.setattr(base, "with_layout", lambda build, share, longest, wrap: wrap(build(False), padded))
    logger = MetricsCSV()
    logger.open(tmp_path / "metrics.csv")
    sft_data = data(tmp_path, 11, batch_size=2)
    sft = module()
    loop = trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[Throughput()], logger=logger)
    loop.fit(sft, sft_data)
    with (tmp_path / "metrics.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    batches = list(sft_data.train_dataloader())
    updates = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    seen = 0
    for row, update in zip(rows, updates, strict=True):
        real = [b for b in update if b["sample_ids"]]
        lengths = [[segment.length for segment in batch["segments"]] for batch in real]
        tokens = sum(map(sum, lengths))
        positions = sum(len(n) * max(n) for n in lengths) if is_padded else tokens
        seen += tokens
        assert positions > tokens or not is_padded
        assert float(row["train/num_tokens"]) == seen
        assert abs(float(row["train/padding"]) - (1 - tokens / positions)) < 1e-6
        assert float(row["train/tokens_per_second"]) > 0
        assert "train/mfu" not in row, "no peak is known for a CPU"
    assert float(rows[-1]["train/num_tokens"]) == sft_data.lengths("train").sum()


def test_flops_are_six_per_parameter_but_for_looked_up_and_frozen_ones(tmp_path):
    sft_data = data(tmp_path)
    for tied in (True, False):
        sft = module(config={"tie_word_embeddings": tied})
        model = sft.build(sft_data.tokenizer)
        total = sum(p.numel() for p in model.parameters())
        embedding = model.base.get_input_embeddings().weight.numel()
        assert flops_per_token(model) == 6 * (total if tied else total - embedding)
    for p in model.base.base_model.layers[0].parameters():
        p.requires_grad_(False)
    frozen = sum(p.numel() for p in model.base.base_model.layers[0].parameters())
    assert flops_per_token(model) == 6 * (total - embedding) - 2 * frozen


def test_peaks_are_found_by_device_name(monkeypatch):
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("Some Card", None),
    ]:
        monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak, name
    assert peak_flops(torch.device("cpu")) is None
