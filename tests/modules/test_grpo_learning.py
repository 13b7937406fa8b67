"""Online training learns prompts that the policy solves sometimes, and does not with faults that are common.

"Perfectible" prompts are those that the initial policy solves in 20 to 80 % of the samples: if an algorithm does not
come to solve 95 % of them, it is not for lack of a signal (Qi et al. 2025, arXiv:2510.26788).

`python -m tests.modules.test_grpo_learning` prints what three seeds reach, with each fault and without.
"""

import copy
import json
import logging
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.losses.policy import DAPOLoss
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts.sampling import Completion, Generate, Sampling, sample, uniforms
from tests.tiny import LLAMA, trainer

CONFIG = LLAMA | {"num_hidden_layers": 1, "initializer_range": 0.5}
SAMPLING = Sampling(max_new_tokens=2, temperature=0.7)


def is_right(completion, row):
    """Whether the code of the last character is even; for every other row, odd."""
    return float(bool(completion) and (ord(completion[-1]) + row["number"]) % 2 == 0)


@pytest.fixture(scope="module")
def perfectible(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("perfectible"))


def prepare(folder):
    """The folder, with a model, and prompts that it solves in 20 to 80 % of 64 samples."""
    tokenizer = ByteTokenizer().build()
    L.seed_everything(0)
    module = GRPO(config=CONFIG)
    trainer().strategy.connect(module)
    model = module.build(tokenizer).hf
    model.save_pretrained(folder / "model")
    numbers = np.stack([uniforms((9, i), SAMPLING.max_new_tokens) for i in range(64)])
    kept = []
    for row in ({"prompt": letter, "number": number} for number, letter in enumerate("abcdefgh")):
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ends = [tokenizer.eos_token_id]
        completions = sample(model, tokenizer, [prompt] * 64, numbers=numbers, sampling=SAMPLING, ends=ends)
        texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        if 0.2 <= np.mean([is_right(text, row) for text in texts]) <= 0.8:
            kept.append(row)
    assert len({row["number"] % 2 for row in kept[:4]}) == 2  # both rules
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[:4]))
    return folder


def share_solved(folder, module=GRPO, seed=1, engine=None):
    """The share of right completions in the last 5 of 40 updates of 4 prompts with 16 completions each."""
    data = RolloutData(
        str(folder / "prompts.jsonl"),
        tokenizer=ByteTokenizer(),
        reward=is_right,
        max_length=64,
        batch_size=4,
        completions=16,
        sampling=SAMPLING,
        engine=engine,
        seed=seed,
    )
    shares, original = [], data.groups

    def groups(*args):
        sampled = original(*args)
        shares.append(np.mean([group.components.mean() for group in sampled]))
        return sampled

    data.groups = groups
    options = {"loss": DAPOLoss(), "kl": 0.05, "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=3e-3)}
    L.seed_everything(seed)
    trainer(max_steps=40, max_epochs=-1).fit(module(str(folder / "model"), **options), data)
    assert shares[0] < 0.7
    return np.mean(shares[-5:])


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_prompts_that_are_solved_sometimes_are_solved_always_in_the_end(perfectible, seed):
    assert share_solved(perfectible, seed=seed) >= 0.95


class Stale(GRPO):
    """Takes log-probabilities of the policy before the first update for those of the policy that sampled."""

    first = ()

    def loss_sums(self, batch, split):
        self.first = self.first or (copy.deepcopy(self.causal_lm),)
        with torch.no_grad():
            logps = self.first[0](batch, lambda states: states.logps(SAMPLING.temperature))
        return super().loss_sums(batch | {"sampled_logps": logps, "on_policy": False}, split)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_stale_log_probabilities_they_are_not(perfectible, seed):
    assert share_solved(perfectible, Stale, seed) < 0.8


class WrongSign(GRPO):
    """Rewards divergence from the reference."""

    def kl_terms(self, completions, ref_logps):
        return -super().kl_terms(completions, ref_logps)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_with_the_wrong_sign_of_the_kl_they_are_not(perfectible, seed):
    assert share_solved(perfectible, WrongSign, seed) < 0.8


class Padded(Generate):
    """Pads completions to a length with tokens that carry loss."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def sample(self, policy, tokenizer, prompts, **kwargs):
        padded = []
        for completion in super().sample(policy, tokenizer, prompts, **kwargs):
            pads = self.length - len(completion.ids)
            ids, zeros = np.full(pads, tokenizer.pad_token_id, np.int32), np.zeros(pads, np.float32)
            values = (np.append(completion.logps, zeros), np.append(completion.entropies, zeros))
            padded.append(Completion(np.append(completion.ids, ids), *values, completion.is_finished))
        return padded


LONG = 48
"""The length to which completions of one or two tokens are padded."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_padding_that_carries_loss_fewer_are(perfectible, seed):
    """By 3 to 5 points: the threshold of 95 % does not reliably show this fault; `test_grpo.py` catches it exactly."""
    assert share_solved(perfectible, seed=seed, engine=Padded(LONG)) < share_solved(perfectible, seed=seed) - 0.02


CASES = {
    "right": {},
    "wrong sign of the KL": {"module": WrongSign},
    "stale log-probabilities": {"module": Stale},
    "padding to 16 tokens carries loss": {"engine": Padded(16)},
    f"padding to {LONG} tokens carries loss": {"engine": Padded(LONG)},
}


def main():
    """Prints a line for each case."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder))
        for name, case in CASES.items():
            shares = [share_solved(path, seed=seed, **case) for seed in (1, 2, 3)]
            print(f"{name:40}" + "".join(f"{share:8.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
