"""The engines against a real vLLM: after updates, it samples with the weights of the policy."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from oumi_pl.__main__ import main
from oumi_pl.commands.serving import check_vllm
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from oumi_pl.models.lora import with_lora
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts import vllm
from oumi_pl.rollouts.sampling import Generate, Sampling, truncated
from oumi_pl.rollouts.vllm import VLLM, VLLMServer
from tests.conftest import free_port
from tests.modules.test_grpo import SAMPLING, Logged, run
from tests.tiny import LLAMA, write_jsonl

pytest.importorskip("vllm", reason="needs vLLM's own environment; CONTRIBUTING.md has the commands that create it")
pytestmark = pytest.mark.slow

CONFIG = LLAMA | {"initializer_range": 0.2, "head_dim": 32}  # vLLM's attention on CPUs has no smaller heads
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOLERANCE = 1e-5
"""Nats per token, in float32; measured: 4e-7."""
OPTIONS = {"enforce_eager": True, "dtype": "float32"}
SERVER = (
    "--enforce-eager",
    "--dtype",
    "float32",
    "--logprobs-mode",
    "processed_logprobs",
    "--max-model-len",
    "128",
    "--no-enable-chunked-prefill",
)


@pytest.fixture(scope="module", autouse=True)
def _small_cache():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB


def new_model(path, **config):
    tokenizer = ByteTokenizer().build()
    torch.manual_seed(3)
    build_model(None, config=CONFIG | config, tokenizer=tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model whose embedding and head share a weight."""
    return new_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@contextmanager
def serving(folder, log, port):
    """A server of the model, with LoRA."""
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


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("server") / "log.txt", free_port()) as address:
        yield address


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


@pytest.mark.parametrize("name", POLICIES)
def test_in_process_a_head_that_is_the_embedding_follows_it(tmp_path, tied, name, monkeypatch):
    arguments, policy = POLICIES[name]
    right = differences(tmp_path, tied, VLLM(options=OPTIONS, **arguments), **policy)
    assert max(right) < TOLERANCE, right
    print(name, "tied, in process:", right)
    if name == "all weights":
        monkeypatch.setattr(vllm, "pack_head", lambda model: None)
        stale = differences(tmp_path, tied, VLLM(options=OPTIONS, **arguments), **policy)
        assert min(stale[1:]) > 100 * TOLERANCE, stale
        print("stale head:", stale)


def test_a_server_on_a_cpu_refuses_a_head_that_is_the_embedding(tmp_path, tied, url):
    with pytest.raises(UserError, match="can't replace the weight of a head that is the embedding's"):
        differences(tmp_path, tied, VLLMServer(url))


def test_in_process_stale_weights_would_be_noticed(tmp_path, folder):
    stale = differences(tmp_path, folder, only_once(VLLM)(options=OPTIONS))
    assert stale[0] < TOLERANCE
    assert min(stale[1:]) > 100 * TOLERANCE, stale
    print("stale in process:", stale)


class SameSalt(VLLM):
    """Lets vLLM use the keys and values of prompts that were computed with earlier weights."""

    def complete(self, prompts, params):
        name, self.synchronised = self.synchronised, "the same"
        try:
            return super().complete(prompts, params)
        finally:
            self.synchronised = name


def test_cached_prompts_of_earlier_weights_would_be_noticed(tmp_path, folder):
    beginning = "ab" * 20  # longer than a block of cached tokens
    prompts = "".join(json.dumps({"prompt": beginning + str(i)}) + "\n" for i in range(7))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    options = OPTIONS | {"block_size": 32, "enable_prefix_caching": True}
    assert max(differences(tmp_path, folder, VLLM(options=options))) < TOLERANCE
    stale = differences(tmp_path, folder, SameSalt(options=options))
    assert stale[0] < TOLERANCE
    assert min(stale[1:]) > 100 * TOLERANCE, stale
    print("stale prompts:", stale)


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


def test_a_server_that_was_restarted_gets_the_weights_again(tmp_path, folder):
    port = free_port()
    with serving(folder, tmp_path / "first.txt", port) as address:
        engine = VLLMServer(address)
        module, *_ = sampled(tmp_path, folder, engine, [Sampling(4)])
        first = engine._instance_now()
    with serving(folder, tmp_path / "second.txt", port):
        assert engine._instance_now() != first
        arguments = module, module.data.tokenizer, [[65], [66]]
        settings = {"seeds": [(0, 0), (0, 1)], "sampling": Sampling(8, temperature=0.0), "ends": []}
        with pytest.raises(UserError, match="was restarted while it sampled"):
            engine.sample(*arguments, **settings)
        engine.synchronise(module)
        ours, theirs = engine.sample(*arguments, **settings), Generate().sample(*arguments, **settings)
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(ours, theirs, strict=True)) < 1e-4


def engines(url):
    return {"server": VLLMServer(url), "process": VLLM(options=OPTIONS)}


