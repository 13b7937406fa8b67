"""One recipe on Lightning, on transformers.Trainer and on TRL: the same losses, norms, rates, metrics and weights."""

import json
import math
from functools import partial

import lightning as L
import pytest
import torch
from transformers import TrainerCallback

from oumi_pl import adapters
from oumi_pl.data.distill import DistillData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.losses.distillation import JSD, ReverseKL
from oumi_pl.losses.policy import BNPOLoss, CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss
from oumi_pl.losses.preference import BCO, LDDPO, JensenShannon, Robust, Sigmoid, WeightedSum
from oumi_pl.losses.responses import APOZeroUnpaired, KTOLoss
from oumi_pl.losses.reward import BradleyTerry
from oumi_pl.models.recomputation import EveryNth
from oumi_pl.modules.distill import Distill
from oumi_pl.modules.grpo import GRPO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.optim.schedules import Linear
from oumi_pl.rollouts.advantages import GroupMean
from oumi_pl.rollouts.sampling import Sampling
from oumi_pl.types import TokenLoss
from tests.data.corpora import corpus, pretrain_data
from tests.models.test_lora import pretrained
from tests.tiny import (
    LLAMA,
    data,
    distance,
    dpo,
    dpo_data,
    kto,
    kto_data,
    module,
    reward,
    reward_data,
    trainer,
    weights,
)

ROWS, BATCH, MICRO = 21, 2, 4
"""Updates of 8, 8 and 5 rows: the last one has a short micro-batch and an empty one."""
LORA = {"r": 4, "lora_alpha": 8}


class Squared(TokenLoss):
    """A loss of one's own."""

    def __call__(self, logits, targets):
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return 0.5 * nll.square()


