"""Distillation: the update equals a plain loop over both models' full logits, and a second run computes nothing."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.data.distill import DistillData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.distillation import JSD, ForwardKL, ReverseKL
from oumi_pl.modules import reference
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.distill import Distill, Teacher
from oumi_pl.modules.sft import SFT
from oumi_pl.rollouts.sampling import Generate, Sampling
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.folders import saved_steps
from tests.conftest import free_port
from tests.data.corpora import corpus, pretrain_data
from tests.models.test_lora import plain_tokenizer, pretrained
from tests.modules.test_dpo import Record
from tests.modules.test_update import epoch_of
from tests.tiny import LLAMA, conversations, data, distance, fit, sgd, trainer, weights, write_jsonl

ROWS = 11
SETTINGS = {
    "forward": (ForwardKL, {}, {}),
    "reverse": (ReverseKL, {}, {"temperature": 2.0}),
    "jsd": (JSD, {"beta": 0.3}, {"cross_entropy": 0.4}),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model twice as wide as the student, with larger weights, so its distributions are not uniform."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return pretrained(folder, hidden_size=64, initializer_range=0.3)


@pytest.fixture
def computed(monkeypatch):
    """The examples whose distributions are computed before training, in order."""
    ids, original = [], reference._logps

    def counted(trainer, model, split, examples, compute):
        ids.extend((split, i) for i in examples)
        return original(trainer, model, split, examples, compute)

    monkeypatch.setattr(reference, "_logps", counted)
    return ids


def distill(teacher, name="forward", model=None, **kwargs):
    of, arguments, settings = SETTINGS[name]
    start = {} if model else {"config": LLAMA}
    return Distill(model, teacher=teacher, divergence=of(**arguments), **{"optimizer": sgd} | start | settings | kwargs)


def rows(path, **kwargs):
    return data(path, ROWS, **{"batch_size": 8, "group_by_length": False} | kwargs)


def trained(path, module, micro_batches=1, **kwargs):
    record = Record()
    options = {k: kwargs.pop(k) for k in ("max_epochs", "max_steps", "precision", "devices", "strategy") if k in kwargs}
    result = fit(
        module,
        rows(path, **kwargs),
        accumulate_grad_batches=micro_batches,
        callbacks=[record],
        **{"max_epochs": 1} | options,
    )
    return result, record.updates


def plain_loop(path, module, teacher):
    """SGD written out, with full logits of both models, one division per update."""
    samples = rows(path)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(module)
    hf = module.build(samples.tokenizer).hf
    theirs = AutoModelForCausalLM.from_pretrained(teacher)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    losses = []
    samples.setup("fit")
    for update in epoch_of(samples):
        total, targets = 0.0, 0
        for i in update:
            example = samples.examples("train")[i]
            ids = torch.tensor(example.input_ids, dtype=torch.long).unsqueeze(0)
            mask = torch.tensor(example.loss_mask[1:])
            logits = hf(input_ids=ids).logits[0, :-1][mask]
            with torch.no_grad():
                expected = theirs(input_ids=ids).logits[0, :-1][mask]
            total = total + loss(module, logits, expected, ids[0, 1:][mask])
            targets += int(mask.sum())
        optimizer.zero_grad()
        (total / targets).backward()
        optimizer.step()
        losses.append(float(total / targets))
    return {name: p.detach() for name, p in hf.named_parameters()}, losses


def loss(module, student, teacher, targets):
    t, weight, kl = module.temperature, module.cross_entropy, torch.nn.KLDivLoss(reduction="sum", log_target=True)
    p, q = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    if isinstance(module.divergence, JSD):
        b = module.divergence.beta
        m = (b * q.exp() + (1 - b) * p.exp()).log()
        value = b * kl(m, q) + (1 - b) * kl(m, p)
    else:
        value = kl(p, q) if isinstance(module.divergence, ForwardKL) else kl(q, p)
    return (1 - weight) * value + weight * F.cross_entropy(student, targets, reduction="sum")


@pytest.mark.parametrize("top_k", [None, 9999], ids=["online", "whole vocabulary cached"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_a_plain_loop_with_any_micro_batches(tmp_path, teacher, name, top_k):
    expected, losses = plain_loop(tmp_path, distill(teacher, name), teacher)
    for batch_size, micro_batches in ((8, 1), (2, 4)):
        got, updates = trained(tmp_path, distill(teacher, name, top_k=top_k), micro_batches, batch_size=batch_size)
        assert distance(got, expected) < 2e-6
        assert [update["loss"] for update in updates] == pytest.approx(losses, rel=2e-6)


def test_a_mean_of_means_would_be_caught(tmp_path, teacher, monkeypatch):
    expected, _ = plain_loop(tmp_path, distill(teacher), teacher)
    monkeypatch.setattr(LanguageModule, "share", lambda self, batch: 1 / max(1, len(batch["targets"])))
    got, _ = trained(tmp_path, distill(teacher), 4, batch_size=2)
    assert distance(got, expected) > 1e-4


def test_validation_does_not_depend_on_batches_or_packing(tmp_path, teacher):
    values = []
    for kwargs in ({"eval_batch_size": 1}, {"eval_batch_size": 8}, {"eval_batch_size": 2, "packing": True}):
        module = distill(teacher, "jsd")
        options = {"validation": 0.4} | kwargs
        trained(tmp_path, module, **options | {"batch_size": 99})  # one update, before which validation would differ
        values.append({k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("val/")})
    assert set(values[0]) == set(Distill.validation_metrics)
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-5)
    assert values[0]["val/perplexity"] == pytest.approx(2.718281828 ** values[0]["val/nll"], rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_that_is_its_own_teacher_has_no_gradient(tmp_path, teacher, name, top_k):
    module = distill(teacher, name, model=teacher, top_k=top_k, cross_entropy=0.0)
    _, updates = trained(tmp_path, module, max_steps=1)
    assert abs(updates[0]["divergence"]) < 1e-5
    assert updates[0]["grad_norm"] < 1e-4
    assert updates[0]["teacher_agreement"] == 1.0


def test_temperature_of_only_one_of_the_two_would_be_caught(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(Teacher, "_outcomes", lambda self, states: forgetful(self, states))
    _, updates = trained(tmp_path, distill(teacher, "reverse", model=teacher), max_steps=1)
    assert updates[0]["divergence"] > 1e-2


def forgetful(teacher, states):
    from oumi_pl.losses.distillation import TeacherHead

    return TeacherHead(states.predicting, states.lm.head, None, 1.0, teacher.vocab)


# ---- two processes

WORKER = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import oumi_pl.data.reference
from tests.modules.test_distill import distill, mixed, trained
from tests.tiny import fit
oumi_pl.data.reference.CHUNK = 2
teacher, out = sys.argv[1], Path(sys.argv[2])
for name, top_k in (("online", None), ("cached", 9999)):
    module = distill(teacher, "jsd", top_k=top_k)
    got, updates = trained(out, module, 2, batch_size=2, devices=2, strategy="ddp")
    if module.global_rank == 0:
        torch.save({"weights": got, "losses": [u["loss"] for u in updates]}, out / f"{name}.pt")
module = distill(teacher, "jsd")
options = {"accumulate_grad_batches": 2, "max_epochs": 2, "devices": 2, "strategy": "ddp"}
got = fit(module, mixed(out, batch_size=1), **options)
if module.global_rank == 0:
    torch.save(got, out / "both kinds.pt")
"""


