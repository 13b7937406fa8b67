"""Reward models as rewards of online training: the scores of transformers and of `score`, however ids are rendered."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.commands.score import load, scored
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts.calculator import Calculator
from oumi_pl.rollouts.rewards import Rewards, Scored
from oumi_pl.rollouts.sampling import Completion, Sampling
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.checksums import model_files
from oumi_pl.runs.folders import saved_steps
from tests.models.test_lora import plain_tokenizer, pretrained
from tests.tiny import LLAMA, reward, reward_data, sgd, trainer

TURNS = {
    "prompt": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "and 4"},
    ]
}
ROWS = [row | {"answer": "5"} for row in ({"prompt": "2 + 3"}, {"prompt": "a longer question"}, TURNS)]
ANSWERS = ["5", "an answer that is longer", "9"]
OTHER_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} <eos>\n{% endfor %}"
END = "<|im_end|>"


class Policy:
    device = torch.device("cpu")


def reward_model(folder, tokenizer=None, pad=True, of=LlamaForSequenceClassification, **config):
    """A folder with a reward model whose scores differ visibly."""
    tokenizer = tokenizer or ByteTokenizer().build()
    values = {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.3}
    values |= {"pad_token_id": tokenizer.pad_token_id if pad else None}
    torch.manual_seed(7)
    of(of.config_class(**{k: v for k, v in LLAMA.items() if k != "model_type"} | values | config)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def data(tmp_path, judge, **kwargs):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"tokenizer": ByteTokenizer(), "max_length": 200, "sampling": Sampling(40)}
    return RolloutData(str(file), reward=judge, **options | kwargs)


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setattr(RolloutData, "policy", Policy)


def samples_of(samples, answers, *, are_finished=True):
    tokenizer, nothing = samples.tokenizer, np.zeros(0, dtype=np.float32)
    result = []
    for prompt, answer in zip(samples.all_prompts("train"), answers, strict=True):
        text = answer + END if are_finished else answer
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        result.append(Scored(prompt, Completion(ids, nothing, nothing, are_finished), answer))
    return result


def own_scores(folder, texts, tokenizer):
    """Transformers' own score of each text, or of its ids, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text for text in texts]
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits) for row in rows]


def conversations():
    turns = [[{"role": "user", "content": r["prompt"]}] if isinstance(r["prompt"], str) else r["prompt"] for r in ROWS]
    return [[*of, {"role": "assistant", "content": a}] for of, a in zip(turns, ANSWERS, strict=True)]


def rendered(tokenizer):
    return [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations()]


def with_template(tokenizer):
    tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


TOKENIZERS = {
    "the same": lambda: ByteTokenizer().build(),
    "another template": lambda: with_template(ByteTokenizer().build()),
    "other tokens": lambda: with_template(plain_tokenizer()),
}


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_scores_are_those_of_transformers_and_of_the_command(tmp_path, name, pad):
    tokenizer = TOKENIZERS[name]()
    folder = reward_model(tmp_path / "runs/judge/model", tokenizer, pad)
    samples = data(tmp_path, folder)
    assert samples.rewards.names == ["judge"]
    scores = samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))[:, 0]
    expected = own_scores(folder, rendered(tokenizer), tokenizer)
    assert np.ptp(expected) > 0.1
    assert scores == pytest.approx(expected, abs=1e-5)
    lines = [(str(i), {"messages": turns}) for i, turns in enumerate(conversations())]
    by_command = [values[0] for _, values in scored(load(folder, None, "error"), lines, 2, "rows")]
    assert scores == pytest.approx(by_command, abs=1e-5)


@pytest.mark.usefixtures("policy")
def test_an_encoder_scores_too(tmp_path):
    tokenizer = with_template(plain_tokenizer())
    folder = reward_model(tmp_path / "bert", tokenizer, of=BertForSequenceClassification)
    samples = data(tmp_path, folder)
    scores = samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))[:, 0]
    assert scores == pytest.approx(own_scores(folder, rendered(tokenizer), tokenizer), abs=1e-5)


