"""Warns of likely mistakes. A warning says what was seen, why it matters and what to change, once per run.

Settings are checked before the first update; waiting for data, the loss and the rewards are watched during training.
`run.json` keeps all warnings under `warnings`.
"""

import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW

from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.report.environment import usable_cpus
from oumi_pl.runs import folders
from oumi_pl.types import RunData, RunModule

CUT_SHARE = 0.01
"""A larger share of rows cut to length is more than a few outliers."""
SAMPLED_VALUES = 65536
"""How many values of each tensor are sampled to estimate the share that a step would change."""
SMALL = 50_000_000
"""Models with fewer parameters than this are trained at higher learning rates than the published, larger ones."""
SMALL_FACTOR = 10.0
"""How much higher: the best learning rate is roughly inverse to the width (Yang et al. 2022, arXiv:2203.03466)."""
USUAL_LR = {
    ("alone", "scratch"): (1e-5, 2e-2),
    ("alone", "full"): (1e-6, 1e-3),
    ("alone", "lora"): (1e-5, 5e-3),
    ("reference", "scratch"): (1e-6, 1e-2),
    ("reference", "full"): (5e-8, 5e-5),
    ("reference", "lora"): (5e-7, 5e-4),
}
"""(With a reference model or alone, what is trained) -> lowest and highest usual learning rate of Adam.

Nearly all published runs are within this range. Adapters take about ten times the rate of all weights (Schulman et al.
2025, "LoRA Without Regret"); preference training a tenth to a hundredth of fine-tuning's (5e-7 in Tunstall et al. 2023,
arXiv:2310.16944)."""
KINDS = {"scratch": "a model from random weights", "full": "all weights of a pretrained model", "lora": "LoRA"}
WAIT_WINDOW = 50
"""Updates over which waiting for data is measured: a single slow batch is no evidence."""
WAIT_FIRST = 10
"""Updates ignored at the start, while the loader processes start up."""
WAIT_SHARE = 0.15
"""More loader processes are worth their memory if a larger share of the time is spent waiting."""
WAIT_SECONDS = 0.005
"""Seconds. More processes do not help below this wait per update: handing over a batch takes as long."""
STUCK_AFTER = 100
"""The loss is judged after this many updates at no less than half of the peak learning rate."""
STUCK_PART = 20
"""The first and the last of these updates, this many of each, are compared."""
STUCK_SHARE = 0.01
"""A relative change of the loss that counts as movement, even if it is within the noise."""
RISEN_SHARE = 0.05
"""A relative rise of the loss that is more than a slow start."""
NOISE = 3.0
"""Two means that differ by fewer standard errors count as equal."""
NOT_FINITE = 10
"""Warn after this many updates in a row without a finite loss. A gradient scaler finds its scale in fewer."""


def warn(trainer: Any, message: str) -> None:
    """Warns on rank 0, and adds the message to `run.json`."""
    if getattr(rank_zero_only, "rank", 0):
        return
    caller = sys._getframe(1)
    # `warnings.warn` keeps a registry and would show a text once per process, so not in the next run of this process
    warnings.warn_explicit(message, UserWarning, caller.f_code.co_filename, caller.f_lineno)
    directory = run_directory(trainer)
    if directory is not None:
        earlier = folders.read_state(directory).get("warnings", [])
        if message not in earlier:
            folders.write_state(directory, warnings=[*earlier, message])


