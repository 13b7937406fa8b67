"""Completions of several turns: the environment's tokens are read and not trained on; all else is as without one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from oumi_pl.adapters.batches import rollout_inputs
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.rollouts import Rollouts
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.data.prompts import Prompt
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.policy import BNPOLoss, DrGRPOLoss, GRPOLoss
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import documents, padded
from oumi_pl.modules.grpo import GRPO
from oumi_pl.preview.groups import groups as shown_groups
from oumi_pl.preview.pieces import Decoder
from oumi_pl.rollouts.calculator import Calculator, value_of
from oumi_pl.rollouts.continuous import ContinuousBatching
from oumi_pl.rollouts.environment import Environment, sample_episodes, turn_ids
from oumi_pl.rollouts.sampling import Completion, Engine, Generate, Sampling
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.folders import saved_steps
from oumi_pl.types import Update
from tests.modules.test_grpo import Logged, rollouts, run, same
from tests.tiny import LLAMA, distance, sgd, trainer, weights

SAMPLING = Sampling(max_new_tokens=12, temperature=0.7)


def grpo(**kwargs):
    """A policy whose completions of a prompt often begin alike."""
    return GRPO(config=LLAMA | {"initializer_range": 0.5}, **{"optimizer": sgd} | kwargs)


class TwoTokens(Generate):
    """Ends each turn after two tokens, as a stop text would; raises at a call if it is given its number."""

    def __init__(self, dies_at=None):
        self.dies_at, self.calls, self.seeds = dies_at, 0, []

    def sample(self, *args, seeds, sampling, **kwargs):
        self.calls += 1
        if self.calls == self.dies_at:
            raise ConnectionAbortedError
        self.seeds += map(tuple, seeds)
        short = Sampling(min(2, sampling.max_new_tokens), sampling.temperature)
        sampled = super().sample(*args, seeds=seeds, sampling=short, **kwargs)
        return [turn._replace(is_finished=len(turn.ids) == 2) for turn in sampled]


class Sums(Environment):
    """Says the last figure of the sum of a turn's ids twice; ends the episode if it is 0."""

    def start(self, row, tokenizer, rng):
        def reply(ids):
            figure = int(ids.sum()) % 10
            return [ord(str(figure))] * 2 if figure else None

        return reply


def figures(completion, row):
    """Reads the last turn, and what the environment said."""
    return len(completion) / 10 + sum(ord(text[0]) % 7 for text in row["turns"][1::2])


def options(**kwargs):
    return {"environment": Sums(), "engine": TwoTokens(), "sampling": SAMPLING, "reward": figures} | kwargs


def plain_update(path, module, groups, prompts, advantages):
    """An update written out: each completion as a row of its own, full logits, loss on the policy's tokens alone."""
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(module)
    hf = module.build(ByteTokenizer().build()).hf.eval()
    total, completions, tokens = 0.0, 0, 0
    for group, of_group in zip(groups, advantages.tolist(), strict=True):
        for completion, advantage in zip(group.completions, of_group, strict=True):
            ids = torch.tensor([*prompts[group.prompt].ids, *completion.ids], dtype=torch.long)
            n, sampled = len(completion.ids), torch.from_numpy(completion.is_sampled)
            logits = hf(input_ids=ids[None]).logits[0, -n - 1 : -1] / SAMPLING.temperature
            logps = logits.log_softmax(-1).gather(-1, ids[-n:, None])[sampled, 0]
            assert torch.allclose(logps.detach(), torch.from_numpy(completion.logps), atol=1e-5)
            weight = {GRPOLoss: 1 / len(logps), DrGRPOLoss: 1 / SAMPLING.max_new_tokens}.get(type(module.loss), 1.0)
            total = total - weight * advantage * logps.sum()
            completions, tokens = completions + 1, tokens + len(logps)
    (total / (tokens if module.loss.unit == "targets" else completions)).backward()
    with torch.no_grad():
        return {name: p - 0.1 * p.grad for name, p in hf.named_parameters()}


@pytest.mark.parametrize("loss", [GRPOLoss(), BNPOLoss(), DrGRPOLoss()], ids=lambda loss: type(loss).__name__)
def test_an_update_trains_the_policys_tokens_alone_with_any_micro_batches(tmp_path, loss):
    logged = Logged()
    samples = run(tmp_path, module := grpo(loss=loss), data=options(), max_steps=1, callbacks=[logged])
    (groups,) = samples.sampled
    completions = [completion for group in groups for completion in group.completions]
    assert max(len(completion.turns) for completion in completions) >= 5
    assert {completion.is_finished for completion in completions} == {True, False}
    advantages = module.advantages(samples.totals(groups))
    expected = plain_update(tmp_path, grpo(loss=loss), groups, samples.all_prompts("train"), advantages)
    assert distance(weights(module), expected) < 5e-6
    assert logged.updates[0]["train/sampling_difference"] < 1e-5
    policys = np.mean([len(completion.replies) + 1 for completion in completions])
    assert logged.updates[0]["train/turns"] == pytest.approx(policys)
    cut = run(tmp_path, other := grpo(loss=loss), 4, options(batch_size=1, prompts_per_call=1), max_steps=1)
    assert same(cut.sampled, samples.sampled) or same([[g] for g in groups], cut.sampled)
    assert distance(weights(other), expected) < 5e-6


