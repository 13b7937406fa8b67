"""References of a policy: which model it is, how it is prepared, and the check that training starts from it.

Any trainer type may have one: set `self.reference = Reference(self, ...)` in its constructor, and call
`self.reference.logps(batch, split)`. A reference is not a submodule: it is in no checkpoint and no optimizer, and never
in training mode.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from oumi_pl.attention import NAME
from oumi_pl.errors import UserError
from oumi_pl.models.build import DType, build_model
from oumi_pl.models.fingerprint import model_fingerprint, weights_fingerprint
from oumi_pl.models.hub import locate
from oumi_pl.models.lm import LM, States, disable_dropout, with_layout
from oumi_pl.models.sharding import data_ranks, reshard, whole
from oumi_pl.runs.checkpoints import sharded_as
from oumi_pl.terminal.screen import track
from oumi_pl.types import Batch, RunModule

WORDS = ("initial", "online", "none")
"""Values of `reference` besides the name of a model."""
EQUAL_LOGPS = {True: 5e-2, False: 1e-5}
"""Half precision or not -> largest difference of a token's log-probability, in nats, in two runs of one model."""
CACHED_LOGPS = {True: 2e-1, False: 1e-3}
"""The same for cached values, which were computed in batches of other examples."""


class Reference:
    """The reference of a module. The module calls its hooks; a trainer type only asks for `logps`.

    Args:
        module: The module that it belongs to.
        name: `initial`: the model at the start of training; `online`: the same, as a frozen copy in memory;
            `none`; or a hub id or directory of another model.
        dtype: Of a frozen copy or another model; that of the policy when left out.
        sync_every: Optimizer steps after which the reference moves towards the policy; keeps a copy in memory.
        mixup: How far it moves, from 0 to 1.
        share_prompt: Whether another model may compute shared tokens once.
        needed: Whether the loss uses a reference.
        user: Name of the loss, for messages.

    Raises:
        UserError: the arguments contradict each other or the loss.
    """

    role: ClassVar[str] = "reference"
    """What it is called in messages."""

    def __init__(
        self,
        module: RunModule,
        name: str = "initial",
        dtype: DType | None = None,
        sync_every: int | None = None,
        mixup: float = 0.6,
        *,
        share_prompt: bool = True,
        needed: bool = True,
        user: str = "this loss",
    ) -> None:
        if not isinstance(name, str):
            raise UserError(
                f"model.reference is a {type(name).__name__}; name a model or a folder (`save_pretrained` writes one), "
                "or say initial, online or none"
            )
        self.name = name
        self.dtype = dtype
        self.sync_every = sync_every
        self.mixup = mixup
        self.description = ""
        """A line for `notes`."""
        self._module = module
        self._share_prompt = share_prompt
        self._user = user
        self._check(needed)
        self.kind = self._kind(needed)
        """`none`, `adapters` (the base with its adapters disabled), `online` or `precomputed`."""
        self.opened: Opened | None = None
        """Computes or reads the log-probabilities; None until `open` is called."""
        self.sharded_copy: LM | None = None
        """A frozen copy of the initial model that is sharded as the policy is, in runs that shard it."""
        self._kept: LM | None = None
        self._fingerprint: str | None = None
        self._moved: dict[str, Tensor] | None = None

    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Log-probability of each target under the reference, `[targets]` float32, without gradient.

        Args:
            batch: A batch of examples of the split.
            split: `train`, `validation` or `test`.
            compute: Computes other values from the reference's hidden states, such as log-probabilities at a
                temperature; for references that run a model, not for those that were computed before training.
        """
        assert self.opened is not None
        return self.opened.logps(batch, split, compute).float()

    @property
    def is_initial(self) -> bool:
        """Whether policy and reference are equal before the first update."""
        return self.kind != "none" and self.name in WORDS

    @property
    def frozen_model(self) -> LM | None:
        """The copy or other model in memory; None if the reference has none."""
        return self.opened.model if isinstance(self.opened, FrozenModel) else None

    # ---- arguments

    def _check(self, needed: bool) -> None:
        if self.sync_every is not None:
            if self.sync_every < 1:
                raise UserError(f"model.sync_every is {self.sync_every}, but has to be at least 1 optimizer step")
            if not 0 < self.mixup <= 1:
                raise UserError(f"model.mixup is {self.mixup}, but has to be above 0 and at most 1")
            if self.name not in ("initial", "online"):
                raise UserError(f"model.sync_every moves the reference, but model.reference is {self.name!r}")
        if (close := difflib.get_close_matches(self.name, WORDS, n=1, cutoff=0.7)) and self.name not in WORDS:
            raise UserError(f"model.reference: {self.name!r}; did you mean {close[0]!r}? (or the name of a model)")
        if self.name == "none" and needed:
            raise UserError(
                f"model.reference: none, but {self._user} compares with a reference; leave it out, or take a loss "
                "without one (SimPO, ORPO, CPO)"
            )
        if not needed:
            named = "reference" if self.name not in ("initial", "none") else ""
            asked = "sync_every" if self.sync_every is not None else named
            if asked:
                raise UserError(f"model.{asked}: {self._user} compares with no reference; leave it out")

    def _kind(self, needed: bool) -> str:
        if not needed:
            return "none"
        if self.name == "online" or self.sync_every is not None:
            return "online"
        if self.name != "initial":
            return "precomputed"
        if self.dtype is not None:
            raise UserError("model.reference_dtype: the initial model is the policy itself; set reference: online")
        # PEFT trains biases in the base itself, so disabling the adapters would not restore them
        lora = self._module.lora
        return "adapters" if lora is not None and lora.get("bias", "none") == "none" else "precomputed"

    @property
    def _is_policy_on_disk(self) -> bool:
        """Whether the reference is the initial policy's own log-probabilities, kept in the cache."""
        return self.kind == "precomputed" and self.name == "initial"

    # ---- before the first update

    def remember(self, model: LM) -> None:
        """Keeps a copy or a fingerprint of the initial model, before a checkpoint is restored into it."""
        if self.kind == "online" and self.sharded_copy is None:
            self._kept = deepcopy(model)
        if self.kind == "online" or self._is_policy_on_disk:
            self._fingerprint = weights_fingerprint(model)

    def covers(self, splits: tuple[str, ...]) -> bool:
        """Whether `open` was called for those of these splits that have rows."""
        if not isinstance(self.opened, Precomputed):
            return self.opened is not None
        data = self._module.trainer.datamodule
        return all(split in self.opened.stores or data.sources[split] is None for split in splits)

    def open(self, splits: tuple[str, ...], *, in_memory: bool = False) -> None:
        """Prepares the reference for the examples of these splits; computes what is missing in the cache.

        Args:
            splits: `train`, `validation` or `test`.
            in_memory: Keep the initial model as a frozen copy (`frozen_model`) instead of precomputing its
                log-probabilities, for engines that run the reference themselves. Call it before the first update.

        Raises:
            UserError: log-probabilities of the initial model are missing, but it has been trained since.
        """
        if self.kind == "none":
            self.opened, self.description = NoReference(), f"no reference: {self._user} needs none"
        elif self.kind == "adapters":
            self.opened = WithoutAdapters(self._module.causal_lm)
            self.description = "reference: the base model, adapters disabled"
        elif self.kind == "online" or in_memory:
            opened = FrozenModel(self.sharded_copy or self._placed(self._kept or deepcopy(self._module.causal_lm)))
            if self._moved:
                own = opened.model.state_dict()
                moved = {name: sharded_as(value, own[name]) for name, value in self._moved.items()}
                opened.model.load_state_dict(moved, strict=False)
            self.opened = opened
            moving = f", moved by {self.mixup:g} every {self.sync_every} steps" if self.sync_every else ""
            self.description = f"reference: a frozen copy of the initial model{moving}"
        else:
            self._open_precomputed(splits)
        self._kept = self._moved = None

    def _open_precomputed(self, splits: tuple[str, ...]) -> None:
        module, trainer = self._module, self._module.trainer
        data = trainer.datamodule
        parts: dict[str, Any] = {"precision": str(trainer.precision), "dtype": self.dtype or module.dtype_name}
        parts["model"] = self._fingerprint or model_fingerprint(self.name, "model.reference")
        if self.name == "initial":  # `model.config` changes what the same weights compute
            values = module.causal_lm.base.config.to_dict()  # the left out ones say where the model came from
            parts["config"] = {k: v for k, v in values.items() if k[0] != "_" and k != "transformers_version"}
        stores = {split: data.reference_logps(split, parts) for split in splits if data.sources[split] is not None}
        missing = trainer.strategy.broadcast(any(store.missing() for store in stores.values()))
        if missing:
            if self.opened is not None and self._is_policy_on_disk and module.tokens_seen["tokens"]:
                raise UserError(
                    f"the reference of {', '.join(stores)} can't be computed: the initial model has been trained "
                    "since; use a new module, and the checkpoint as ckpt_path"
                )
            model = self._model()
            for split, store in stores.items():
                precompute(trainer, model, split, store)
        self.opened = Precomputed((self.opened.stores if isinstance(self.opened, Precomputed) else {}) | stores)
        of = "the initial model" if self.name == "initial" else self.name
        self.description = f"reference: {of}, {'computed before training' if missing else 'from the cache'}"

    def _model(self) -> LM:
        """The model whose log-probabilities are missing.

        Raises:
            UserError: another model than the policy, with another vocabulary.
        """
        if self.name == "initial":
            return self._module.causal_lm if self._kept is None else self._placed(self._kept)
        model = other_model(self._module, self.name, self.dtype, share_prompt=self._share_prompt)
        return self._placed(model)

    def _placed(self, model: LM) -> LM:
        """Casts a model to the dtype of the reference and moves it to the device."""
        if self.dtype not in (None, "auto"):
            model = model.to(getattr(torch, str(self.dtype)))
        else:
            model = self._module.trainer.precision_plugin.convert_module(model)
        return model.to(self._module.device)

    # ---- before the first step

    @torch.no_grad()
    def check_start(self, batch: Batch) -> None:
        """Checks on the first batch that policy and reference are equal.

        Raises:
            UserError: the log-probabilities of policy and reference differ by more than rounding.
        """
        if not self.is_initial:
            return
        policy = self._module.causal_lm
        logps, reference = policy(batch), self.logps(batch, "train")
        # cached values were computed in other batches: compare strictly with the policy in evaluation mode instead
        online = reference
        if self.kind == "precomputed":  # on a rank without rows too: all ranks have to gather sharded weights
            policy.eval()
            online = policy(batch)
            policy.train()
        if not len(logps):
            return
        refuse_other_start(float((logps - online).abs().max()), half := self.is_half_precision)
        cached = float((reference - online).abs().max())
        if cached > CACHED_LOGPS[half]:
            rank_zero_warn(
                f"cached log-probabilities of the reference differ by up to {cached:.2g} nats per token from what "
                "the same model gives now; has the precision or the hardware changed?"
            )

    @property
    def is_half_precision(self) -> bool:
        """Whether policy or reference compute in 16 bits or less."""
        module = self._module
        dtypes = (self.dtype, module.trainer.precision, *(p.dtype for p in module.causal_lm.parameters()))
        return bool(module.fp8) or any("16" in str(dtype) for dtype in dtypes)

    # ---- training and checkpoints

    def after_step(self, step: int) -> None:
        """Moves the reference if this optimizer step is a multiple of `sync_every`."""
        if self.sync_every is not None and step % self.sync_every == 0 and isinstance(self.opened, FrozenModel):
            self.opened.move_towards(self._module.causal_lm, self.mixup)

    def state(self) -> dict[str, Any]:
        """State for a resume: the fingerprint of the initial weights, and the weights of a reference that moves."""
        state: dict[str, Any] = {"fingerprint": self._fingerprint}
        if self.sync_every is not None and isinstance(self.opened, FrozenModel):
            trained = {name for name, p in self._module.causal_lm.named_parameters() if p.requires_grad}
            state["moved"] = {k: whole(v) for k, v in self.opened.model.state_dict().items() if k in trained}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the state returned by `state`.

        Raises:
            UserError: the model on disk is not the one that training started from.
        """
        self._moved = state.get("moved")
        if self._is_policy_on_disk and self.opened is None:
            self._kept = deepcopy(self._module.causal_lm)  # before the checkpoint's weights are loaded into the policy
        saved = state.get("fingerprint")
        if saved is not None and self._fingerprint is not None and saved != self._fingerprint:
            raise UserError(
                "the model that training started from has changed since, and the reference with it: "
                f"{self._module.model_name or 'random initialisation'} gives other weights now"
            )


def refuse_other_start(difference: float, half: bool) -> None:
    """Refuses a run whose policy differs from its reference before the first update.

    Args:
        difference: Largest difference of a token's log-probability, in nats.
        half: Whether the models compute in 16 bits.

    Raises:
        UserError: it is larger than rounding can explain.
    """
    if not difference <= EQUAL_LOGPS[half]:
        raise UserError(
            f"before the first update the policy has to equal its reference, but log-probabilities differ by up to "
            f"{difference:.2g} nats per token: dropout is still active in the model, or an adapter doesn't start at "
            "zero (model.lora.init_lora_weights)"
        )


# ---- sources of log-probabilities


class Opened(ABC):
    """A reference that was opened."""

    @abstractmethod
    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Log-probabilities `[targets]` of a batch of examples of a split, without gradient."""


