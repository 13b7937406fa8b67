"""The numbers of Oumi's own trainer, against a loop that is written out and against transformers.Trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from oumi_pl.core.configs import MixedPrecisionDtype
from oumi_pl.core.trainers import Trainer
from oumi_pl.core.trainers.collate import default_collator
from oumi_pl.core.trainers.optimisation import build_optimizer, build_schedule
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.core.test_trainer import Points, Regression, llama, logged, params, rows_of, token_rows

ROWS = 13  # with micro-batches of 2 and an accumulation of 3: updates of 6, 6 and 1 rows


class TinyLM(nn.Module):
    """A causal model of one's own: the mean over its own targets, and no num_items_in_batch."""

    def __init__(self):
        super().__init__()
        self.hf = llama().double()

    def forward(self, input_ids, attention_mask, labels):
        logits = self.hf(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


def plain_loop(hf, rows, epochs, lr, clip):
    """SGD written out: one row at a time, one division per update, torch's own norm."""
    sgd = torch.optim.SGD(hf.parameters(), lr=lr)
    losses, norms = [], []
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        for start in range(0, len(rows), 6):
            total, targets = 0.0, 0
            for i in order[start : start + 6]:
                labels = torch.tensor(rows[i]["labels"])[1:]
                logits = hf(input_ids=torch.tensor([rows[i]["input_ids"]])).logits[0, :-1]
                total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
                targets += int((labels != -100).sum())
            sgd.zero_grad()
            (total / targets).backward()
            norms.append(float(nn.utils.clip_grad_norm_(hf.parameters(), clip)))
            sgd.step()
            losses.append(float(total / targets))
    return losses, norms


@pytest.mark.parametrize("own_module", [True, False])
def test_equals_a_plain_loop_with_ragged_labels_and_a_short_last_window(tmp_path, own_module):
    model = TinyLM() if own_module else llama().double()
    values = params(
        tmp_path,
        **{"optimizer": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.7},
        **{"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "data_seed": 7},
    )
    Trainer(model, ByteTokenizer().build(), values, token_rows(ROWS)).train()
    reference = llama().double()
    losses, norms = plain_loop(reference, token_rows(ROWS), 2, 0.5, 0.7)
    assert len(losses) == 6
    exact = 1e-10 if own_module else 1e-6  # transformers computes its loss in float32
    assert logged(tmp_path) == pytest.approx(losses, rel=exact)
    assert logged(tmp_path, "train/grad_norm") == pytest.approx(norms, rel=exact)
    trained = (model.hf if own_module else model).state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=exact, atol=exact / 100)


class Doubles(Points):
    def __getitem__(self, i):
        return {name: value.double() for name, value in super().__getitem__(i).items()}


def test_a_window_cut_in_uneven_micro_batches_is_one_big_batch(tmp_path):
    norms = []
    for size, steps in ((5, 1), (2, 3)):
        model = Regression().double()
        model.dropout.p = 0
        run = tmp_path / str(size)
        values = params(run, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        Trainer(model, args=values, train_dataset=Doubles(5)).train()
        norms += logged(run, "train/grad_norm")
    assert norms[1] == pytest.approx(norms[0], rel=1e-12)


def test_equals_the_trainer_of_transformers(tmp_path):
    common = {
        **{"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 1, "data_seed": 5},
        "logging_steps": 1,
    }
    ours, theirs = llama(), llama()
    Trainer(ours, ByteTokenizer().build(), params(tmp_path, **common, warmup_ratio=0.2), token_rows(ROWS)).train()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"), use_cpu=True, save_strategy="no", warmup_steps=0.2, **common
    )
    hf = transformers.Trainer(
        theirs,
        arguments,
        train_dataset=token_rows(ROWS),
        data_collator=default_collator(ByteTokenizer().build()),
    )
    hf.train()
    rows = [row for row in hf.state.log_history if "loss" in row]
    assert logged(tmp_path) == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert logged(tmp_path, "train/grad_norm") == pytest.approx([row["grad_norm"] for row in rows], rel=1e-5)
    assert logged(tmp_path, "learning_rate") == pytest.approx([row["learning_rate"] for row in rows], rel=1e-9)
    ours_epochs = [row["epoch"] for row in rows_of(tmp_path) if "train/loss" in row]
    assert ours_epochs == pytest.approx([row["epoch"] for row in rows])


@pytest.mark.parametrize(
    ("name", "kwargs", "theirs"),
    [
        ("linear", {}, "linear"),
        ("cosine", {"num_cycles": 1.5}, "cosine"),
        ("cosine_with_restarts", {"num_cycles": 3}, "cosine_with_restarts"),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, "cosine_with_min_lr"),
        ("cosine_with_min_lr", {"min_lr": 0.25}, "cosine_with_min_lr"),
        ("constant", {}, "constant_with_warmup"),
    ],
)
def test_schedules_are_those_of_transformers(tmp_path, name, kwargs, theirs):
    values = params(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=3, learning_rate=2.0)
    factor = build_schedule(values, 20)
    steps = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = transformers.get_scheduler(theirs, steps, 3, 20, scheduler_specific_kwargs=kwargs)
    for step in range(22):
        assert 2.0 * factor(step, 20) == pytest.approx(steps.param_groups[0]["lr"], abs=1e-12)
        steps.step()
        reference.step()


def test_a_minimum_is_said_once(tmp_path):
    both = {"min_lr": 0.1, "min_lr_rate": 0.1}
    with pytest.raises(UserError, match="both are set; keep one"):
        build_schedule(params(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=both), 10)


@pytest.mark.parametrize(
    ("name", "more", "made"),
    [
        ("adam", {}, lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.5)),
        ("AdamW", {"adam_beta1": 0.5}, lambda p: torch.optim.AdamW(p, 0.1, betas=(0.5, 0.999), weight_decay=0.5)),
        ("adamw_torch_fused", {"adam_epsilon": 1e-3}, lambda p: torch.optim.AdamW(p, 0.1, eps=1e-3, weight_decay=0.5)),
        ("sgd", {"sgd_momentum": 0.9}, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.5)),
        (
            "adafactor",
            {},
            lambda p: transformers.Adafactor(p, 0.1, weight_decay=0.5, relative_step=False, scale_parameter=False),
        ),
    ],
)
def test_optimizers_by_name(tmp_path, name, more, made):
    """Biases are not decayed."""
    ours, theirs = Regression(), Regression()
    values = params(tmp_path, optimizer=name, learning_rate=0.1, weight_decay=0.5, **more)
    built = build_optimizer(ours, values)
    groups = [{"params": [theirs.layer.weight]}, {"params": [theirs.layer.bias], "weight_decay": 0.0}]
    reference = made(groups)
    for model, steps in ((ours, built), (theirs, reference)):
        model.eval()
        for i in range(3):
            steps.zero_grad()
            model(Points().x, Points().y * i)["loss"].backward()
            steps.step()
    assert torch.equal(ours.layer.weight, theirs.layer.weight)
    assert torch.equal(ours.layer.bias, theirs.layer.bias)