class LogLightning(L.Callback):
    """What Lightning logs after each update."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class LogEngine(TrainerCallback):
    """What the engine itself logs after each update."""

    def __init__(self):
        self.rows, self.updates = [], []

    def on_step_end(self, args, state, control, train_dataloader, **kwargs):
        self.updates.append(train_dataloader.update)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append(logs)


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def sft(tmp_path, packing=False, **kwargs):
    layout = {"packing": True, "batch_size": 1, "max_length": 128} if packing else {"batch_size": BATCH}
    return module(adamw, schedule=Linear(2), **kwargs), data(tmp_path, ROWS, **layout)


def pretrain(tmp_path, **kwargs):
    train = corpus(tmp_path, 20)
    return Pretrain(config=LLAMA, optimizer=adamw, schedule=Linear(2)), pretrain_data(train, **kwargs)


def preferences(tmp_path, packing=False, config=None, **kwargs):
    layout = {"packing": True, "batch_size": 1, "max_length": 128} if packing else {"batch_size": BATCH}
    policy = dpo(None, adamw, {"attention_dropout": 0.1} | (config or {}), schedule=Linear(2), **kwargs)
    return policy, dpo_data(tmp_path, ROWS, **layout)


def judgements(tmp_path, packing=False, batch_size=8, **kwargs):
    layout = {"packing": True, "batch_size": 2, "max_length": 128} if packing else {"batch_size": batch_size}
    policy = kto(None, adamw, {"attention_dropout": 0.1}, schedule=Linear(2), **kwargs)
    return policy, kto_data(tmp_path, ROWS, **layout)


def run(engine, make, tmp_path, precision="32-true", micro=MICRO, **kwargs):
    """The trained module, its last metrics, and losses, norms and rates by update."""
    trained, its_data = make(tmp_path, **kwargs)
    L.seed_everything(3)
    record = LogLightning() if engine == "lightning" else LogEngine()
    loop = trainer(
        max_epochs=2,
        accumulate_grad_batches=micro,
        gradient_clip_val=0.5,
        precision=precision,
        callbacks=[record] if engine == "lightning" else [],
    )
    if engine == "lightning":
        loop.fit(trained, its_data)
        names = ("train/loss", "train/grad_norm", "train/lr")
    else:
        adapters.run(engine, loop, trained, its_data, [record])
        names = ("loss", "grad_norm", "learning_rate")
    return trained, loop, [[row[name] for row in record.rows] for name in names], record


def assert_equal(engine, make, tmp_path, **kwargs):
    ours, our_loop, (losses, norms, rates), _ = run("lightning", make, tmp_path, **kwargs)
    theirs, their_loop, logged, record = run(engine, make, tmp_path, **kwargs)
    assert len(losses) >= 5
    assert abs(losses[-1] - losses[0]) > 1e-3, "nothing moved"
    assert logged[0] == pytest.approx(losses, rel=1e-5)
    assert logged[1] == pytest.approx(norms, rel=1e-5)
    assert logged[2] == pytest.approx(rates, rel=1e-5, abs=1e-12)
    assert distance(weights(theirs), weights(ours)) < 1e-4
    ours, theirs = ({k: float(v) for k, v in loop.callback_metrics.items()} for loop in (our_loop, their_loop))
    ours.pop("step")
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name
    return record


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["hf", "trl"])
def test_padded_rows(tmp_path, engine):
    record = assert_equal(engine, sft, tmp_path)
    assert [len(update) for update in record.updates] == [MICRO] * 6
    empty = [[bool((batch["shift_labels"] == -100).all()) for batch in update] for update in record.updates]
    assert [sum(batches) for batches in empty] == [0, 0, 1] * 2
    assert any("attention_mask" in batch for update in record.updates for batch in update)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["hf", "trl"])
def test_packed_documents(tmp_path, engine):
    record = assert_equal(engine, sft, tmp_path, packing=True)
    for batch in (batch for update in record.updates for batch in update):
        assert len(batch["input_ids"]) == 1
        assert "attention_mask" not in batch
    assert any(int((batch["position_ids"] == 0).sum()) > 1 for update in record.updates for batch in update)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["hf", "trl"])
@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1, z_loss=1e-3), Squared()])
def test_other_token_losses(tmp_path, engine, loss):
    assert_equal(engine, sft, tmp_path, loss=loss)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["hf", "trl"])
def test_adapters_and_frozen_parts(tmp_path, engine):
    assert_equal(engine, sft, tmp_path, lora=LORA)
    assert_equal(engine, sft, tmp_path, freeze=["model.embed_tokens"], gradient_checkpointing=True)


class Counted(EveryNth):
    """Counts the runs of layers that will be recomputed."""

    runs = 0

    def function_of(self, layer, index):
        run = super().function_of(layer, index)

        def counted(*args):
            self.runs += 1
            return run(*args)

        return run and counted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["hf", "trl"])
def test_layers_follow_the_policy_of_recomputation(tmp_path, engine):
    policy = Counted(2)  # of two layers, the first
    record = assert_equal(engine, sft, tmp_path, gradient_checkpointing=policy)
    assert policy.runs == 2 * sum(len(update) for update in record.updates)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"packing": "concat", "isolate": False},  # a row's last target is the next row's first token
        {"packing": "best_fit", "isolate": True},
    ],
)
def test_pretraining(tmp_path, kwargs):
    assert_equal("hf", pretrain, tmp_path, **kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", [{}, {"lora": LORA}, {"packing": True}, {"reference": "online"}])
def test_preferences(tmp_path, kwargs):
    """Micro-batches of an update have different numbers of pairs."""
    assert_equal("trl", preferences, tmp_path, **kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"loss": KTOLoss(0.3), "desirable_weight": 0.7, "undesirable_weight": 1.5},
        {"lora": LORA},
        {"packing": True},
        {"reference": "online", "batch_size": 1},
        {"loss": APOZeroUnpaired(0.2), "micro": MICRO, "batch_size": 2},
    ],
)
def test_single_responses(tmp_path, kwargs):
    """Single responses. TRL estimates the KL divergence on a micro-batch, which has to be the update."""
    assert_equal("trl", judgements, tmp_path, **{"micro": 1} | kwargs)


def rewards(tmp_path, packing=False, config=None, **kwargs):
    layout = {"packing": True, "batch_size": 1, "max_length": 128} if packing else {"batch_size": BATCH}
    scorer = reward(None, adamw, {"attention_dropout": 0.1} | (config or {}), schedule=Linear(2), **kwargs)
    return scorer, reward_data(tmp_path, ROWS, **layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs",
    [{"loss": BradleyTerry(center_rewards_coefficient=0.05)}, {"lora": LORA}, {"packing": True}],
    ids=["full", "lora", "packing"],
)
def test_rewards(tmp_path, kwargs):
    assert_equal("trl", rewards, tmp_path, **kwargs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Student and teacher. Both have logits for five more tokens than the tokenizer has, which don't take part."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = pretrained(folder / "teacher", room=5, hidden_size=64, initializer_range=0.3)
    return {"model": pretrained(folder / "student", room=5), "teacher": teacher}


def distillation(tmp_path, packing=False, **kwargs):
    layout = {"packing": True, "batch_size": 1, "max_length": 128} if packing else {"batch_size": BATCH}
    return Distill(**kwargs, optimizer=adamw, schedule=Linear(2)), data(tmp_path, ROWS, **layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"divergence": ReverseKL()}, {"divergence": JSD(0.3), "temperature": 2.0}, {"lora": LORA}, {"packing": True}],
    ids=["forward", "reverse", "jsd", "lora", "packing"],
)
def test_distillation(tmp_path, pair, kwargs):
    assert_equal("trl", distillation, tmp_path, **pair, **kwargs)


def distillation_of_both_kinds(tmp_path, **kwargs):
    data(tmp_path, ROWS)  # writes the file
    file = str(tmp_path / f"rows-{ROWS}-0.jsonl")
    options = {"max_length": 128, "batch_size": BATCH, "seed": 3, "completions": 2, "sampling": Sampling(6)}
    return Distill(**kwargs, optimizer=adamw, schedule=Linear(2)), DistillData(
        file, tokenizer=ByteTokenizer(), **options
    )


@pytest.mark.filterwarnings("ignore")
def test_distillation_in_updates_of_both_kinds(tmp_path, pair):
    assert_equal("trl", distillation_of_both_kinds, tmp_path, **pair)


def sampled(tmp_path, loss=None, lora=None, kl=0.0, kl_corrected=True, advantage=None, **kwargs):
    """Updates of 8 and 3 prompts: the last one has a short micro-batch and two empty ones."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "say " + "ab" * i}) + "\n" for i in range(11)))
    data = {"tokenizer": ByteTokenizer(), "max_length": 128, "batch_size": BATCH, "completions": 3, "seed": 0}
    rollouts = RolloutData(str(file), reward=mixed, **data | {"sampling": Sampling(6, temperature=1.5)} | kwargs)
    settings = {"loss": loss, "advantage": advantage, "kl": kl, "kl_corrected": kl_corrected and kl > 0, "lora": lora}
    optimizer = partial(torch.optim.SGD, lr=0.3, momentum=0.5)
    return GRPO(config=LLAMA | {"initializer_range": 0.2}, optimizer=optimizer, **settings), rollouts