@pytest.mark.usefixtures("policy")
def test_the_adapter_of_a_reward_run_scores_too(tmp_path):
    rows = reward_data(tmp_path, tokenizer=None)
    judge = reward(pretrained(tmp_path / "base", initializer_range=0.3), lora={"r": 4})
    trainer(max_steps=2).fit(judge, rows)
    judge.save(tmp_path / "judge/model")
    rows.tokenizer.save_pretrained(tmp_path / "judge/model")
    folder = str(tmp_path / "judge/model")
    samples = data(tmp_path, folder)
    scores = samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))[:, 0]
    lines = [(str(i), {"messages": turns}) for i, turns in enumerate(conversations())]
    by_command = [values[0] for _, values in scored(load(folder, None, "error"), lines, 2, "rows")]
    assert scores == pytest.approx(by_command, abs=1e-5)
    assert np.ptp(scores) > 0.1


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_completion_that_was_cut_is_scored_up_to_the_cut(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    folder = reward_model(tmp_path / "judge", tokenizer)
    samples = data(tmp_path, folder)
    scores = samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS, are_finished=False))[:, 0]
    texts = [text[: text.rindex(a) + len(a)] for text, a in zip(rendered(tokenizer), ANSWERS, strict=True)]
    assert scores == pytest.approx(own_scores(folder, texts, tokenizer), abs=1e-5)


def test_prompts_without_a_template_are_joined_with_the_completion(tmp_path, monkeypatch):
    monkeypatch.setattr(RolloutData, "policy", Policy)
    monkeypatch.setattr(f"{__name__}.ROWS", [{"text": "once"}, {"text": "upon a"}])
    tokenizer = plain_tokenizer()
    folder = reward_model(tmp_path / "judge", tokenizer)
    samples = data(tmp_path, folder, tokenizer=plain_tokenizer())
    texts = [" there was", " time"]
    scores = samples.rewards.components(texts, ROWS, samples_of(samples, texts, are_finished=False))[:, 0]
    assert scores == pytest.approx(own_scores(folder, ["once there was", "upon a time"], tokenizer), abs=1e-5)
    other = data(tmp_path, folder, tokenizer=ByteTokenizer(chat_template=False))
    assert len(other.tokenizer) > len(tokenizer)
    scores = other.rewards.components(texts, ROWS, samples_of(other, texts, are_finished=False))[:, 0]
    assert scores == pytest.approx(own_scores(folder, ["once there was", "upon a time"], tokenizer), abs=1e-5)


def test_a_policy_is_trained_on_the_scores_of_a_model_that_no_checkpoint_holds(tmp_path):
    folder = reward_model(tmp_path / "judge")
    rewards = {folder: 2.0, "exact_match": 1.0}
    samples = data(tmp_path, rewards, batch_size=3, completions=3, sampling=Sampling(6, temperature=1.5), seed=0)
    sampled, original = [], samples.groups
    samples.groups = lambda *args: sampled.append(original(*args)) or sampled[-1]
    checkpoints = Checkpoints(every=1, keep=3)
    checkpoints.directory = tmp_path / "checkpoints"
    L.seed_everything(1)
    module = GRPO(config=LLAMA | {"initializer_range": 0.2}, optimizer=sgd)
    options = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_steps": 1}
    runner = trainer(callbacks=[checkpoints], **options)
    runner.fit(module, samples)
    tokenizer, prompts = samples.tokenizer, samples.all_prompts("train")
    end, newline = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (END, "\n"))
    ids = [[*prompts[group.prompt].ids, *c.ids] for group in sampled[0] for c in group.completions]
    expected = own_scores(folder, [row + newline if row[-1:] == end else row for row in ids], tokenizer)
    scores = np.concatenate([group.components[:, 0] for group in sampled[0]])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert samples.totals(sampled[0]).reshape(-1) == pytest.approx(2 * np.array(expected), abs=1e-4)
    assert float(runner.callback_metrics["train/rewards/judge"]) == pytest.approx(np.mean(expected), abs=1e-5)
    model = samples.rewards.functions["judge"].model
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    content = torch.load(saved_steps(checkpoints.directory)[0], weights_only=True)
    assert set(content["state_dict"]) == set(module.state_dict())
    assert not any("score" in name for name in content["state_dict"])


