"""LoRA: which weights are trained, what a checkpoint holds, and gradients equal to those of the plain computation."""

import lightning as L
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import LM
from oumi_pl.modules.sft import SFT
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.architectures import small
from tests.tiny import LLAMA, data, trainer
from tests.trees import batch_of_rows

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTER = {"r": 4, "lora_dropout": 0.1}


def plain_tokenizer():
    """Bytes, pad and EOS: a chat template brings its tokens along."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|endoftext|>")


def pretrained(path, tokenizer=None, dtype=torch.float32, room=0, **values):
    """A "pretrained" model with its tokenizer, in a folder. `room`: rows beyond the tokenizer's."""
    torch.manual_seed(0)
    tokenizer = tokenizer or ByteTokenizer().build()
    config = AutoConfig.for_model(**LLAMA | {"vocab_size": len(tokenizer) + room} | values)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def run(path, sft, resume=None, directory=None, **kwargs):
    """Trains; checkpoints every second update into `directory`."""
    callbacks = []
    if directory is not None:
        callbacks = [Checkpoints(every=2, keep=9)]
        callbacks[0].directory = directory
    sft_data = data(path, batch_size=4, **{"tokenizer": None} | kwargs.pop("data", {}))
    L.seed_everything(1)
    kwargs = {"max_epochs": 1, "enable_checkpointing": directory is not None} | kwargs
    trainer(callbacks=callbacks, plugins=[AtomicCheckpointIO()], **kwargs).fit(
        sft, sft_data, ckpt_path=resume, weights_only=True
    )
    return sft, sft_data


def trainable(hf):
    return {name: p for name, p in hf.named_parameters() if p.requires_grad}


def read(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


# ---- which layers


def test_all_linear_layers_but_the_head_by_default(tmp_path):
    hf = build_model(pretrained(tmp_path), lora={"r": 4})
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(hf)}
    assert names == LINEAR
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable(hf))
    assert len(trainable(hf)) == 2 * 2 * len(LINEAR)


MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "phimoe",
    "llama4_text",
]

OTHERS = ["embed_tokens", "lm_head", "conv1d"]


def gradients_of_weights(hf):
    """Names of the weights, by hooks on nothing but the parameters: those that a batch of many tokens reaches."""
    ids = torch.arange(4 * 60).view(4, 60) % 90
    hf(input_ids=ids, use_cache=False).logits.square().sum().backward()
    return {name for name, p in hf.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_includes_experts_and_routers_of_every_architecture(name):
    """Every matrix of the layers has an adapter: as many as a full fine-tuning would train."""
    config = small(name)
    hf = build_model(None, config=config)
    matrices = {n for n, p in hf.named_parameters() if p.ndim > 1 and not any(x in n for x in OTHERS)}
    with_adapters = moved(None, config=config, lora={"r": 2})
    adapted = set()
    for path, module in with_adapters.get_base_model().named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            layer = path.replace(".base_layer", "")
            adapted.add(f"{layer}.{getattr(module, 'parameter_name', 'weight')}")
    assert adapted == matrices
    reached = gradients_of_weights(with_adapters)
    assert all(n in reached for n in trainable(with_adapters)), "an adapter changes nothing"


def test_all_linear_leaves_out_what_the_model_reads_without_calling():
    """Jamba multiplies with the weight of `dt_proj` itself: an adapter there would be trained for nothing."""
    hf = build_model(None, config=small("jamba"), lora={"r": 2})
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(hf)}
    assert "dt_proj" not in names
    assert {"in_proj", "x_proj", "out_proj"} <= names


@pytest.mark.parametrize("name", ["mamba", "falcon_h1"])
def test_all_linear_leaves_out_what_peft_refuses(name):
    hf = build_model(None, config=small(name), lora={"r": 2})
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(hf)}
    assert "in_proj" in names
    assert "out_proj" not in names


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_adapters_of_experts_can_not_do_is_refused(lora):
    with pytest.raises(
        UserError, match=rf"model\.lora: {next(iter(lora))}.* the weights of experts.*name target_modules"
    ):
        build_model(None, config=small("gpt_oss"), lora={"r": 2} | lora)
    build_model(None, config=small("gpt_oss"), lora={"r": 2, "target_modules": ["q_proj"]} | lora)


