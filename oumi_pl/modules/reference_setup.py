"""Which reference a policy gets, how it is made ready, and whether training starts where it should."""

import difflib
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from oumi_pl.attention import NAME
from oumi_pl.errors import UserError
from oumi_pl.models.build import DType, build_model
from oumi_pl.models.fingerprint import model_fingerprint, weights_fingerprint
from oumi_pl.models.hub import locate
from oumi_pl.models.preference import PreferenceLM, with_layout
from oumi_pl.modules.reference import FrozenModel, NoReference, Precomputed, Reference, WithoutAdapters, precompute
from oumi_pl.types import Pairs, PreferenceBatch

if TYPE_CHECKING:
    from oumi_pl.modules.dpo import DPO

WORDS = ("initial", "online", "none")
"""What `reference` may say besides the name of a model."""
EQUAL = {True: 5e-2, False: 1e-5}
"""Half precision or not -> nats by which a token's log-probability may differ between two runs of the same model."""
CACHED = {True: 2e-1, False: 1e-3}
"""The same between batches of other examples, as the cache was made from."""


class ReferenceSetup:
    """Decides on the reference of a DPO run and keeps what it needs; arguments as of `DPO`.

    Raises:
        UserError: the arguments contradict each other or the loss.
    """

    def __init__(
        self, module: "DPO", reference: str, dtype: DType | None, sync_every: int | None, mixup: float
    ) -> None:
        self.module = module
        self.name = reference
        self.dtype = dtype
        self.sync_every = sync_every
        self.mixup = mixup
        self.opened: Reference | None = None
        self.description = ""
        self.kind = self._kind()
        self._held: PreferenceLM | None = None
        self._fingerprint: str | None = None
        self._moved: dict[str, Tensor] | None = None

    def _kind(self) -> str:
        loss = self.module.loss
        if self.sync_every is not None:
            if self.sync_every < 1:
                raise UserError(f"model.sync_every is {self.sync_every}, but has to be at least 1 optimizer step")
            if not 0 < self.mixup <= 1:
                raise UserError(f"model.mixup is {self.mixup}, but lies above 0 and at most at 1")
            if self.name not in ("initial", "online"):
                raise UserError(f"model.sync_every moves the reference, and model.reference is {self.name!r}: drop one")
        if (close := difflib.get_close_matches(self.name, WORDS, n=1, cutoff=0.7)) and self.name not in WORDS:
            raise UserError(f"model.reference: {self.name!r}; did you mean {close[0]!r}? (or the name of a model)")
        if self.name == "none" and loss.needs_reference:
            raise UserError(
                f"model.reference: none, but {type(loss).__name__} compares with a reference; leave it out, or take a "
                "loss without one (SimPO, ORPO, CPO)"
            )
        if not loss.needs_reference:
            named = "reference" if self.name not in ("initial", "none") else ""
            asked = "sync_every" if self.sync_every is not None else named
            if asked:
                raise UserError(f"model.{asked}: {type(loss).__name__} compares with no reference; leave it out")
            return "none"
        if self.name == "online" or self.sync_every is not None:
            return "online"
        # biases are trained in the base itself, where disabling adapters does not undo it
        bias = (self.module.lora or {}).get("bias", "none")
        if self.name != "initial":
            return "precomputed"
        if self.dtype is not None:
            raise UserError("model.reference_dtype: the initial model is the policy itself; set reference: online")
        return "adapters" if self.module.lora is not None and bias == "none" else "precomputed"

    @property
    def is_initial(self) -> bool:
        """Whether policy and reference are equal before the first update."""
        return self.kind != "none" and self.name in WORDS

    @property
    def _is_policy_on_disk(self) -> bool:
        """Whether the reference is what the policy itself says before the first update, kept in the cache."""
        return self.kind == "precomputed" and self.name == "initial"

    # ---- before the first update

    def remember(self, model: PreferenceLM) -> None:
        """Takes note of the model before a checkpoint is restored into it."""
        if self.kind == "online":
            self._held = deepcopy(model)
        if self.kind == "online" or self._is_policy_on_disk:
            self._fingerprint = weights_fingerprint(model)

    def covers(self, splits: tuple[str, ...]) -> bool:
        """Whether the reference is ready for the pairs of these splits, as far as there are any."""
        if not isinstance(self.opened, Precomputed):
            return self.opened is not None
        data: Any = self.module.trainer.datamodule  # type: ignore[attr-defined]
        return all(split in self.opened.stores or data.sources[split] is None for split in splits)

    def open(self, splits: tuple[str, ...]) -> None:
        """Makes the reference ready for the pairs of these splits, computing what the cache lacks.

        Raises:
            UserError: log-probabilities of the initial model are missing, and it has been trained since.
        """
        if self.kind == "none":
            self.opened, self.description = NoReference(), f"no reference: {type(self.module.loss).__name__} needs none"
        elif self.kind == "adapters":
            self.opened = WithoutAdapters(self.module.policy)
            self.description = "reference: the base model, adapters disabled"
        elif self.kind == "online":
            assert self._held is not None
            if self.module._is_sharded:
                raise UserError("model.reference: a frozen copy is not sharded; set reference: initial")
            self.opened = FrozenModel(self._placed(self._held))
            if self._moved:
                self.opened.model.load_state_dict(self._moved, strict=False)
            moving = f", moved by {self.mixup:g} every {self.sync_every} steps" if self.sync_every else ""
            self.description = f"reference: a frozen copy of the initial model{moving}"
        else:
            self._open_precomputed(splits)
        self._held = self._moved = None

    def _open_precomputed(self, splits: tuple[str, ...]) -> None:
        trainer: Any = self.module.trainer
        data = trainer.datamodule
        parts: dict[str, Any] = {"model": self._model_fingerprint(), "precision": str(trainer.precision)}
        parts |= {"dtype": self.dtype or self.module.dtype_name}
        if self.name == "initial":  # model.config changes what the same weights say
            parts["config"] = _settings(self.module.policy)
        stores = {split: data.reference_logps(split, parts) for split in splits if data.sources[split] is not None}
        missing = trainer.strategy.broadcast(any(store.missing() for store in stores.values()))
        if missing:
            if self.opened is not None and self._is_policy_on_disk and self.module.tokens_seen["tokens"]:
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

    def _model_fingerprint(self) -> str:
        if self.name == "initial":
            assert self._fingerprint is not None
            return self._fingerprint
        return model_fingerprint(self.name, "model.reference")

    def _model(self) -> PreferenceLM:
        """The model whose log-probabilities are missing."""
        if self.name != "initial":
            return self._placed(self._named())
        return self.module.policy if self._held is None else self._placed(self._held)

    def _named(self) -> PreferenceLM:
        """Another model.

        Raises:
            UserError: it has another vocabulary.
        """
        data: Any = self.module.trainer.datamodule  # type: ignore[attr-defined]
        _refuse_other_vocabulary(self.name, data.tokenizer)
        dtype, trusted = self.dtype or self.module.dtype_name, self.module.trust_remote_code

        def build(packed: bool) -> PreferenceLM:
            attn = NAME if packed else None
            hf = build_model(
                self.name,
                tokenizer=data.tokenizer,
                added_tokens=data.added_tokens,
                dtype=dtype,
                attn=attn,
                trust_remote_code=trusted,
            )
            return PreferenceLM(hf)

        return with_layout(build, self.module.share_prompt is not False)

    def _placed(self, model: PreferenceLM) -> PreferenceLM:
        if self.dtype not in (None, "auto"):
            model = model.to(getattr(torch, str(self.dtype)))
        else:
            model = self.module.trainer.precision_plugin.convert_module(model)  # type: ignore[assignment]
        return model.to(self.module.device)

    # ---- the law of the first step

    @torch.no_grad()
    def check_start(self, batch: PreferenceBatch, pairs: Pairs) -> None:
        """Checks on the first batch that policy and reference are equal, and the loss is what it then has to be.

        Raises:
            UserError: the same model gives other log-probabilities when it is run again as the reference.
        """
        if not self.is_initial:
            return
        policy, online = self.module.policy, pairs.ref_logps
        if self.kind == "precomputed":  # on a rank without rows too: sharded weights are gathered by all together
            policy.eval()
            online = policy(batch).logps
            policy.train()
        if not len(pairs.logps):
            return
        dtypes = {str(self.dtype), str(self.module.trainer.precision), *(str(p.dtype) for p in policy.parameters())}
        half = any("16" in dtype for dtype in dtypes)
        off = float((pairs.logps - online).abs().max())
        if not off <= EQUAL[half]:
            raise UserError(
                f"before the first update the policy has to equal its reference, but log-probabilities differ by up "
                f"to {off:.2g} nats per token: dropout is still active in the model, or an adapter doesn't start at "
                "zero (model.lora.init_lora_weights)"
            )
        loss = self.module.loss
        keeps_state = isinstance(loss, nn.Module) and next(loss.buffers(), None) is not None
        if loss.loss_at_start is not None and not keeps_state:
            equal = Pairs(pairs.logps, online, pairs.branches, pairs.count, pairs.margins)
            value, expected = float(loss(equal).mean()), loss.loss_at_start
            if abs(value - expected) > (1e-1 if half else 1e-4) * max(1.0, abs(expected)):
                raise UserError(
                    f"{type(loss).__name__} is {value:.6g} where policy and reference agree, not {expected:g}"
                )
        cached = float((pairs.ref_logps - online).abs().max())
        if cached > CACHED[half]:
            rank_zero_warn(
                f"cached log-probabilities of the reference differ by up to {cached:.2g} nats per token from what "
                "the same model gives now; has the precision or the hardware changed?"
            )

    # ---- later

    def after_step(self, step: int) -> None:
        """Moves the reference if this optimizer step is a multiple of `sync_every`."""
        if self.sync_every is not None and step % self.sync_every == 0 and isinstance(self.opened, FrozenModel):
            self.opened.move_towards(self.module.policy, self.mixup)

    def state(self) -> dict[str, Any]:
        """What a resume needs: which weights training started from, and those of a reference that moves."""
        state: dict[str, Any] = {"fingerprint": self._fingerprint}
        if self.sync_every is not None and isinstance(self.opened, FrozenModel):
            trained = {name for name, p in self.module.policy.named_parameters() if p.requires_grad}
            state["moved"] = {k: v for k, v in self.opened.model.state_dict().items() if k in trained}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            UserError: the model on disk is another than the one that training started from.
        """
        self._moved = state.get("moved")
        if self._is_policy_on_disk and self.opened is None:
            self._held = deepcopy(self.module.policy)  # the checkpoint's weights are about to take its place
        saved = state.get("fingerprint")
        if saved is not None and self._fingerprint is not None and saved != self._fingerprint:
            raise UserError(
                "the model that training started from has changed since, and the reference with it: "
                f"{self.module.model_name or 'its random weights'} gives other weights now"
            )


def _settings(model: PreferenceLM) -> dict[str, Any]:
    """The config of a model, without what says where it came from."""
    return {k: v for k, v in model.base.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}


def _refuse_other_vocabulary(name: str, tokenizer: Any) -> None:
    """Compares the tokenizer beside a reference with that of the data; a folder without one says nothing."""
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