def test_equals_a_plain_loop_on_two_processes(tmp_path, teacher):
    """The short update of 3 rows leaves a rank without rows; the ranks compute the cache together."""
    expected, losses = plain_loop(tmp_path, distill(teacher, "jsd"), teacher)  # puts the rows into the cache
    (tmp_path / "worker.py").write_text(WORKER)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "MASTER_PORT": free_port()}
    command = [sys.executable, str(tmp_path / "worker.py"), teacher, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("online", "cached"):
        got = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert distance(got["weights"], expected) < 2e-6
        assert got["losses"] == pytest.approx(losses, rel=2e-6)
    alone = fit(distill(teacher, "jsd"), mixed(tmp_path), max_epochs=2)
    assert distance(torch.load(tmp_path / "both kinds.pt", weights_only=True), alone) < 5e-6


# ---- documents


def test_every_token_of_documents_is_a_target(tmp_path, teacher):
    """A row's last target is the next row's first token, which the teacher predicts too; as in a plain loop."""
    options = {"tokenizer": ByteTokenizer(), "batch_size": 3, "shuffle_buffer": 0}
    documents = pretrain_data(corpus(tmp_path, 6), **options)
    module = Distill(config=LLAMA, teacher=teacher, optimizer=sgd)
    hf = initial(tmp_path, module, documents)
    theirs = AutoModelForCausalLM.from_pretrained(teacher)
    batch = next(iter(documents.train_dataloader()))
    ids = batch["input_ids"].view(3, -1)
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.flatten(0, 1).log_softmax(-1) for model in (hf, theirs))
        expected = F.kl_div(p, q, reduction="batchmean", log_target=True)
    assert len(batch["targets"]) == ids.numel()
    module, record = Distill(config=LLAMA, teacher=teacher, optimizer=sgd), Record()
    fit(module, pretrain_data(corpus(tmp_path, 6), **options), max_steps=1, callbacks=[record])
    assert record.updates[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def initial(path, module, samples):
    """The student of a run with seed 1, before its first update."""
    L.seed_everything(1)
    trainer(max_steps=1).strategy.connect(module)
    samples.prepare_data()
    samples.setup("fit")
    return module.build(samples.tokenizer).hf


def test_streams_have_no_cache(tmp_path, teacher):
    module = Distill(config=LLAMA, teacher=teacher, optimizer=sgd, top_k=4)
    with pytest.raises(UserError, match=r"the rows of PretrainData are a stream.*leave out `model.top_k`"):
        fit(module, pretrain_data(corpus(tmp_path, 6), tokenizer=ByteTokenizer()), max_steps=1)


def test_a_student_from_random_weights_uses_the_teachers_tokenizer(tmp_path):
    teacher = pretrained(tmp_path / "other", tokenizer=plain_tokenizer())
    module = distill(teacher)
    trained(tmp_path, module, tokenizer=None, template="plain")
    assert module.trainer.datamodule.tokenizer.get_vocab() == plain_tokenizer().get_vocab()
    assert distill(teacher, model="org/student").tokenizer_name == "org/student"


# ---- the cache


def test_the_second_run_computes_nothing_and_loads_no_teacher(tmp_path, teacher, computed, monkeypatch):
    first, updates = trained(tmp_path, distill(teacher, top_k=4), validation=0.3)
    assert computed
    computed.clear()
    monkeypatch.setattr(Teacher, "_model", lambda self: pytest.fail("the teacher was loaded"))
    for kwargs in ({}, {"batch_size": 4}):
        module = distill(teacher, top_k=4)
        second, again = trained(tmp_path, module, validation=0.3, **kwargs)
        assert not computed
        assert "from the cache" in module.notes[0]
        if not kwargs:
            assert again == updates
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change", [{"top_k": 5}, {"temperature": 1.5}, {"teacher_dtype": "bfloat16"}], ids=lambda c: next(iter(c))
)
def test_the_cache_is_recomputed_if_anything_it_depends_on_changes(tmp_path, teacher, computed, change):
    trained(tmp_path, distill(teacher, top_k=4), max_steps=1)
    computed.clear()
    trained(tmp_path, distill(teacher, **{"top_k": 4} | change), max_steps=1)
    assert len(computed) == ROWS