def mixed(completion, row):
    """Varies between completions."""
    return math.sin(sum(map(ord, completion))) + len(row["prompt"]) % 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"loss": GRPOLoss(0.05), "iterations": 2},
        {"loss": BNPOLoss(), "kl": 0.2, "kl_corrected": False},
        {"loss": DAPOLoss(), "steps_per_rollout": 2, "mask_truncated": True},
        {"loss": DrGRPOLoss(), "advantage": GroupMean("none"), "kl": 0.2},
        {"loss": GSPOLoss(), "lora": LORA},
        {"loss": CISPOLoss(), "lora": LORA, "kl": 0.2},
    ],
    ids=["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"],
)
def test_rollouts(tmp_path, kwargs):
    ours, our_loop, expected, _ = run("lightning", sampled, tmp_path, **kwargs)
    theirs, their_loop, logged, _ = run("trl", sampled, tmp_path, **kwargs)
    metrics = [
        {k: float(v) for k, v in loop.callback_metrics.items() if k != "step"} for loop in (our_loop, their_loop)
    ]
    assert metrics[1].keys() == metrics[0].keys() >= {"train/reward", "train/entropy", "train/clipped/low"}
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)
    assert len(expected[0]) == (8 if "iterations" in kwargs else 4)
    assert logged[0] == pytest.approx(expected[0], rel=1e-5, abs=5e-6)
    assert logged[1] == pytest.approx(expected[1], rel=1e-5)
    assert distance(weights(theirs), weights(ours)) < 1e-5


GEMMA = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}


@pytest.mark.filterwarnings("ignore")
def test_an_architecture_with_an_attention_and_logits_of_its_own(tmp_path):
    """Lightning reads its pairs as padded rows, too; logits have a soft cap, and layers a window."""
    assert_equal("trl", preferences, tmp_path, config=GEMMA)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loss",
    [
        LDDPO(WeightedSum([Sigmoid(0.2), BCO(0.2)], [0.7, 0.5]), alpha=0.3),
        Robust(beta=0.3, label_smoothing=0.2, divergence=JensenShannon()),
    ],
)
def test_other_preference_losses(tmp_path, loss):
    assert_equal("trl", preferences, tmp_path, loss=loss)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "engine", "precision"),
    [
        (sft, "hf", "bf16-mixed"),
        (preferences, "trl", "bf16-true"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (sft, "hf", "bf16-true"),
                (sft, "trl", "bf16-mixed"),
                (sft, "trl", "bf16-true"),
                (preferences, "trl", "bf16-mixed"),
            ]
        ),
    ],
)
def test_half_precision(tmp_path, make, engine, precision):
    """Up to the rounding of bfloat16: weights and matrix products have the same dtypes."""
    ours, _, expected, _ = run("lightning", make, tmp_path, precision)
    theirs, _, logged, _ = run(engine, make, tmp_path, precision)
    assert logged[0] == pytest.approx(expected[0], rel=1e-2)
    assert logged[1] == pytest.approx(expected[1], rel=5e-2)
    assert logged[0] != pytest.approx(run(engine, make, tmp_path)[2][0], rel=1e-6)
    dtypes = {p.dtype for p in theirs.parameters()}
    assert dtypes == {p.dtype for p in ours.parameters()}
    assert dtypes == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}


class Infinite(TokenLoss):
    def __call__(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none") * float("inf")


@pytest.mark.filterwarnings("ignore")
def test_a_non_finite_loss_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="train/loss became inf at step 1"):
        run("hf", sft, tmp_path, loss=Infinite())


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was_built(tmp_path):
    """Configs and forward methods, which engines change while they train."""
    trained, _, _, _ = run("trl", preferences, tmp_path, lora=LORA)
    base = trained.causal_lm.base
    built = preferences(tmp_path, lora=LORA)[0].build(trained.trainer.datamodule.tokenizer)
    assert "forward" not in vars(base)
    assert base.config.to_dict() == built.base.config.to_dict()
    assert list(trained.causal_lm.hf.peft_config) == ["default"]
    assert trained.causal_lm.hf.peft_config["default"].to_dict() == built.hf.peft_config["default"].to_dict()
