"""GGUF files: read back, and run by llama.cpp where llama-cpp-python is installed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oumi_pl.__main__ import main
from oumi_pl.commands.export import export_gguf
from oumi_pl.data.sources import BUNDLED
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models import gguf_file
from oumi_pl.models.gguf_file import modelfile, pre_tokenizer, write_gguf

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'oumi_pl[gguf]'")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def saved(folder, kind, **more):
    """A model folder of random weights, also in norms and biases."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer().build()
    config = AutoConfig.for_model(kind, **(SHAPE | KINDS.get(kind, {}) | {"vocab_size": len(tokenizer) + 2} | more))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 257]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    made = {kind: saved(path / kind, kind) for kind in KINDS}
    return made | {"llama 3.1": saved(path / "llama3", "llama", rope_parameters=LLAMA3)}


def values(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def field(reader, name):
    return reader.get_field(name).contents()


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Name in transformers -> name in llama.cpp."""


def expected(folder, kind) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names. There, row `2 i + j` of a rotated head is its row `8 j + i` in transformers."""
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        start, _, end = name.rpartition(".")
        layer = start.removeprefix("model.layers.").partition(".") if start.startswith("model.layers.") else None
        key = NAMES[start] if layer is None else f"blk.{layer[0]}.{NAMES[layer[2]]}"
        rows = value.float().numpy()
        if kind in ("llama", "mistral", "llama 3.1") and NAMES.get(layer[2] if layer else "") in ("attn_q", "attn_k"):
            order = [16 * h + 8 * j + i for h in range(rows.shape[0] // 16) for i in range(8) for j in range(2)]
            rows = rows[order]
        tensors[f"{key}.{end}"] = rows
    return tensors


def differences(folder, kind, file, tolerance) -> list[str]:
    reader = gguf.GGUFReader(file)
    actual = {tensor.name: values(tensor) for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    wanted = expected(folder, kind)
    assert actual.keys() == wanted.keys()
    return [name for name in wanted if not np.allclose(actual[name], wanted[name], rtol=0, atol=tolerance)]


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("kind", [*KINDS, "llama 3.1"])
def test_every_weight_is_in_the_file_under_its_name(tmp_path, folders, kind, outtype, tolerance):
    write_gguf(folders[kind], tmp_path / "m.gguf", outtype)
    assert differences(folders[kind], kind, tmp_path / "m.gguf", tolerance) == []
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds == {"F32", {"f16": "F16", "q8_0": "Q8_0"}[outtype]}


def test_heads_in_transformers_order_would_be_noticed(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(gguf_file, "interleave", lambda values, heads: values)
    write_gguf(folders["llama"], tmp_path / "m.gguf")
    assert differences(folders["llama"], "llama", tmp_path / "m.gguf", 1e-3) == [
        f"blk.{layer}.attn_{name}.weight" for layer in (0, 1) for name in ("k", "q")
    ]


def test_shape_tokenizer_and_template_are_in_the_file(tmp_path, folders):
    write_gguf(folders["qwen3"], tmp_path / "m.gguf", name="mine")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3"])
    wanted = {
        "general.architecture": "qwen3",
        "general.name": "mine",
        "qwen3.context_length": 256,
        "qwen3.block_count": 2,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eot_token_id": 257,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {name: field(reader, name) for name in wanted} == wanted
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert tokens[65] == "A"
    assert tokens[-3:] == ["<|im_end|>", "[PAD260]", "[PAD261]"]
    assert (types[65], types[259], types[260]) == (1, 3, 5)


def test_the_frequencies_of_llama_3_1_are_those_of_transformers(tmp_path, folders):
    write_gguf(folders["llama 3.1"], tmp_path / "m.gguf")
    tensor = next(one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if one.name == "rope_freqs.weight")
    model = AutoModelForCausalLM.from_pretrained(folders["llama 3.1"])
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    actual = plain / torch.from_numpy(values(tensor).copy())
    torch.testing.assert_close(actual, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "the architecture gpt2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "positions scaled by yarn",
        ),
    ],
)
def test_other_models_are_refused_by_name_with_llama_cpps_command(tmp_path, kind, more, message):
    folder = saved(tmp_path / "m", kind, **more)
    with pytest.raises(UserError) as error:
        write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert message in str(error.value)
    assert f"python convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype q8_0" in str(error.value)


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter alone, and GGUF needs whole weights"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def backend(pre, merges=(("a", "b"),), normalizer=None, **model):
    vocab = {token: i for i, token in enumerate(["a", "b", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **model))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda: backend(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
        (lambda: backend(BYTES, merges=()), "gpt-2"),
        (lambda: backend(BYTES), None),
        (lambda: backend(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
        (
            lambda: backend(
                pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
            ),
            "smollm",
        ),
        (lambda: backend(split(WORDS + r"\p{N}{1,3}" + REST), ignore_merges=True), "llama-bpe"),
        (lambda: backend(split(WORDS + r"\p{N}{1,3}" + REST)), None),
        (lambda: backend(split(WORDS + r"\p{N}" + REST), normalizer=normalizers.NFC()), "qwen2"),
        (lambda: backend(split(r"\w+")), None),
        (lambda: backend(pre_tokenizers.Metaspace()), None),
        (lambda: backend(BYTES, merges=(), normalizer=normalizers.Lowercase()), None),
    ],
)
def test_a_tokenizer_has_the_name_of_llama_cpps_pre_tokenizer_that_splits_alike(content, name):
    assert pre_tokenizer(content()) == name


def test_ollamas_file_has_the_turns_of_the_template_and_the_stop_tokens(folders):
    assert modelfile(folders["llama"], "m.gguf") == (
        "# ollama create NAME -f Modelfile && ollama run NAME\n"
        "FROM ./m.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
    )


def test_a_template_that_refuses_a_system_turn_is_left_to_ollama(tmp_path, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(tmp_path)
    assert "# The chat template is in the file;" in modelfile(tmp_path, "m.gguf")


def test_a_weight_that_llama_cpp_does_not_know_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", "llama", attention_bias=False)
    whole = load_file(folder / "model.safetensors")
    save_file(whole | {"model.layers.0.self_attn.gate.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    monkeypatch.setattr(gguf_file, "_weights", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(UserError, match=r"a weight model\.layers\.0\.self_attn\.gate\.weight"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_export_writes_the_file_from_a_model_folder_and_refuses_what_does_not_belong_to_it(tmp_path, folders):
    command = ["export", "--checkpoint", str(folders["llama"]), "--format", "gguf", "--outtype", "q8_0"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert main([*command, "--output", str(tmp_path / "new"), "--check", "vllm"]) == 2


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def compared(folder, file, texts, longest) -> tuple[int, float]:
    """How many greedy answers of llama.cpp are those of transformers, and the largest difference of log-probabilities.

    The latter is over all tokens of prompts and equal answers. Both tokenize the texts, with the same ids.
    """
    llama = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python").Llama(
        str(file), n_ctx=128, logits_all=True, verbose=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal, apart = 0, 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=longest, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )[0].tolist()
            logps = model(torch.tensor([out])).logits[0].log_softmax(-1)
        llama.reset()
        llama.eval(ids)
        answer = list(ids)
        while answer[-1] != tokenizer.eos_token_id and len(answer) < len(ids) + longest:
            answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(answer[-1:])
        equal += answer == out
        known = torch.tensor(np.array(llama.scores[: len(ids) if answer != out else len(out)])).log_softmax(-1)
        rows = torch.arange(len(known) - 1)
        targets = torch.tensor(out[1 : len(known)])
        apart = max(apart, float((known[rows, targets] - logps[rows, targets]).abs().max()))
    return equal, apart


@pytest.mark.parametrize("kind", [*KINDS, "llama 3.1"])
def test_llama_cpp_gives_the_same_log_probabilities(tmp_path, folders, kind):
    write_gguf(folders[kind], tmp_path / "m.gguf")
    texts = ["Hello, world 12", "né ß漢\n\n x", "a" * 60, "<|im_start|>user\nhi<|im_end|>\n"]
    _, apart = compared(folders[kind], tmp_path / "m.gguf", texts, 1)
    assert apart < 0.05  # of weights of this size in float16; 1 and more with heads in the wrong order


def test_llama_cpp_notices_heads_in_the_wrong_order(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(gguf_file, "interleave", lambda values, heads: values)
    write_gguf(folders["llama"], tmp_path / "m.gguf")
    assert compared(folders["llama"], tmp_path / "m.gguf", ["Hello, world 12"], 1)[1] > 0.5


@pytest.mark.slow
def test_the_quickstarts_model_answers_50_prompts_alike(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    assert main(["fit", "--config", "quickstart/sft", "--runs_dir", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs/quickstart-sft/model"
    rows = [json.loads(line) for line in (BUNDLED / "instructions/heldout.jsonl").read_text().splitlines()[:50]]
    asked = [f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n" for row in rows]
    for outtype, tolerance in (("f16", 0.05), ("q8_0", 0.5)):
        export_gguf(tmp_path / "runs/quickstart-sft", tmp_path / outtype, outtype)
        equal, apart = compared(folder, tmp_path / outtype / "model.gguf", asked, 28)
        assert (equal, apart < tolerance) == (50, True)
