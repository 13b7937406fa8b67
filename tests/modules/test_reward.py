"""Reward models as a whole: what an update is, that nothing depends on how rows were batched, and what is exported."""

import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from oumi_pl.attention.segments import path_positions
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.reward import BCE, MSE, BradleyTerry, PairLoss
from oumi_pl.models.lm import States, documents, forest, padded, plain_scores
from oumi_pl.modules.base import LanguageModule
from tests.models.test_lora import pretrained
from tests.modules.test_dpo import Record
from tests.tiny import distance, fit, pairs, reward, reward_data, trainer, write_jsonl

ROOT = str(Path(__file__).parents[2])
PAIRS, RATED = 7, 4  # an update of 8 rows and a short one of 3
LR = 0.1
CENTER = 0.05


def loss():
    return BradleyTerry(label_smoothing=0.1, center_rewards_coefficient=CENTER)


def module(**kwargs):
    return reward(**{"loss": loss(), "outcome_loss": BCE()} | kwargs)


def data(path, batch_size=8, **kwargs):
    return reward_data(path, PAIRS, outcomes=RATED, batch_size=batch_size, **kwargs)


# ---- an update


def started(tmp_path, **kwargs):
    """A module with the weights that `fit` starts from, and its data."""
    ours, rows = module(**kwargs), data(tmp_path)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(ours)
    ours.model = ours.build(rows.tokenizer, branching=True)
    return ours, rows


def plain_copy(ours):
    """Transformers' own sequence-classification model with the same weights."""
    hf = AutoModelForSequenceClassification.from_config(ours.causal_lm.base.config, attn_implementation="eager")
    hf.load_state_dict(ours.causal_lm.base.state_dict())
    return hf.train()


def paths(example):
    return [
        torch.from_numpy(example.input_ids[path_positions(example.segments, i)]).long()
        for i in range(len(example.segments))
    ]


