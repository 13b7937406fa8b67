"""The examples outside the package: each is short, uses public names only, and computes what a plain loop computes."""

import copy
import importlib
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from oumi_pl.config.cli import instantiate
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.losses.preference import Sigmoid
from oumi_pl.models.lm import States
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.sft import SFT
from oumi_pl.rollouts.sampling import Sampling
from tests.tiny import LLAMA, conversations, distance, fit, module, pairs, sgd, trainer, weights

FOLDER = Path(__file__).parents[2] / "recipes" / "examples"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def load(name):
    return importlib.import_module(name)


def sft_data(n=8, cls=SFTData, **kwargs):
    return cls(conversations(n), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def dpo_data(n=8, **kwargs):
    return DPOData(pairs(n), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0, "batch_size": 4} | kwargs))


def plain_logits(hf, data, split, ids):
    """Logits and targets of some examples of SFT, one at a time."""
    logits, targets = [], []
    for i in ids:
        example = data.examples(split)[i]
        row, mask = torch.from_numpy(example.input_ids).long(), torch.from_numpy(example.loss_mask)
        logits.append(hf(row[None]).logits[0, :-1][mask[1:]])
        targets.append(row[mask])
    return torch.cat(logits), torch.cat(targets)


def test_there_are_eight_of_at_most_forty_lines_that_use_public_names_only():
    names = ["curriculum", "dft", "gated", "influence", "online_dpo", "sam", "taught", "tdpo"]
    assert [file.stem for file in FILES] == names
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 40, file.name
        assert not re.findall(r"(?:oumi_pl|self|module|pl_module|data|reference)\._\w+", text), file.name


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"class_path": "SFT", "init_args": {"loss": {"class_path": "dft.DFT", "init_args": {"power": 0.5}}}}, {}),
        ({"class_path": "SFT", "init_args": {"optimizer": {"class_path": "sam.SAM", "init_args": {"lr": 0.1}}}}, {}),
        ({"class_path": "SFT", "init_args": {"architecture": "gated.Gated", "config": {"hidden_size": 8}}}, {}),
        ({"class_path": "SFT"}, {"class_path": "curriculum.Curriculum", "init_args": {"stages": 2, "packing": True}}),
        ({"class_path": "tdpo.TDPO", "init_args": {"alpha": 0.3, "lora": {"r": 2}}}, {"class_path": "DPOData"}),
        ({"class_path": "taught.TaughtDPO", "init_args": {"teacher": "t", "weight": 0.2}}, {"class_path": "DPOData"}),
    ],
)
def test_recipes_name_them_with_the_arguments_of_their_bases(model, data):
    model["init_args"] = {"config": LLAMA} | model.get("init_args", {})
    built, rows = instantiate({"model": model, "data": {"class_path": "SFTData"} | data})
    named = {part.rpartition(".")[0] for part in re.findall(r"(\w+\.\w+)'", str((model, data)))}
    own = {type(part).__module__ for part in (built, built.loss, rows)}
    assert named & own or built.config["model_type"] == "gated" or "sam" in named