class Advice(L.Callback):
    """Checks the settings of a run, then watches how long updates wait for data, and whether the loss moves."""

    def __init__(self) -> None:
        self.wait = Wait()
        self.loss = LossWatch()

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Checks the settings, and starts to watch."""
        for check in CHECKS:
            if message := check(trainer, pl_module):
                warn(trainer, message)
        for message in pl_module.doubts:
            warn(trainer, message)
        # the loss of a policy gradient does not measure progress
        self.loss.is_watching = trainer.global_step == 0 and not trainer.datamodule.samples
        self.loss.in_float16 = str(trainer.precision).startswith("16")
        self.wait.follow(trainer.fit_loop.epoch_loop)

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Starts timing the micro-batch."""
        self.wait.start_clock()

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Checks the update that has just ended."""
        self.wait.batch_ends()
        if trainer.fit_loop._should_accumulate():
            return
        if (times := self.wait.update_ends()) and not trainer.datamodule.samples:
            warn(trainer, _starved(*times, trainer.datamodule))
        sums, group = pl_module.last_update, trainer.optimizers[0].param_groups[0]
        loss = sums["loss"] / (pl_module.units(sums) or 1.0)
        if message := self.loss.update(loss, group["lr"], group.get("initial_lr", group["lr"])):
            warn(trainer, message)


# ---- checks of settings: each returns a warning, or None


def rounded_away(trainer: Any, module: RunModule) -> str | None:
    """Warns of half-precision weights that Adam updates in place, so that small steps are rounded away."""
    optimizer = trainer.optimizers[0]
    trained = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained or not isinstance(optimizer, Adam | AdamW):
        return None
    dtype = trained[0].dtype
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    # adding less than half the gap to the next number changes nothing, and that gap is at least |v| * eps / 2
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]  # sharded: this rank's part
    values = [p.detach().flatten()[:SAMPLED_VALUES].abs().float() for p in local]
    lost = sum(int((v * (torch.finfo(dtype).eps / 4) > lr).sum()) for v in values)
    share = lost / max(1, sum(len(v) for v in values))
    name = str(dtype).removeprefix("torch.")
    mixed = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
    return (
        f"the trained weights are {name}, and {type(optimizer).__name__} adds to them in {name}, which keeps "
        f"{8 if dtype == torch.bfloat16 else 11} bits: smaller steps are rounded away. At a learning rate of {lr:.2g}, "
        f"{share:.0%} of the weights are too large to be changed by a step. trainer.precision: {mixed} with "
        "model.dtype: float32 computes in half precision and keeps the weights in full; or train adapters (model.lora)"
    )


def unusual_lr(trainer: Any, module: RunModule) -> str | None:
    """Warns of a learning rate so far from the usual that it is more likely a typo than a choice."""
    optimizer = trainer.optimizers[0]
    if "adam" not in type(optimizer).__name__.lower():
        return None  # the scales of other optimizers differ
    kind = "lora" if module.lora is not None else "full" if module.model_name else "scratch"
    compared = module.reference is not None
    if module.unit != "targets" and not compared:
        return None  # rates are known only for losses per token and losses against a reference
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    low, high = usual_lr(compared, kind, sum(p.numel() for p in module.parameters()))
    if low <= lr <= high:
        return None
    what = f"{KINDS[kind]}{' with a reference model' if compared else ''}, {low:.0e} to {high:.0e}"
    if lr > high:
        return (
            f"the learning rate {lr:.2g} is above what is usual for {what}: steps of that size tend to destroy more "
            f"than they teach; unless you know it works, set model.optimizer.lr to {high:.0e} or less"
        )
    return (
        f"the learning rate {lr:.2g} is below what is usual for {what}: hardly anything will be learned; unless you "
        f"know it works, set model.optimizer.lr to {low:.0e} or more"
    )


def usual_lr(compared: bool, kind: str, parameters: int) -> tuple[float, float]:
    """The lowest and the highest usual learning rate of Adam.

    Args:
        compared: Whether the policy is compared with a reference.
        kind: What is trained: a key of `KINDS`.
        parameters: Size of the model.
    """
    low, high = USUAL_LR["reference" if compared else "alone", kind]
    return low, high * (SMALL_FACTOR if kind == "full" and parameters < SMALL else 1.0)


def cut_rows(trainer: Any, module: RunModule) -> str | None:
    """Warns if many rows are longer than `max_length`."""
    data: RunData = trainer.datamodule
    for split, report in data.report().items():
        if report["kept"] and report["cut"] / report["kept"] > CUT_SHARE:
            return (
                f"{report['cut'] / report['kept']:.1%} of the {split} rows are cut to data.max_length "
                f"{data.max_length} ({report['cut']:,} of {report['kept']:,}): what was cut is never "
                "learned (preview --cut shows where); raise data.max_length, or drop such rows with data.overflow: drop"
            )
    return None


def other_template(trainer: Any, module: RunModule) -> str | None:
    """Warns of a chat template other than the one that the pretrained model knows."""
    data: RunData = trainer.datamodule
    own, used = data.own_template, data.template
    if not own or used is None or module.model_name is None or used.text.strip() == str(own).strip():
        return None
    return (
        f"the chat template is {used.source}, and the tokenizer has one of its own: {module.model_name} learned to "
        "write turns in that one, and has to learn the new one. The new one is exported with the model; to train on "
        "the model's own, leave data.template out"
    )


OTHER_TOKENS = 0.1
"""Share of tokens with another meaning above which a tokenizer is not the model's."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def other_tokenizer(trainer: Any, module: RunModule) -> str | None:
    """Warns of a tokenizer whose ids mean other tokens to the pretrained model, or that uses few of its tokens."""
    data: RunData = trainer.datamodule
    name, spec = module.model_name, data.tokenizer_spec
    if name is None or spec is None or str(spec) == name:
        return None
    tokens = {i: token for token, i in data.tokenizer.get_vocab().items() if i not in set(data.added_tokens)}
    advice = "the model would have to learn its tokens from scratch; leave data.tokenizer out to use the model's own"
    own = _own_tokens(name)
    if own:
        others = sum(own.get(i) != token for i, token in tokens.items()) / len(tokens)
        if others > OTHER_TOKENS:
            return f"data.tokenizer is not that of {name}: {others:.0%} of its ids are other tokens there, and {advice}"
        return None
    rows = module.causal_lm.base.get_input_embeddings().weight.shape[0]
    if rows > 2 * len(tokens) and rows - len(tokens) > 1000:
        return f"data.tokenizer has {len(tokens):,} tokens and {name} {rows:,}, so it seems not to be its own: {advice}"
    return None