class NoReference(Opened):
    """Zeros, for losses that need no reference."""

    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Zeros."""
        return torch.zeros(len(batch["targets"]), device=batch["targets"].device)


class WithoutAdapters(Opened):
    """The policy itself with its adapters disabled, which needs no additional memory."""

    def __init__(self, policy: LM) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Runs the base model."""
        with self.policy.hf.disable_adapter():
            return self.policy(batch, compute)


class FrozenModel(Opened):
    """A copy of the initial policy, kept in memory."""

    def __init__(self, model: LM) -> None:
        self.model: LM = model.eval().requires_grad_(False)

    @torch.no_grad()
    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Runs the model."""
        return self.model(batch, compute)

    @torch.no_grad()
    def move_towards(self, policy: LM, share: float) -> None:
        """Sets the weights to `(1 - share) reference + share policy` (Gorbatovski et al. 2024, arXiv:2404.09656)."""
        for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            if theirs.requires_grad:  # frozen weights are equal
                mine.lerp_(theirs.to(mine), share)


class Precomputed(Opened):
    """Log-probabilities that were computed before training and are read from disk: needs no second model.

    Args:
        stores: split -> its `oumi_pl.data.reference.ReferenceLogps`.
    """

    def __init__(self, stores: dict[str, Any]) -> None:
        self.stores = stores

    def logps(self, batch: Batch, split: str, compute: Callable[[States], Tensor] = States.logps) -> Tensor:
        """Reads those of the batch's examples."""
        values = torch.from_numpy(self.stores[split].logps(batch["sample_ids"]))
        return values.to(batch["targets"].device, non_blocking=True)


