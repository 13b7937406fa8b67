"""Processor seconds to sample the same completions with `generate` and with continuous batching.

    python benchmarks/rollouts.py [--threads 1] [--repeats 3] [--hidden 256] [--layers 4]

A Llama with random weights completes 8 prompts 8 times each. In some cases all completions are as long as
`max_new_tokens`; in others each token ends a completion with the same probability, so that most are much shorter than
the longest. `generate` computes each row until the last one has ended. The fixed costs of a call are included, and
waiting is not.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from contenders import versions

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.rollouts.continuous import ContinuousBatching
from oumi_pl.rollouts.sampling import Completion, Engine, Generate, Sampling

PROMPTS, MEMBERS, VOCABULARY = 8, 8, 8192
CASES = {
    # name: shortest and longest prompt, max_new_tokens, mean tokens until the end
    "prompts of 32, all completions of 128": (32, 32, 128, None),
    "prompts of 32, completions of 32 on average, at most 256": (32, 32, 256, 32),
    "prompts of 16 to 256, completions of 32 on average, at most 256": (16, 256, 256, 32),
    "prompts of 512, completions of 16 on average, at most 128": (512, 512, 128, 16),
}


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 1), ("repeats", 3), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = random_policy(options.hidden, options.layers)
    weights = sum(parameter.numel() for parameter in policy.causal_lm.hf.parameters())
    print(versions(("torch", "transformers"), options.threads))
    print(f"{weights:,} weights, {PROMPTS} prompts x {MEMBERS} completions; median of {options.repeats}")
    print(f"{'':66}{'generate s':>12}{'continuous s':>14}{'ratio':>8}{'tokens':>9}{'longest':>9}")
    for name, case in CASES.items():
        seconds, completions = measured(policy, case, options.repeats)
        lengths = [len(completion.ids) for completion in completions]
        ours, other = seconds
        print(f"{name:66}{ours:12.2f}{other:14.2f}{ours / other:7.2f}x{sum(lengths):9,}{max(lengths):9,}", flush=True)


def random_policy(hidden: int, layers: int) -> Any:
    """A Llama with random weights, as engines read a policy."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=1024,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config)
    return SimpleNamespace(causal_lm=SimpleNamespace(hf=hf, base=hf))


def measured(policy: Any, case: tuple[int, int, int, int | None], repeats: int) -> tuple[list[float], list[Completion]]:
    """Median processor seconds of both engines, which sample the same tokens."""
    shortest, longest, most, mean = case
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer().build()
    prompts = [rng.integers(VOCABULARY, size=n).tolist() for n in rng.integers(shortest, longest + 1, size=PROMPTS)]
    # random weights give all tokens nearly the same probability
    ends = range(VOCABULARY // mean) if mean else [VOCABULARY]
    arguments: dict[str, Any] = {
        "seeds": [(0, i, member) for i in range(PROMPTS) for member in range(MEMBERS)],
        "sampling": Sampling(most),
        "ends": ends,
    }
    rows = [prompt for prompt in prompts for _ in range(MEMBERS)]
    engines: list[Engine] = [Generate(), ContinuousBatching()]
    seconds: list[list[float]] = [[], []]
    sampled = []
    for _ in range(repeats):
        for engine, times in zip(engines, seconds, strict=True):
            started = time.process_time()
            sampled.append(engine.sample(policy, tokenizer, rows, **arguments))
            times.append(time.process_time() - started)
    for other in sampled[1:]:
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(sampled[0], other, strict=True))
    return [float(np.median(times)) for times in seconds], sampled[0]


if __name__ == "__main__":
    main()
