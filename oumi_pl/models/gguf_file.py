"""Writes a model folder as a GGUF file, which llama.cpp and Ollama read; the `gguf` package writes the format.

Llama, Mistral, Qwen2 and Qwen3, with byte-level BPE tokenizers. Everything else is refused by name, with the command of
llama.cpp's own converter, which knows more architectures.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OutType = Literal["f16", "q8_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` -> architecture of llama.cpp."""
INTERLEAVED = ("llama",)
"""Architectures of llama.cpp whose rotary embedding turns neighbouring dimensions; transformers turns halves."""
CONVERTER = "python convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype {outtype}  # of llama.cpp"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe", f"{_WORDS}\\p{{N}}{_REST}": "qwen2"}
"""Pattern of a tokenizer's `Split` -> llama.cpp's name of the pre-tokenizer."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF."""


def write_gguf(folder: Path, file: Path, outtype: OutType = "f16", name: str = "") -> None:
    """Writes a model folder as a GGUF file, with its tokenizer, chat template and special tokens.

    Matrices are float16 (or in blocks of 8 bits, where the length of their rows is a multiple of 32), vectors float32.
    Nothing is written before everything is known to be writable.

    Args:
        folder: A folder of whole weights, as `export` writes it.
        file: The file.
        outtype: `f16` or `q8_0`.
        name: Of the model; the folder's when left out.

    Raises:
        UserError: `gguf` isn't installed, or llama.cpp's own converter is needed.
    """
    gguf = import_gguf()
    config, tokenizer = read(folder, outtype)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(_architecture(gguf, architecture), config.num_hidden_layers)
    known = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in _names(folder, config)}
    for key, written in known.items():
        if written is None:
            refuse(f"a weight {key}", CONVERTER.format(folder=folder, outtype=outtype))
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name or folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[{"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[outtype]])
    factors = _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size, folder)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for key, values in _weights(folder, config, interleaved=architecture in INTERLEAVED):
        _add_tensor(gguf, writer, known[key], values, outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def import_gguf() -> Any:
    """The package.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf: pip install 'oumi_pl[gguf]'") from error
    return gguf


def read(folder: Path, outtype: str) -> tuple[Any, Any]:
    """Config and tokenizer of a model folder that can be written.

    Raises:
        UserError: it can't be.
    """
    from transformers import AutoConfig, AutoTokenizer

    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter alone, and GGUF needs whole weights: export its checkpoint")
    config = AutoConfig.from_pretrained(folder)
    refuse_other(config, None, folder, outtype)  # before its tokenizer, which may be none of transformers'
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refuse_other(config, tokenizer, folder, outtype)
    return config, tokenizer


def refuse_other(config: Any, tokenizer: Any, folder: Path | str, outtype: str, before: str = "") -> None:
    """Refuses a model or a tokenizer that only llama.cpp's own converter may know.

    Args:
        config: The model's, of transformers.
        tokenizer: Its tokenizer; None leaves it out.
        folder: Of the model, for the command of llama.cpp's converter.
        outtype: `f16` or `q8_0`.
        before: Command that writes the folder, if it is none yet.

    Raises:
        UserError: it is one; the message has the command.
    """
    if (what := _other(config, tokenizer)) is not None:
        refuse(what, before + CONVERTER.format(folder=folder, outtype=outtype))


def refuse(what: str, command: str) -> NoReturn:
    """Refuses a model, with the command that may write it.

    Raises:
        UserError: always.
    """
    raise UserError(f"--format gguf: {what} is not written here ({', '.join(ARCHITECTURES)} are); use\n  {command}")


def _other(config: Any, tokenizer: Any) -> str | None:
    """What of a model is not written here; None if everything is."""
    if config.model_type not in ARCHITECTURES:
        return f"the architecture {config.model_type}"
    if getattr(config, "quantization_config", None):
        return "weights that are quantized already"
    if getattr(config, "use_sliding_window", False):
        return "a sliding window"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return "a rotary embedding of a part of the dimensions"
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return f"positions scaled by {kind}"
    known = tokenizer is None or pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str())) is not None
    return None if known else "this tokenizer"


def _architecture(gguf: Any, name: str) -> Any:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


# --- what the model looks like ----------------------------------------------------------------------------------------


def _add_shape(writer: Any, config: Any) -> np.ndarray | None:
    """Writes the sizes of a model. Returns the factors on the wavelengths of its positions, if it has some."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    return _llama3_factors(rope, head_dim) if kind == "llama3" else None


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by, `[head_dim / 2]`: long waves by `factor`, short ones by 1."""
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves = 2 * np.pi / frequencies
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    length, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < length / high, 1.0, np.where(waves > length / low, factor, between))
    return factors.astype(np.float32)


# --- its weights ------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _is_written(name: str, config: Any) -> bool:
    return not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and config.tie_word_embeddings)


def _names(folder: Path, config: Any) -> Iterator[str]:
    """The names of the weights, of which no values are read."""
    from safetensors import safe_open

    for file in _files(folder):
        with safe_open(file, "pt") as tensors:
            yield from (name for name in tensors.keys() if _is_written(name, config))  # noqa: SIM118 - it is no dict


def _weights(folder: Path, config: Any, *, interleaved: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values `[out, in]` in float32 of each weight, one file of the folder after the other."""
    import torch
    from safetensors import safe_open

    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    for file in _files(folder):
        with safe_open(file, "pt") as tensors:
            for name in sorted(name for name in tensors.keys() if _is_written(name, config)):  # noqa: SIM118
                values = tensors.get_tensor(name).to(torch.float32).numpy()
                part = name.rpartition(".")[0].rpartition(".")[2]
                if interleaved and part in ("q_proj", "k_proj"):
                    values = interleave(values, heads if part == "q_proj" else groups)
                yield name, values


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from (first half, second half) to pairs of both, as llama.cpp turns them."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _add_tensor(gguf: Any, writer: Any, name: str, values: np.ndarray, outtype: str) -> None:
    if values.ndim < 2:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    if outtype == "q8_0" and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype(np.float16))


# --- its tokenizer ----------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, tokenizer: "PreTrainedTokenizerBase", size: int, folder: Path) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _vocabulary(tokenizer, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [""])  # llama.cpp wants a list; no pair of tokens is empty
    for kind in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    with_special = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(with_special) and with_special[0] == tokenizer.bos_token_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    ends = [token for token in stop_tokens(folder) if token != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level BPE tokenizer splits text before merging; None if it has none.

    Args:
        backend: Content of `tokenizer.json`.
    """
    normalizer, model = backend.get("normalizer"), backend["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or (normalizer and normalizer["type"] != "NFC"):
        return None
    pre = backend.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_gpt2 = steps[-1].get("use_regex", True)
    if len(steps) == 1:  # without merges, nothing depends on how a text is split
        return "gpt-2" if uses_gpt2 or not model["merges"] else None
    first = steps[0]
    if len(steps) == 2 and first["type"] == "Digits" and first["individual_digits"] and uses_gpt2:
        return "smollm"
    pattern = first.get("pattern", {}).get("Regex") if first["type"] == "Split" else None
    known = SPLITS.get(pattern or "") if len(steps) == 2 and not uses_gpt2 else None
    return None if known == "llama-bpe" and not model.get("ignore_merges") else known


def _vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embeddings; rows without a token are unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        is_added = added.get(index)
        types.append(NORMAL if is_added is None else CONTROL if is_added.special else USER_DEFINED)
    return tokens, types


def stop_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer, of `generation_config.json`."""
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# --- Ollama -----------------------------------------------------------------------------------------------------------

_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
FAMILIES = {
    "chatml": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama3": (
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
"""Templates that are a text per turn: that text, and what begins an answer."""


def modelfile(folder: Path, file_name: str) -> str:
    """The text of Ollama's Modelfile for a GGUF file beside it.

    Ollama has templates in a language of its own. One is written where the chat template writes each turn alike;
    otherwise Ollama looks for one of its own that fits.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    stops = [tokenizer.decode([token]) for token in stop_tokens(folder)]
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{file_name}"]
    if tokenizer.chat_template:
        written = _rendered(tokenizer)
        fitting = [family for family in FAMILIES.values() if _renders(*family) == written]
        if fitting:
            turn = fitting[0][0].format(role="{{ .Role }}", content="{{ .Content }}")
            lines.append(f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}{fitting[0][1]}"""')
        else:
            lines.append("# The chat template is in the file; if Ollama knows none like it, write it as TEMPLATE here.")
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops), ""])


def _rendered(tokenizer: Any) -> str | None:
    """What the chat template writes for some turns, without the BOS that llama.cpp adds; None if it refuses them."""
    from jinja2 import TemplateError

    try:
        written = tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # of a system turn, for example
        return None
    return re.sub(f"^{re.escape(tokenizer.bos_token or '')}", "", written)


def _renders(turn: str, start: str) -> str:
    return "".join(turn.format(**message) for message in _TURNS) + start