def test_a_larger_top_k_is_closer_to_the_full_distribution(tmp_path, teacher):
    exact, _ = trained(tmp_path, distill(teacher))
    away = [distance(trained(tmp_path, distill(teacher, top_k=k))[0], exact) for k in (1, 16, 128, 9999)]
    assert away == sorted(away, reverse=True)
    assert away[-1] < 1e-6


# ---- exact resume, LoRA, export


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 4}, {"lora": {"r": 4}}], ids=["online", "cached", "lora"])
def test_a_resumed_run_is_bit_identical(tmp_path, teacher, kwargs):
    model = teacher if "lora" in kwargs else None
    whole = run(tmp_path, distill(teacher, model=model, **kwargs), tmp_path / "checkpoints")
    again = run(tmp_path, distill(teacher, model=model, **kwargs), None, saved_steps(tmp_path / "checkpoints")[1])
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def run(path, module, directory, resume=None):
    callbacks = []
    if directory:
        callbacks = [Checkpoints(every=1, keep=9)]
        callbacks[0].directory = directory
    L.seed_everything(1)
    loop = trainer(
        max_epochs=2, callbacks=callbacks, plugins=[AtomicCheckpointIO()], enable_checkpointing=bool(directory)
    )
    loop.fit(module, rows(path, batch_size=4), ckpt_path=resume)
    return weights(module)


# ---- teachers that don't fit


def test_another_vocabulary_is_refused(tmp_path, teacher):
    other = pretrained(tmp_path / "other", tokenizer=plain_tokenizer())
    with pytest.raises(UserError, match=r"model\.teacher: .*reads other tokens than the data's tokenizer"):
        trained(tmp_path, distill(other))
    with pytest.raises(UserError, match=r"model\.teacher: .*reads other tokens"):
        trained(tmp_path, distill(other, top_k=3))


