"""A plan runs the recipe's own update without values: its memory, products and messages are those of a real one."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

from oumi_pl.config import files
from oumi_pl.config.cli import CLI
from oumi_pl.errors import UserError
from oumi_pl.planning.parts import launched, parts_of
from oumi_pl.planning.tracker import Kind, Tracker
from oumi_pl.planning.update import Settings, estimate
from tests.tiny import LLAMA

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 64, 128, 2, 512
CONFIG = LLAMA | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
LINEAR = LAYERS * (HIDDEN * (HIDDEN + HIDDEN // 2 + HIDDEN // 2 + HIDDEN) + 3 * HIDDEN * INTERMEDIATE)
"""Weights of the linear layers below the head."""
WEIGHTS = LINEAR + 2 * VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN
ROWS, TOKENS = 4, 128
FSDP2 = {"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 8, "tensor_parallel_size": 1}}


def recipe(folder, *, rows=None, **trainer):
    """A recipe of pretraining, whose micro-batches are all alike; with rows, of SFT on them."""
    data: dict[str, Any] = {
        "train": str(folder / "rows.jsonl"),
        "tokenizer": {"class_path": "ByteTokenizer"},
        "max_length": TOKENS,
        "batch_size": ROWS,
    }
    kind = "Pretrain" if rows is None else "SFT"
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows or [{"text": "x" * 8_000}] * 3))
    tree = {
        "model": {"class_path": kind, "init_args": {"config": CONFIG}},
        "data": {"class_path": f"{kind}Data", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "gradient_clip_val": 1.0} | trainer,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def planned(path, *options, devices=1, **settings):
    return estimate(Settings((path,), options, devices, **settings))


class Begin(L.Callback):
    def on_train_start(self, *_):
        with record_function("updates begin"):
            torch.empty(1)


class Measured(CLI):
    """Trains under torch's profiler, which records what is allocated."""

    def _run_subcommand(self, subcommand: str) -> None:
        trainer: Any = self.trainer
        trainer.callbacks, trainer.loggers = [Begin()], []
        gc.collect()  # what is freed later would be subtracted
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.fit(self.model, datamodule=self.datamodule)
        events = profiler.profiler.kineto_results.events()
        begin = next(event.start_ns() for event in events if event.name() == "updates begin")
        self.peak = in_use = 0
        for at, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
            in_use += size
            self.peak = max(self.peak, in_use) if at >= begin else self.peak


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model.gradient_checkpointing", "true", "--trainer.accumulate_grad_batches", "3"),
        ("--model.gradient_checkpointing", "EveryNth", "--model.gradient_checkpointing.n", "2"),
        ("--model.gradient_checkpointing", "Selective"),
        ("--model.lora.r", "8"),
        ("--trainer.precision", "bf16-mixed"),
        ("--model.optimizer", "SGD", "--model.optimizer.init_args.lr", "0.1"),
    ],
    ids=["plain", "recomputed", "every second", "selective", "lora", "bf16", "sgd"],
)
def test_the_peak_is_that_of_a_real_run(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path)
    plan = planned(path, *options, on_gpu=False)
    run = Measured(["fit", "--config", str(path), *options], trees=[files.check(path)])
    assert plan.total == pytest.approx(run.peak, rel=0.02)


def test_the_peak_on_the_rows_of_the_data_is_that_of_a_real_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "q" * 20}, {"role": "assistant", "content": "a" * 60}]
    path = recipe(tmp_path, rows=[{"messages": turns}] * 8)
    plan = planned(path, real_rows=True, on_gpu=False)
    run = Measured(["fit", "--config", str(path)], trees=[files.check(path)])
    assert plan.total == pytest.approx(run.peak, rel=0.1)
    assert plan.tokens < planned(path).tokens == ROWS * TOKENS  # the largest rows that the settings allow


def test_the_products_are_counted(tmp_path):
    plan = planned(recipe(tmp_path))
    assert plan.tokens == ROWS * TOKENS
    linear, head = 6 * LINEAR * ROWS * TOKENS, 6 * VOCAB * HIDDEN * plan.targets
    attention = 14 * LAYERS * HIDDEN * ROWS * TOKENS**2  # two products forward, five backward
    assert plan.costs.flops == linear + head + attention
    twice = planned(recipe(tmp_path), "--trainer.accumulate_grad_batches", "5")
    assert twice.costs.flops == 5 * plan.costs.flops


