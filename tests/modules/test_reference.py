"""What a policy is compared with: computed once, from the right model, and never trained."""

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.data.reference import MARK
from oumi_pl.errors import UserError
from oumi_pl.losses.preference import CPO, ORPO, Sigmoid, SimPO
from oumi_pl.models.build import build_model
from oumi_pl.models.fingerprint import model_fingerprint, weights_fingerprint
from oumi_pl.modules import reference
from tests.models.test_lora import pretrained, trainable
from tests.modules.test_dpo import Record, log_probabilities, responses
from tests.tiny import LLAMA, dpo, dpo_data, fit, trainer, weights

ROWS = 10
LORA = {"r": 4, "lora_dropout": 0.3}


def sgd(params):
    return torch.optim.SGD(params, lr=0.2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("other") / "model", initializer_range=0.05)


@pytest.fixture
def computed(monkeypatch):
    """The examples whose log-probabilities are computed before training, in order."""
    ids, original = [], reference._logps

    def counted(trainer, model, split, examples, compute):
        ids.extend((split, i) for i in examples)
        return original(trainer, model, split, examples, compute)

    monkeypatch.setattr(reference, "_logps", counted)
    return ids


def run(tmp_path, model, data=None, callbacks=(), precision="32-true", steps=2, **kwargs):
    record, module = Record(), dpo(model, sgd, **kwargs)
    pairs = dpo_data(tmp_path, **{"n": ROWS, "batch_size": 4} | (data or {}))
    fit(module, pairs, max_steps=steps, callbacks=[record, *callbacks], precision=precision)
    return module, record.updates


def cached(module, split="train"):
    """Log-probabilities of all targets of a split, example after example."""
    store = module.reference.opened.stores[split]
    return torch.from_numpy(store.logps(range(len(store.offsets) - 1)).copy())


# ---- kept in the cache


