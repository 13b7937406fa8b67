"""The battery's rows about data, models, and places to write to and to fetch from."""

from tests.command_line import jsonl
from tests.error_battery_cases import (
    CHAT,
    DATA,
    GOOD,
    KEYS,
    MODEL,
    PRETRAINED,
    PRETRAINING,
    REWARDS,
    TEXTS,
    TOGETHER,
    VALUES,
    Case,
    hub_unreachable,
    of_gpt2,
    reads,
    saved,
    shards,
    without_permission,
)

ROWS = {
    "missing": Case("nope.jsonl: no such file or directory; it is looked for in HERE", args="--data.train nope.jsonl"),
    "missing, and misspelt": Case(
        "row.jsonl: no such file or directory; did you mean 'rows.jsonl'?", args="--data.train row.jsonl"
    ),
    "label of text": reads(
        jsonl(GOOD | {"label": 1}, GOOD | {"label": "good"}),
        "data.jsonl:2: column 'label' holds 'good' instead of a number, true or false",
        **REWARDS,
    ),
    "empty": reads("", "data.jsonl: the file is empty"),
    "unreadable": Case(
        "data.jsonl: cannot be read: Input/output error",
        {f"{DATA}train": "data.jsonl"},
        before=lambda cli, _: (cli.directory / "data.jsonl").symlink_to("/proc/self/mem"),
    ),
    "unreadable, one of a folder": Case(
        "d/b.jsonl: cannot be read: Input/output error",
        {f"{DATA}train": "d"},
        files={"d/a.jsonl": jsonl(GOOD)},
        before=lambda cli, _: (cli.directory / "d/b.jsonl").symlink_to("/proc/self/mem"),
    ),
    "binary": reads(
        b"\x00\x01\x02\xff",
        "data.jsonl:1: expected text, found binary data (a zero byte); tables are read from .parquet and .arrow files",
    ),
    "wrong encoding": reads(
        jsonl(GOOD).encode() + '{"prompt": "café"}'.encode("latin-1"),
        "data.jsonl:2: not UTF-8 text (0xe9 at byte 16 of the line, 53 of the file); save it as UTF-8, name its "
        "encoding ({path: data.jsonl, encoding: cp1252}), or have such bytes replaced: {path: data.jsonl, errors: "
        "replace}",
    ),
    "wrong encoding, UTF-16": reads(
        jsonl(GOOD).encode("utf-16"),
        "data.jsonl:1: expected UTF-8 text, found UTF-16; save it as UTF-8, or name its encoding: {path: data.jsonl, "
        "encoding: utf-16}",
    ),
    "corrupt line": reads(
        jsonl(GOOD, GOOD) + '{"prompt": "a\n',
        "data.jsonl:3: not valid JSON: Unterminated string starting at (column 12)",
    ),
    "missing column": reads(jsonl(GOOD, {"prompt": "a"}), "data.jsonl:2: no column 'response'; known: 'prompt'"),
    "response without a label": reads(
        jsonl(GOOD),
        "data.jsonl:1: no column says whether the response is good; known: label, kto_tag, desirable, thumbs, "
        "feedback, score, rating; say which of your columns it is with `columns`, e.g. {label: my_column}",
        **{"model.class_path": "KTO", "data.class_path": "KTOData"},
    ),
    "mixed formats": reads(
        jsonl(GOOD, CHAT),
        "data.jsonl:2: a row of the format messages, and those before it are prompt_response; put the rows of each "
        "format in a separate file, and name both as sources",
    ),
    "empty answer": reads(
        jsonl(*[GOOD | {"response": ""}] * 2),
        "data.train: the answers of all 2 rows are empty; the model would only learn to end at once",
    ),
    "all rows dropped": reads(
        jsonl(CHAT, CHAT),
        "data.train: none of 2 rows is left (2 longer than max_length); raise data.max_length, which is 5, or set "
        "data.overflow: truncate",
        **{f"{DATA}overflow": "drop", f"{DATA}max_length": 5},
    ),
    "no row held out": Case(
        "data.validation: 1e-09 of the rows of data.train, chosen by a hash of the prompt, leaves none for "
        "validation; name a source for validation, another fraction, or a data.group",
        {f"{DATA}validation": 1e-9},
    ),
    "unknown template": Case(
        "data.template: unknown chat template 'chatm'; did you mean 'chatml'? (or name a .jinja file)",
        {f"{DATA}template": "chatm"},
    ),
    "token shards overwritten": Case(
        "shards/train/tokens-00000.bin: holds the id 999, and the tokenizer has 260: it was overwritten or damaged; "
        "prepare it again",
        PRETRAINING,
        "--data.train shards",
        TEXTS,
        lambda cli, _: shards(cli, b"\xe7\x03"),
    ),
    "token shards incomplete": Case(
        "shards/train: the token files (tokens-*.bin) are missing; copy them too, or prepare it again",
        PRETRAINING,
        "--data.train shards",
        TEXTS,
        lambda cli, _: shards(cli, None),
    ),
}