def test_what_is_held_is_divided_among_the_ranks(tmp_path):
    one, eight, many = (planned(recipe(tmp_path, strategy=FSDP2), devices=n) for n in (1, 8, 1024))
    assert one.held[Kind.OPTIMIZER] == pytest.approx(2 * 4 * WEIGHTS, rel=0.01)
    for kind in (Kind.PARAMETERS, Kind.GRADIENTS, Kind.OPTIMIZER):
        assert eight.held[kind] == pytest.approx(one.held[kind] / 8, rel=0.05)
        assert many.held[kind] < eight.held[kind]
    assert many.tokens == 1024 * one.tokens
    assert eight.sharded


def test_the_messages_of_ddp_are_its_gradients(tmp_path):
    plan = planned(recipe(tmp_path, accumulate_grad_batches=3), devices=4)
    assert plan.costs.sent == 2 * 3 / 4 * 4 * WEIGHTS  # float32, once per update
    assert plan.peak[Kind.COMMUNICATION] == 4 * WEIGHTS  # the buckets
    assert planned(recipe(tmp_path)).costs.sent == 0


def test_the_messages_of_fsdp2_are_weights_and_gradients(tmp_path):
    plan = planned(recipe(tmp_path, strategy=FSDP2, gradient_clip_val=None), devices=8)
    sizes: Counter[str] = Counter()
    for message, n in plan.costs.collectives.items():
        sizes[message.name] += n * message.sent
    assert sizes["reduce_scatter"] == pytest.approx(7 / 8 * 4 * WEIGHTS, rel=0.01)
    layers = 4 * (LINEAR + 2 * LAYERS * HIDDEN)  # gathered again for the backward pass
    assert sizes["all_gather"] == pytest.approx(7 / 8 * (4 * WEIGHTS + layers), rel=0.01)
    assert not any(message.is_waited_for for message in plan.costs.collectives)


@pytest.mark.parametrize(("devices", "of_node", "nodes"), [(16, 8, 2), (8, 4, 2), (8, 8, 1)])
def test_messages_between_replicas_cross_nodes(tmp_path, devices, of_node, nodes):
    """Each weight is divided over half of the ranks, which are consecutive; the other half is another replica."""
    replicas = {"class_path": "Sharded", "init_args": {"replicas": 2}}
    plan = planned(recipe(tmp_path, strategy=replicas), devices=devices, devices_per_node=of_node)
    messages = {(message.name, message.ranks, message.nodes) for message in plan.costs.collectives}
    assert ("all_reduce", 2, nodes) in messages
    assert ("all_gather", devices // 2, 1) in messages


def test_ranks_of_a_tensor_group_share_products_weights_and_rows(tmp_path):
    one, two, four = (
        planned(
            recipe(tmp_path, strategy={"class_path": "Sharded", "init_args": {"tensor": size, "shards": shards}}),
            devices=n,
        )
        for size, shards, n in ((1, 1, 1), (2, 1, 2), (2, 2, 4))
    )
    assert (two.tokens, four.tokens) == (one.tokens, 2 * one.tokens)
    assert (two.data_ranks, four.data_ranks) == (1, 2)
    assert two.costs.flops == four.costs.flops == one.costs.flops / 2
    for kind in (Kind.PARAMETERS, Kind.GRADIENTS, Kind.OPTIMIZER):
        assert two.held[kind] == pytest.approx(one.held[kind] / 2, rel=0.01)
        assert four.held[kind] == pytest.approx(one.held[kind] / 4, rel=0.02)
    # two for each layer in both passes, and one for embeddings
    of_all_tokens = [(m, n) for m, n in two.costs.collectives.items() if m.size == 4 * ROWS * TOKENS * HIDDEN]
    assert [n for _, n in of_all_tokens] == [4 * LAYERS + 1]
    assert all(message.is_waited_for for message, _ in of_all_tokens)
    overlapped = {message.name for message in four.costs.collectives if not message.is_waited_for}
    assert overlapped >= {"all_gather", "reduce_scatter"}  # of FSDP2
    assert two.peak[Kind.HEAD] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", ["SFT, packed, tensor parallelism", "SFT, packed, selective, FSDP2"])
def test_the_peak_of_two_processes_is_that_of_a_real_run(name):
    script = Path(__file__).parents[2] / "benchmarks/plan.py"
    ended = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=580)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith(name)]
    error = re.search(r"([-+][\d.]+)%", line)
    assert abs(float(error[1])) < 2


