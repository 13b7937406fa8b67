"""The vLLM engines against stand-ins: weights follow the policy, settings are passed on or refused, runs resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.config.check import known_classes
from oumi_pl.data.rollout_loader import RolloutLoader
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.modules.distill import Distill
from oumi_pl.modules.grpo import GRPO
from oumi_pl.rollouts import vllm
from oumi_pl.rollouts.sampling import Engine, Generate, Sampling
from oumi_pl.rollouts.vllm import VLLM, VLLMServer, sampling_params, weights_hash
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.folders import saved_steps
from tests.modules.test_grpo import SAMPLING, Logged, rollouts, run, same
from tests.rollouts import stand_ins
from tests.tiny import LLAMA, distance, trainer, weights

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
TWO_UPDATES = {"batch_size": 2, "prompts_per_call": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("initial")
    tokenizer = ByteTokenizer().build()
    torch.manual_seed(3)
    tied = {"initializer_range": 0.2, "tie_word_embeddings": True, "num_hidden_layers": 1}
    build_model(None, config=LLAMA | tied, tokenizer=tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def server(folder):
    stand_in = stand_ins.Server(folder)
    yield stand_in
    stand_in.close()


@pytest.fixture
def module(monkeypatch):
    stand_ins.install(monkeypatch)


def big_steps(params):
    return torch.optim.SGD(params, lr=3.0)


def policy(folder, **kwargs):
    return GRPO(str(folder), **{"optimizer": big_steps} | kwargs)


def differences(path, folder, engine, **kwargs):
    """`train/sampling_difference` of 2 updates."""
    logged = Logged()
    data = TWO_UPDATES | {"engine": engine}
    run(path, policy(folder, **kwargs), data=data, callbacks=[logged], max_steps=2)
    return [update["train/sampling_difference"] for update in logged.updates]


def only_once(kind):
    """An engine that gets the initial weights, and never those of an update."""

    class Stale(kind):
        def synchronise(self, policy):
            if self.synchronised is None:
                super().synchronise(policy)

    return Stale


POLICIES = {
    "all weights": (False, None),
    "an adapter": (False, LORA),
    "a merged adapter": (True, LORA | {"use_dora": True}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_server_samples_with_the_weights_of_each_update(tmp_path, folder, server, name):
    merge, lora = POLICIES[name]
    assert max(differences(tmp_path, folder, VLLMServer(server.url, merge=merge), lora=lora)) < 1e-5
    assert len(server.asked("/v1/load_lora_adapter")) == (2 if name == "an adapter" else 0)
    assert len(server.asked("/collective_rpc")) == (1 if name == "an adapter" else 2)  # the adapter's base, once
    assert len(server.model.adapters) == (name == "an adapter")
    of_update = [body["cache_salt"] for body in server.asked("/v1/completions")]
    assert len(set(of_update)) == 2  # a prompt's keys and values are never those of other weights


@pytest.mark.parametrize("name", POLICIES)
def test_in_process_it_samples_with_the_weights_of_each_update(tmp_path, folder, module, name):
    merge, lora = POLICIES[name]
    assert max(differences(tmp_path, folder, VLLM(merge=merge), lora=lora)) < 1e-5
    (llm,) = stand_ins.LLM.built
    assert llm.calls == (["add_lora"] * 2 if name == "an adapter" else ["reload_weights", "pack_head"])
    assert llm.options["max_model_len"] == 128
    assert llm.options["dtype"] == "float32"


@pytest.mark.parametrize("form", ["server", "process"])
def test_weights_that_are_not_sent_would_be_noticed(tmp_path, folder, server, module, form):
    engine = only_once(VLLMServer)(server.url) if form == "server" else only_once(VLLM)()
    stale = differences(tmp_path, folder, engine)
    assert stale[0] < 1e-5
    assert min(stale[1:]) > 1e-3


def test_vllm_in_process_leaves_the_random_generators_alone(tmp_path, folder, module):
    def drawn():
        return [*torch.rand(2).tolist(), *np.random.rand(2)]

    states = []
    for engine in (VLLM(), None):
        run(tmp_path, policy(folder), data=TWO_UPDATES | ({"engine": engine} if engine else {}), max_steps=1)
        states.append(drawn())
    assert states[0] == states[1]


def test_weights_are_sent_when_they_change_and_only_then(tmp_path, folder, server):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "say"}) + "\n")
    data = TWO_UPDATES | {"engine": VLLMServer(server.url), "validation": str(held_out)}
    grpo = policy(folder)
    run(tmp_path, grpo, data=data, max_steps=2, val_check_interval=1)
    # the validation after the first update and the second update share weights; the last validation has its own
    assert len(server.asked("/collective_rpc")) == 3
    before = weights_hash(grpo.causal_lm.hf)
    with torch.no_grad():
        weight = next(grpo.causal_lm.hf.parameters())
        weight.data[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_hash(grpo.causal_lm.hf) != before


def test_completions_do_not_depend_on_how_many_are_asked_for_at_a_time(tmp_path, folder, server):
    sampled = []
    for requests, per_call in ((1, 1), (64, 8)):
        data = {"engine": VLLMServer(server.url, requests=requests), "prompts_per_call": per_call}
        sampled.append(run(tmp_path, policy(folder), data=data, max_steps=1).sampled[0])
    assert same([sampled[0]], [sampled[1]])
    seeds = [body["seed"] for body in server.asked("/v1/completions")]
    assert len(set(seeds)) == len(seeds) / 2
    other = run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url), "seed": 1}, max_steps=1)
    assert not same([sampled[0]], [other.sampled[0]])


def test_each_setting_is_passed_on_under_vllms_name():
    sampling = Sampling(9, temperature=0.7, top_p=0.8, top_k=5, stop=("\n", "<end>"))
    params = sampling_params(sampling, [2, 7], (1, 2, 3))
    assert params == {
        "n": 1, "max_tokens": 9, "temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.0, "seed": params["seed"],
        "stop": ["\n", "<end>"], "stop_token_ids": [2, 7], "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "logprobs": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # fmt: skip
    others = [sampling_params(sampling, [], seed)["seed"] for seed in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3, 1))]
    assert len({params["seed"], *others}) == 5
    assert all(0 <= seed < 2**63 for seed in others)
    assert sampling_params(sampling, [], (1, 2, 3))["seed"] == params["seed"]


def test_stop_texts_and_end_tokens_end_a_completion_and_belong_to_it(tmp_path, folder, server):
    samples = run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1)
    module, stop = samples.policy, tuple("etaoin")
    prompts = [prompt.ids for prompt in samples.all_prompts("train")]
    sampling = Sampling(max_new_tokens=20, stop=stop)
    ends = [65, 2**31 - 1]  # the dry run's, which no vocabulary has
    seeds = [(0, i) for i in range(7)]
    completions = samples.engine.sample(module, samples.tokenizer, prompts, seeds=seeds, sampling=sampling, ends=ends)
    assert any(c.is_finished for c in completions)
    for completion in completions:
        text = samples.tokenizer.decode(completion.ids)
        assert completion.is_finished == (any(s in text for s in stop) or completion.ids[-1] == 65)
        assert not any(s in samples.tokenizer.decode(completion.ids[:-1]) for s in stop)
        assert np.array_equal(completion.entropies, -completion.logps)


def test_on_policy_distillation_samples_with_it(tmp_path, folder, server):
    student = Distill(str(folder), teacher=str(folder), optimizer=big_steps)
    data = {"engine": VLLMServer(server.url), "reward": None, "completions": 1, "steps_per_rollout": 2, "batch_size": 2}
    run(tmp_path, student, data=data, max_steps=2)
    assert len(server.asked("/collective_rpc")) == 1


WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from oumi_pl.rollouts.vllm import VLLMServer
from tests.modules.test_grpo import run
from tests.rollouts.test_vllm import policy
from tests.tiny import weights
out = Path(sys.argv[1])
module = policy({folder!r})
data = {{"engine": VLLMServer({url!r}), "batch_size": 1, "prompts_per_call": 1, "iterations": 2}}
run(out, module, 2, data, devices=2, strategy="ddp", max_steps=3)
if module.global_rank == 0:
    torch.save(weights(module), out / "weights.pt")
"""