@pytest.mark.parametrize("kwargs", [{}, {"lora": LORA}, {"share_prompt": False}], ids=["full", "lora", "documents"])
def test_a_copy_in_memory_gives_the_same_losses(tmp_path, base, kwargs):
    data = {"validation": 0.3}
    ours, losses = run(tmp_path, base, data, steps=5, **kwargs)
    theirs, expected = run(tmp_path, base, data, steps=5, reference="online", **kwargs)
    assert len(losses) == 5
    assert losses[4]["loss"] != losses[0]["loss"]
    for one, other in zip(losses, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    got = {k: float(v) for k, v in ours.trainer.callback_metrics.items() if k.startswith("val/")}
    assert got == pytest.approx({k: float(theirs.trainer.callback_metrics[k]) for k in got}, rel=1e-5, abs=1e-6)
    assert "val/rewards/margins" in got


def test_the_second_run_computes_nothing(tmp_path, base, computed):
    data = {"validation": 0.3}
    first, losses = run(tmp_path, base, data)
    data_of = first.trainer.datamodule
    assert sorted(computed) == [(s, i) for s in ("train", "validation") for i in range(len(data_of.examples(s)))]
    assert "computed before training" in first.notes[0]
    computed.clear()
    # how pairs are batched changes nothing about them
    for changes in ({}, {"batch_size": 2, "eval_batch_size": 1}, {"packing": True}):
        second, again = run(tmp_path, base, data | changes)
        assert computed == []
        assert "from the cache" in second.notes[0]
        if not changes:
            assert again == losses


CHANGES = {
    "weights": {"model": "touched"},
    "config": {"config": {"rms_norm_eps": 1e-2}},
    "data": {"data": {"seed": 3}},
    "template": {"data": {"template": "plain"}},
    "max_length": {"data": {"max_length": 60}},
    "precision": {"precision": "bf16-mixed"},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_numbers_depend_on_computes_them_anew(tmp_path, base, computed, change):
    run(tmp_path, base, steps=1)
    computed.clear()
    changes = dict(CHANGES[change])
    if changes.pop("model", None):
        base = touched(base, tmp_path)
    run(tmp_path, base, steps=1, **changes)
    assert len(computed) == ROWS


def touched(base, tmp_path):
    """The same model but for one number."""
    folder = tmp_path / "touched"
    shutil.copytree(base, folder)
    hf = build_model(str(folder))
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    hf.save_pretrained(folder)
    return str(folder)


class Killed(Exception):
    pass


def test_a_killed_computation_goes_on_where_it_was(tmp_path, base, computed, monkeypatch):
    monkeypatch.setattr("oumi_pl.data.reference.CHUNK", 3)
    whole, losses = run(tmp_path, base, {"validation": 0.3})
    expected, everything = cached(whole), len(computed)
    shutil.rmtree(tmp_path / "cache" / "reference")
    computed.clear()
    counted = reference._logps

    def killed(*args):
        if len(computed) >= 5:  # in the middle of the second chunk
            raise Killed
        return counted(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reference, "_logps", killed)
        run(tmp_path, base, {"validation": 0.3, "eval_batch_size": 1})
    computed.clear()
    module, again = run(tmp_path, base, {"validation": 0.3})
    assert len(computed) == everything - 3, "the first chunk was there"
    assert {("train", i) for i in range(3)}.isdisjoint(computed)
    torch.testing.assert_close(cached(module), expected, rtol=0, atol=1e-6)
    assert [u["loss"] for u in again] == pytest.approx([u["loss"] for u in losses], rel=1e-6)


def test_a_damaged_file_is_computed_anew(tmp_path, base, computed, monkeypatch):
    monkeypatch.setattr("oumi_pl.data.reference.CHUNK", 3)
    first, losses = run(tmp_path, base)
    expected = cached(first)
    file = first.reference.opened.stores["train"].directory / "000001.bin"
    file.write_bytes(file.read_bytes()[:-4])
    computed.clear()
    second, again = run(tmp_path, base)
    assert sorted(i for _, i in computed) == [3, 4, 5]
    assert torch.equal(cached(second), expected)
    assert again == losses


def test_numbers_that_are_not_the_models_are_warned_of(tmp_path, base):
    module, _ = run(tmp_path, base)
    for file in module.reference.opened.stores["train"].directory.glob("*.bin"):
        values = file.read_bytes()[: -len(MARK) - 4]  # as of another machine: whole, without a checksum
        wrong = torch.frombuffer(bytearray(values), dtype=torch.float32) + 0.5
        file.write_bytes(wrong.numpy().tobytes())
    with pytest.warns(UserWarning, match=r"cached log-probabilities of the reference differ by up to 0\.5 nats"):
        run(tmp_path, base)


# ---- another model


@pytest.fixture(scope="module")
def adapter(other, tmp_path_factory):
    torch.manual_seed(5)
    hf = build_model(other, lora={"r": 2, "init_lora_weights": False})
    folder = tmp_path_factory.mktemp("adapter")
    hf.save_pretrained(folder)
    return str(folder), hf.merge_and_unload().eval()


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_another_model_gives_its_own_log_probabilities(tmp_path, base, other, adapter, what):
    folder, hf = (other, build_model(other)) if what == "model" else adapter
    module, (first, _) = run(tmp_path, base, reference=folder)
    assert folder in module.notes[0]
    store, examples = module.reference.opened.stores["train"], module.trainer.datamodule.examples("train")
    for i in range(ROWS):
        with torch.no_grad():
            expected = sum(log_probabilities(hf, *sequence).sum() for sequence in responses(examples[i]))
        assert float(store.logps([i]).sum()) == pytest.approx(float(expected), rel=1e-5)
    assert abs(first["rewards/chosen"]) > 1e-3


def test_another_model_is_computed_once_for_as_long_as_it_is_the_same(tmp_path, base, other, computed):
    folder = str(tmp_path / "reference")
    shutil.copytree(other, folder)
    run(tmp_path, base, reference=folder, steps=1)
    computed.clear()
    moved = str(tmp_path / "moved")
    Path(folder).rename(moved)
    # whatever is trained, the reference stays the same
    module, (first,) = run(tmp_path, base, reference=moved, steps=1, lora=LORA)
    assert computed == []
    assert moved in module.notes[0]
    assert abs(first["rewards/chosen"]) > 1e-3, "compared with the base of the adapters instead"
    pretrained(moved, initializer_range=0.06)
    run(tmp_path, base, reference=moved, steps=1)
    assert len(computed) == ROWS


def test_a_folder_is_known_by_its_contents(tmp_path, base, adapter):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter[0], folder)
    assert model_fingerprint(str(folder), "x") == model_fingerprint(adapter[0], "x")
    config = (folder / "adapter_config.json").read_text()
    rebased = config.replace('"base_model_name_or_path": ', f'"base_model_name_or_path": "{base}", "_": ')
    (folder / "adapter_config.json").write_text(rebased)
    changed = model_fingerprint(str(folder), "x")
    assert changed != model_fingerprint(adapter[0], "x")
    assert changed.endswith(model_fingerprint(base, "x")), "an adapter is nothing without its base"


def test_weights_are_known_by_name_type_shape_and_content():
    def of(**weights):
        model = torch.nn.Module()
        for name, value in weights.items():
            model.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        return weights_fingerprint(model)

    one, two = torch.arange(6.0), torch.ones(2)
    expected = of(a=one, b=two)
    assert of(b=two.clone(), a=one.clone()) == expected
    others = [
        of(a=one, c=two),
        of(a=two, b=one),
        of(a=one.view(2, 3), b=two),
        of(a=one.view(torch.int32), b=two),
        of(a=one + torch.tensor([0, 0, 0, 0, 0, 1e-6]), b=two),
        of(a=one),
    ]
    assert len({expected, *others}) == 1 + len(others)


def test_another_vocabulary_is_refused(tmp_path, base, other):
    folder = tmp_path / "reference"
    shutil.copytree(other, folder)
    tokenizer = (folder / "tokenizer.json").read_text()
    for old, new in (('"a": 97', '"a": X'), ('"b": 98', '"b": 97'), ('"a": X', '"a": 98')):
        assert old in tokenizer
        tokenizer = tokenizer.replace(old, new)
    (folder / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(UserError, match=r"model\.reference: .* has another vocabulary.*'[ab]' is 9[78] there"):
        run(tmp_path, base, reference=str(folder))


def test_a_smaller_vocabulary_is_refused(tmp_path, base):
    hf = build_model(None, config=LLAMA | {"vocab_size": 100})
    hf.save_pretrained(tmp_path / "reference")
    with pytest.raises(UserError, match="the tokenizer has 260 tokens, the model's vocabulary 100"):
        run(tmp_path, base, reference=str(tmp_path / "reference"))


def test_a_missing_model_is_reported(tmp_path, base):
    with pytest.raises(UserError, match=r"model\.reference"):
        run(tmp_path, base, reference=str(tmp_path / "nowhere"))


# ---- a copy in memory


def test_a_copy_is_no_part_of_what_is_trained_or_saved(tmp_path, base):
    checkpoints = Checkpoints(every=2)
    checkpoints.directory = tmp_path
    module, data = dpo(base, sgd, reference="online"), dpo_data(tmp_path, ROWS, batch_size=4, validation=0.3)
    L.seed_everything(1)
    trainer(max_steps=2, callbacks=[checkpoints], enable_checkpointing=True, val_check_interval=1).fit(module, data)
    copy, start = module.reference.opened.model, build_model(base)
    assert not any(m.training for m in copy.modules())
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(torch.equal(p, q) for p, q in zip(copy.hf.parameters(), start.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(module.causal_lm.hf.parameters(), start.parameters(), strict=True))
    held = {p.data_ptr() for p in copy.parameters()}
    assert held.isdisjoint(p.data_ptr() for p in module.parameters())
    assert held.isdisjoint(p.data_ptr() for group in module.trainer.optimizers[0].param_groups for p in group["params"])
    saved = torch.load(tmp_path / "step-00000002.ckpt", weights_only=True)
    assert {name.removeprefix("model.hf.") for name in saved["state_dict"]} == set(start.state_dict())
    assert set(saved["reference"]) == {"fingerprint"}


class Moves(L.Callback):
    """The weights of policy and reference after each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        if not trainer.fit_loop._should_accumulate():
            copy = module.reference.opened.model.hf.named_parameters()
            policy = dict(module.causal_lm.hf.named_parameters())
            self.steps.append({n: (policy[n].detach().clone(), p.detach().clone()) for n, p in copy})


@pytest.mark.parametrize("kwargs", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_the_reference_moves_towards_the_policy_every_so_many_steps(tmp_path, base, kwargs):
    moves, record = Moves(), Record()
    module = dpo(base, sgd, sync_every=2, mixup=0.3, **kwargs)
    data = dpo_data(tmp_path, ROWS, batch_size=1)
    fit(module, data, max_steps=5, accumulate_grad_batches=2, callbacks=[moves, record])
    assert "moved by 0.3 every 2 steps" in module.notes[0]
    names = set(dict(module.causal_lm.hf.named_parameters())) if not kwargs else set(trainable(module.causal_lm.hf))
    assert [u["kl"] == 0 for u in record.updates] == [True, *[False] * 4]
    before = moves.steps[0]
    for step, after in enumerate(moves.steps[1:], start=2):
        changed = {name for name, (_, copy) in after.items() if not torch.equal(copy, before[name][1])}
        assert changed <= names
        assert bool(changed) is (step % 2 == 0), step
        for name in changed:
            expected = 0.7 * before[name][1] + 0.3 * after[name][0]
            torch.testing.assert_close(after[name][1], expected, rtol=1e-5, atol=1e-7)
        before = after


def test_a_reference_that_moves_all_the_way_is_the_policy(tmp_path, base):
    _, updates = run(tmp_path, base, steps=3, sync_every=1, mixup=1.0)
    assert [u["kl"] for u in updates] == [0.0, 0.0, 0.0]
    assert [u["rewards/accuracies"] for u in updates] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kwargs", [{"reference": "online"}, {"sync_every": 1}], ids=["online", "moving"])
def test_a_copy_in_less_precision(tmp_path, base, kwargs):
    module, updates = run(tmp_path, base, reference_dtype="bfloat16", **kwargs)
    assert {p.dtype for p in module.reference.opened.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.causal_lm.parameters()} == {torch.float32}
    assert updates[0]["loss"] == pytest.approx(0.6931, abs=1e-2)


def test_another_model_in_less_precision(tmp_path, base, other, computed):
    full, _ = run(tmp_path, base, reference=other)
    half, _ = run(tmp_path, base, reference=other, reference_dtype="bfloat16")
    assert len(computed) == 2 * ROWS
    off = (cached(full) - cached(half)).abs().max()
    assert 1e-4 < off < 0.1
    hf = build_model(other, dtype="bfloat16")
    example = half.trainer.datamodule.examples("train")[0]
    with torch.no_grad():
        expected = sum(float(log_probabilities(hf, *sequence).sum()) for sequence in responses(example))
    actual = float(half.reference.opened.stores["train"].logps([0]).sum())
    assert actual == pytest.approx(expected, rel=1e-2)


# ---- adapters


@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_are_disabled_only_where_that_gives_the_base(tmp_path, base, bias):
    """Biases are trained in the base itself."""
    config = {"attention_bias": True, "mlp_bias": True}
    folder = pretrained(tmp_path / "biased", **config)
    lora = LORA | {"bias": bias}
    module, losses = run(tmp_path, folder, steps=4, lora=lora)
    assert ("disabled" in module.notes[0]) is (bias == "none")
    assert losses[0]["rewards/margins"] == 0.0
    _, expected = run(tmp_path, folder, steps=4, lora=lora, reference="online")
    assert [u["loss"] for u in losses] == pytest.approx([u["loss"] for u in expected], rel=1e-6)


def test_the_policy_has_its_adapters_again_after_the_reference_ran(tmp_path, base):
    module, _ = run(tmp_path, base, lora=LORA)
    batch = module.trainer.datamodule.batch("train", [0])
    with torch.no_grad():
        policy = module.causal_lm(batch)
        without = module.reference.opened.logps(batch, "train")
        assert not torch.equal(without, policy)
        assert torch.equal(module.causal_lm(batch), policy)
        plain = dpo(base).build(module.trainer.datamodule.tokenizer, branching=True)
        assert torch.equal(plain(batch), without)


# ---- none


@pytest.mark.parametrize("loss", [SimPO, ORPO, CPO])
@pytest.mark.parametrize("kwargs", [{}, {"reference": "none"}], ids=["left-out", "none"])
def test_losses_without_a_reference_load_none(tmp_path, base, computed, monkeypatch, loss, kwargs):
    built = []
    monkeypatch.setattr("oumi_pl.modules.base.build_model", lambda *a, **k: built.append(a) or build_model(*a, **k))
    monkeypatch.setattr("oumi_pl.modules.reference.deepcopy", built.append)
    module, updates = run(tmp_path, base, loss=loss(), **kwargs)
    assert (len(built), computed) == (1, [])
    assert "no reference" in module.notes[0]
    assert loss.__name__ in module.notes[0]
    # rewards are the policy's own, and equal to no reference's
    assert updates[0]["rewards/margins"] != 0
    if loss is CPO:
        assert updates[0]["rewards/chosen"] == pytest.approx(module.loss.beta * updates[0]["logps/chosen"], rel=1e-6)
    assert all(torch.isfinite(w).all() for w in weights(module).values())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"reference": "none"}, r"model\.reference: none, but Sigmoid compares with a reference"),
        ({"sync_every": 0}, r"model\.sync_every is 0"),
        ({"sync_every": 2, "mixup": 0.0}, r"model\.mixup is 0\.0"),
        ({"sync_every": 2, "mixup": 1.5}, r"model\.mixup is 1\.5"),
        ({"sync_every": 2, "reference": "some/model"}, r"model\.sync_every moves the reference, .*'some/model'"),
        ({"reference_dtype": "bfloat16"}, r"model\.reference_dtype: .*set reference: online"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_loaded(kwargs, words):
    with pytest.raises(UserError, match=words):
        dpo("nowhere/to-be-found", loss=Sigmoid(), **kwargs)


def test_one_module_may_validate_and_then_train_and_be_tested(tmp_path, base):
    """A second command of the same module computes what it lacks, as long as the initial model is there to do so."""
    module, data = dpo(base), dpo_data(tmp_path, validation=0.25, test=str(tmp_path / "pairs-16-0.jsonl"))
    trainer(logger=False).validate(module, data, verbose=False)
    trainer(max_steps=2).fit(module, data)
    with pytest.raises(UserError, match="the reference of test can't be computed: the initial model has been trained"):
        trainer().test(module, data, verbose=False)


def test_a_loss_without_reference_logs_no_divergence_from_one(tmp_path, base):
    runner = trainer(max_steps=1)
    runner.fit(dpo(base, loss=SimPO()), dpo_data(tmp_path))
    assert "train/rewards/margins" in runner.callback_metrics
    assert "train/kl" not in runner.callback_metrics