NO_HUB = (
    "can't be reached: Name or service not known; without a network, name a folder, or fill the cache and set "
    "HF_HUB_OFFLINE=1"
)
MODELS = {
    "model folder without weights": Case(
        "model: HERE/m holds no weights (no *.safetensors); a run leaves them in its model/, and `export` makes "
        "them of a checkpoint",
        PRETRAINED,
        before=lambda cli, _: (saved(cli) / "model.safetensors").unlink(),
    ),
    "weights of another architecture": Case(
        "model: HERE/m lacks 28 of the weights that GPT2LMHeadModel has, first transformer.h.0.attn.c_attn.bias: "
        "it has another architecture, or model.config adds weights to it",
        PRETRAINED,
        before=of_gpt2,
    ),
    "weights cut short": Case(
        "model: can't load 'HERE/m': Error while deserializing header: header too small; the file is damaged or cut "
        "short: fetch it again",
        PRETRAINED,
        before=lambda cli, _: (saved(cli) / "model.safetensors").write_bytes(b""),
    ),
    "vocabulary of another tokenizer": Case(
        "model: the tokenizer has 260 tokens, the model's vocabulary 100: they don't belong together; set "
        "data.tokenizer "
        "to the model's own",
        PRETRAINED,
        before=lambda cli, _: saved(cli, vocab_size=100),
    ),
    "LoRA targets that match nothing": Case(
        "model.lora.target_modules: 'qproj' matches no layer; did you mean 'q_proj'? linear layers of this model: "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        {f"{MODEL}lora": {"r": 2, "target_modules": ["qproj"]}},
    ),
    "unknown optimizer": Case(
        "model.optimizer: unknown class 'AdamWW'; did you mean 'AdamW'?", {f"{MODEL}optimizer.class_path": "AdamWW"}
    ),
    "unknown schedule": Case(
        "model.schedule: unknown class 'Linaer'; did you mean 'Linear'?", args="--model.schedule Linaer"
    ),
    "output directory under a file": Case(
        "runs_dir: can't write to rows.jsonl/runs: rows.jsonl is not a directory", {"runs_dir": "rows.jsonl/runs"}
    ),
    "output directory not writable": Case(
        "runs_dir: can't write to out: no permission to write to .", {"runs_dir": "out"}, before=without_permission
    ),
    "cache directory not writable": Case(
        "can't create the cache directory HERE/cache: File exists; name another one with the environment variable "
        "OUMI_PL_CACHE",
        before=lambda cli, _: cli.write("cache", ""),
    ),
    "hub unreachable, model": Case(
        f"model: 'org/name' is no folder and not in the cache (/home/me/.cache/huggingface/hub), and "
        f"https://huggingface.co {NO_HUB}",
        PRETRAINED | {f"{MODEL}model": "org/name"},
        before=hub_unreachable,
    ),
    "hub unreachable, data": Case(
        "org/name: no such file or directory here; no copy of data set 'org/name' is in the cache "
        "(/home/me/.cache/huggingface/datasets), and the hub can't be reached; without a network, name a file, "
        "or fill the "
        "cache and set HF_HUB_OFFLINE=1",
        {f"{DATA}train": "org/name"},
        before=hub_unreachable,
    ),
    "run to resume that there is not": Case(
        "--resume: no run folder nope; it is looked for in HERE", args="--resume nope"
    ),
}

BATTERY = KEYS | VALUES | TOGETHER | ROWS | MODELS