class OtherModel:
    """A frozen model beside policy and reference: a teacher, a judge, a third policy.

    It is no submodule: it is in no checkpoint and no optimizer, and in evaluation mode. It is loaded when it is first
    called, so that a constructor may create it: `self.teacher = OtherModel(self, "org/name")`. It has to read the same
    tokens as the policy.

    Args:
        module: The module that uses it.
        name: Hub id or directory.
        dtype: Of its weights; that of the policy when left out.
    """

    def __init__(self, module: RunModule, name: str, dtype: DType | None = None) -> None:
        self.name = name
        self.dtype = dtype
        self._module = module
        self._model: LM | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, compute: Callable[[States], Any] = States.logps) -> Any:
        """Runs it on a batch, like `module.causal_lm`: log-probabilities of the targets, or what `compute` returns."""
        if self._model is None:
            model = other_model(self._module, self.name, self.dtype).eval().requires_grad_(False)
            if self.dtype in (None, "auto"):
                model = self._module.trainer.precision_plugin.convert_module(model)
            self._model = model.to(self._module.device)
        return self._model(batch, compute)


def other_model(module: RunModule, name: str, dtype: DType | None = None, *, share_prompt: bool = True) -> LM:
    """Loads another model for the batches of a module's run, without dropout, on the CPU.

    Raises:
        UserError: it can't be loaded, or has another vocabulary.
    """
    data = module.trainer.datamodule
    _refuse_other_vocabulary(name, data.tokenizer)

    def build(packed: bool) -> Any:
        return build_model(
            name,
            tokenizer=data.tokenizer,
            added_tokens=data.added_tokens,
            dtype=dtype or module.weights_dtype,
            attn=NAME if packed else None,
            trust_remote_code=module.trust_remote_code,
        )

    model = with_layout(build, data.branching and share_prompt)
    disable_dropout(model)
    model.keep_dtypes(cast("Tensor", model.head.weight).dtype)
    return model