def plain_loop(hf, rows, updates):
    """SGD written out: each response alone through transformers' own forward, one division per update."""
    optimizer, losses = torch.optim.SGD(hf.parameters(), lr=LR), []
    for update in updates:
        total = 0.0
        for i in update:
            example = rows.examples("train")[i]
            scores = [hf(input_ids=path[None]).logits[0, 0] for path in paths(example)]
            if len(scores) == 2:
                difference = scores[0] - scores[1]
                total = total - 0.9 * logsigmoid(difference) - 0.1 * logsigmoid(-difference)
                total = total + CENTER * (scores[0] + scores[1]) ** 2
            else:
                outcome = torch.tensor(example.fields["outcome"])
                total = total + binary_cross_entropy_with_logits(scores[0], outcome.float())
        optimizer.zero_grad()
        (total / len(update)).backward()
        optimizer.step()
        losses.append(float(total / len(update)))
    return losses


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights and losses of the plain loop."""
    path = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUMI_PL_CACHE", str(path / "cache"))
        ours, rows = started(path)
        plan = rows.plan(0)
        updates = [
            [int(i) for batch in plan.micro_batches(u, rows.layout) for row in batch for i in row]
            for u in range(len(plan))
        ]
        assert [len(update) for update in updates] == [8, 3]
        hf = plain_copy(ours)
        losses = plain_loop(hf, rows, updates)
    return {name: p.detach().clone() for name, p in hf.named_parameters()}, losses


def trained(tmp_path, batch_size=8, micro_batches=1, packing=False, **kwargs):
    record, ours = Record(), module(**kwargs)
    rows = data(tmp_path, batch_size, packing=packing)
    got = fit(ours, rows, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[record])
    return ours, got, [update["loss"] for update in record.updates]


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(1, 8), (2, 4), (8, 1)])
def test_equals_a_plain_loop_with_any_micro_batches(tmp_path, reference, batch_size, micro_batches):
    ours, got, losses = trained(tmp_path, batch_size, micro_batches)
    assert ours.causal_lm.layout is forest
    assert distance(got, reference[0]) < 1e-6
    assert losses == pytest.approx(reference[1], rel=1e-6)


@pytest.mark.parametrize("layout", [documents, padded])
def test_equals_a_plain_loop_in_every_layout(tmp_path, reference, monkeypatch, layout):
    monkeypatch.setattr("oumi_pl.models.lm.choose_layout", lambda hf, share, longest: (layout, "because"))
    ours, got, losses = trained(tmp_path, 4, 2)
    assert ours.causal_lm.layout is layout
    assert distance(got, reference[0]) < 1e-6
    assert losses == pytest.approx(reference[1], rel=1e-6)


def test_a_mean_of_means_would_be_caught(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(LanguageModule, "share", lambda self, batch: 1 / max(1, len(batch["sample_ids"])))
    _, got, _ = trained(tmp_path, 2, 4)
    assert distance(got, reference[0]) > 1e-4


def test_the_token_before_the_last_would_be_caught(tmp_path, reference, monkeypatch):
    def ends(self):
        lengths = torch.tensor([segment.length for segment in self.batch["segments"]])
        return self.at(lengths.cumsum(0) - 2)

    monkeypatch.setattr(States, "ends", property(ends))
    monkeypatch.setattr("oumi_pl.models.lm.ScoringLM.refuse_unknown_logits", lambda self: None)
    _, got, losses = trained(tmp_path)
    assert abs(losses[0] - reference[1][0]) > 1e-4
    assert distance(got, reference[0]) > 1e-4


def test_a_score_of_another_token_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(States, "ends", property(lambda self: self.at(torch.tensor([0, 1, 2]))))
    with pytest.raises(UserError, match="computes its score in a way that is not supported"):
        trained(tmp_path)


WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.modules.test_dpo import Record
from tests.modules.test_reward import data, fit, module
strategy, out = sys.argv[1], Path(sys.argv[2])
if strategy == "fsdp2":
    from lightning.pytorch.strategies import ModelParallelStrategy
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
record, ours = Record(), module()
got = fit(ours, data(out, 2), max_epochs=1, devices=2, accumulate_grad_batches=2, callbacks=[record], strategy=strategy)
got = {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in got.items()}}
ours.save(out / "model")
if ours.global_rank == 0:
    torch.save({{"weights": got, "losses": [u["loss"] for u in record.updates]}}, out / "result.pt")
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_equals_a_plain_loop_on_two_processes(tmp_path, reference, strategy):
    """The short update of 3 rows leaves one of four micro-batches without rows."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=ROOT))
    environment = os.environ | {"OUMI_PL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    data(tmp_path).stores("train")  # both processes find it in the cache
    command = [sys.executable, str(script), strategy, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(tmp_path / "result.pt", weights_only=True)
    assert distance(got["weights"], reference[0]) < 1e-6
    assert got["losses"] == pytest.approx(reference[1], rel=1e-6)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert distance(dict(exported.named_parameters()), reference[0]) < 1e-6


# ---- layouts


def test_scores_do_not_depend_on_what_shares_the_batch(tmp_path):
    """Packed, with prompts shared or apart, and one by one; changing a row leaves its neighbours bit-identical."""
    ours, rows = started(tmp_path)
    model, count = ours.causal_lm.eval(), PAIRS + RATED
    alone = [model(rows.batch("train", [i]), model.scores) for i in range(count)]
    batch = rows.batch("train", range(count))
    with torch.no_grad():
        together = model(batch, model.scores)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
        for layout in (documents, padded):
            model.layout = layout
            torch.testing.assert_close(model(batch, model.scores), together, rtol=1e-5, atol=1e-6)
        model.layout = forest
        batch["input_ids"][0, -3] += 1  # in the last row
        changed = model(batch, model.scores)
    assert torch.equal(changed[:-1], together[:-1])
    assert changed[-1] != together[-1]


def test_validation_does_not_depend_on_the_batch_size_or_packing(tmp_path):
    actual = []
    for kwargs in ({"eval_batch_size": 1}, {"eval_batch_size": 5}, {"packing": True}):
        ours = module()
        L.seed_everything(1)
        loop = trainer()
        rows = data(tmp_path, validation=str(tmp_path / "pairs-7-0.jsonl"), **kwargs)
        actual.append(loop.validate(ours, rows, verbose=False)[0])
    assert actual[1] == pytest.approx(actual[0], rel=1e-6)
    assert actual[2] == pytest.approx(actual[0], rel=1e-6)


# ---- metrics


def test_metrics_are_means_over_pairs_and_rated_rows(tmp_path):
    ours, rows = started(tmp_path)
    with torch.no_grad():
        scores = [[float(plain_copy(ours)(input_ids=p[None]).logits[0, 0]) for p in paths(e)] for e in all_of(rows)]
    record = Record()
    fit(module(), data(tmp_path, PAIRS + RATED), max_epochs=1, callbacks=[record])
    (got,) = record.updates
    chosen, rejected = (torch.tensor([s[i] for s in scores if len(s) == 2]) for i in (0, 1))
    single = torch.tensor([s[0] for s in scores if len(s) == 1])
    outcomes = torch.tensor([e.fields["outcome"] for e in all_of(rows) if len(e.segments) == 1])
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/chosen_std": chosen.std(correction=0),
        "rewards/rejected_std": rejected.std(correction=0),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "outcomes/mean": single.mean(),
        "outcomes/std": single.std(correction=0),
        "outcomes/accuracies": ((single > 0) == (outcomes > 0.5)).float().mean(),
    }
    assert {name: got[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-5)


def all_of(rows):
    return [rows.examples("train")[i] for i in range(PAIRS + RATED)]


def test_accuracies_of_each_held_out_source_add_up(tmp_path):
    held_out = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for file, n, seed in zip(held_out, (5, 9), (1, 2), strict=True):
        write_jsonl(Path(file), pairs(n, seed))
    rows = reward_data(tmp_path, 4, validation=held_out, eval_batch_size=3)
    L.seed_everything(1)
    (got,) = trainer().validate(reward(), rows, verbose=False)
    a, b = (got[f"val/rewards/accuracies/{name}"] for name in "ab")
    assert (5 * a + 9 * b) / 14 == pytest.approx(got["val/rewards/accuracies"], abs=1e-6)
    alone = reward_data(tmp_path, 4, validation=held_out[0])
    L.seed_everything(1)
    (first,) = trainer().validate(reward(), alone, verbose=False)
    assert first["val/rewards/accuracies"] == pytest.approx(a)
    assert "val/rewards/accuracies/a" not in first


# ---- rows and losses that don't fit


class Averaged(PairLoss):
    def __call__(self, chosen, rejected, margins):
        return (rejected - chosen).mean()


class Detached(PairLoss):
    def __call__(self, chosen, rejected, margins):
        return (rejected - chosen).detach()


MISTAKES = {
    "no outcome loss": ({"outcome_loss": None}, r"outcome_loss: 4 rows in data.train have an outcome.*BCE \(for 0 and"),
    "no margins": ({"loss": BradleyTerry(margin=True)}, "needs the margin of each pair, and 7 of 7 in data.train"),
    "averaged": ({"loss": Averaged()}, r"Averaged returned a tensor of shape \[\] for 7 rows"),
    "detached": ({"loss": Detached()}, "Detached returned losses without a gradient"),
}


@pytest.mark.parametrize(("kwargs", "message"), MISTAKES.values(), ids=MISTAKES)
def test_losses_that_do_not_fit_the_rows(tmp_path, kwargs, message):
    with pytest.raises(UserError, match=message):
        fit(module(**kwargs), data(tmp_path, PAIRS + RATED), max_epochs=1)


def test_scores_out_of_range_are_refused_for_bce_and_fine_for_mse(tmp_path):
    write_jsonl(tmp_path / "s.jsonl", [{"prompt": "a", "response": "b" * i, "score": i} for i in (1, 2, 3)])
    rows = reward_data(tmp_path)
    rows.sources["train"] = str(tmp_path / "s.jsonl")
    with pytest.raises(
        UserError, match=r"BCE takes outcomes from 0 to 1, and those in data.train are from 1 to 3; use"
    ):
        fit(module(), rows, max_epochs=1)
    record = Record()
    fit(module(outcome_loss=MSE()), rows, max_epochs=2, callbacks=[record])
    first, second = record.updates
    assert first["loss"] == pytest.approx(14 / 3, rel=0.1)  # (1 + 4 + 9) / 3 for scores near 0
    assert second["outcomes/errors"] < first["outcomes/errors"]


def test_margins_enter_the_loss(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", [row | {"margin": 3.0} for row in pairs(4)])
    rows = reward_data(tmp_path)
    rows.sources["train"] = str(tmp_path / "m.jsonl")
    record = Record()
    fit(reward(loss=BradleyTerry(margin=True)), rows, max_steps=1, callbacks=[record])
    assert record.updates[0]["loss"] == pytest.approx(math.log1p(math.exp(3)), rel=1e-2)


# ---- where training starts, and what is exported


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


def ragged(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 250, (n,), generator=generator) for n in (3, 12, 7, 30)]


def live_scores(ours, rows):
    hf = ours.causal_lm.hf.eval()
    with torch.no_grad():
        return torch.stack([hf(input_ids=row[None], use_cache=False).logits[0, 0] for row in rows])


def loaded_by_transformers(folder, pad):
    """As a user does; the base of an adapter knows neither the labels nor the pad token."""
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    settings = {"num_labels": 1, "pad_token_id": pad} if is_adapter else {}
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


@pytest.mark.parametrize(
    ("kwargs", "merge"),
    [({}, False), ({"lora": {"r": 4}}, True), ({"lora": {"r": 4}}, False)],
    ids=["full", "merged", "adapter"],
)
def test_an_export_scores_the_same_in_plain_transformers(tmp_path, base, kwargs, merge):
    ours = reward(base, lambda params: torch.optim.AdamW(params, lr=1e-2), **kwargs)
    rows = reward_data(tmp_path, 16, batch_size=4)
    fit(ours, rows, max_epochs=1)
    expected = live_scores(ours, ragged(ours))
    folder = tmp_path / "exported"
    ours.save(folder, tokenizer=rows.tokenizer, merge=merge)
    pad = rows.tokenizer.pad_token_id
    hf = loaded_by_transformers(folder, pad)
    with torch.no_grad():
        torch.testing.assert_close(plain_scores(hf, ragged(ours)), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 1e-2
    if merge or not kwargs:
        assert (hf.config.num_labels, hf.config.pad_token_id) == (1, pad)
        assert hf.config.architectures == ["LlamaForSequenceClassification"]
    again = reward(str(folder))  # the head is read, from an adapter too
    again.assemble(rows.tokenizer)
    torch.testing.assert_close(live_scores(again, ragged(ours)), expected, rtol=1e-5, atol=1e-5)


def test_it_starts_from_a_causal_lm_with_its_weights(base):
    ours = reward(base)
    ours.assemble(ByteTokenizer().build())
    lm = pretrained_weights(base)
    own = ours.causal_lm.hf.state_dict()
    assert own.keys() == (lm.keys() - {"lm_head.weight"}) | {"score.weight"}
    assert all(torch.equal(own[name], lm[name]) for name in own if name != "score.weight")


def pretrained_weights(base):
    from safetensors.torch import load_file

    return load_file(Path(base) / "model.safetensors")


@pytest.mark.parametrize("fault", ["no head", "another head", "another layer"])
def test_an_export_that_scores_otherwise_is_never_done(tmp_path, base, monkeypatch, fault):
    ours = reward(base)
    tokenizer = ByteTokenizer().build()
    ours.assemble(tokenizer)
    hf = ours.causal_lm.hf
    save = type(hf).save_pretrained

    def spoilt(self, folder, **kwargs):
        state = {name: value.clone() for name, value in hf.state_dict().items()}
        if fault == "no head":
            del state["score.weight"]
        else:
            state["score.weight" if fault == "another head" else "model.layers.1.mlp.up_proj.weight"] *= 1.5
        save(self, folder, state_dict=state, **kwargs)

    monkeypatch.setattr(type(hf), "save_pretrained", spoilt)
    with pytest.raises(UserError, match="LlamaForSequenceClassification is not the trained model: its logits are off"):
        ours.save(tmp_path / "exported", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("cohere", "no sequence-classification class for cohere, .* for example gemma2, gpt2, llama"),
        ("bert", "BertForSequenceClassification has no linear head `score`"),
    ],
)
def test_an_architecture_without_a_score_is_refused(model_type, message):
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ours = reward()
    ours.config = {"model_type": model_type} | tiny
    with pytest.raises(UserError, match=message):
        ours.assemble(ByteTokenizer().build())


ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8},
    "phi3": {}, "olmo2": {}, "smollm3": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "gpt_neox": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures_export_what_they_score(tmp_path, model_type):
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    known = CONFIG_MAPPING[model_type]().to_dict()
    config = {name: value for name, value in tiny.items() if name in known} | ARCHITECTURES[model_type]
    ours = reward()
    ours.config = {"model_type": model_type} | config
    tokenizer = ByteTokenizer().build()
    L.seed_everything(1)
    ours.assemble(tokenizer, branching=True)
    ours.causal_lm.refuse_unknown_logits()
    ours.save(tmp_path / "exported", tokenizer=tokenizer)