def test_damaged_weights_are_refused_by_their_path(tmp_path):
    folder = reward_model(tmp_path / "judge")
    with model_files(Path(folder)):
        pass
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"reward.*/judge is damaged: its file model\.safetensors is not what"):
        _ = data(tmp_path, folder).rewards.functions["judge"].model


def test_loading_it_changes_no_random_numbers(tmp_path):
    folder = reward_model(tmp_path / "judge")
    samples = data(tmp_path, folder)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert samples.rewards.functions["judge"].model.config.num_labels == 1
    assert torch.equal(torch.rand(3), expected)


def broken(tmp_path):
    folder = reward_model(tmp_path / "broken")
    weights = load_file(f"{folder}/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"}, f"{folder}/model.safetensors", {"format": "pt"}
    )
    return folder


MISTAKES = {
    r"data\.reward: there is no folder '.*/nowhere/model'": lambda path: str(path / "nowhere/model"),
    r"data\.reward: .*/lm is LlamaForCausalLM, not a reward model": lambda path: pretrained(path / "lm"),
    r"data\.reward: .*/two has 2 labels; a reward model needs exactly one": lambda path: reward_model(
        path / "two", num_labels=2
    ),
    r"data\.reward: .*/broken: its weights score\.weight are missing": broken,
}


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_no_reward_model_is_refused_by_its_path(tmp_path, message):
    with pytest.raises(UserError, match=message):
        samples = data(tmp_path, MISTAKES[message](tmp_path))
        samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))


@pytest.mark.usefixtures("policy")
def test_a_conversation_that_its_template_refuses_is_an_error_with_path_and_row(tmp_path):
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('no system turns') if messages[0].role == 'system' }}" + OTHER_TEMPLATE
    )
    samples = data(tmp_path, reward_model(tmp_path / "strict", tokenizer))
    with pytest.raises(UserError, match=r"data\.reward: .*/strict: .*prompts\.jsonl:3: .*no system turns"):
        samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))


@pytest.mark.usefixtures("policy")
def test_rows_that_are_longer_than_its_positions_are_refused(tmp_path):
    samples = data(tmp_path, reward_model(tmp_path / "short", max_position_embeddings=40))
    with pytest.raises(UserError, match=r"/short reads at most 40 tokens, and a prompt with its completion has \d+"):
        samples.rewards.components(ANSWERS, ROWS, samples_of(samples, ANSWERS))


@pytest.mark.parametrize("key", ["reward", "metrics"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_without_room_for_a_completion_in_its_positions_are_refused_at_the_start(tmp_path, name, key):
    tokenizer = TOKENIZERS[name]()
    judges = {}
    for positions in (60, 500):
        judges[positions] = reward_model(tmp_path / str(positions), tokenizer, max_position_embeddings=positions)
    message = rf"data\.{key}: .*/60 reads at most 60 tokens, but the longest prompt and 40 new tokens are \d+; lower"
    for positions, judge in judges.items():
        samples = data(tmp_path, judge) if key == "reward" else data(tmp_path, "exact_match", metrics=[judge])
        if positions == 500:
            samples.setup("fit")
            continue
        with pytest.raises(UserError, match=message):
            samples.setup("fit")


def test_a_reward_model_with_other_tokens_can_not_read_several_turns(tmp_path):
    judge = reward_model(tmp_path / "judge", TOKENIZERS["other tokens"]())
    with pytest.raises(UserError, match=r"data\.reward: .*/judge has other tokens or another chat template"):
        data(tmp_path, judge, environment=Calculator()).setup("fit")


def test_where_there_is_only_text_a_reward_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"PassAtK\.reward: runs/r/model is a reward model, which only RolloutData has"):
        Rewards("runs/r/model", "PassAtK.reward")
