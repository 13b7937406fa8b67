"""Samples completions with vLLM: `VLLM` in the trainer's process, or `VLLMServer` from a server.

vLLM computes with its own kernels, so its log-probabilities are those of the policy but for rounding. `GRPO` logs the
difference as `train/sampling_difference`, and corrects for it (`max_importance_ratio`).

**Weights.** Before completions are sampled, the engine compares a hash of the policy's trained weights with that of the
weights that vLLM has, and sends them if they differ: after updates, after a resume, and where a weight average takes
the policy's place. Cached prefixes of other weights are never used (each hash is a `cache_salt`).

**LoRA.** The adapter is sent, not the merged weights: vLLM then adds the adapter's output to the base's, as training
does. Merging would round the sum of a weight and its small change to the dtype of the weights; in bfloat16, most of
the change of a few updates would be lost. The adapter is also far smaller. `merge: true` sends merged weights, for
adapters that vLLM can't apply (DoRA, trained token rows); in float32 this is exact, too.

**Sampling.** Token ids in, token ids out. Each completion has a seed of its own, derived from the run's seed, the
prompt's number and the completion's index. The same weights and seeds give the same completions up to rounding: vLLM's
log-probabilities can depend on what else is in its batch, so a token on the edge of two may change. Log-probabilities
are those of the distribution that is sampled from, after temperature and truncation (`processed_logprobs`).
"""

import copy
import hashlib
import http.client
import json
import os
import random
import tempfile
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from oumi_pl.errors import UserError, reason
from oumi_pl.models.lora import merged
from oumi_pl.rollouts.sampling import Completion, Engine, Sampling

LOGPROBS_MODE = "processed_logprobs"
"""vLLM's name of log-probabilities after temperature and truncation."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this."""
ADAPTER = "policy-"
"""Prefix of the names of adapters."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`."""
ADAPTER_FEATURES = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
"""Settings of `peft.LoraConfig` whose adapters vLLM would refuse, or apply differently."""


class Output(NamedTuple):
    """A completion as vLLM returns it."""

    ids: Sequence[int]
    logps: Sequence[float]
    finish_reason: str | None
    """`stop` or `length`."""


