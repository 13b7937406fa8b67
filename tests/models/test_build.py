"""Building and loading models: the recipe decides what is trained; what can't be built is an error of one line."""

import json
import socket
import time
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models import build, hub
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import LM
from tests.models.test_lora import pretrained
from tests.tiny import LLAMA
from tests.trees import batch_of_rows

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


def save(path, tokenizer=None, dtype=torch.float32, **values):
    """A "pretrained" model: random weights in a folder."""
    torch.manual_seed(0)
    config = {"vocab_size": len(tokenizer) if tokenizer else 97} | LLAMA | values
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    hf.save_pretrained(path)
    return hf


def logits(hf, ids=None):
    ids = torch.arange(12)[None] if ids is None else ids
    training = hf.training
    with torch.no_grad():
        out = hf.eval()(ids).logits
    hf.train(training)
    return out


def refused(words, *args, **kwargs):
    with pytest.raises(UserError) as error:
        build_model(*args, **kwargs)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    return message


# ---- from a config


def test_random_weights_follow_the_tokenizer(tokenizer):
    hf = build_model(None, config=LLAMA, tokenizer=tokenizer)
    assert hf.training
    assert hf.config.vocab_size == len(hf.get_input_embeddings().weight) == len(tokenizer)
    assert (hf.config.eos_token_id, hf.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert {p.dtype for p in hf.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_sise": 32}, ["model.config.hidden_sise", "did you mean 'hidden_size'"]),
        ({"model_type": "lama"}, ["model.config.model_type", "'lama'", "did you mean 'llama'"]),
        ({"model_type": None}, ["name a model", "model_type"]),
        ({"hidden_size": "wide"}, ["model.config", "hidden_size", "expected int"]),
        ({"hidden_act": "relux"}, ["model.config", "llama", "relux"]),
        ({"vocab_size": 100}, ["model.config.vocab_size: 100", "tokens", "leave it out"]),
    ],
)
def test_wrong_configs_are_refused(tokenizer, config, words):
    refused(words, None, config=LLAMA | config, tokenizer=tokenizer)


def test_rope_values_may_have_their_old_names():
    values = {"vocab_size": 97, "rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    rope = build_model(None, config=LLAMA | values).config.rope_parameters
    assert rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}


def test_values_that_a_model_reads_though_its_config_does_not_declare_them(tmp_path, tokenizer):
    """Qwen3-MoE reads `head_dim` with `getattr`."""
    moe = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert build_model(None, config=moe, tokenizer=tokenizer).model.layers[0].self_attn.head_dim == 8
    hf = build_model(None, config=moe | {"head_dim": 16}, tokenizer=tokenizer)
    assert hf.model.layers[0].self_attn.head_dim == 16
    hf.save_pretrained(tmp_path)
    assert torch.equal(logits(build_model(str(tmp_path), config={"head_dim": 16})), logits(hf))
    refused(["model.config.head_dims"], None, config=moe | {"head_dims": 16}, tokenizer=tokenizer)


def test_attention_falls_back_where_an_architecture_lacks_it(tokenizer):
    gemma = LLAMA | {"model_type": "gemma2", "head_dim": 8}
    assert build_model(None, config=gemma, tokenizer=tokenizer).config._attn_implementation == "eager"
    assert build_model(None, config=LLAMA, tokenizer=tokenizer).config._attn_implementation == "sdpa"
    refused(["model.attn", "'sdpa'", "leave it out"], None, config=gemma, tokenizer=tokenizer, attn="sdpa")


@pytest.mark.parametrize(
    ("key", "words"),
    [("documents", "can't keep packed documents apart"), ("hidden", "can't build this llama: KeyError: 'hidden'")],
)
def test_an_error_blames_the_attention_only_if_it_names_it(monkeypatch, tmp_path, key, words):
    def fail(*_, **__):
        raise KeyError(key)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    refused([words], None, config=LLAMA | {"vocab_size": 99}, attn="documents")
    monkeypatch.undo()
    save(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    at_load = words if key == "documents" else "KeyError: 'hidden'"
    refused([at_load], str(tmp_path), attn="documents")


# ---- from a folder


def test_a_folder_is_loaded_unchanged(tmp_path, tokenizer):
    saved = save(tmp_path, tokenizer)
    hf = build_model(str(tmp_path), tokenizer=tokenizer)
    assert hf.training
    assert torch.equal(logits(hf), logits(saved))
    assert hf.config._name_or_path == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_dtype(tmp_path, dtype, expected):
    save(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in build_model(str(tmp_path), dtype=dtype).parameters()} == {expected}


def test_config_values_override_the_pretrained_ones(tmp_path):
    save(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    plain = build_model(str(tmp_path))
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    hf = build_model(str(tmp_path), config={"max_position_embeddings": 99, "attention_dropout": 0.5} | linear)
    assert (hf.config.max_position_embeddings, hf.config.attention_dropout) == (99, 0.5)
    # the frequency of the pretrained model stays
    assert hf.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0}
    assert not torch.allclose(logits(hf), logits(plain))
    theta = build_model(str(tmp_path), config={"rope_theta": 10.0})
    assert not torch.allclose(logits(theta), logits(plain))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"atention_dropout": 0.1}, ["model.config.atention_dropout", "did you mean 'attention_dropout'"]),
        ({"num_hidden_layers": 3}, ["lacks", "layers.2", "model.config adds weights"]),
        ({"hidden_size": 64}, ["don't fit the config", "model.config"]),
        ({"num_hidden_layers": "two"}, ["model.config.num_hidden_layers", "expected int"]),
    ],
)
def test_overrides_that_do_not_fit_the_weights_are_refused(tmp_path, config, words):
    save(tmp_path)
    refused(words, str(tmp_path), config=config)