@pytest.mark.slow
def test_two_ranks_sample_from_one_server_and_train_as_one(tmp_path, folder, server):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2]), folder=str(folder), url=server.url))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(server.asked("/collective_rpc")) == 2  # rank 0 sends
    alone = policy(folder)
    data = {"engine": VLLMServer(server.url), "batch_size": 4, "iterations": 2}
    run(tmp_path, alone, data=data, max_steps=3)
    assert distance(torch.load(tmp_path / "weights.pt"), weights(alone)) < 5e-6


def test_each_completion_has_a_limit_of_its_own(tmp_path, folder, server):
    samples = run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1)
    settings = {"seeds": [(0, 0), (0, 1)], "sampling": Sampling(9), "ends": [], "limits": [3, 9]}
    sampled = samples.engine.sample(samples.policy, samples.tokenizer, [[65], [66]], **settings)
    assert [len(completion.ids) for completion in sampled] == [3, 9]


def test_vllm_in_process_leaves_the_number_of_threads_alone(monkeypatch):
    before, function = torch.get_num_threads(), torch.set_num_threads
    with vllm._as_it_was():
        torch.set_num_threads(before + 1)
        torch.set_num_threads = lambda number: None  # as vLLM does on CPUs
    assert torch.set_num_threads is function
    assert torch.get_num_threads() == before