# ---- precomputing


def precompute(
    trainer: Any,
    model: LM,
    split: str,
    store: Any,
    *,
    compute: Callable[[States], Tensor] = States.logps,
    what: str = "reference log-probabilities",
) -> None:
    """Computes the missing chunks of a store, divided among the ranks.

    Args:
        trainer: The run's.
        model: The reference.
        split: The split of the examples.
        store: The `oumi_pl.data.reference.ReferenceLogps` to fill.
        compute: From hidden states to the values of the targets, `[targets]` or `[targets, width]`.
        what: The name of the values, for the progress line.

    Raises:
        UserError: the ranks do not see each other's files.
    """
    missing = trainer.strategy.broadcast(store.missing())
    training = model.training
    model.eval()
    try:
        batches = _computed(trainer, model, split, store, missing, compute=compute)
        if trainer.is_global_zero and missing:
            total = sum(len(store.examples(chunk)) for chunk in missing) // data_ranks(trainer).number
            batches = track(batches, f"{what}, {split}", total=total, unit="rows", size=len)
        for _ in batches:
            pass
    finally:
        model.train(training)
        reshard(model)  # what looks at the weights before the first update sees this rank's, not gathered copies
    trainer.strategy.barrier("reference computed")
    if lacking := store.missing():
        raise UserError(
            f"the log-probabilities of {len(lacking)} chunks are not in {store.directory}: the ranks write to "
            "different disks; set OUMI_PL_CACHE to a directory that they share"
        )