def test_activations_in_host_memory_are_not_in_the_peak(tmp_path):
    path, option = recipe(tmp_path), "--model.gradient_checkpointing"
    kept = planned(path).peak[Kind.ACTIVATIONS]
    away = planned(path, option, "Offload", f"{option}.recompute", "false").peak[Kind.ACTIVATIONS]
    recomputed, inputs_away = (planned(path, option, policy).peak[Kind.ACTIVATIONS] for policy in ("true", "Offload"))
    assert away < kept / 2
    assert inputs_away <= recomputed  # the first layer's backward pass is the peak, for which its inputs are back
    on_cpu = planned(path, option, "Offload", f"{option}.recompute", "false", on_gpu=False)
    assert on_cpu.total == planned(path, on_gpu=False).total


def test_adapters_are_float32_under_fsdp2(tmp_path):
    lora = ("--model.lora.r", "8", "--trainer.precision", "bf16-true")
    whole, one, eight = (
        planned(recipe(tmp_path, strategy=strategy), *lora, devices=devices)
        for strategy, devices in (("auto", 1), ("fsdp2", 1), ("fsdp2", 8))
    )
    assert one.held == whole.held
    assert one.held[Kind.OPTIMIZER] == pytest.approx(2 * one.held[Kind.GRADIENTS], rel=0.01)
    for kind in (Kind.PARAMETERS, Kind.GRADIENTS, Kind.OPTIMIZER):
        assert eight.held[kind] == pytest.approx(one.held[kind] / 8, rel=0.01)


def test_completions_of_an_environment_are_as_large_as_others():
    """Though completions share what they begin with there."""
    options = ("--data.environment", "oumi_pl.rollouts.calculator.Calculator")
    with launched(1):
        data = parts_of([files.find("quickstart/grpo")], options, 1).datamodule
    prompt, completions = 64 - 12, 8 * 12
    batch = data.full_batch(2)
    assert batch["input_ids"].numel() == 2 * (prompt + completions)
    assert len(batch["targets"]) == 2 * completions


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("sft", 1024), ("dpo", 4080), ("kto", 2048), ("reward", 4080), ("grpo", 4736), ("distill", 512)],
)
def test_every_trainer_type_is_planned_without_its_model_or_rows(name, tokens):
    plan = planned(files.find(f"quickstart/{name}"))
    assert plan.tokens == tokens
    assert plan.costs.flops > 0


def test_a_teacher_and_a_frozen_copy_are_held(tmp_path):
    cached, beside = (planned(files.find("quickstart/distill"), *extra) for extra in ((), ("--model.top_k", "8")))
    assert cached.held[Kind.PARAMETERS] > 2 * beside.held[Kind.PARAMETERS]
    initial, online = (
        planned(files.find("quickstart/dpo"), "--model.reference", kind) for kind in ("initial", "online")
    )
    assert online.held[Kind.PARAMETERS] == 2 * initial.held[Kind.PARAMETERS]


def test_quantized_weights_take_fewer_bits_also_sharded_and_but_for_named_layers():
    def parameters(*options, devices=1):
        options = ("--model.config.num_hidden_layers", "1", *options)
        return planned(files.find("sft/smollm2_135m_lora"), *options, devices=devices).held[Kind.PARAMETERS]

    bits = ("--model.quantization", "nf4")
    whole, quantized, down = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536, parameters(*bits), 576 * 1536
    saved = 4 - 0.5 - 1 / 64
    assert parameters() - quantized == pytest.approx(whole * saved, rel=0.01)
    assert parameters(*bits, "--model.unquantized", "[down_proj]") - quantized == pytest.approx(down * saved, rel=0.01)
    assert parameters(*bits, "--trainer.strategy", "fsdp2", devices=2) == pytest.approx(quantized / 2, rel=0.05)