def test_a_token_loss_with_its_metrics():
    loss = load("dft").DFT(power=0.5)
    sft, data = module(loss=loss), sft_data(validation=conversations(5, seed=1), batch_size=8)
    run = trainer(max_steps=1)
    L.seed_everything(1)
    run.fit(sft, data)
    logged = run.callback_metrics
    (after,) = run.validate(sft, data, verbose=False)
    with torch.no_grad():
        logits, targets = plain_logits(sft.causal_lm.hf.eval(), data, "validation", range(5))
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    assert after["val/loss"] == pytest.approx(float((-(p.sqrt() * p.log())).mean()), rel=1e-5)
    assert after["val/probability"] == pytest.approx(float(p.mean()), rel=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert after["val/entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert "train/probability" in logged
    # as a plain loop takes the step
    L.seed_everything(1)
    plain = module(loss=loss)
    plain.assemble(data.tokenizer)
    logits, targets = plain_logits(plain.causal_lm.hf, data, "train", range(8))
    nll = F.cross_entropy(logits, targets, reduction="none")
    ((-nll).exp().detach().sqrt() * nll).mean().backward()
    sgd(plain.parameters()).step()
    assert distance(weights(sft), weights(plain)) < 1e-5


def pair_logits(hf, data, i):
    """Logits and targets of both responses of a pair, each read after the prompt."""
    example = data.examples("train")[i]
    ids, mask = torch.from_numpy(example.input_ids).long(), torch.from_numpy(example.loss_mask)
    first, second = example.segments
    for path in (range(first.length), [*range(second.shared), *range(first.length, first.length + second.length)]):
        chosen = list(path)
        yield hf(ids[chosen][None]).logits[0, :-1][mask[chosen][1:]], ids[chosen][mask[chosen]]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_loss_of_token_level_divergences(alpha):
    tdpo, data = load("tdpo").TDPO(config=LLAMA, alpha=alpha, optimizer=sgd), dpo_data()
    L.seed_everything(1)
    run = trainer(max_steps=3)
    run.fit(tdpo, data)
    assert float(run.callback_metrics["train/kl/chosen"]) > 0
    batch = data.batch("train", range(4))
    got = tdpo.loss_sums(batch, "train")["loss"] / 4
    policy, reference = tdpo.causal_lm.hf, tdpo.reference.frozen_model.hf
    losses = []
    for i in range(4):
        ratios, divergences = [], []
        for (ours, targets), (theirs, _) in zip(
            pair_logits(policy, data, i), pair_logits(reference, data, i), strict=True
        ):
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            ratios.append((ours - theirs).gather(1, targets[:, None]).sum())
            divergences.append(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        inner = ratios[0] - ratios[1] - alpha * (divergences[1] - divergences[0].detach())
        losses.append(-F.logsigmoid(0.1 * inner))
    expected = torch.stack(losses).mean()
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    parameters = list(policy.parameters())
    gradients = [torch.autograd.grad(value, parameters) for value in (got, expected)]
    assert max(float((a - b).norm()) for a, b in zip(*gradients, strict=True)) < 1e-5
    if not alpha:
        L.seed_everything(1)
        dpo = DPO(config=LLAMA, loss=Sigmoid(beta=0.1), optimizer=sgd)
        fit(dpo, dpo_data(), max_steps=3)
        assert distance(weights(tdpo), weights(dpo)) < 1e-5


def test_a_preference_loss_with_a_teacher(tmp_path):
    data = dpo_data(batch_size=8)
    teacher = DPO(config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(teacher, data, max_steps=5)
    teacher.save(tmp_path / "teacher", tokenizer=data.tokenizer)
    adamw = lambda p: torch.optim.AdamW(p, lr=3e-3)  # noqa: E731
    taught = load("taught").TaughtDPO(config=LLAMA, teacher=str(tmp_path / "teacher"), weight=10.0, optimizer=adamw)

    class First(L.Callback):
        values = []

        def on_train_batch_end(self, trainer, *_):
            self.values.append(float(trainer.callback_metrics["train/teacher_kl"]))

    L.seed_everything(3)
    trainer(max_steps=15, callbacks=[First()]).fit(taught, dpo_data(batch_size=8))
    assert First.values[-1] < 0.5 * First.values[0]
    batch = data.batch("train", range(8))
    got = taught.loss_sums(batch, "train")["teacher_kl"]
    assert got.requires_grad
    expected = 0.0
    for i in range(8):
        (ours, _), (theirs, _) = (next(pair_logits(m.causal_lm.hf, data, i)) for m in (taught, teacher))
        expected += F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum").item()
    assert float(got) == pytest.approx(expected, rel=1e-4)
    assert float(load("taught").TaughtDPO.loss_sums(taught, batch, "train")["loss"]) > float(got)


def test_an_architecture_of_ones_own(tmp_path):
    data = sft_data(16, packing=True, validation=0.25, batch_size=2)
    adamw = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
    L.seed_everything(1)
    gated = SFT(config={"hidden_size": 32}, architecture="gated.Gated", optimizer=adamw)
    run = trainer(max_epochs=4)
    run.fit(gated, data)
    assert float(run.callback_metrics["val/loss"]) < 5
    batch = data.batch("train", [0, 1, 2])
    with torch.no_grad():
        logits, _ = plain_logits(gated.causal_lm.hf, data, "train", [0, 1, 2])
        torch.testing.assert_close(gated.causal_lm(batch, States.logits), logits, atol=1e-5, rtol=1e-5)
    gated.save(tmp_path / "m", tokenizer=data.tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(plain_logits(again, data, "train", [0, 1, 2])[0], logits)
    prompt = torch.tensor([[65, 66, 67]])
    assert again.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False).shape == (1, 7)


def test_a_curriculum():
    curriculum = load("curriculum").Curriculum

    class Seen(L.Callback):
        ids: list[list[int]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.ids.append(batch["sample_ids"])

    data = sft_data(12, curriculum, stages=2, batch_size=3)
    trainer(max_epochs=3, callbacks=[Seen()]).fit(module(), data)
    order = data.lengths("train").argsort(kind="stable").tolist()
    seen = [i for ids in Seen.ids for i in ids]
    assert seen[:18] == [*order[:6], *order]
    assert sorted(seen[18:]) == list(range(12)) != seen[18:]
    packed = sft_data(12, curriculum, stages=2, packing=True)
    packed.prepare_data()
    assert sorted(packed.plan(0).example_ids.tolist()) == sorted(order[:6])


def test_sam_takes_the_steps_of_a_plain_loop():
    sam = load("sam").SAM
    data = sft_data(batch_size=8)
    ours = module(optimizer=lambda p: sam(p, lr=0.1, rho=0.5))
    L.seed_everything(1)
    run = trainer(max_steps=3)
    run.fit(ours, data)
    assert ours.tokens_seen["targets"] == 3 * int(data.targets("train").sum()), "counted once"
    L.seed_everything(1)
    plain = module()
    plain.assemble(data.tokenizer)
    hf = plain.causal_lm.hf

    def gradients():
        hf.zero_grad()
        F.cross_entropy(*plain_logits(hf, data, "train", range(8))).backward()
        return [p.grad.clone() for p in hf.parameters()]

    for _ in range(3):
        first = gradients()
        norm = torch.stack([g.norm() for g in first]).norm()
        with torch.no_grad():
            start = [p.clone() for p in hf.parameters()]
            for p, g in zip(hf.parameters(), first, strict=True):
                p += 0.5 * g / norm
        second = gradients()
        with torch.no_grad():
            for p, s, g in zip(hf.parameters(), start, second, strict=True):
                p.copy_(s - 0.1 * g)
    assert distance(weights(ours), weights(plain)) < 1e-4
    assert float(run.callback_metrics["train/grad_norm"]) > 0


def test_noise_is_added_to_the_true_gradient_with_its_variance():
    noise = load("sam").GradientNoise(eta=0.04)
    steps = []
    for callbacks in ([], [noise]):
        L.seed_everything(1)
        sft = module()
        before = None
        data = sft_data(batch_size=2)

        class Start(L.Callback):
            def on_train_start(self, trainer, pl_module):
                nonlocal before
                before = weights(pl_module)

        trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[Start(), *callbacks]).fit(sft, data)
        steps.append({name: (before[name] - w) / 0.1 for name, w in weights(sft).items()})
    added = torch.cat([(steps[1][name] - steps[0][name]).flatten() for name in steps[0]])
    assert float(added.std()) == pytest.approx(0.2, rel=0.03)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.01)


def test_influences_are_those_of_the_whole_hessian():
    data = sft_data(6, validation=conversations(3, seed=1))
    sft = module(config={"num_hidden_layers": 1})
    fit(sft, data, max_steps=4)
    parameters = [sft.causal_lm.base.model.norm.weight]
    trained = [data.batch("train", [i]) for i in range(6)]
    held_out = data.batch("validation", range(3))
    got = load("influence").influences(sft, trained, held_out, parameters, damping=0.1, steps=40)
    hf = sft.causal_lm.hf

    def loss(split, ids):
        return F.cross_entropy(*plain_logits(hf, data, split, ids))

    with sdpa_kernel(SDPBackend.MATH):
        total = sum(loss("train", [i]) for i in range(6)) / 6
        (gradient,) = torch.autograd.grad(total, parameters, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, parameters, retain_graph=True)[0] for g in gradient])
        (target,) = torch.autograd.grad(loss("validation", range(3)), parameters)
        solution = torch.linalg.solve(hessian + 0.1 * torch.eye(32), target)
        expected = [-float(solution @ torch.autograd.grad(loss("train", [i]), parameters)[0]) for i in range(6)]
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_online_dpo_takes_the_best_and_the_worst_of_each_group(tmp_path):
    file, options = tmp_path / "prompts.jsonl", {"tokenizer": ByteTokenizer(), "max_length": 64, "batch_size": 4}
    file.write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcd"))

    def reward(completion, row):
        return float(len(completion.encode()) % 3) * (row["prompt"] != "d")

    def data(**kwargs):
        sampled = RolloutData(
            str(file), reward=reward, completions=4, sampling=Sampling(6, temperature=1.5), seed=0, iterations=2,
            **options | kwargs,
        )  # fmt: skip
        sampled.kept, groups = [], sampled.groups
        sampled.groups = lambda *args: sampled.kept.append(groups(*args)) or sampled.kept[-1]
        return sampled

    def trained(micro_batches, **kwargs):
        L.seed_everything(1)
        policy = load("online_dpo").OnlineDPO(config=LLAMA | {"initializer_range": 0.2}, beta=0.5, optimizer=sgd)
        trainer(max_steps=2, accumulate_grad_batches=micro_batches).fit(policy, samples := data(**kwargs))
        return weights(policy), samples

    ours, samples = trained(1)
    assert distance(trained(4, batch_size=1)[0], ours) < 5e-6
    (groups,) = samples.kept
    L.seed_everything(1)
    start = load("online_dpo").OnlineDPO(config=LLAMA | {"initializer_range": 0.2}, optimizer=sgd)
    trainer().strategy.connect(start)
    hf = start.build(ByteTokenizer().build()).hf.eval()
    frozen, optimizer = copy.deepcopy(hf), torch.optim.SGD(hf.parameters(), lr=0.1)

    def logp(model, group, i):
        n = len(group.completions[i].ids)
        ids = torch.tensor([*samples.all_prompts("train")[group.prompt].ids, *group.completions[i].ids])
        logits = model(ids[None].long()).logits[0, -n - 1 : -1] / 1.5
        return logits.log_softmax(-1).gather(-1, ids[-n:, None].long()).sum()

    pairs = 0
    for _ in range(2):
        losses = []
        for group in groups:
            values = group.components[:, 0]
            if values.max() > values.min():
                best, worst = int(values.argmax()), int(values.argmin())
                ratios = [logp(hf, group, i) - logp(frozen, group, i).detach() for i in (best, worst)]
                losses.append(-F.logsigmoid(0.5 * (ratios[0] - ratios[1])))
        pairs = len(losses)
        optimizer.zero_grad()
        (sum(losses) / len(groups)).backward()
        optimizer.step()
    assert 0 < pairs < len(groups)
    assert distance({name: p.detach() for name, p in hf.named_parameters()}, ours) < 5e-6