def _computed(
    trainer: Any, model: LM, split: str, store: Any, missing: list[int], *, compute: Callable[[States], Tensor]
) -> Iterator[list[int]]:
    """Computes this rank's share of the missing chunks, and yields the example ids of each finished batch.

    Every rank runs the model equally often, because all ranks have to gather sharded weights.
    """
    reading = data_ranks(trainer)
    ranks, rank = reading.number, reading.index
    for first in range(0, len(missing), ranks):
        chunks = missing[first : first + ranks]
        plans = [trainer.datamodule.in_batches(split, store.examples(chunk)) for chunk in chunks]
        mine = plans[rank] if rank < len(plans) else []
        logps: dict[int, np.ndarray] = {}
        for step in range(max(map(len, plans))):
            ids = mine[step] if step < len(mine) else []
            logps |= _logps(trainer, model, split, ids, compute)
            yield ids
        if mine:
            store.write(chunks[rank], np.concatenate([logps[i] for i in store.examples(chunks[rank])]))


@torch.no_grad()
def _logps(
    trainer: Any, model: LM, split: str, ids: list[int], compute: Callable[[States], Tensor]
) -> dict[int, np.ndarray]:
    """The values of each example's targets."""
    data = trainer.datamodule
    batch = trainer.strategy.batch_to_device(data.batch(split, ids))
    with trainer.precision_plugin.forward_context():
        logps = model(batch, compute)
    counts = [data.examples(split)[i].target_tokens for i in ids]
    pieces = cast("Any", logps.float().cpu()).split(counts) if ids else []
    return {i: piece.numpy() for i, piece in zip(ids, pieces, strict=True)}


def _refuse_other_vocabulary(name: str, tokenizer: Any) -> None:
    """Refuses a reference whose tokenizer has other ids than the data's; does nothing if it comes without tokenizer."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(locate(name, "model.reference")).get_vocab()
    except (OSError, ValueError):
        return
    ours = tokenizer.get_vocab()
    other = [token for token, index in theirs.items() if token in ours and ours[token] != index]
    if other or not set(theirs) & set(ours):
        raise UserError(
            f"model.reference: {name} has another vocabulary than the data's tokenizer"
            + (f" ({other[0]!r} is {theirs[other[0]]} there and {ours[other[0]]} here)" if other else "")
            + "; a reference has to read the same tokens"
        )