def test_missing_weights_are_an_error_and_not_random(tmp_path):
    """A tied model has no head of its own: untied by the recipe, transformers would start it at random and go on."""
    save(tmp_path, tie_word_embeddings=True)
    refused(["lacks 1", "lm_head.weight"], str(tmp_path), config={"tie_word_embeddings": False})


def test_folders_without_a_model_are_refused(tmp_path, monkeypatch):
    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(["./smolm", "no folder", "did you mean 'smollm'"], "./smolm")
    refused(["runs/x/model", "no folder"], "runs/x/model")
    refused(["smollm", "config.json"], "smollm")
    (tmp_path / "step-1.ckpt").write_bytes(b"x")
    refused(["step-1.ckpt is a file", "oumi_pl export"], "step-1.ckpt")


def test_only_safetensors_are_loaded(tmp_path):
    hf = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(["no *.safetensors"], str(tmp_path))
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle, which may run code
    refused(["no *.safetensors"], str(tmp_path))


def test_code_of_a_model_does_not_run(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(["trust_remote_code: true"], str(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---- hub names


def test_a_hub_name_offline_says_where_it_was_looked_for(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(["'someone/model'", str(tmp_path), "HF_HUB_OFFLINE"], "someone/model")


def test_an_unreachable_hub_fails_within_seconds(monkeypatch, tmp_path):
    """A listening socket that never answers: left alone, transformers would ask for minutes."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hub, "TIMEOUT", 1.0)
        start = time.monotonic()
        refused(["'someone/model'", constants.ENDPOINT, "can't be reached"], "someone/model")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RepositoryNotFoundError", ["nor on the hub", "hf auth login"]),
        ("GatedRepoError", ["is gated", "accept its terms"]),
        ("RevisionNotFoundError", ["no revision 'v2'"]),
    ],
)
def test_answers_of_the_hub_become_clear_errors(monkeypatch, tmp_path, kind, words):
    import huggingface_hub
    from huggingface_hub import constants, errors

    def answer(*_, **__):
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(["'someone/model'", *words], "someone/model", revision="v2")
    kind = (
        "EntryNotFoundError"  # no config.json, which a tokenizer alone does without: it is for the loader to find out
    )
    assert hub.locate("someone/model", "data.tokenizer") == "someone/model"


# ---- vocabularies


def last_two(tokenizer):
    return [len(tokenizer) - 2, len(tokenizer) - 1]


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    save(tmp_path)
    refused([f"{len(tokenizer)} tokens", "vocabulary 97", "data.tokenizer"], str(tmp_path), tokenizer=tokenizer)
    # with tokens added it would be resized without a word
    words = [f"{len(tokenizer) - 2} tokens", "vocabulary 97"]
    refused(words, str(tmp_path), tokenizer=tokenizer, added_tokens=last_two(tokenizer))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("room", [-2, 4])
def test_rows_of_added_tokens_are_the_mean_of_the_trained_ones(tmp_path, tokenizer, tied, room):
    """Appended, or in the room that a padded vocabulary has: its unused rows don't count."""
    n = len(tokenizer)
    saved = save(tmp_path, vocab_size=n + room, tie_word_embeddings=tied)
    hf = build_model(str(tmp_path), tokenizer=tokenizer, added_tokens=last_two(tokenizer))
    assert hf.config.vocab_size == max(n + room, n)
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) is tied
    for layer, old in ((hf.model.embed_tokens, saved.model.embed_tokens), (hf.lm_head, saved.lm_head)):
        assert torch.equal(layer.weight[: n - 2], old.weight[: n - 2])
        torch.testing.assert_close(layer.weight[n - 2 : n], old.weight[: n - 2].mean(0).expand(2, -1))
        assert torch.equal(layer.weight[n:], old.weight[n:])


def test_a_token_that_was_there_before_keeps_its_row(tmp_path):
    """A template makes `<|im_end|>` special where the vocabulary has it already: then it is not new."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>", "<|endoftext|>"]
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    before = tokenizer.get_vocab()
    added = SFTData(template="chatml").prepare_tokenizer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(added) == ["<|im_start|>"]
    assert all(tokenizer.get_vocab()[token] == i for token, i in before.items())
    saved = save(tmp_path, vocab_size=len(symbols))
    hf = build_model(str(tmp_path), tokenizer=tokenizer, added_tokens=added)
    assert torch.equal(hf.model.embed_tokens.weight[: len(symbols)], saved.model.embed_tokens.weight)


def test_added_tokens_of_random_weights_have_different_rows(tokenizer):
    """Two added tokens with the same row would start as the same token, for no reason."""
    hf = build_model(None, config=LLAMA, tokenizer=tokenizer, added_tokens=last_two(tokenizer))
    assert not torch.equal(*hf.model.embed_tokens.weight[-2:])


# ---- what is trained


def test_freeze(tmp_path):
    save(tmp_path)
    hf = build_model(str(tmp_path), freeze=["model.embed_tokens", "model.layers.0"])
    frozen = {name for name, p in hf.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in hf.named_parameters() if n.startswith(("model.embed_tokens", "model.layers.0."))}
    refused(
        ["model.freeze", "model.embed_token", "did you mean 'model.embed_tokens'"],
        str(tmp_path),
        freeze=["model.embed_token"],
    )


@pytest.mark.parametrize("config", [LLAMA, GPT2 | {"resid_pdrop": 0.2}], ids=["llama", "gpt2 with dropout"])
def test_gradient_checkpointing_changes_no_gradient(tokenizer, config):
    ids = torch.arange(30).view(2, 15)
    batch = batch_of_rows(ids, ids)
    losses, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        hf = build_model(None, config=config, tokenizer=tokenizer, gradient_checkpointing=checkpointing)
        calls = count_calls(hf)
        torch.manual_seed(1)
        loss = LM(hf)(batch, lambda states: states.loss_sum(CrossEntropy())).loss_sum
        loss.backward()
        assert len(calls) == (4 if checkpointing else 2), "layers were not run again in the backward pass"
        losses.append(loss)
        gradients.append([p.grad for p in hf.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def count_calls(hf):
    calls = []
    for module in hf.modules():
        if type(module).__name__ in ("LlamaAttention", "GPT2Attention") and isinstance(module, nn.Module):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_quantization_without_its_requirements_is_refused(tmp_path, monkeypatch):
    save(tmp_path)

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(build, "version", absent)
    refused(["model.quantization", "oumi_pl[gpu]"], str(tmp_path), quantization="nf4", lora={"r": 4})
    monkeypatch.setattr(build, "version", lambda name: "0.49.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["model.quantization", "without a CUDA device needs bitsandbytes 0.50", "0.49.2 is installed"]
    refused(words, str(tmp_path), quantization="nf4", lora={"r": 4})


def test_damaged_weights_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="can't load"):
        build_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attention_dropout": 10**400}, "attention_dropout"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_parameters.rope_theta"),
    ],
)
def test_numbers_that_torch_can_not_take_are_refused_by_their_key(tmp_path, changes, key):
    folder = pretrained(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=rf"config\.json: {key} is a number .* has to fit into 64 bits"):
        build_model(str(folder))


@pytest.mark.parametrize("value", [[[]], "", {}, [1, "a"], True, 10**19, [1, -(10**19)]])
def test_token_ids_in_a_generation_config_that_are_no_numbers_are_refused(tmp_path, value):
    folder = pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id in the generation_config\.json of .* has to be a token id"):
        build_model(str(folder), tokenizer=ByteTokenizer().build())


def test_a_config_that_leaves_layers_of_trained_weights_out_is_refused(tmp_path):
    folder = pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"num_hidden_layers\): 9 trained weights .* left out, first model.layers.1"):
        build_model(folder, config={"num_hidden_layers": 1})
    build_model(folder, config={"attention_dropout": 0.1})


def test_a_checkpoint_of_transformers_trainer_gives_its_weights_and_says_what_it_does_not(tmp_path, capsys, tokenizer):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none")
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    trainer = Trainer(model=save(tmp_path / "base", tokenizer), args=arguments, train_dataset=rows)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    capsys.readouterr()
    model = build_model(str(folder), tokenizer=tokenizer)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    build_model(str(folder), tokenizer=tokenizer)  # the line is there once
    assert capsys.readouterr().out == (
        f"note: {folder} is a checkpoint of transformers' Trainer, at step 1: the run starts from its weights; "
        "not taken over: optimizer, schedule, random states, step, position in the data\n"
    )
    build_model(str(tmp_path / "base"), tokenizer=tokenizer)
    assert "note" not in capsys.readouterr().out
