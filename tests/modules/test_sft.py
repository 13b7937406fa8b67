"""SFT as a whole: what is trained and what is reported do not depend on how rows were batched or packed."""

import json
import textwrap

import lightning as L
import pytest
import torch

from oumi_pl.__main__ import main
from oumi_pl.data.kto import KTOData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models.lm import documents, padded
from oumi_pl.modules.sft import SFT
from tests.tiny import conversations, data, distance, fit, module, trainer, weights, write_jsonl

ROWS = 13


def validated(tmp_path, **kwargs):
    kwargs = {"validation": str(write_rows(tmp_path)), "batch_size": 2} | kwargs
    sft, sft_data = module(), data(tmp_path, ROWS, **kwargs)
    L.seed_everything(1)
    return trainer().validate(sft, sft_data, verbose=False)[0]


def write_rows(tmp_path):
    return write_jsonl(tmp_path / "val.jsonl", conversations(ROWS, seed=5))


def test_validation_does_not_depend_on_batches_or_packing(tmp_path):
    expected = validated(tmp_path, eval_batch_size=1)
    assert expected["val/perplexity"] == pytest.approx(torch.tensor(expected["val/nll"]).exp().item(), rel=1e-6)
    for kwargs in ({"eval_batch_size": 3}, {"eval_batch_size": 8}, {"eval_batch_size": 2, "packing": True}):
        got = validated(tmp_path, **kwargs)
        for name in ("val/loss", "val/nll", "val/mean_token_accuracy"):
            assert got[name] == pytest.approx(expected[name], rel=1e-6), (name, kwargs)


def test_a_mean_of_batch_means_would_be_caught(tmp_path, monkeypatch):
    expected = validated(tmp_path, eval_batch_size=1)
    original = SFT.loss_sums

    def mean(self, batch, split):
        return {name: value / len(batch["targets"]) for name, value in original(self, batch, split).items()}

    monkeypatch.setattr(SFT, "loss_sums", mean)
    monkeypatch.setattr(SFT, "count", lambda self, batch: {"targets": 1})
    assert validated(tmp_path, eval_batch_size=3)["val/loss"] != pytest.approx(expected["val/loss"], rel=1e-4)


def test_packed_training_equals_unpacked(tmp_path):
    """The same thirteen rows in one update, packed and padded: the same weights afterwards."""
    expected = fit(module(), data(tmp_path, ROWS, batch_size=ROWS), max_epochs=1)
    sft_data = data(tmp_path, ROWS, batch_size=ROWS, packing=True, max_length=256)
    got = fit(module(), sft_data, max_epochs=1)
    assert len(sft_data.plan(0)) == 1
    assert sft_data.plan(0).rows < ROWS, "nothing was packed"
    assert distance(got, expected) < 1e-5


SMALL = {"hidden_size": 32, "num_attention_heads": 4}
LEAKING = {  # how each fails to keep packed documents apart -> its config
    "see each other": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "BloomModel can't keep packed documents apart": SMALL | {"model_type": "bloom", "n_layer": 1},
    "architecture's attention can't": SMALL | {"model_type": "falcon", "num_hidden_layers": 1, "alibi": True},
}