class VLLMEngine(Engine):
    """What both forms share: when weights are sent, and what is asked of vLLM.

    Args:
        merge: Send a LoRA adapter merged into its base weights; see the module's docstring.
    """

    is_exact = False

    def __init__(self, merge: bool = False) -> None:
        self.merge = merge
        self.synchronised: str | None = None
        """Hash of the weights that vLLM has; None before the first of a policy are sent."""
        self._of: Any = None
        """Weak reference to the model whose weights it has."""
        self._written: Any = None
        """Temporary folder of the adapter that vLLM has, which may read it again."""

    def send(self, policy: Any, name: str) -> None:
        """Sends the policy's weights to vLLM: all of them, or its adapter, and before the first one the adapter's base.

        Args:
            policy: The module that is trained.
            name: Their hash.

        Raises:
            UserError: vLLM can't be used, or can't have these weights.
        """
        is_adapter = self.sends_adapter(policy)
        if not self.connect(policy, is_adapter):
            if not is_adapter:
                self.replace_weights(policy, weights_of(policy))
            elif self.synchronised is None and not is_quantized(policy.causal_lm):
                self.replace_weights(policy, base_weights(policy))  # vLLM may have those of another run
        if is_adapter:
            self.replace_adapter(policy, name)

    @abstractmethod
    def connect(self, policy: Any, is_adapter: bool) -> bool:
        """Starts vLLM, or looks at the settings of a server, the first time; returns whether it now has the weights.

        Args:
            policy: The module that is trained.
            is_adapter: Whether its adapter is sent, after the adapter's base.
        """

    @abstractmethod
    def replace_weights(self, policy: Any, weights: Mapping[str, Tensor]) -> None:
        """Replaces the weights of vLLM's model, by their names in checkpoints."""

    @abstractmethod
    def replace_adapter(self, policy: Any, name: str) -> None:
        """Sends the policy's adapter, whose weights have the hash `name`, in place of the one before."""

    @abstractmethod
    def complete(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Output]:
        """Samples a completion of each prompt.

        Args:
            prompts: Token ids.
            params: Arguments of `vllm.SamplingParams` for each.
        """

    def check(self, sampling: Sampling) -> None:
        """Refuses what vLLM samples from another distribution.

        Raises:
            UserError: names the setting.
        """
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"data.sampling.temperature is {sampling.temperature}, and vLLM samples with at least "
                f"{LEAST_TEMPERATURE}; take 0, which is greedy, or that"
            )
        if sampling.min_p and sampling.top_p < 1:
            raise UserError(
                "data.sampling.min_p: vLLM applies it before top_p, `generate` after it, so both together mean another "
                "distribution; leave one out"
            )

    def synchronise(self, policy: Any) -> None:
        """Sends the policy's weights, unless vLLM has them already."""
        if self._of is None or self._of() is not policy.causal_lm:
            self._of, self.synchronised = weakref.ref(policy.causal_lm), None  # frozen weights may differ, too
        name = weights_hash(policy.causal_lm.hf)
        if name != self.synchronised:
            self.send(policy, name)
            self.synchronised = name

    def sample(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Iterable[int],
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Engine`; the entropy is estimated by minus the log-probability of the sampled token.

        Raises:
            UserError: vLLM can't sample this way, or fails.
        """
        self.check(sampling)
        vocab = policy.causal_lm.hf.config.get_text_config().vocab_size
        ending = sorted({end for end in ends if end < vocab})
        params = [sampling_params(sampling, ending, seed) for seed in seeds]
        for of_prompt, limit in zip(params, limits or (), strict=limits is not None):
            of_prompt["max_tokens"] = limit
        completions = []
        for output in self.complete([list(prompt) for prompt in prompts], params):
            ids, logps = np.array(output.ids, dtype=np.int32), np.array(output.logps, dtype=np.float32)
            is_finished = output.finish_reason == "stop" or (len(ids) > 0 and int(ids[-1]) in ending)
            completions.append(Completion(ids, logps, -logps, is_finished))
        return completions

    def sends_adapter(self, policy: Any) -> bool:
        """Whether the policy's adapter is sent alone.

        Raises:
            UserError: vLLM could not apply it.
        """
        if self.merge or not policy.causal_lm.has_adapters:
            return False
        config = policy.causal_lm.hf.active_peft_config
        wrong = [name for name in ADAPTER_FEATURES if getattr(config, name, None)]
        if config.bias != "none":
            wrong.append("bias")
        if wrong:
            raise UserError(f"model.lora.{wrong[0]}: vLLM can't apply such an adapter; set data.engine.merge: true")
        return True


def sampling_params(sampling: Sampling, ends: Sequence[int], seed: Sequence[int]) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` that mean the same as `sampling`; all that have a default are given.

    A server's defaults come from the model's generation config, which may have a penalty for repetition, for example.

    Args:
        sampling: The settings.
        ends: Token ids that end a completion.
        seed: As in `Engine.sample`.
    """
    # vLLM's seed is one signed integer of 64 bits
    (number,) = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64).tolist()
    return {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": number >> 1,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # `stop_token_ids` has them all
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop texts may contain them
        "logprobs": 0,  # of the sampled token alone
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


# ---- weights


@torch.no_grad()
def weights_hash(hf: Any) -> str:
    """A hash of the weights that are trained, and of the buffers; a change of a single bit changes it."""
    values = [p for p in hf.parameters() if p.requires_grad] + list(hf.buffers())
    hashes = [torch.hash_tensor(value.detach()).view(torch.int64).cpu() for value in values if value.numel()]
    return hashlib.blake2b(torch.stack(hashes).numpy().tobytes(), digest_size=8).hexdigest()


def weights_of(policy: Any) -> dict[str, Tensor]:
    """The policy's weights by their names in checkpoints, each once; adapters are merged in a copy.

    Raises:
        UserError: merged, they are of another architecture.
    """
    hf = policy.causal_lm.hf
    if not policy.causal_lm.has_adapters:
        return checkpoint_weights(hf, hf.state_dict())
    whole = merged(copy.deepcopy(hf))
    if is_tied(policy) and not whole.config.get_text_config().tie_word_embeddings:
        raise UserError(
            "model.lora: the adapters change the embedding and the head differently, and vLLM was started with one "
            "weight for both; leave them out of the adapted layers"
        )
    return checkpoint_weights(whole, whole.state_dict())


def base_weights(policy: Any) -> dict[str, Tensor]:
    """The weights of an adapter's base by their names in checkpoints, each once."""
    base = policy.causal_lm.base
    state = {name: value for name, value in base.state_dict().items() if ".lora_" not in name}
    return checkpoint_weights(base, {name.replace(".base_layer.", "."): value for name, value in state.items()})


def checkpoint_weights(hf: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model by their names in checkpoints; tied ones are listed once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: value.detach() for name, value in state.items()}
    for copied, source in getattr(hf, "all_tied_weights_keys", {}).items():
        if copied in state and source in state and state[copied].data_ptr() == state[source].data_ptr():
            del state[copied]
    return revert_weight_conversion(hf, state)


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes weights as a checkpoint of one file."""
    host = {name: value.cpu().contiguous() for name, value in weights.items()}
    with _writing(folder):
        save_file(host, folder / "model.safetensors", metadata={"format": "pt"})


def written_adapter(policy: Any, parent: str | None = None) -> Any:
    """A temporary folder with the policy's adapter."""
    folder = temporary_folder(parent)
    with _writing(folder.name):
        policy.causal_lm.hf.save_pretrained(folder.name, save_embedding_layers=False)
    return folder


def temporary_folder(parent: str | None = None) -> Any:
    """A folder that other users can read, as a server may be; it is removed with the returned object."""
    with _writing(parent or tempfile.gettempdir()):
        folder = tempfile.TemporaryDirectory(prefix="oumi_pl-vllm-", dir=parent)
        Path(folder.name).chmod(0o755)
    return folder


@contextmanager
def _writing(folder: Path | str) -> Iterator[None]:
    """Raises a `UserError` if a folder is missing, may not be written to, or its disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"data.engine: can't write weights for vLLM to {folder}: {reason(error)}") from error


def write_config(hf: Any, folder: Path) -> None:
    """Writes the configuration of a model, as vLLM reads it."""
    config = copy.deepcopy(hf.config)
    config.architectures = [type(hf).__name__]
    config.save_pretrained(folder)


def is_on_cpu(policy: Any) -> bool:
    """Whether the policy, and so vLLM in its process, computes on a CPU."""
    return bool(next(policy.causal_lm.base.parameters()).device.type == "cpu")


def is_tied(policy: Any) -> bool:
    """Whether the embedding and the head share a weight."""
    return bool(policy.causal_lm.base.config.get_text_config().tie_word_embeddings)


def pack_head(model: Any) -> None:
    """Packs the output head of vLLM's model anew.

    On CPUs, a head computes with a packed copy of its weight, which `reload_weights` of vLLM 0.32 leaves as it was if
    the weight is the embedding's.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


def is_quantized(lm: Any) -> bool:
    """Whether the base of an adapter is quantised; vLLM then loads it by its name, or the server has it."""
    return bool(getattr(lm.base, "is_quantized", False))


def rank_of(hf: Any) -> int:
    """The largest rank of the layers of an adapter."""
    config = hf.active_peft_config
    return max(config.r, *config.rank_pattern.values(), 1)


def adapter_options(rank: int) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for one adapter at a time of this rank.

    Raises:
        UserError: the rank is too large.
    """
    if rank > RANKS[-1]:
        raise UserError(f"model.lora.r is {rank}, and vLLM applies adapters of at most {RANKS[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= rank)}


# ---- in this process

CACHE = 2**30
"""Bytes of keys and values for a few short completions."""

OWN_OPTIONS = ("model", "tokenizer", "logprobs_mode", "enable_lora", "max_loras")
"""Arguments of `vllm.LLM` that the engine sets."""


class VLLM(VLLMEngine):
    """vLLM in the trainer's process, on its device: `vllm.LLM`. For one device; several take `VLLMServer`.

    It keeps weights of its own beside the policy's. Needs the extra `vllm`.

    Args:
        gpu_memory_utilization: Share of the device's memory for vLLM: its weights and its cache of keys and values.
        options: Further arguments of `vllm.LLM`, as `{enforce_eager: true, dtype: bfloat16}`. `dtype` is that of the
            policy's weights, and `max_model_len` is `data.max_length`, when left out.
        merge: See `VLLMEngine`.
    """

    def __init__(
        self, gpu_memory_utilization: float = 0.4, options: dict[str, Any] | None = None, merge: bool = False
    ) -> None:
        super().__init__(merge)
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(
                f"data.engine.gpu_memory_utilization is {gpu_memory_utilization}, but has to be above 0 and at most 1"
            )
        if taken := [name for name in OWN_OPTIONS if name in (options or {})]:
            raise UserError(f"data.engine.options.{taken[0]}: the engine sets it; leave it out")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.options = options or {}
        self.llm: Any = None
        self._adapter: Any = None
        self._adapters = 0

    def send(self, policy: Any, name: str) -> None:
        """See `VLLMEngine`."""
        with _as_it_was():
            super().send(policy, name)

    def connect(self, policy: Any, is_adapter: bool) -> bool:
        """See `VLLMEngine`; builds the engine with the first weights.

        Raises:
            UserError: vLLM is not installed, can't load the model, or there is more than one rank.
        """
        if policy.trainer.world_size > 1:
            raise UserError(
                f"data.engine: VLLM is for one device, and the run has {policy.trainer.world_size}; take VLLMServer"
            )
        if self.llm is not None:
            return False
        with temporary_folder() as folder:
            self.llm = self._build(policy, Path(folder), is_adapter)
        return True

    def replace_weights(self, policy: Any, weights: Mapping[str, Tensor]) -> None:
        """See `VLLMEngine`; they are handed over in memory."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if is_on_cpu(policy) and is_tied(policy):
            self.llm.apply_model(pack_head)

    def _build(self, policy: Any, folder: Path, is_adapter: bool) -> Any:
        lm = policy.causal_lm
        policy.data.tokenizer.save_pretrained(folder)
        write_config(lm.base, folder)
        options: dict[str, Any] = {"model": str(folder), **(adapter_options(rank_of(lm.hf)) if is_adapter else {})}
        if is_adapter and is_quantized(lm):
            options["model"] = lm.base.config._name_or_path  # in full precision, as adapters are exported for
        else:
            write_weights(base_weights(policy) if is_adapter else weights_of(policy), folder)
        dtype = next(p.dtype for p in lm.base.parameters() if p.is_floating_point())
        defaults = {
            "generation_config": "vllm",  # no settings of the model's own
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": policy.data.max_length,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        if is_on_cpu(policy):
            defaults["enable_chunked_prefill"] = False  # on CPUs, vLLM fails if a prompt with a seed is split
        return build_llm(**(defaults | self.options | options), tokenizer=str(folder), logprobs_mode=LOGPROBS_MODE)

    def replace_adapter(self, policy: Any, name: str) -> None:
        """See `VLLMEngine`; as files, which vLLM may read again."""
        from vllm.lora.request import LoRARequest

        written, before = written_adapter(policy), self._adapter
        self._adapters += 1
        self._adapter = LoRARequest(f"{ADAPTER}{name}", self._adapters, written.name)
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
        self.llm.llm_engine.add_lora(self._adapter)
        self._written = written

    def complete(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Output]:
        """See `VLLMEngine`; all prompts are scheduled together."""
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": [*prompt], "cache_salt": self.synchronised} for prompt in prompts]
        with _as_it_was():
            results = self.llm.generate(
                inputs,
                [SamplingParams(**p, detokenize=bool(p["stop"])) for p in params],
                lora_request=self._adapter,
                use_tqdm=False,
            )
        return [output_of(result.outputs[0]) for result in results]


def output_of(output: Any) -> Output:
    """A `vllm.CompletionOutput` with `logprobs` as an `Output`."""
    ids = list(output.token_ids)
    return Output(ids, [at[i].logprob for i, at in zip(ids, output.logprobs, strict=True)], output.finish_reason)


def build_llm(**options: Any) -> Any:
    """Builds a `vllm.LLM` whose engine runs in this process, so that tensors are handed over in memory.

    Raises:
        UserError: vLLM is not installed, or can't load the model.
    """
    llm = import_llm()
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return llm(**options, disable_log_stats=True, use_tqdm_on_load=False)
    except Exception as error:  # of any of vLLM's parts
        raise UserError(f"vLLM can't load {options['model']}: {reason(error)}") from error
    finally:
        if before is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


def import_llm() -> Any:
    """The class `vllm.LLM`.

    Raises:
        UserError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"vLLM can't be imported ({reason(error)}); install the extra: pip install 'oumi_pl[vllm]'"
        ) from error
    return LLM


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Restores what vLLM changes in its process: random generators, which it seeds, and the number of threads.

    On CPUs, it also replaces the function `torch.set_num_threads` by one that does nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)


# ---- a server

COMPLETIONS = "/v1/completions"
TRIES = 4
"""How often a request that changes nothing is sent, if the connection fails."""
PAUSE = 1.0
"""Seconds before the second try; they double before each further one."""


class VLLMServer(VLLMEngine):
    """A vLLM server, on this machine or another one that reads the same files. Needs no vLLM here.

    Start it with the initial model, the development endpoints, and log-probabilities of what is sampled from:

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

    For LoRA, add `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` before and `--enable-lora --max-lora-rank RANK` after it. MODEL
    may be any of the same architecture and tokenizer: its weights are replaced. The server serves one run at a time,
    and should be reachable by nobody else: its development endpoints are not protected. Rank 0 sends the weights, as a
    folder that the server reads; all ranks sample. A server that was restarted between two updates gets the weights
    again; one that is restarted while it samples ends the run.

    Args:
        url: Where it listens.
        folder: Where weights are written for it to read, and removed afterwards; the system's temporary folder when
            left out.
        merge: See `VLLMEngine`.
        timeout: Seconds to wait for an answer.
        requests: Most completions that a rank asks for at a time.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        folder: str | None = None,
        merge: bool = False,
        timeout: float = 600.0,
        requests: int = 128,
    ) -> None:
        super().__init__(merge)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"data.engine.url is {url!r}, but has to be as http://127.0.0.1:8000")
        for name, value in (("timeout", timeout), ("requests", requests)):
            if not value > 0:
                raise UserError(f"data.engine.{name} is {value}, but has to be above 0")
        self.url, self.folder, self.timeout, self.requests = url.rstrip("/"), folder, timeout, requests
        self._base = ""
        """The server's name of its model."""
        self._model = ""
        """That of what is sampled from: the model or an adapter."""
        self._instance: str | None = None
        """vLLM's random name of the server's process."""

    def synchronise(self, policy: Any) -> None:
        """Sends the policy's weights from rank 0, unless the server has them already.

        Raises:
            UserError: on all ranks, if it fails; rank 0 raises any other error as it is.
        """
        error: Exception | None = None
        message = None
        if policy.trainer.is_global_zero:
            try:
                self._forget_if_restarted()
                super().synchronise(policy)
            except Exception as failure:  # of any kind, since the other ranks wait
                error, message = failure, str(failure)
                if not isinstance(failure, UserError):
                    message = f"data.engine: rank 0 failed, see its output: {type(failure).__name__}: {failure}"
        state = message, self.synchronised, self._model, self._instance
        message, self.synchronised, self._model, self._instance = policy.trainer.strategy.broadcast(state)
        if error is not None:
            raise error
        if message is not None:
            raise UserError(message)

    def _forget_if_restarted(self) -> None:
        """Forgets which weights the server has if it is a new process, which begins with those of its start."""
        if self._instance is not None and self._instance_now() != self._instance:
            self._base, self.synchronised, self._instance = "", None, None

    def _instance_now(self) -> str:
        return str(self._config(TRIES)["instance_id"])

    def connect(self, policy: Any, is_adapter: bool) -> bool:
        """See `VLLMEngine`.

        Raises:
            UserError: the server can't be reached, or was started without what it needs.
        """
        if not self._base:
            self._base = self._model = self._checked(policy, is_adapter)
        return False

    def replace_weights(self, policy: Any, weights: Mapping[str, Tensor]) -> None:
        """See `VLLMEngine`; as a folder that the server reads."""
        with temporary_folder(self.folder) as folder:
            write_weights(weights, Path(folder))
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})

    def replace_adapter(self, policy: Any, name: str) -> None:
        """See `VLLMEngine`; as a folder that the server reads."""
        name, written = f"{ADAPTER}{name}", written_adapter(policy, self.folder)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": written.name})
        if self._model != self._base:
            self._post("/v1/unload_lora_adapter", {"lora_name": self._model})
        self._model, self._written = name, written

    def _checked(self, policy: Any, is_adapter: bool) -> str:
        """The name of the server's model, after a look at its settings."""
        config = self._config()
        try:
            mode = config["model_config"]["logprobs_mode"]
            is_cpu = config["device_config"]["device"] == "cpu"
            splits_prompts = config["scheduler_config"]["enable_chunked_prefill"]
            max_rank = (config.get("lora_config") or {"max_lora_rank": 0})["max_lora_rank"]
            instance = str(config["instance_id"])
        except (KeyError, TypeError):
            raise self._is_another_server() from None
        if mode != LOGPROBS_MODE:
            raise UserError(f"data.engine: {self.url} returns {mode}; start it with --logprobs-mode {LOGPROBS_MODE}")
        if is_cpu and is_tied(policy) and not is_adapter:
            raise UserError(
                f"data.engine: {self.url} runs on CPUs, where vLLM can't replace the weight of a head that is the "
                "embedding's; take VLLM, or untie them (model.config.tie_word_embeddings: false)"
            )
        if is_cpu and splits_prompts:
            raise UserError(
                f"data.engine: {self.url} runs on CPUs, where vLLM fails if it splits a prompt whose completion has a "
                "seed; start it with --no-enable-chunked-prefill"
            )
        if is_adapter:
            rank = rank_of(policy.causal_lm.hf)
            if max_rank < rank:
                raise UserError(
                    f"data.engine: {self.url} can't apply adapters of rank {rank}; start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank "
                    f"{adapter_options(rank)['max_lora_rank']}, or set merge: true"
                )
        base, *adapters = [model["id"] for model in self._json("GET", "/v1/models")["data"]]
        for name in adapters:  # of a run that was killed
            if name.startswith(ADAPTER):
                self._post("/v1/unload_lora_adapter", {"lora_name": name})
        self._instance = instance
        return str(base)

    def _config(self, tries: int = 1) -> Any:
        """The server's settings."""
        try:
            return self._json("GET", "/server_info?config_format=json", tries=tries)["vllm_config"]
        except (KeyError, TypeError):
            raise self._is_another_server() from None

    def _is_another_server(self) -> UserError:
        return UserError(f"data.engine.url: {self.url} is no vLLM server of version 0.32 or later")

    def complete(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Output]:
        """See `VLLMEngine`; one request for each completion, since a request has one seed.

        Raises:
            UserError: the server fails, or was restarted, so that some completions may be of other weights.
        """
        with ThreadPoolExecutor(min(self.requests, len(prompts))) as pool:
            outputs = list(pool.map(self._complete, prompts, params))
        if self._instance_now() != self._instance:
            raise UserError(
                f"data.engine: the vLLM server at {self.url} was restarted while it sampled, and has no longer the "
                "policy's weights; continue from the last checkpoint"
            )
        return outputs

    def _complete(self, prompt: Sequence[int], params: Mapping[str, Any]) -> Output:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "add_special_tokens": False,
            "return_token_ids": True,
            "cache_salt": self.synchronised,
            **params,
        }
        (choice,) = self._json("POST", COMPLETIONS, json.dumps(body), TRIES)["choices"]
        return Output(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        self._ask("POST", path, json.dumps(body))

    def _json(self, method: str, path: str, body: str | None = None, tries: int = 1) -> Any:
        content = self._ask(method, path, body, tries)
        try:
            return json.loads(content)
        except ValueError:
            raise self._is_another_server() from None

    def _ask(self, method: str, path: str, body: str | None = None, tries: int = 1) -> bytes:
        """The server's answer.

        Args:
            method: Of HTTP.
            path: Below the server's address.
            body: What is sent.
            tries: How often, if the connection fails; more than once only if the request changes nothing.

        Raises:
            UserError: it does not answer, or refuses the request.
        """
        try:
            for number in range(tries - 1):
                try:
                    return self._answer(method, path, body)
                except (ConnectionError, http.client.IncompleteRead):
                    time.sleep(PAUSE * 2**number)
            return self._answer(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"data.engine.url: the vLLM server at {self.url} does not answer: {reason(error)}; start it with "
                "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
            ) from error

    def _answer(self, method: str, path: str, body: str | None) -> bytes:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            connection.request(method, parts.path + path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        text = content.decode(errors="replace")[:500]
        if response.status == http.HTTPStatus.NOT_FOUND and path != COMPLETIONS:
            raise UserError(
                f"data.engine: the vLLM server at {self.url} has no {path.partition('?')[0]}; start it with "
                f"VLLM_SERVER_DEV_MODE=1, and for LoRA VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. It answers: {text}"
            )
        if response.status >= http.HTTPStatus.BAD_REQUEST:
            raise UserError(f"data.engine: the vLLM server at {self.url} refused {path}: {response.status} {text}")
        return content