OFFLOADED = ("--trainer.strategy", "Sharded", "--trainer.strategy.offload", "true")


def test_what_is_offloaded_is_held_but_not_in_the_peak():
    recipe = files.find("quickstart/sft")
    sharded, offloaded = (
        planned(recipe, *options, devices=2) for options in (("--trainer.strategy", "fsdp2"), OFFLOADED)
    )
    held = {Kind.PARAMETERS, Kind.GRADIENTS, Kind.OPTIMIZER}
    assert offloaded.held == sharded.held
    assert offloaded.offloaded
    assert not held & offloaded.peak.keys()
    rest = sum(size for kind, size in sharded.peak.items() if kind not in held)
    assert rest <= offloaded.total < sharded.total


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ((), ["--trainer.strategy fsdp2", "--model.quantization nf4"]),
        (("--model.quantization", "int8"), []),
        (OFFLOADED, ["--model.quantization nf4"]),
        (("--model.lora", "null"), ["--trainer.strategy fsdp2", "--model.lora.r 16"]),
        (("--model.quantization", "nf4"), ["--trainer.strategy fsdp2"]),
        (("--trainer.strategy", "fsdp2"), ["--trainer.strategy Sharded", "--model.quantization nf4"]),
    ],
)
def test_the_ways_to_hold_less_are_those_that_the_recipe_has_not_taken(options, ways):
    plan = planned(files.find("sft/smollm2_135m_lora"), "--model.config.num_hidden_layers", "1", *options)
    assert [way.partition(":")[0].partition(" --")[0] for way in plan.ways_to_hold_less] == ways


def test_a_trainer_type_that_reads_values_is_refused(tmp_path, monkeypatch):
    (tmp_path / "reading.py").write_text(
        "from oumi_pl.modules.sft import SFT\n\n\n"
        "class Reading(SFT):\n"
        "    def loss_sums(self, batch, split):\n"
        "        sums = super().loss_sums(batch, split)\n"
        "        return sums if sums['loss'] > 0 else {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = recipe(tmp_path, rows=[{"prompt": "a", "completion": "b"}])
    path.write_text(path.read_text().replace("class_path: SFT\n", "class_path: reading.Reading\n"))
    with pytest.raises(UserError, match="plan: Reading reads values while it trains"):
        planned(path)


def test_nothing_of_a_plan_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path)
    before = torch.distributed.is_initialized(), dict(os.environ), sorted(tmp_path.iterdir())
    planned(path, devices=2)
    assert (torch.distributed.is_initialized(), dict(os.environ), sorted(tmp_path.iterdir())) == before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_products_on_a_gpu_are_in_the_precision_of_the_run(tmp_path, precision):
    """A product in half precision that is added to a gradient in float32 is as fast as others."""
    plan = planned(recipe(tmp_path), "--trainer.precision", precision)
    dtypes = {operation.dtype for operation in plan.costs.operations if operation.flops}
    assert dtypes == {torch.float32 if precision == "32-true" else torch.bfloat16}


def test_what_is_left_of_a_plan_is_not_collected_and_other_garbage_is(tmp_path):
    """Collecting it corrupted the heap of processes that made several plans."""

    class Garbage:
        def __init__(self):
            self.itself = self

    before = gc.get_freeze_count()
    planned(recipe(tmp_path), devices=2)
    assert gc.get_freeze_count() > before and gc.isenabled()
    gone = weakref.ref(Garbage())
    gc.collect()
    assert gone() is None


def test_only_operations_that_read_or_write_count_as_moved_memory():
    tracker = Tracker(())
    with FakeTensorMode(), tracker:
        values = torch.empty(100)
        torch.empty_like(values)
        torch.ops.prim.device.default(values)
        assert not tracker.costs.operations
        values + 1
    assert [operation.moved for operation in tracker.costs.operations] == [800]