def test_bitsandbytes_is_named_where_it_is_missing(tmp_path, monkeypatch):
    # The submodule too: one that another test has imported would be taken without a look at its package.
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'oumi_pl\[gpu\]'"):
        build_optimizer(Regression(), params(tmp_path, optimizer="paged_adamw_8bit"))


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights(tmp_path):
    kinds = set()

    class Spy(Regression):
        def forward(self, x, y):
            kinds.add((self.layer(x).dtype, self.layer.weight.dtype))
            return super().forward(x, y)

    Trainer(
        Spy(), args=params(tmp_path, mixed_precision_dtype=MixedPrecisionDtype.BF16), train_dataset=Points()
    ).train()
    assert kinds == {(torch.bfloat16, torch.float32)}


def test_gradient_checkpointing_changes_no_number(tmp_path):
    for name, more in (("plain", {}), ("checkpointing", {"enable_gradient_checkpointing": True})):
        values = params(tmp_path / name, **more)
        Trainer(llama(), ByteTokenizer().build(), values, token_rows(6)).train()
    for metric in ("train/loss", "train/grad_norm"):
        assert logged(tmp_path / "checkpointing", metric) == pytest.approx(logged(tmp_path / "plain", metric), rel=1e-5)


WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from oumi_pl.core.trainers import Trainer
from oumi_pl.data.tokenizers import ByteTokenizer
from tests.core.test_trainer import Stream, llama, params, token_rows
values = params(
    sys.argv[1], optimizer="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_steps=4,
    gradient_accumulation_steps=int(sys.argv[2]), eval_strategy="epoch",
)
kind = {{"map-style": list, "iterable": Stream}}[sys.argv[3]]
rows, held_out = kind(token_rows(9)), kind(token_rows(3, 9))
Trainer(llama(), ByteTokenizer().build(), values, rows, eval_dataset=held_out).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map-style", "iterable"])
def test_two_processes_train_as_one(tmp_path, kind):
    """Updates of 8 rows and of 1, for which the second process has none."""
    root = str(Path(__file__).parents[2])
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=root))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    one = [sys.executable, str(script), str(tmp_path / "one"), "4", kind]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = [*launch, str(script), str(tmp_path / "two"), "2", kind]
    for command in (one, two):
        subprocess.run(command, check=True, env=env, capture_output=True, timeout=300)
    for name in ("train/loss", "train/grad_norm", "val/loss", "total_tokens_seen"):
        got, expected = logged(tmp_path / "two", name), logged(tmp_path / "one", name)
        assert len(got) > 1
        assert got == pytest.approx(expected, rel=1e-5)