# ---- restarts and connections that fail


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_server_that_was_restarted_gets_the_weights_again(tmp_path, folder, server, lora):
    samples = run(tmp_path, policy(folder, lora=lora), data={"engine": VLLMServer(server.url)}, max_steps=1)
    engine, module = samples.engine, samples.policy
    for _ in range(2):
        engine.synchronise(module)
        sent = len(server.asked("/collective_rpc")), len(server.asked("/v1/load_lora_adapter"))
    server.restart()
    engine.synchronise(module)
    now = len(server.asked("/collective_rpc")), len(server.asked("/v1/load_lora_adapter"))
    assert [b - a for a, b in zip(sent, now, strict=True)] == [1, int(lora is not None)]
    prompts, seeds = [[65], [66]], [(0, 0), (0, 1)]
    arguments = module, samples.tokenizer, prompts
    settings = {"seeds": seeds, "sampling": Sampling(9, temperature=0.0), "ends": []}
    expected = Generate().sample(*arguments, **settings)
    sampled = engine.sample(*arguments, **settings)
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(sampled, expected, strict=True)) < 1e-5


def test_a_restart_while_completions_are_sampled_ends_the_run(tmp_path, folder, server):
    class Restarted(VLLMServer):
        def _complete(self, *args):
            output = super()._complete(*args)
            server.restart()
            return output

    with pytest.raises(UserError, match="was restarted while it sampled"):
        run(tmp_path, policy(folder), data={"engine": Restarted(server.url, requests=1)}, max_steps=1)


def test_only_requests_for_completions_are_repeated(tmp_path, folder, server, monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE", 0.0)
    server.dropped = {"/v1/completions": vllm.TRIES - 1}
    run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url, requests=1)}, max_steps=1)
    server.dropped = {"/v1/completions": vllm.TRIES}
    with pytest.raises(UserError, match="does not answer"):
        run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url, requests=1)}, max_steps=1)
    server.dropped = {"/collective_rpc": 1}
    with pytest.raises(UserError, match="does not answer"):
        run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1)


# ---- resumes


class Dies(VLLMServer):
    """Dies at a call."""

    left = 0

    def complete(self, *args):
        self.left -= 1
        if not self.left:
            raise ConnectionAbortedError
        return super().complete(*args)


def resumed(path, folder, server, checkpoint, data):
    module = policy(folder, optimizer=adam)
    L.seed_everything(1)
    samples = rollouts(path, **data | {"engine": VLLMServer(server.url)})
    trainer(max_epochs=1, plugins=[AtomicCheckpointIO()]).fit(module, samples, ckpt_path=str(checkpoint))
    return weights(module)


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2)


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
    """The weights of an uninterrupted run, and the checkpoints of one that ended while it sampled."""
    path, server = tmp_path_factory.mktemp("killed"), stand_ins.Server(folder)
    data = TWO_UPDATES | {"steps_per_rollout": 2, "iterations": 2}
    options = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_epochs": 1}

    def saving(name):
        callback = Checkpoints(every=1, keep=20)
        callback.directory = path / name
        return [callback]

    whole = policy(folder, optimizer=adam)
    run(path, whole, data=data | {"engine": VLLMServer(server.url)}, callbacks=saving("whole"), **options)
    engine = Dies(server.url)
    engine.left = 6  # the first block of 4 updates has 4 calls
    with pytest.raises(ConnectionAbortedError):
        run(path, policy(folder, optimizer=adam), data=data | {"engine": engine}, callbacks=saving("killed"), **options)
    server.close()
    return path, data, weights(whole), [saved_steps(path / "whole")[1], saved_steps(path / "killed")[-1]]