def test_unknown_layers_are_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"model\.lora.*linear layers of this model: .*down_proj.*q_proj"):
        build_model(pretrained(tmp_path), lora={"r": 4, "target_modules": ["c_attn"]})


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, r"model\.lora\.rank: unknown key"),
        ({"lora_alfa": 4}, r"model\.lora\.lora_alfa.*did you mean 'lora_alpha'"),
        ({"init_lora_weights": "pissa"}, r"model\.lora\.init_lora_weights.*rewrites the base"),
    ],
)
def test_keys_are_checked_before_anything_is_loaded(lora, words):
    with pytest.raises(UserError, match=words):
        SFT(model="nowhere/to-be-found", lora=lora)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 8}], ids=["dora", "rslora"])
def test_variants_of_lora_train(tmp_path, lora):
    folder = pretrained(tmp_path / "base")
    before = build_model(folder, lora={"r": 4} | lora)
    sft, _ = run(tmp_path, SFT(folder, lora={"r": 4} | lora, optimizer=adamw))
    after = trainable(sft.causal_lm.hf)
    assert after.keys() == trainable(before).keys()
    assert all(not torch.equal(p, trainable(before)[name]) for name, p in after.items() if "lora_B" in name)


# ---- numbers


def batch(rows=3, length=12):
    ids = torch.arange(rows * length).view(rows, length) % 90
    return batch_of_rows(ids, ids.roll(-1, 1))


def loss_of(hf, inputs):
    return LM(hf)(inputs, lambda states: states.loss_sum(CrossEntropy())).loss_sum


def naive_loss(hf, inputs):
    """From the full logits, by transformers' own forward pass over a rectangle of rows."""
    length = inputs["segments"][0].length
    logits = hf(input_ids=inputs["input_ids"].view(-1, length), use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["targets"], reduction="sum")