def _own_tokens(name: str) -> dict[int, str]:
    """Id -> token of the tokenizer that came with a model; empty if there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return {}
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # it needs a network, or code of its own: nothing is known then
        return {}
    return {i: token for token, i in tokenizer.get_vocab().items()}


def no_pad_token(trainer: Any, module: RunModule) -> str | None:
    """Warns of a tokenizer without a pad token, for which another token is used."""
    data: RunData = trainer.datamodule
    if data.own_pad is not None or data.tokenizer.pad_token is None:
        return None
    return (
        f"the tokenizer has no pad token, so {data.tokenizer.pad_token} is used instead. Training is not "
        "affected: padding is known by its position, so the end of an answer still carries loss. But the exported "
        "tokenizer names it as its pad token, and a program that finds padding by token id mistakes the ends of texts "
        "for padding"
    )


def no_validation(trainer: Any, module: RunModule) -> str | None:
    """Warns if no rows are held out."""
    data: RunData = trainer.datamodule
    if data.sources["validation"] is not None:
        return None
    return (
        "no rows are held out: without them you cannot tell learning from memorisation; set data.validation, to a "
        "source or to a share such as 0.05"
    )


CHECKS = (rounded_away, unusual_lr, cut_rows, other_template, other_tokenizer, no_pad_token, no_validation)
"""Checks of the settings at the start of a run."""


def _starved(share: float, wait: float, step: float, data: RunData) -> str:
    cores = usable_cpus()
    more = max(data.workers + 1, min(2 * max(1, data.workers), cores))
    prepare = ", or tokenize once beforehand (data.streaming: false)" if data.streaming else ""
    return (
        f"in {WAIT_WINDOW} updates, {share:.0%} of the time was spent waiting for data ({1000 * wait:.0f} ms of "
        f"{1000 * step:.0f} ms per update): the device is idle meanwhile. Set data.workers to {more} or more (it is "
        f"{data.workers}, and there are {cores} cores){prepare}"
    )


# ---- during training


class Wait:
    """Measures how long updates wait for their micro-batches, without validation, saving and other callbacks."""

    def __init__(self) -> None:
        self._since = self._waited = self._worked = 0.0
        self._updates = -WAIT_FIRST
        self._reported = False

    def follow(self, loop: Any) -> None:
        """Times each fetch of a batch.

        Lightning has no callback around a fetch, so this wraps the two methods that its loop calls for the profiler.
        """

        def before() -> None:
            type(loop)._on_before_fetch(loop)
            self.start_clock()

        def after() -> None:
            self.batch_arrived()
            type(loop)._on_after_fetch(loop)

        loop._on_before_fetch, loop._on_after_fetch = before, after

    def start_clock(self) -> None:
        """Starts timing a fetch, or the work on a micro-batch."""
        self._since = time.perf_counter()

    def batch_arrived(self) -> None:
        """Counts the time since `start_clock` as waiting."""
        self._waited += time.perf_counter() - self._since

    def batch_ends(self) -> None:
        """Counts the time since `start_clock` as work."""
        self._worked += time.perf_counter() - self._since

    def update_ends(self) -> tuple[float, float, float] | None:
        """Counts an update. At the end of a window that was mostly spent waiting, returns how long: once per run.

        Returns:
            The share of the time, seconds of waiting per update, and seconds per update.
        """
        self._updates += 1
        if self._updates < WAIT_WINDOW and self._updates != 0:
            return None
        waited, total, updates = self._waited, self._waited + self._worked, self._updates
        self._waited, self._worked, self._updates = 0.0, 0.0, 0
        if self._reported or not updates or waited <= max(WAIT_SHARE * total, WAIT_SECONDS * updates):
            return None
        self._reported = True
        return waited / total, waited / updates, total / updates


class LossWatch:
    """Watches whether the loss moves at the start of a run, and whether it stays finite."""

    def __init__(self) -> None:
        self.is_watching = True
        self.in_float16 = False
        self._losses: list[float] = []
        self._not_finite = 0

    def update(self, loss: float, lr: float, peak: float) -> str | None:
        """Adds an update; returns a warning, or None. `peak` is the highest learning rate of the run."""
        if not math.isfinite(loss):
            self._not_finite += 1
            return _not_finite(loss, self.in_float16) if self._not_finite == NOT_FINITE else None
        if self._not_finite < NOT_FINITE:  # once reported, it is never reported again
            self._not_finite = 0
        if not self.is_watching or lr < 0.5 * peak:
            return None
        self._losses.append(loss)
        if len(self._losses) < STUCK_AFTER:
            return None
        self.is_watching = False
        return _stuck(self._losses, peak)


def _not_finite(loss: float, in_float16: bool) -> str:
    remedy = "a lower learning rate, a warm-up or trainer.gradient_clip_val: 1.0 usually helps"
    if in_float16:
        remedy = "in float16, large activations overflow; trainer.precision: bf16-mixed has room for them, or 32-true"
    return f"the loss has been {loss} for {NOT_FINITE} updates in a row: {remedy}"


def _stuck(losses: list[float], lr: float) -> str | None:
    first, last = losses[:STUCK_PART], losses[-STUCK_PART:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / STUCK_PART)
    means = f"{before:.4g} in the first {STUCK_PART} updates, {after:.4g} in the last {STUCK_PART} of {len(losses)}"
    if after - before > max(NOISE * error, RISEN_SHARE * abs(before)):
        return (
            f"the loss rises: {means}. The steps are too large: lower model.optimizer.lr ({lr:.2g} now), warm up "
            "longer (model.schedule.warmup), and clip the gradient (trainer.gradient_clip_val: 1.0)"
        )
    if abs(after - before) <= min(NOISE * error, STUCK_SHARE * abs(before)) or after == before:
        return (
            f"the loss does not move: {means}. Either there is nothing left to learn from these rows, or the learning "
            f"rate ({lr:.2g}) is too small, what should learn is frozen, or the targets are not what you think: "
            "oumi_pl preview shows which tokens carry loss"
        )
    return None


# ---- preference training


EARLY = 3
"""In the first updates, this many, hardly anything can have been learned."""
ENOUGH_PAIRS = 32
"""Ranking fewer pairs than this correctly may be chance."""
DISPLACED = 20
"""Log-probabilities that are low for this many updates in a row are no accident."""


class PreferenceWarnings(L.Callback):
    """Warns of pairs that are too easy to tell apart, and of chosen responses that become less likely as well.

    Does nothing for modules that log no margins of pairs.
    """

    def __init__(self) -> None:
        self._right = self._pairs = 0.0
        self._warned_of_leak = self._warned_of_displacement = False
        self._margins: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Checks the update that has just ended."""
        sums, reference = pl_module.last_update, pl_module.reference
        if trainer.fit_loop._should_accumulate() or "rewards/margins" not in sums:
            return
        self._watch_leak(trainer, sums)
        if reference is not None and reference.kind != "none":  # without a reference, rewards are not log-ratios
            self._watch_displacement(trainer, sums)

    def _watch_leak(self, trainer: Any, sums: dict[str, float]) -> None:
        step = trainer.global_step
        if step > EARLY or self._warned_of_leak:
            return
        # before the first update all margins are exactly 0, and each counts as half right: no evidence
        if sums["rewards/accuracies"] != 0.5 * sums["rows"]:
            self._right += sums["rewards/accuracies"]
            self._pairs += sums["rows"]
        if self._pairs >= ENOUGH_PAIRS and self._right == self._pairs:
            self._warned_of_leak = True
            warn(
                trainer,
                f"all {self._pairs:.0f} pairs are ranked correctly after {step} updates: the chosen responses differ "
                "in something that is easier to learn than what you want to teach (length, a phrase, a format, the "
                "order of the data); look at some pairs",
            )

    def _watch_displacement(self, trainer: Any, sums: dict[str, float]) -> None:
        chosen, rejected, margin = (
            sums[f"rewards/{name}"] / max(1.0, sums["rows"]) for name in ("chosen", "rejected", "margins")
        )
        is_falling = chosen < 0 and rejected < 0 and margin > 0
        self._margins = [*self._margins, margin] if is_falling else []
        half = len(self._margins) // 2
        grows = sum(self._margins[half:]) > sum(self._margins[:half])
        if len(self._margins) >= DISPLACED and grows and not self._warned_of_displacement:
            self._warned_of_displacement = True
            warn(
                trainer,
                f"for {len(self._margins)} updates the chosen responses have become less likely as well, while the "
                "margin grows (likelihood displacement, Razin et al. 2024, arXiv:2410.08847): probability moves to "
                "responses that are neither chosen nor rejected; try a larger beta, a smaller learning rate, APOZero, "
                "or an SFTTerm in a WeightedSum",
            )