@pytest.mark.parametrize("which", [0, 1], ids=["with rollouts left", "killed while sampling"])
def test_a_resumed_run_is_bit_identical(folder, server, killed, which):
    path, data, expected, checkpoints = killed
    actual = resumed(path, folder, server, checkpoints[which], data)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    sampled_again = len({tuple(body["prompt"]) for body in server.asked("/v1/completions")})
    assert sampled_again == 3  # the second block's alone: those of the first come from the checkpoint


def test_rollouts_that_a_checkpoint_lacks_would_be_noticed(folder, server, killed, monkeypatch):
    path, data, expected, checkpoints = killed
    load = RolloutLoader.load_state_dict

    def without(self, state):
        groups = [{k: v for k, v in group.items() if k != "policy_logps"} for group in state["rollouts"]]
        load(self, {**state, "rollouts": groups})

    for fault in (without, lambda self, state: load(self, {**state, "rollouts": []})):
        monkeypatch.setattr(RolloutLoader, "load_state_dict", fault)
        actual = resumed(path, folder, server, checkpoints[0], data)
        assert not all(torch.equal(value, expected[name]) for name, value in actual.items())


# ---- mistakes


def raised_on_each_rank(engine, module):
    """What rank 0 and another rank raise; the other one gets what rank 0 broadcasts, and would wait without it."""
    sent, errors = [], []

    def broadcast(state):
        sent.append(state)
        return sent[0]

    for is_global_zero in (True, False):
        trainer = SimpleNamespace(is_global_zero=is_global_zero, strategy=SimpleNamespace(broadcast=broadcast))
        with pytest.raises(Exception) as error:
            engine.synchronise(SimpleNamespace(trainer=trainer, causal_lm=module.causal_lm))
        errors.append(error.value)
    assert len(sent) == 2
    return errors


def test_an_error_of_rank_0_ends_all_ranks(tmp_path, folder, server, monkeypatch):
    module = run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1).policy
    missing = tmp_path / "missing"
    first, second = raised_on_each_rank(VLLMServer(server.url, folder=str(missing)), module)
    assert isinstance(first, UserError)
    assert str(first) == str(second)
    assert f"can't write weights for vLLM to {missing}: " in str(first)
    monkeypatch.setattr(vllm, "weights_hash", lambda hf: {}["a fault of the package"])
    first, second = raised_on_each_rank(VLLMServer(server.url), module)
    assert isinstance(first, KeyError)
    assert isinstance(second, UserError)
    assert "rank 0 failed, see its output: KeyError: 'a fault of the package'" in str(second)


def test_answers_that_are_not_those_of_vllm_are_refused(tmp_path, folder, server):
    for info in ({}, {"vllm_config": "as text"}, {"vllm_config": {"model_config": {}}}):
        server.info = info
        with pytest.raises(UserError, match=r"is no vLLM server of version 0\.32 or later"):
            run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1)


def test_what_a_server_answers_to_an_unknown_path_is_in_the_message(server):
    with pytest.raises(
        UserError, match=r'has no /v1/load_lora; start it with .*\. It answers: \{"detail": "Not Found"\}'
    ):
        VLLMServer(server.url)._ask("POST", "/v1/load_lora", "{}")


def test_recipes_know_the_engines_by_name():
    known = known_classes([Engine])
    assert known["VLLM"] is VLLM
    assert known["VLLMServer"] is VLLMServer
    assert "VLLMEngine" not in known


REFUSED = {
    r"data\.sampling\.temperature is 0\.001, and vLLM samples with at least 0\.01": {"temperature": 0.001},
    r"data\.sampling\.min_p: vLLM applies it before top_p": {"min_p": 0.1, "top_p": 0.9},
}