def test_padded_embeddings_are_accepted(tmp_path):
    padded = pretrained(tmp_path / "padded", room=7, initializer_range=0.3)
    expected, losses = plain_loop_of_fewer(tmp_path, padded)
    _, updates = trained(tmp_path, distill(padded))
    assert updates[0]["loss"] == pytest.approx(losses, rel=1e-5)
    assert expected == len(ByteTokenizer().build())


def plain_loop_of_fewer(path, teacher):
    """The first update's loss with the teacher's logits cut to the tokens."""
    samples, module = rows(path), distill(teacher)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(module)
    hf, theirs = module.build(samples.tokenizer).hf, AutoModelForCausalLM.from_pretrained(teacher)
    samples.setup("fit")
    size, total, targets = hf.config.vocab_size, 0.0, 0
    for i in epoch_of(samples)[0]:
        example = samples.examples("train")[i]
        ids = torch.tensor(example.input_ids, dtype=torch.long).unsqueeze(0)
        mask = torch.tensor(example.loss_mask[1:])
        with torch.no_grad():
            mine, expected = (m(input_ids=ids).logits[0, :-1][mask][:, :size] for m in (hf, theirs))
        total += float(loss(module, mine, expected, ids[0, 1:][mask]))
        targets += int(mask.sum())
    return size, total / targets


MISTAKES = {
    "temperature is 0, but has to be above 0": {"temperature": 0},
    "cross_entropy is a share from 0 to below 1, not 1; for cross-entropy alone use SFT": {"cross_entropy": 1},
    "top_k is 0, but has to be at least 1; leave it out to run the teacher online": {"top_k": 0},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_invalid_settings_are_refused(teacher, message):
    with pytest.raises(UserError, match=f"model.{message}"):
        Distill(config=LLAMA, teacher=teacher, **MISTAKES[message])


@pytest.mark.parametrize("word", ["initial", "online", "none"])
def test_a_teacher_must_be_a_model(word):
    with pytest.raises(UserError, match=f"model.teacher: '{word}' is no model"):
        Distill(config=LLAMA, teacher=word)


def sampling(path, **kwargs):
    file = path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "say " + "ab" * i}) + "\n" for i in range(5)))
    options = {"batch_size": 4, "completions": 2, "max_length": 128, "sampling": Sampling(6), "validation": str(file)}
    return RolloutData(str(file), tokenizer=ByteTokenizer(), seed=0, **options | kwargs)


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(4, 1), (1, 4)])
def test_on_its_own_completions_it_equals_a_plain_loop(tmp_path, teacher, batch_size, micro_batches):
    module, samples, updates = distill(teacher, "reverse"), sampling(tmp_path, batch_size=batch_size), []
    original = samples.groups

    def groups(*args):
        updates.append(original(*args))
        return updates[-1]

    samples.groups = groups
    fit(module, samples, accumulate_grad_batches=micro_batches, max_steps=2, max_epochs=2, limit_val_batches=0)
    other = distill(teacher, "reverse")
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(other)
    hf = other.build(samples.tokenizer).hf
    theirs = AutoModelForCausalLM.from_pretrained(teacher)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    for update in updates[:2]:
        total, targets = 0.0, 0
        for group in update:
            for completion in group.completions:
                prompt, n = samples.all_prompts("train")[group.prompt].ids, len(completion.ids)
                ids = torch.tensor([[*prompt, *completion.ids]])
                with torch.no_grad():
                    wanted = theirs(input_ids=ids).logits[0, -n - 1 : -1]
                total = total + loss(other, hf(input_ids=ids).logits[0, -n - 1 : -1], wanted, ids[0, -n:])
                targets += n
        optimizer.zero_grad()
        (total / targets).backward()
        optimizer.step()
    assert len(updates[0]) == 4
    assert distance(weights(module), {name: p.detach() for name, p in hf.named_parameters()}) < 5e-6


def test_its_own_completions_are_evaluated_without_a_reward(tmp_path, teacher):
    logged = trainer(max_epochs=1).validate(distill(teacher), sampling(tmp_path), verbose=False)[0]
    assert logged["val/divergence"] > 0
    assert not any("reward" in name or "pass@" in name for name in logged)


