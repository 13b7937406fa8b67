"""Samples completions with each engine of `RolloutData`: tokens per second, and how far log-probabilities are off.

    python benchmarks/rollout_engines.py --model runs/quickstart-grpo_start/model [--prompts 32] [--repeats 5]

Needs an environment with vLLM (CONTRIBUTING.md). Each engine runs in a process of its own, with a float32 policy: it
gets the policy's weights, samples once to warm up, and then `--repeats` times after a small change of all weights, so
that each time includes sending them. `difference`: sampled and recomputed log-probabilities, in nats per token.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from types import SimpleNamespace

from contenders import processor

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from oumi_pl.commands.generate import prompt_ids
from oumi_pl.models.lm import LM
from oumi_pl.rollouts.sampling import Generate, Sampling
from oumi_pl.rollouts.vllm import VLLM, VLLMServer

EAGER = {"enforce_eager": True}
NO_TOKEN = 2**31 - 1
"""Ends no completion, so that all are equally long."""
ENGINES = {
    "generate": lambda url: Generate(),
    "VLLM, float32": lambda url: VLLM(options=EAGER),
    "VLLM, bfloat16": lambda url: VLLM(options=EAGER | {"dtype": "bfloat16"}),
    "VLLMServer, float32": VLLMServer,
}


def untied(hf):
    """The model with a head of its own, which servers on CPUs need."""
    if hf.config.tie_word_embeddings:
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
        hf.config.tie_word_embeddings = False
    return hf


def policy_of(folder: str):
    """What the engines need of a module in training."""
    lm = LM(untied(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, strategy=strategy)
    return SimpleNamespace(causal_lm=lm, trainer=trainer, data=SimpleNamespace(tokenizer=tokenizer, max_length=128))


@torch.no_grad()
def differences(policy, prompts, completions, sampling) -> np.ndarray:
    """Distances of sampled and recomputed log-probabilities, `[tokens]`."""
    off = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([*prompt, *completion.ids], dtype=torch.long)
        logits = policy.causal_lm.hf(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / sampling.temperature
        own = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None]).squeeze(-1).numpy()
        off.append(np.abs(own - completion.logps))
    return np.concatenate(off)


def measured(name: str, options: argparse.Namespace, url: str) -> dict:
    """Samples in this process."""
    policy, engine = policy_of(options.model), ENGINES[name](url)
    tokenizer = policy.data.tokenizer
    words = ["stone", "river", "apple", "light", "chair", "bread", "cloud", "horse"]
    of_prompts = [prompt_ids(tokenizer, f"Reverse {words[i % 8]}{i}") for i in range(options.prompts)]
    prompts = [prompt for prompt in of_prompts for _ in range(options.completions)]
    sampling = Sampling(max_new_tokens=options.tokens)
    seconds, cpu = [], []
    for repeat in range(options.repeats + 1):
        with torch.no_grad():
            for weight in policy.causal_lm.hf.parameters():
                weight.mul_(1 + 1e-3 * torch.randn_like(weight))
        seeds = [(repeat, i) for i in range(len(prompts))]
        began, began_cpu = time.perf_counter(), time.process_time()
        engine.synchronise(policy)
        completions = engine.sample(policy, tokenizer, prompts, seeds=seeds, sampling=sampling, ends=[NO_TOKEN])
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    tokens = sum(len(completion.ids) for completion in completions)
    off = differences(policy, prompts, completions, sampling)
    return {
        "rate": tokens / statistics.median(seconds[1:]),
        "cpu": tokens / statistics.median(cpu[1:]),
        "mean": float(off.mean()),
        "largest": float(off.max()),
        "tokens": tokens,
    }


def untied_copy(folder: str) -> str:
    """A folder of the model with a head of its own."""
    copy = tempfile.mkdtemp()
    untied(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).save_pretrained(copy)
    AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
    return copy


def serve(model: str, port: int) -> subprocess.Popen:
    """Starts a server, and waits until it answers."""
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    settings = ["--enforce-eager", "--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    server = subprocess.Popen(
        [*program, *settings, "--max-model-len", "128", "--no-enable-chunked-prefill"],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while True:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    if options.only:
        print(json.dumps(measured(options.only, options, url)))
        return
    import vllm

    print(f"# python {' '.join(sys.argv)}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}, python "
        f"{platform.python_version()}; {processor()}, {os.cpu_count()} cores"
    )
    print(f"{options.prompts} prompts x {options.completions} completions of {options.tokens} tokens, {options.model}")
    print(f"{'':22}{'tokens/s':>10}{'per CPU s':>11}{'difference':>12}{'largest':>10}")
    for name in options.engines:
        server = serve(untied_copy(options.model), options.port) if "Server" in name else None
        try:
            command = [sys.executable, *sys.argv, "--only", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        finally:
            if server is not None:
                server.terminate()
                server.wait()
        row = json.loads(out.strip().splitlines()[-1])
        cpu = f"{row['cpu']:11,.0f}" if server is None else f"{'-':>11}"
        print(f"{name:22}{row['rate']:10,.0f}{cpu}{row['mean']:12.1e}{row['largest']:10.1e}", flush=True)


if __name__ == "__main__":
    main()