def train_all(sampled):
    """Takes the environment's tokens for the policy's."""
    nothing = [np.zeros(len(c.ids), dtype=np.float32) for c in sampled]
    for values, completion in zip(nothing, sampled, strict=True):
        values[completion.is_sampled] = completion.logps
    return [c._replace(replies=(), logps=v, entropies=np.abs(v)) for c, v in zip(sampled, nothing, strict=True)]


def test_tokens_of_the_environment_that_carry_loss_would_be_caught(tmp_path, monkeypatch):
    data = options(reward=lambda completion, row: sum(map(ord, completion)) % 5)
    right = run(tmp_path, module := grpo(), data=data, max_steps=1)
    original = RolloutData.batch_of

    def batch_of(self, split, groups, *args):
        return original(self, split, [replace(g, completions=train_all(g.completions)) for g in groups], *args)

    monkeypatch.setattr(RolloutData, "batch_of", batch_of)
    wrong = run(tmp_path, faulty := grpo(), data=data, max_steps=1)
    assert same(wrong.sampled, right.sampled)
    assert distance(weights(module), weights(faulty)) > 1e-4


def test_beginnings_that_completions_share_are_computed_once(tmp_path):
    samples = run(tmp_path, module := grpo(), data=options(completions=6), max_steps=1)
    (groups,) = samples.sampled
    prompts = samples.all_prompts("train")
    batch = samples.batch_of("train", groups)
    paths = [(*prompts[g.prompt].ids, *c.ids) for g in groups for c in g.completions]
    with_prompts_once = sum(len(prompts[g.prompt].ids) + sum(len(c.ids) for c in g.completions) for g in groups)
    beginnings = {(i // 6, path[:n]) for i, path in enumerate(paths) for n in range(1, len(path) + 1)}
    # a completion that an earlier one begins with has its last token once more
    contained = sum(
        any(path == other[: len(path)] for other in paths[i // 6 * 6 : i]) for i, path in enumerate(paths)
    )  # fmt: skip
    assert batch["input_ids"].shape[1] == len(beginnings) + contained < with_prompts_once
    assert len(batch["targets"]) == sum(len(c.logps) for g in groups for c in g.completions)
    logps = module.causal_lm(batch)
    for layout in (documents, padded):
        module.causal_lm.layout = layout
        assert torch.allclose(module.causal_lm(batch), logps, atol=1e-5)
    hf, start = module.causal_lm.hf.eval(), 0
    for path, completion in zip(paths, [c for g in groups for c in g.completions], strict=True):
        ids, n = torch.tensor(path), len(completion.ids)
        every = hf(input_ids=ids[None]).logits[0, -n - 1 : -1].log_softmax(-1).gather(-1, ids[-n:, None])[:, 0]
        alone = every[torch.from_numpy(completion.is_sampled)]
        assert torch.allclose(logps[start : start + len(alone)], alone, atol=1e-5)
        start += len(alone)


def test_trl_gets_the_environments_tokens_without_loss(tmp_path):
    samples = run(tmp_path, grpo(), data=options(completions=6), max_steps=1)
    completions = [c for group in samples.sampled[0] for c in group.completions]
    batch = samples.batch_of("train", samples.sampled[0], np.zeros((4, 6)))
    inputs = rollout_inputs(batch | {"on_policy": False, "update": Update(len(batch["targets"]), 24, 1)})
    for row, completion in enumerate(completions):
        n = len(completion.ids)
        assert inputs["completion_ids"][row, :n].tolist() == completion.ids.tolist()
        assert inputs["tool_mask"][row].nonzero()[:, 0].tolist() == np.flatnonzero(completion.is_sampled).tolist()
        logps = inputs["old_per_token_logps"][row, :n][torch.from_numpy(completion.is_sampled)]
        assert logps.tolist() == completion.logps.tolist()


def test_truncated_completions_are_masked_while_others_train_the_tokens_that_they_share(tmp_path):
    samples = run(tmp_path, grpo(), data=options(completions=6, mask_truncated=True), max_steps=1)
    for group in samples.sampled[0]:
        batch = samples.batch_of("train", [group])
        counts = torch.bincount(batch["target_segments"], minlength=6).tolist()
        assert counts == [len(c.logps) if c.is_finished else 0 for c in group.completions]


def test_each_turn_has_random_numbers_of_its_own(tmp_path):
    engine = TwoTokens()
    run(tmp_path, grpo(), data=options(engine=engine, extra_rounds=1, reward=lambda c, row: 0.0))
    padded = [seed + (0,) * (6 - len(seed)) for seed in engine.seeds]  # numpy ignores zeros at the end
    assert len(set(padded)) == len(padded)
    assert max(map(len, engine.seeds)) == 6


MANY = {"batch_size": 2, "steps_per_rollout": 2, "iterations": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with a checkpoint after each of its 8 updates, its weights, and its calls of the engine."""
    path = tmp_path_factory.mktemp("whole")
    saved(path, module := grpo(optimizer=adam), engine := TwoTokens())
    return path, weights(module), engine.calls


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def saved(path, module, engine):
    checkpoints = Checkpoints(every=1, keep=20)
    checkpoints.directory = path / "checkpoints"
    settings = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    return run(path, module, data=options(engine=engine) | MANY, callbacks=[checkpoints], **settings)


def resumed(path, step):
    module = grpo(optimizer=adam)
    L.seed_everything(1)
    checkpoint = str(saved_steps(path / "checkpoints")[step])
    trainer(max_epochs=1, plugins=[AtomicCheckpointIO()]).fit(
        module, rollouts(path, **options() | MANY), ckpt_path=checkpoint
    )
    return weights(module)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_resumed_run_is_bit_identical(whole, step):
    path, expected, _ = whole
    ours = resumed(path, step)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_run_that_dies_in_a_later_turn_resumes_bit_identically(tmp_path, whole):
    _, expected, calls = whole
    with pytest.raises(ConnectionAbortedError):
        saved(tmp_path, grpo(optimizer=adam), TwoTokens(dies_at=calls))
    ours = resumed(tmp_path, -1)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_rollouts_and_the_preview_show_the_environments_turns(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    samples = run(tmp_path, grpo(), data=options(), max_steps=1, callbacks=[folder, Rollouts()])
    completions = [c for group in samples.sampled[0] for c in group.completions]
    lines = [json.loads(line) for line in (folder.directory / "rollouts.jsonl").read_text().splitlines()]
    for line, completion in zip(lines, completions, strict=True):
        assert [turn["by"] for turn in line["turns"]] == ["policy", "environment"] * len(completion.replies) + [
            "policy"
        ]
        for turn, (start, stop) in zip(line["turns"][1::2], completion.replies, strict=True):
            assert turn["text"] == chr(completion.ids[start]) * 2
            assert stop - start == 2
    (group, *_) = samples.sampled[0]
    (shown,) = shown_groups(samples, Decoder(samples.tokenizer), [group], np.zeros((1, len(group.completions))))
    for section, completion in zip(shown.sections[1:], group.completions, strict=True):
        assert f"{2 * len(completion.replies)} of them by the environment" in section.title or not completion.replies
        untrained = [piece.text for piece in section.pieces if not piece.target]
        assert "".join(untrained) == "".join(chr(completion.ids[i]) for i in np.flatnonzero(~completion.is_sampled))


class TwoTokensFirst(TwoTokens):
    """Ends the first turn after two tokens, samples later ones with an engine, and keeps the lengths of their rows."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.lengths = engine, []

    def sample(self, policy, tokenizer, prompts, **kwargs):
        if not self.calls:
            return super().sample(policy, tokenizer, prompts, **kwargs)
        turns = self.engine.sample(policy, tokenizer, prompts, **kwargs)
        self.lengths += [len(prompt) + len(turn.ids) for prompt, turn in zip(prompts, turns, strict=True)]
        return turns


class Long(Environment):
    """Answers the first turn with as many tokens as the row says."""

    def start(self, row, tokenizer, rng):
        replies = iter([[65] * row["tokens"], None])
        return lambda ids: next(replies)


@pytest.mark.parametrize("engine", [Generate(), Generate(bucket=8), ContinuousBatching(page_size=8)])
def test_no_turn_is_sampled_past_the_positions_of_the_model_beside_a_shorter_one(engine):
    tokenizer = ByteTokenizer().build()
    torch.manual_seed(0)
    config = {
        "model_type": "gpt2",
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "initializer_range": 0.5,
    }
    hf = build_model(None, config=config, tokenizer=tokenizer)
    policy = SimpleNamespace(causal_lm=SimpleNamespace(hf=hf, base=hf))
    prompts = [Prompt(list(b"four"), {"tokens": tokens}, "rows.jsonl:1") for tokens in (6, 1, 3)]

    def episodes(chosen):
        recorded = TwoTokensFirst(engine)
        settings = {"seeds": [(0, i, 0) for i in chosen], "sampling": Sampling(12), "ends": []}
        sampled = sample_episodes(recorded, Long(), policy, tokenizer, [prompts[i] for i in chosen], **settings)
        assert max(recorded.lengths) == 16
        return [completion.ids.tolist() for completion in sampled]

    together = episodes(range(3))
    assert [len(ids) for ids in together] == [12, 12, 12]
    assert together == [ids for i in range(3) for ids in episodes([i])]


# ---- mistakes of environments


class Fails(Environment):
    def start(self, row, tokenizer, rng):
        return lambda ids: row["no_such_column"]


class Foreign(Environment):
    def start(self, row, tokenizer, rng):
        return lambda ids: [5, 1000]


class Text(Environment):
    def start(self, row, tokenizer, rng):
        return lambda ids: "4"


MISTAKES = {
    r"data\.environment: Text returned '4' after turn 1 of .*:\d, the row \{.*; return token ids, or None": Text(),
    r"data\.environment: Fails failed after turn 1 of .*prompts\.jsonl:\d, the row \{'prompt'.*KeyError": Fails(),
    r"data\.environment: Foreign returned ids that the tokenizer doesn't have after turn 1 of .*:\d, ": Foreign(),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_of_an_environment_names_the_row(tmp_path, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, grpo(), data=options(environment=MISTAKES[message]), max_steps=1)


# ---- episodes and the calculator, with a policy that says what it is given


class Says(Engine):
    """Says texts, turn by turn, the same for every prompt."""

    def __init__(self, *texts):
        self.texts, self.read = list(texts), []

    def sample(self, policy, tokenizer, prompts, *, seeds, sampling, ends, limits=None):
        self.read += [tokenizer.decode(ids) for ids in prompts]
        ids = tokenizer(self.texts.pop(0), add_special_tokens=False)["input_ids"]
        kept = np.array(ids[: sampling.max_new_tokens], dtype=np.int32)
        zeros = np.zeros(len(kept), dtype=np.float32)
        return [Completion(kept, zeros, zeros, len(kept) == len(ids)) for _ in prompts]


def episode(engine, environment, most=200):
    tokenizer = ByteTokenizer().build()
    prompt = Prompt(list(b"q"), {"prompt": "q"}, "rows.jsonl:1")
    settings = {"seeds": [(0, 0, 0)], "sampling": Sampling(most), "ends": [tokenizer.eos_token_id]}
    (completion,) = sample_episodes(engine, environment, None, tokenizer, [prompt], **settings)
    return completion, [(by, tokenizer.decode(ids)) for by, ids in completion.turns]


def test_the_calculator_answers_calls_in_turns_of_the_chat_template():
    engine = Says("so <calc>3 * (4 + 5)</calc><|im_end|>", "27<|im_end|>")
    completion, turns = episode(engine, Calculator())
    reply = "\n<|im_start|>user\n<tool_response>\n27\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert turns == [(True, "so <calc>3 * (4 + 5)</calc><|im_end|>"), (False, reply), (True, "27<|im_end|>")]
    assert engine.read[1] == "q" + turns[0][1] + reply
    assert completion.is_finished
    tokens = len(ByteTokenizer().build()(reply)["input_ids"])
    assert len(completion.logps) == completion.is_sampled.sum() == len(completion.ids) - tokens


def test_a_turn_that_a_stop_text_ended_is_closed_by_the_template():
    tokenizer = ByteTokenizer().build()
    ids = np.array(tokenizer("<calc>1</calc>")["input_ids"])
    assert tokenizer.decode(turn_ids(tokenizer, ids, "1", "user")).startswith(
        "<|im_end|>\n<|im_start|>user\n1<|im_end|>"
    )


def test_the_calculator_answers_so_many_calls_at_most():
    _, turns = episode(Says(*["<calc>1</calc><|im_end|>"] * 3), Calculator(calls=2), most=500)
    assert [by for by, _ in turns] == [True, False, True, False, True]


@pytest.mark.parametrize("most", [60, 16, 10])
def test_a_reply_that_leaves_no_room_is_left_out_and_the_completion_counts_as_truncated(most):
    completion, turns = episode(Says("<calc>1</calc><|im_end|>", "1"), Calculator(), most)
    assert len(turns) == 1
    assert not completion.is_finished
    assert len(completion.ids) == min(most, 15)


def test_a_last_turn_is_cut_to_the_room_that_is_left():
    completion, turns = episode(Says("<calc>1</calc><|im_end|>", "a long answer" * 9), Calculator(), 80)
    assert len(completion.ids) == 80
    assert not completion.is_finished
    assert [by for by, _ in turns] == [True, False, True]


VALUES = {"2+2": "4", " 1/4 ": "0.25", "1/0": "error", "x": "error", "9" * 400: "error", "2**8": "error", "": "error"}


@pytest.mark.parametrize("expression", VALUES)
def test_values(expression):
    assert value_of(expression) == VALUES[expression]