def test_its_own_completions_can_not_be_cached_in_advance(tmp_path, teacher):
    with pytest.raises(UserError, match=r"model.top_k: the student's own completions"):
        trainer(max_steps=1).fit(distill(teacher, top_k=4), sampling(tmp_path))


# ---- the student's own completions in some of the updates


def mixed(path, **kwargs):
    """Rows of which some updates train on the answers, and others on completions; seed 3 draws both kinds early."""
    file = path / f"rows-{ROWS}.jsonl"
    write_jsonl(file, conversations(ROWS))
    options = {"batch_size": 4, "max_length": 128, "sampling": Sampling(6), "group_by_length": False, "seed": 3}
    return DistillData(str(file), tokenizer=ByteTokenizer(), **options | kwargs)


def recorded(samples):
    """The groups of each sampled update, which appear in the list once they are sampled."""
    updates, original = [], samples.groups

    def groups(*args):
        updates.append(original(*args))
        return updates[-1]

    samples.groups = groups
    return updates


def plain_loop_of_both_kinds(path, module, teacher, kinds, sampled):
    """GKD's algorithm 1 written out: for each update one of two sets of rows, full logits of both, one division."""
    samples = mixed(path)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(module)
    hf, theirs = module.build(samples.tokenizer).hf, AutoModelForCausalLM.from_pretrained(teacher)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    samples.setup("fit")
    sampled, examples = iter(sampled), samples.examples("train")
    plans = [[plan.examples_of(u, samples.layout, 1) for u in range(len(plan))] for plan in map(samples.plan, range(2))]
    for is_sampled, update in zip(kinds, itertools.chain(*plans), strict=True):
        texts = [(examples[i].input_ids, examples[i].loss_mask) for i in update]
        if is_sampled:
            groups = next(sampled)
            assert [group.prompt for group in groups] == list(update)
            texts = []
            for i, group in zip(update, groups, strict=True):
                prompt = examples[i].input_ids[: examples[i].loss_mask.argmax()]
                masks = [np.arange(len(prompt) + len(c.ids)) >= len(prompt) for c in group.completions]
                texts += [([*prompt, *c.ids], mask) for c, mask in zip(group.completions, masks, strict=True)]
        total, targets = 0.0, 0
        for ids, mask in texts:
            ids, mask = torch.tensor([[*map(int, ids)]]), torch.tensor(mask[1:])
            with torch.no_grad():
                wanted = theirs(input_ids=ids).logits[0, :-1][mask]
            total = total + loss(module, hf(input_ids=ids).logits[0, :-1][mask], wanted, ids[0, 1:][mask])
            targets += int(mask.sum())
        optimizer.zero_grad()
        (total / targets).backward()
        optimizer.step()
    return {name: p.detach() for name, p in hf.named_parameters()}


def test_updates_of_both_kinds_equal_a_plain_loop_with_any_micro_batches(tmp_path, teacher):
    results = []
    for batch_size, micro_batches in ((4, 1), (1, 4)):
        module, samples, record = distill(teacher, "jsd"), mixed(tmp_path, batch_size=batch_size), Record()
        sampled = recorded(samples)
        got = fit(module, samples, accumulate_grad_batches=micro_batches, max_epochs=2, callbacks=[record])
        kinds = [bool(update["sampled"]) for update in record.updates]
        assert kinds == [samples.is_sampled(*divmod(i, 3)) for i in range(6)]
        assert {*kinds} == {True, False}
        assert kinds.count(True) == len(sampled)
        results.append((got, kinds, sampled))
    (one, kinds, sampled), (other, *_) = results
    expected = plain_loop_of_both_kinds(tmp_path, distill(teacher, "jsd"), teacher, kinds, sampled)
    assert distance(one, expected) < 5e-6
    assert distance(other, expected) < 5e-6
    # a run that takes the wrong kind in one update ends elsewhere
    wrong = plain_loop_of_both_kinds(tmp_path, distill(teacher, "jsd"), teacher, [False, *kinds[1:]], sampled[1:])
    assert kinds[0]
    assert distance(wrong, one) > 1e-3