def moved(folder, **kwargs):
    """A model as if trained: LoRA's B starts at zero, which would hide most gradients."""
    torch.manual_seed(5)
    hf = build_model(folder, **kwargs)
    for p in trainable(hf).values():
        p.data += 0.1 * torch.randn_like(p)
    return hf


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_naive_loss(tmp_path, tied):
    """The head is frozen: only gradients by the hidden states may leave the loss, and they must be all there."""
    folder = pretrained(tmp_path, tie_word_embeddings=tied)
    ours, naive = (moved(folder, lora={"r": 4}) for _ in range(2))
    loss, expected_loss = loss_of(ours, batch()), naive_loss(naive, batch())
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    for name, p in trainable(ours).items():
        expected = trainable(naive)[name].grad
        assert (p.grad - expected).norm() < 1e-5 * expected.norm(), name
    assert ours.get_output_embeddings().weight.grad is None


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = pretrained(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        hf = moved(folder, lora=ADAPTER, gradient_checkpointing=checkpointing)
        torch.manual_seed(2)  # LoRA's dropout
        loss_of(hf, batch()).backward()
        gradients.append({name: p.grad for name, p in trainable(hf).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.norm() > 0 for gradient in gradients[1].values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_adapters_are_float32_on_a_bfloat16_base(tmp_path, precision):
    folder = pretrained(tmp_path / "base", plain_tokenizer(), dtype=torch.bfloat16)
    sft = SFT(folder, dtype="bfloat16", lora=ADAPTER, optimizer=adamw)
    run(tmp_path, sft, precision=precision, max_steps=1, data={"template": "chatml"})
    hf = sft.causal_lm.hf
    assert {p.dtype for p in trainable(hf).values()} == {torch.float32}
    assert {p.dtype for p in hf.parameters() if not p.requires_grad} == {torch.bfloat16}


# ---- checkpoints


def test_a_checkpoint_holds_the_adapter_alone_and_resumes(tmp_path):
    folder = pretrained(tmp_path / "base", room=4000)

    def make():
        return SFT(folder, lora=ADAPTER, optimizer=adamw)

    whole, _ = run(tmp_path, make(), directory=tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "step-00000002.ckpt"
    saved = read(checkpoint)
    assert {name.removeprefix("model.hf.") for name in saved} == trainable(whole.causal_lm.hf).keys()
    adapter = 4 * sum(p.numel() for p in trainable(whole.causal_lm.hf).values())
    # the adapter, AdamW's two moments, and some overhead per tensor; the base alone has 1.2 MB
    assert checkpoint.stat().st_size < 3 * adapter + 200_000 < 300_000
    resumed, _ = run(tmp_path, make(), resume=checkpoint, directory=tmp_path / "resumed")
    expected = dict(whole.causal_lm.hf.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.causal_lm.hf.named_parameters())


def test_a_checkpoint_on_random_weights_holds_everything(tmp_path):
    sft = SFT(config=LLAMA, lora=ADAPTER, optimizer=adamw)
    run(tmp_path, sft, directory=tmp_path / "run", data={"tokenizer": ByteTokenizer()})
    saved = read(tmp_path / "run" / "step-00000002.ckpt")
    assert {name.removeprefix("model.hf.") for name in saved} == set(sft.causal_lm.hf.state_dict())


# ---- added tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("room", [0, 6])
def test_rows_of_added_tokens_are_trained_and_saved(tmp_path, tied, room):
    tokenizer = plain_tokenizer()
    folder = pretrained(tmp_path / "base", tokenizer, tie_word_embeddings=tied, room=room)

    def make():
        return SFT(folder, lora=ADAPTER, optimizer=adamw)

    sft, sft_data = run(tmp_path, make(), directory=tmp_path / "run", data={"template": "chatml"})
    added = sft_data.added_tokens
    assert added == [len(tokenizer), len(tokenizer) + 1]
    base = sft.causal_lm.base
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    old = AutoModelForCausalLM.from_pretrained(folder)
    for layer, before in zip(layers, (old.model.embed_tokens, old.lm_head), strict=True):
        rows, mean = layer.weight[added], before.weight[: len(tokenizer)].mean(0)
        assert (rows - mean).norm(dim=1).min() > 1e-2, "a row did not move"
        assert torch.equal(layer.weight[: len(tokenizer)], before.weight[: len(tokenizer)])
    assert torch.equal(layers[0].weight, layers[1].weight) is tied
    deltas = [name for name in read(tmp_path / "run" / "step-00000002.ckpt") if "trainable_tokens" in name]
    assert len(deltas) == (1 if tied else 2)
    resumed, _ = run(
        tmp_path, make(), tmp_path / "run" / "step-00000002.ckpt", tmp_path / "again", data={"template": "chatml"}
    )
    expected = trainable(sft.causal_lm.hf)
    assert all(torch.equal(p, expected[name]) for name, p in trainable(resumed.causal_lm.hf).items())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_added_rows_are_those_of_the_naive_loss(tmp_path, tied):
    tokenizer = plain_tokenizer()
    folder = pretrained(tmp_path, tokenizer, tie_word_embeddings=tied)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    added = [len(tokenizer) - 2, len(tokenizer) - 1]
    kwargs = {"tokenizer": tokenizer, "added_tokens": added, "lora": {"r": 4}}
    ours, naive = (moved(folder, **kwargs) for _ in range(2))
    inputs = batch()
    inputs["input_ids"].view(3, 12)[:, ::3] = inputs["targets"].view(3, 12)[:, 1::4] = added[0]
    loss_of(ours, inputs).backward()
    naive_loss(naive, inputs).backward()
    for name, p in trainable(ours).items():
        expected = trainable(naive)[name].grad
        assert (p.grad - expected).norm() < 1e-5 * expected.norm(), name


def test_a_head_whose_bias_peft_would_drop_is_refused(tmp_path):
    tokenizer = plain_tokenizer()
    folder = pretrained(tmp_path, tokenizer, model_type="phi")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    added = [len(tokenizer) - 1]
    with pytest.raises(UserError, match=r"lm_head has a bias.*modules_to_save: \[model.embed_tokens, lm_head\]"):
        build_model(folder, tokenizer=tokenizer, added_tokens=added, lora={"r": 4})
    whole = {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    hf = build_model(folder, tokenizer=tokenizer, added_tokens=added, lora=whole)
    assert {name for name in trainable(hf) if "lora" not in name} == {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.bias",
    }


def test_an_exported_adapter_can_be_trained_further(tmp_path):
    """The folder of an adapter is a model: its base with the adapter added, under a new adapter."""
    base = pretrained(tmp_path / "base")
    first = moved(base, lora={"r": 4})
    first.save_pretrained(tmp_path / "adapter")
    ByteTokenizer().build().save_pretrained(tmp_path / "adapter")
    second = build_model(str(tmp_path / "adapter"), lora={"r": 2})
    ids = batch()["input_ids"].view(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(second.eval()(ids).logits, first.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert {p.shape[0] for name, p in trainable(second).items() if "lora_A" in name} == {2}
    sft, _ = run(tmp_path, SFT(str(tmp_path / "adapter"), lora={"r": 2}, optimizer=adamw), max_steps=1)
    assert sft.causal_lm.hf.why_not_alone