A, B, SUM = 8 * 16, 16 * 4, 8 * 4
"""Elements of the factors and of the sum in `MOVED`."""
MOVED = {
    "mm": (lambda x: torch.mm(x.a, x.b), A + B + SUM),
    "mm, out": (lambda x: torch.mm(x.a, x.b, out=x.sum), A + B + SUM),
    "addmm, out": (lambda x: torch.addmm(x.sum, x.a, x.b, out=x.sum), A + B + 2 * SUM),
    "addmm_": (lambda x: x.sum.addmm_(x.a, x.b), A + B + 2 * SUM),
    "copy_": (lambda x: x.a.copy_(x.same), 2 * A),
    "fill_": (lambda x: x.a.fill_(1), A),
    "zero_": (lambda x: x.a.zero_(), A),
    "zeros_like": (lambda x: torch.zeros_like(x.a), A),
    "add_": (lambda x: x.a.add_(x.same), 3 * A),
    "_foreach_mul_": (lambda x: torch._foreach_mul_([x.a, x.b], 2.0), 2 * (A + B)),
    "of an expanded column": (lambda x: x.a * x.a[:, :1].expand(8, 16), 2 * A + 8),
    "detach": (lambda x: x.a.detach(), 0),
    "linear layer of 3 dimensions": (lambda x: torch.nn.functional.linear(x.a.view(2, 4, 16), x.b.t()), A + B + SUM),
    # indices have 64 bits
    "embedding": (lambda x: torch.nn.functional.embedding(x.ids, x.table), 2 * 3 + 2 * 3 * 16),
    "index_select": (lambda x: x.table.index_select(0, x.ids), 2 * 3 + 2 * 3 * 16),
    "index": (lambda x: x.table[x.ids], 2 * 3 + 2 * 3 * 16),
    "gather": (lambda x: x.a.gather(1, x.columns), 2 * 8 + 2 * 8),
    "scatter_add_": (lambda x: x.a.scatter_add_(1, x.columns, x.a[:, :1]), 2 * 8 + 3 * 8),
    "index_put_": (lambda x: x.table.index_put_((x.ids,), x.a[:3]), 2 * 3 + 3 * 3 * 16),
}
"""Name -> an operation, and the float32 numbers that it reads and writes."""


@pytest.mark.parametrize(("operation", "numbers"), MOVED.values(), ids=MOVED)
def test_an_operation_counts_what_it_reads_and_writes(operation, numbers):
    tracker = Tracker(())
    with FakeTensorMode():
        values = {"a": (8, 16), "same": (8, 16), "b": (16, 4), "sum": (8, 4), "table": (1000, 16)}
        floats = {name: torch.empty(shape) for name, shape in values.items()}
        ids, columns = torch.zeros(3, dtype=torch.int64), torch.zeros(8, 1, dtype=torch.int64)
        with tracker:
            operation(SimpleNamespace(**floats, ids=ids, columns=columns))
    assert sum(n * counted.moved for counted, n in tracker.costs.operations.items()) == 4 * numbers


@pytest.mark.parametrize(("scaled", "times"), [(False, 7), (True, 8)])
def test_a_fused_step_reads_gradients_and_changes_the_rest(scaled, times):
    tracker = Tracker(())
    with FakeTensorMode():
        weight, gradient, first, second = (torch.empty(100) for _ in range(4))
        step = torch.empty(())
        options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
        scale = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())} if scaled else {}
        with tracker:
            torch._fused_adamw_(
                *([weight], [gradient], [first], [second], [], [step]),
                **options,
                amsgrad=False,
                maximize=False,
                **scale,
            )
    (counted,) = tracker.costs.operations
    assert counted.moved == 4 * (times * 100 + 1 + len(scale))


def test_weights_are_copied_into_the_buffer_that_is_gathered():
    tracker = Tracker(())
    with FakeTensorMode(), tracker:
        weights, buffer = [torch.empty(30), torch.empty(20)], torch.empty(8 * 50)
        torch.ops.fsdp.all_gather_copy_in(weights, buffer, [30, 20], 50, 0)
    assert [counted.moved for counted in tracker.costs.operations] == [2 * 4 * 50]
