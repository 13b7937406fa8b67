"""Test doubles of vLLM, a server and a module: they speak the part of its interface that the engines use.

They answer with transformers' model, so that the default suite needs no vLLM.
"""

import copy
import json
import random
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oumi_pl.rollouts.sampling import Sampling, sample, uniforms


class Model:
    """A model whose weights and adapters can be replaced."""

    def __init__(self, folder, tokenizer=None):
        self.hf = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder)
        self.adapters = {}

    def load(self, weights):
        missing, unexpected = self.hf.load_state_dict(dict(weights), strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied

    def add_adapter(self, name, folder):
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.hf), folder).eval()

    def complete(self, prompt, params, adapter=None):
        assert params["logprobs"] == 0
        own = self.hf.generation_config.eos_token_id
        own = [] if params.get("ignore_eos") else own if isinstance(own, list) else [own]
        params = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "stop": (), "stop_token_ids": []} | params
        names = {"max_new_tokens": "max_tokens"} | {n: n for n in ("temperature", "top_p", "top_k", "min_p")}
        sampling = Sampling(**{ours: params[theirs] for ours, theirs in names.items()}, stop=tuple(params["stop"]))
        (completion,) = sample(
            self.hf if adapter is None else self.adapters[adapter],
            self.tokenizer,
            [prompt],
            numbers=uniforms((params["seed"],), params["max_tokens"])[None],
            sampling=sampling,
            ends=[*params["stop_token_ids"], *own],
        )
        reason = "stop" if completion.is_finished else "length"
        return completion.ids.tolist(), completion.logps.tolist(), reason


# ---- a server


class Server:
    """A server on a free port; `requests` are the bodies of all that it was asked, with their paths."""

    def __init__(self, folder, logprobs_mode="processed_logprobs", max_lora_rank=8, device="cuda"):
        self.folder, self.requests, self.lock = folder, [], threading.Lock()
        self.dropped = {}
        """How many of the next requests of a path get no answer."""
        lora = {"max_lora_rank": max_lora_rank} if max_lora_rank else None
        self.info = {
            "vllm_config": {
                "model_config": {"logprobs_mode": logprobs_mode},
                "lora_config": lora,
                "device_config": {"device": device},
                "scheduler_config": {"enable_chunked_prefill": False},
            }
        }
        self.restart()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stand_in": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def restart(self):
        """Becomes a new process: the initial weights, and no adapters."""
        self.model = Model(self.folder)
        self.info["vllm_config"]["instance_id"] = uuid.uuid4().hex[:5]

    def asked(self, path):
        return [body for where, body in self.requests if where == path]

    def answer(self, path, body):
        """The answer to a request, or None if there is no such path."""
        with self.lock:
            self.requests.append((path, body))
            if path == "/server_info?config_format=json":
                return self.info
            if path == "/v1/models":
                return {"data": [{"id": "initial"}, *({"id": name} for name in self.model.adapters)]}
            if path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                self.model.load(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
                return {"results": [None]}
            if path == "/v1/load_lora_adapter":
                self.model.add_adapter(body["lora_name"], body["lora_path"])
                return {}
            if path == "/v1/unload_lora_adapter":
                del self.model.adapters[body["lora_name"]]
                return {}
            if path == "/v1/completions":
                adapter = None if body["model"] == "initial" else body["model"]
                ids, logps, reason = self.model.complete(body["prompt"], body, adapter)
                logprobs = {"token_logprobs": logps}
                return {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": reason}]}
            return None


class Handler(BaseHTTPRequestHandler):
    stand_in: Server

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        try:
            content, status = self.stand_in.answer(self.path, body), 200
        except Exception as error:
            content, status = {"error": repr(error)}, 500
        if self.stand_in.dropped.get(self.path, 0):
            self.stand_in.dropped[self.path] -= 1
            return
        text = json.dumps({"detail": "Not Found"} if content is None else content).encode()
        self.send_response(404 if content is None else status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


# ---- the module


class LLM:
    """`vllm.LLM`, as far as the engine uses it; `built` are those that were built."""

    built = []

    def __init__(self, **options):
        self.options, self.calls = options, []
        self.model = Model(options["model"], options["tokenizer"])
        self.llm_engine = SimpleNamespace(add_lora=self.add_lora, remove_lora=self.remove_lora)
        torch.manual_seed(0)  # as vLLM does
        np.random.seed(0)
        random.seed(0)
        LLM.built.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.calls.append(method)
        self.model.load(kwargs["weights_iterator"])

    def apply_model(self, function):
        self.calls.append(function.__name__)

    def add_lora(self, request):
        self.calls.append("add_lora")
        self.model.add_adapter(request.lora_int_id, request.lora_path)

    def remove_lora(self, number):
        del self.model.adapters[number]

    def generate(self, inputs, params, lora_request, use_tqdm):
        torch.rand(3)
        if lora_request is not None and lora_request.lora_int_id not in self.model.adapters:
            self.model.add_adapter(lora_request.lora_int_id, lora_request.lora_path)
        results = []
        for prompt, of_prompt in zip(inputs, params, strict=True):
            adapter = None if lora_request is None else lora_request.lora_int_id
            ids, logps, reason = self.model.complete(prompt["prompt_token_ids"], of_prompt, adapter)
            logprobs = [{i: SimpleNamespace(logprob=logp)} for i, logp in zip(ids, logps, strict=True)]
            output = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)
            results.append(SimpleNamespace(outputs=[output]))
        return results


def install(monkeypatch):
    """Replaces the module `vllm` by a stand-in."""
    LLM.built = []
    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, vllm.__version__ = LLM, lambda **kwargs: kwargs, "0"
    request.LoRARequest = lambda name, number, path: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


if __name__ == "__main__":  # a server in a process of its own
    print(Server(sys.argv[1]).url, flush=True)
    threading.Event().wait()
