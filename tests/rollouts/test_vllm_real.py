"""The engines against a real vLLM: after updates, it samples with the weights of the policy."""

import os
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.build import build_model
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts.sampling import Sampling
from oumi_pl.rollouts.vllm import VLLM, VLLMServer
from tests.conftest import free_port
from tests.modules.test_grpo import SAMPLING, Logged, run
from tests.tiny import LLAMA

pytest.importorskip("vllm", reason="needs vLLM's own environment; CONTRIBUTING.md has the commands that create it")
pytestmark = pytest.mark.slow

CONFIG = LLAMA | {"initializer_range": 0.2, "head_dim": 32}  # vLLM's attention on CPUs has no smaller heads
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOLERANCE = 1e-5
"""Nats per token, in float32; measured: 4e-7."""
OPTIONS = {"enforce_eager": True, "dtype": "float32"}
SERVER = ("--enforce-eager", "--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--max-model-len", "128")


@pytest.fixture(scope="module", autouse=True)
def _small_cache():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tokenizer = ByteTokenizer().build()
    torch.manual_seed(3)
    build_model(None, config=CONFIG, tokenizer=tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server of the model, with LoRA."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    program = ("-m", "vllm.entrypoints.openai.api_server", "--model")  # `vllm serve` of vllm-cpu 0.32.0 can't start
    lora = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1")
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *program, folder, "--port", port, *SERVER, *lora],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 300
    address = f"http://127.0.0.1:{port}"
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(60)


def big_steps(params):
    return torch.optim.SGD(params, lr=3.0)


def updates(tmp_path, folder, engine, sampling=SAMPLING, **kwargs):
    """The metrics of 4 updates."""
    logged = Logged()
    data = {"engine": engine, "batch_size": 2, "prompts_per_call": 2, "sampling": sampling}
    run(tmp_path, GRPO(str(folder), optimizer=big_steps, **kwargs), data=data, callbacks=[logged], max_steps=4)
    return logged.updates


def differences(*args, **kwargs):
    return [update["train/sampling_difference"] for update in updates(*args, **kwargs)]


def only_once(kind):
    """An engine that gets the initial weights, and never those of an update."""

    class Stale(kind):
        def synchronise(self, policy):
            if self.synchronised is None:
                super().synchronise(policy)

    return Stale


POLICIES = {
    "all weights": ({}, {}),
    "an adapter": ({}, {"lora": LORA}),
    "a merged adapter": ({"merge": True}, {"lora": LORA | {"use_dora": True}}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_in_process_it_samples_with_the_weights_of_each_update(tmp_path, folder, name):
    arguments, policy = POLICIES[name]
    right = differences(tmp_path, folder, VLLM(options=OPTIONS, **arguments), **policy)
    assert len(right) == 4
    assert max(right) < TOLERANCE, right
    print(name, "in process:", right)


def test_in_process_stale_weights_would_be_noticed(tmp_path, folder):
    stale = differences(tmp_path, folder, only_once(VLLM)(options=OPTIONS))
    assert stale[0] < TOLERANCE
    assert min(stale[1:]) > 100 * TOLERANCE, stale
    print("stale in process:", stale)


@pytest.mark.parametrize("name", POLICIES)
def test_a_server_samples_with_the_weights_of_each_update(tmp_path, folder, url, name):
    arguments, policy = POLICIES[name]
    right = differences(tmp_path, folder, VLLMServer(url, **arguments), **policy)
    assert len(right) == 4
    assert max(right) < TOLERANCE, right
    print(name, "server:", right)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_servers_stale_weights_would_be_noticed(tmp_path, folder, url, lora):
    stale = differences(tmp_path, folder, only_once(VLLMServer)(url), lora=lora)
    assert stale[0] < TOLERANCE
    assert min(stale[1:]) > 100 * TOLERANCE, stale
    print("stale server:", stale)


def test_completions_are_those_of_the_seed_and_end_where_they_should(tmp_path, folder, url):
    """With the same weights and seeds, both forms draw the same tokens; stop texts and end tokens belong to them."""
    sampling = Sampling(max_new_tokens=24, temperature=1.3, top_k=40, top_p=0.9, stop=("e",))
    logged, groups = [], {}
    for name, engine in (("server", VLLMServer(url)), ("process", VLLM(options=OPTIONS)), ("generate", None)):
        module = GRPO(str(folder), optimizer=big_steps)
        data = {"engine": engine} if engine else {}
        samples = run(tmp_path, module, data=data, max_steps=1)
        prompts = [prompt.ids for prompt in samples.all_prompts("train")] * 8
        seeds = [(0, i) for i in range(len(prompts))]
        ends = [samples.tokenizer.eos_token_id, 65]
        samples.engine.synchronise(module)
        groups[name] = samples.engine.sample(
            module, samples.tokenizer, prompts, seeds=seeds, sampling=sampling, ends=ends
        )
        logged.append(groups[name])
    for name, completions in groups.items():
        assert 0 < sum(c.is_finished for c in completions) < len(completions), name
        for completion in completions:
            text = samples.tokenizer.decode(completion.ids)
            is_ended = int(completion.ids[-1]) in ends or "e" in text
            assert is_ended == completion.is_finished, name
            assert not set(completion.ids[:-1].tolist()) & set(ends)
            assert "e" not in samples.tokenizer.decode(completion.ids[:-1])
            assert len(completion.ids) == len(completion.logps) <= 24


def test_log_probabilities_are_those_of_the_truncated_distribution(tmp_path, folder, url):
    from oumi_pl.rollouts.sampling import truncated

    for sampling in (
        Sampling(max_new_tokens=8, temperature=0.7, top_k=5),
        Sampling(max_new_tokens=8, temperature=1.5, top_p=0.6),
        Sampling(max_new_tokens=8, temperature=1.5, top_k=20, min_p=0.1),
        Sampling(max_new_tokens=8, temperature=0.0),
    ):
        for engine in (VLLMServer(url), VLLM(options=OPTIONS)):
            module = GRPO(str(folder), optimizer=big_steps)
            samples = run(tmp_path, module, data={"engine": engine}, max_steps=1)
            prompts = [prompt.ids for prompt in samples.all_prompts("train")]
            samples.engine.synchronise(module)
            completions = engine.sample(
                module, samples.tokenizer, prompts, seeds=[(0, i) for i in range(7)], sampling=sampling, ends=[]
            )
            for prompt, completion in zip(prompts, completions, strict=True):
                ids = torch.tensor([*prompt, *completion.ids], dtype=torch.long)
                with torch.no_grad():
                    logits = module.causal_lm.hf.eval()(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
                expected = truncated(logits / (sampling.temperature or 1), sampling).log_softmax(-1)
                expected = expected.gather(-1, ids[len(prompt) :, None]).squeeze(-1).numpy()
                assert np.abs(completion.logps - expected).max() < 10 * TOLERANCE
                if sampling.temperature == 0:
                    assert torch.equal(logits.argmax(-1), ids[len(prompt) :])