@pytest.mark.parametrize("message", REFUSED)
def test_sampling_that_vllm_does_otherwise_is_refused_by_key(tmp_path, message):
    with pytest.raises(UserError, match=message):
        rollouts(tmp_path, engine=VLLM(), sampling=replace(SAMPLING, **REFUSED[message]))
    rollouts(tmp_path, sampling=replace(SAMPLING, **REFUSED[message]))


ARGUMENTS = {
    r"gpu_memory_utilization is 1\.5": lambda: VLLM(1.5),
    r"options\.logprobs_mode: the engine sets it": lambda: VLLM(options={"logprobs_mode": "raw_logprobs"}),
    r"url is 'localhost:8000', but has to be as http": lambda: VLLMServer("localhost:8000"),
    r"requests is 0, but has to be above 0": lambda: VLLMServer(requests=0),
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_arguments_are_checked(message):
    with pytest.raises(UserError, match=f"data.engine.{message}"):
        ARGUMENTS[message]()


def test_a_server_without_what_is_needed_is_refused(tmp_path, folder):
    def message(engine, **kwargs):
        with pytest.raises(UserError) as error:
            run(tmp_path, policy(folder, **kwargs), data={"engine": engine}, max_steps=1)
        return str(error.value)

    raw, small = stand_ins.Server(folder, "raw_logprobs"), stand_ins.Server(folder, max_lora_rank=None)
    assert "start it with --logprobs-mode processed_logprobs" in message(VLLMServer(raw.url))
    assert "--enable-lora --max-lora-rank 8" in message(VLLMServer(small.url), lora=LORA)
    text = message(VLLMServer(small.url), lora=LORA | {"use_dora": True})
    assert text == "model.lora.use_dora: vLLM can't apply such an adapter; set data.engine.merge: true"
    cpu = stand_ins.Server(folder, device="cpu")
    assert "can't replace the weight of a head that is the embedding's" in message(VLLMServer(cpu.url))
    cpu.info["vllm_config"]["scheduler_config"]["enable_chunked_prefill"] = True
    assert "start it with --no-enable-chunked-prefill" in message(VLLMServer(cpu.url), lora=LORA)
    small.info = None
    assert "has no /server_info; start it with VLLM_SERVER_DEV_MODE=1" in message(VLLMServer(small.url))
    for server in (raw, small, cpu):
        server.close()
    text = message(VLLMServer(small.url))
    assert f"the vLLM server at {small.url} does not answer" in text
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL" in text


def test_an_adapters_base_is_that_of_the_run_also_if_another_was_before(tmp_path, folder, server, module):
    differences(tmp_path, folder, VLLMServer(server.url))
    assert max(differences(tmp_path, folder, VLLMServer(server.url), lora=LORA)) < 1e-5
    hf = build_model(str(folder))
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(1.5)
    hf.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "other")
    for engine in (VLLM(), VLLMServer(server.url)):
        for of_run in (folder, tmp_path / "other", folder):
            assert max(differences(tmp_path, of_run, engine, lora=LORA)) < 1e-5


def test_adapters_that_a_killed_run_left_are_unloaded(tmp_path, folder, server):
    data = TWO_UPDATES | {"engine": VLLMServer(server.url)}
    left = []
    for _ in range(2):
        run(tmp_path, policy(folder, lora=LORA), data=data, max_steps=1)
        left.append(set(server.model.adapters))
        data = data | {"engine": VLLMServer(server.url)}
    assert left[0] == left[1]
    assert len(left[0]) == 1


def test_a_request_that_the_server_fails_stops_the_run_with_its_words(tmp_path, folder, server, monkeypatch):
    monkeypatch.setattr(stand_ins.Model, "load", lambda self, weights: 1 / 0)
    with pytest.raises(UserError, match=r"refused /collective_rpc: 500 .*ZeroDivisionError"):
        run(tmp_path, policy(folder), data={"engine": VLLMServer(server.url)}, max_steps=1)


def test_without_vllm_the_extra_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"install the extra: pip install 'oumi_pl\[vllm\]'"):
        run(tmp_path, policy(folder), data={"engine": VLLM()}, max_steps=1)