class Dies(Generate):
    """Dies while it samples for the second time."""

    calls = 0

    def sample(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise ConnectionAbortedError
        return super().sample(*args, **kwargs)


def test_a_run_of_both_kinds_resumes_bit_identically(tmp_path, teacher):
    def run(data, directory=None, resume=None):
        callbacks = [Checkpoints(every=1, keep=9)] if directory else []
        for callback in callbacks:
            callback.directory = directory
        options = {"max_epochs": 2, "accumulate_grad_batches": 2, "plugins": [AtomicCheckpointIO()]}
        module = distill(teacher, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        L.seed_everything(1)
        loop = trainer(callbacks=callbacks, enable_checkpointing=bool(directory), **options)
        loop.fit(module, data, ckpt_path=resume)
        return weights(module)

    whole = run(mixed(tmp_path, batch_size=2), tmp_path / "whole")
    steps = saved_steps(tmp_path / "whole")
    assert len(steps) == 6
    with pytest.raises(ConnectionAbortedError):
        run(mixed(tmp_path, batch_size=2, engine=Dies()), tmp_path / "killed")
    killed = saved_steps(tmp_path / "killed")
    assert len(killed) == 2  # the first and the third update sample
    for checkpoint in [killed[-1], *steps[:5:2]]:
        again = run(mixed(tmp_path, batch_size=2), resume=checkpoint)
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_share_of_sampled_updates_is_lmbda_and_does_not_depend_on_the_layout(tmp_path):
    def kinds(**kwargs):
        samples = mixed(tmp_path, **kwargs)
        return [samples.is_sampled(epoch, i) for epoch in range(2) for i in range(1000)]

    assert kinds(lmbda=0.3) == kinds(lmbda=0.3, batch_size=1)
    assert np.mean(kinds(lmbda=0.3)) == pytest.approx(0.3, abs=0.03)
    assert ({*kinds(lmbda=0)}, {*kinds(lmbda=1)}) == ({False}, {True})


def test_without_sampled_updates_it_is_off_policy_distillation(tmp_path, teacher):
    """The same update as `SFTData` makes of these rows, whose conversations have one answer each."""
    sampled = recorded(samples := mixed(tmp_path, lmbda=0, seed=0))
    ours = fit(distill(teacher), samples, max_epochs=1)
    theirs = fit(distill(teacher), rows(tmp_path, batch_size=4, max_length=128), max_epochs=1)
    assert not sampled
    assert distance(ours, theirs) < 1e-7


def test_held_out_rows_are_evaluated_on_their_answers(tmp_path, teacher):
    held_out = {"validation": write_jsonl(tmp_path / "held_out.jsonl", conversations(5, seed=9))}
    logged = trainer().validate(distill(teacher, model=teacher), mixed(tmp_path, **held_out), verbose=False)[0]
    expected = trainer().validate(distill(teacher, model=teacher), rows(tmp_path, **held_out), verbose=False)[0]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert logged["val/nll"] > 0


REFUSED = {
    "data.lmbda is 1.5, but has to be a probability, from 0 to 1": {"lmbda": 1.5},
    "data.max_length is 6, which leaves no room for a prompt and 6 new tokens": {"max_length": 6},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_of_both_kinds_that_can_not_be_are_refused(tmp_path, message):
    with pytest.raises(UserError, match=message):
        mixed(tmp_path, **REFUSED[message])


def test_what_the_model_samples_is_not_imitated(tmp_path):
    with pytest.raises(UserError, match="DistillData samples completions, and SFT imitates answers; use SFTData"):
        fit(SFT(config=LLAMA), mixed(tmp_path), max_steps=1)


def test_rows_held_out_by_a_fraction_are_named(tmp_path):
    samples = mixed(tmp_path, validation=0.4)
    samples.prepare_data()
    named = [origin for _, origin in samples.held_out_rows()]
    assert named == [origin for origin, _ in samples.records("validation")]
    assert named


def test_only_rows_with_a_prompt_and_an_answer_have_both_kinds(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": [*turns, turns[0]]}])
    with pytest.raises(UserError, match="does not end with a turn of the assistant, so it has no answer; RolloutData"):
        DistillData(file, tokenizer=ByteTokenizer(), max_length=128, sampling=Sampling(6)).prepare_data()
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": [*turns, *turns]}])
    samples = DistillData(file, tokenizer=ByteTokenizer(), max_length=100, sampling=Sampling(6))
    samples.prepare_data()
    decode = samples.tokenizer.decode
    prompts = [prompt.ids for prompt in samples.all_prompts("train")]
    first, second = map(decode, prompts)
    assert second.startswith(first + "b")
    assert second.count("a") > first.count("a")
    samples = DistillData(file, tokenizer=ByteTokenizer(), max_length=100, sampling=Sampling(100 - len(prompts[0])))
    samples.prepare_data()
    assert samples.report()["train"]["dropped"] == {"prompt leaves no room for a completion": 1}