def sampled(tmp_path, folder, engine, samplings, ends=()):
    """The policy after an update, prompts, and their completions for each of `samplings`."""
    module = GRPO(str(folder), optimizer=big_steps)
    samples = run(tmp_path, module, data={"engine": engine}, max_steps=1)
    prompts = [prompt.ids for prompt in samples.all_prompts("train")] * 16  # more than vLLM's batch
    seeds = [(0, i) for i in range(len(prompts))]
    engine.synchronise(module)
    completions = [
        engine.sample(module, samples.tokenizer, prompts, seeds=seeds, sampling=sampling, ends=ends)
        for sampling in samplings
    ]
    return module, samples.tokenizer, prompts, completions


def test_both_forms_draw_the_same_completions_and_end_them_where_they_should(tmp_path, folder, url):
    sampling, ends = Sampling(max_new_tokens=24, temperature=1.3, top_k=40, top_p=0.9, stop=("e",)), [257, 65]
    drawn = {}
    for name, engine in engines(url).items():
        _, tokenizer, _, (completions,) = sampled(tmp_path, folder, engine, [sampling], ends)
        drawn[name] = [tuple(completion.ids) for completion in completions]
        assert 0 < sum(c.is_finished for c in completions) < len(completions)
        for completion in completions:
            is_ended = int(completion.ids[-1]) in ends or "e" in tokenizer.decode(completion.ids)
            assert is_ended == completion.is_finished
            assert is_ended or len(completion.ids) == 24
            assert not {*completion.ids[:-1].tolist()} & {*ends}
            assert "e" not in tokenizer.decode(completion.ids[:-1])
    assert len(set(drawn["server"])) > 80
    # a token on the edge between two can fall on either side, if vLLM batches otherwise
    assert sum(a != b for a, b in zip(drawn["server"], drawn["process"], strict=True)) <= 2


SAMPLINGS = (
    Sampling(max_new_tokens=8, temperature=0.7, top_k=5),
    Sampling(max_new_tokens=8, temperature=1.5, top_p=0.6),
    Sampling(max_new_tokens=8, temperature=1.5, top_k=20, min_p=0.1),
    Sampling(max_new_tokens=8, temperature=0.0),
)


@pytest.mark.parametrize("form", ["server", "process"])
def test_log_probabilities_are_those_of_the_truncated_distribution(tmp_path, folder, url, form):
    module, _, prompts, of_each = sampled(tmp_path, folder, engines(url)[form], SAMPLINGS)
    for sampling, completions in zip(SAMPLINGS, of_each, strict=True):
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([*prompt, *completion.ids], dtype=torch.long)
            with torch.no_grad():
                logits = module.causal_lm.hf.eval()(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            expected = truncated(logits / (sampling.temperature or 1), sampling).log_softmax(-1)
            expected = expected.gather(-1, ids[len(prompt) :, None]).squeeze(-1).numpy()
            assert np.abs(completion.logps - expected).max() < 10 * TOLERANCE
            if sampling.temperature == 0:
                assert torch.equal(logits.argmax(-1), ids[len(prompt) :])


# ---- `export --check vllm`


def adapter_of(folder, path):
    model = LM(with_lora(build_model(str(folder)), {"r": 4, "init_lora_weights": False}))
    export_model(model, path, AutoTokenizer.from_pretrained(folder))
    return path


def test_models_and_adapters_are_served_as_they_were_exported(tmp_path, folder):
    for exported in (folder, adapter_of(folder, tmp_path / "adapter")):
        checked = check_vllm(exported)
        assert checked.completions == 8
        assert checked.tokens > 100
        assert max(checked.difference, checked.gap) < 1e-4
        print(checked)


def test_a_model_that_vllm_reads_otherwise_would_be_noticed(folder, monkeypatch):
    build = vllm.build_llm
    rotations = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    monkeypatch.setattr(vllm, "build_llm", lambda **options: build(**options, hf_overrides=rotations))
    with pytest.raises(UserError, match="serves another model than was trained") as error:
        check_vllm(folder)
    print(error.value)


KEYS = ("id", "completion", "token_ids", "finished")


def test_rows_of_a_file_are_completed_as_by_generate(tmp_path, folder):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "id": n} for n in range(20)])
    command = ["generate", "--model", str(folder), "--file", str(rows), "--max_new_tokens", "12", "--logprobs"]
    lines = {}
    for engine in ("generate", "vllm"):
        output = tmp_path / f"{engine}.jsonl"
        assert main([*command, "--engine", engine, "--output", str(output)]) == 0
        lines[engine] = [json.loads(line) for line in output.read_text().splitlines()]
    for served, here in zip(lines["vllm"], lines["generate"], strict=True):
        assert [served[k] for k in ("id", "token_ids", "finished")] == [
            here[k] for k in ("id", "token_ids", "finished")
        ]
        assert served["logprobs"] == pytest.approx(here["logprobs"], abs=TOLERANCE)