def trained_at_once(tmp_path, config, **kwargs):
    """All rows in one update."""
    sft = SFT(config=config, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    fit(sft, data(tmp_path, ROWS, batch_size=ROWS, max_length=256, **kwargs), max_epochs=1)
    return sft


@pytest.mark.parametrize("why", LEAKING)
def test_a_model_that_mixes_packed_documents_reads_them_as_padded_rows(tmp_path, why):
    """The weights are those of unpacked training, and the run says what it does."""
    packed = trained_at_once(tmp_path, LEAKING[why], packing=True)
    assert packed.causal_lm.layout is padded
    assert why in packed.notes[0]
    assert "set " not in packed.notes[0]
    alone = trained_at_once(tmp_path, LEAKING[why])
    assert distance(weights(packed), weights(alone)) < 1e-5


def test_packs_that_leak_would_be_caught(tmp_path, monkeypatch):
    alone = weights(trained_at_once(tmp_path, LEAKING["see each other"]))
    monkeypatch.setattr("oumi_pl.models.lm.choose_layout", lambda *_: (documents, ""))
    packed = weights(trained_at_once(tmp_path, LEAKING["see each other"], packing=True))
    assert distance(packed, alone) > 1e-4


class HalfLoss(CrossEntropy):
    """A loss whose value is not the likelihood: `val/nll` has to be."""

    def __call__(self, logits, targets):
        return 0.5 * super().__call__(logits, targets)

    loss_and_gradient = None


def test_perplexity_is_of_the_likelihood_whatever_is_trained(tmp_path):
    L.seed_everything(1)
    sft = module(loss=HalfLoss())
    sft_data = data(tmp_path, ROWS, validation=str(write_rows(tmp_path)), batch_size=2)
    got = trainer().validate(sft, sft_data, verbose=False)[0]
    assert got["val/loss"] == pytest.approx(got["val/nll"] / 2, rel=1e-6)
    assert got["val/nll"] == pytest.approx(validated(tmp_path)["val/nll"], rel=1e-6)


def test_gradient_checkpointing_and_bf16_run(tmp_path):
    sft = module(gradient_checkpointing=True)
    fit(sft, data(tmp_path, ROWS, packing=True, batch_size=2), max_steps=2, precision="bf16-mixed")
    assert all(torch.isfinite(w).all() for w in weights(sft).values())
    assert sft.causal_lm.base.is_gradient_checkpointing


def test_non_finite_losses_stop_the_run(tmp_path):
    sft = module(lambda params: torch.optim.SGD(params, lr=1e30))
    with pytest.raises(Exception, match=r"became (nan|inf) at step \d"):
        fit(sft, data(tmp_path, ROWS), max_steps=5)


RECIPE = """
model:
  class_path: SFT
  init_args:
    config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
             num_key_value_heads: 4, max_position_embeddings: 512}
data:
  class_path: SFTData
  init_args:
    train: rows.jsonl
    test: rows.jsonl
    tokenizer: {class_path: ByteTokenizer}
    batch_size: 4
trainer: {accelerator: cpu, max_steps: 2}
"""

FOCAL = """
import torch.nn.functional as F
from oumi_pl.types import TokenLoss

class Focal(TokenLoss):
    def __init__(self, gamma: float = 2.0):
        self.gamma = gamma

    def __call__(self, logits, targets):
        nll = F.cross_entropy(logits, targets, reduction="none")
        return (1 - (-nll).exp()) ** self.gamma * nll
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(RECIPE))
    write_jsonl(tmp_path / "rows.jsonl", conversations(ROWS))
    return tmp_path


def first_loss(recipe, *args, name):
    assert main(["fit", "--config", "recipe.yaml", "--name", name, *args]) == 0
    header, first = (recipe / "runs" / name / "metrics.csv").read_text().splitlines()[:2]
    return float(dict(zip(header.split(","), first.split(","), strict=True))["train/loss"])


def test_a_loss_of_ones_own(recipe, monkeypatch):
    (recipe / "focal.py").write_text(FOCAL)
    plain = first_loss(recipe, name="plain")
    own = ["--model.loss", "focal.Focal", "--model.loss.gamma"]
    assert first_loss(recipe, *own, "0.0", name="gamma0") == pytest.approx(plain, rel=1e-6)
    assert first_loss(recipe, *own, "1.0", name="gamma1") < plain * 0.999


def test_predict_writes_a_completion_per_row(recipe):
    first_loss(recipe, name="run")
    checkpoint = next((recipe / "runs/run/checkpoints").glob("*.ckpt"))
    command = [
        "predict",
        "--config",
        "recipe.yaml",
        "--ckpt_path",
        str(checkpoint),
        "--predictions.max_new_tokens",
        "4",
    ]
    assert main(command) == 0
    lines = [json.loads(line) for line in (recipe / "runs/recipe-predict/predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, ROWS + 1))
    rows = conversations(ROWS)
    assert [line["reference"] for line in lines] == [row["messages"][-1]["content"] for row in rows]
    assert all(rows[i]["messages"][0]["content"] in line["prompt"] for i, line in enumerate(lines))


def test_test_reports_the_metrics_of_the_split_once(recipe, capsys):
    first_loss(recipe, name="run")
    checkpoint = next((recipe / "runs/run/checkpoints").glob("*.ckpt"))
    capsys.readouterr()
    assert main(["test", "--config", "recipe.yaml", "--ckpt_path", str(checkpoint)]) == 0
    assert capsys.readouterr().out.count("test/perplexity") == 1


def test_random_weights_are_not_scored(recipe, capsys):
    assert main(["test", "--config", "recipe.yaml"]) == 2
    assert "untrained weights" in capsys.readouterr().err


def test_a_run_shorter_than_val_every_is_validated_at_its_end(recipe):
    args = ["--data.validation", "0.3", "--val_every", "100", "--name", "run"]
    assert main(["fit", "--config", "recipe.yaml", *args]) == 0
    header, *lines = (recipe / "runs/run/metrics.csv").read_text().splitlines()
    column = header.split(",").index("val/loss")
    assert [bool(line.split(",")[column]) for line in lines] == [False, True]


def test_many_rows_cut_to_length_are_warned_of(recipe):
    with pytest.warns(UserWarning, match="of the train rows are cut to data.max_length 48"):
        assert main(["fit", "--config", "recipe.yaml", "--data.max_length", "48"]) == 0


def test_several_devices_without_a_gpu_are_refused(recipe, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["fit", "--config", "recipe.yaml", "--trainer.accelerator", "auto", "--trainer.devices", "8"]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_bad_answers_are_not_imitated(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    feedback = KTOData(
        write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer=ByteTokenizer(), max_length=64, batch_size=2
    )
    with pytest.raises(UserError, match="data: KTOData gives good and bad answers, and SFT would imitate both"):
        fit(module(), feedback, max_steps=1)
