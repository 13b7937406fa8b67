"""Fingerprints of model weights, for the keys of cached model outputs."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from oumi_pl.models.build import loaded, read_adapter_config
from oumi_pl.models.hub import locate
from oumi_pl.models.sharding import is_sharded, quantized_layers, whole

_CHUNK = 1 << 24


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers by name, dtype, shape and bytes: 32 hex digits.

    All ranks have to call it if the model is sharded; it is that of the whole model.
    """
    state = model.state_dict()
    quantized = quantized_layers(model)
    for name, layer in quantized.items():  # which are left out of the state while the weights are sharded
        state |= {f"{name}.weight.{key}": value for key, value in layer.quant_state.as_dict(packed=True).items()}
    entries = sorted(state.items())
    as_bytes = {f"{name}.weight" for name in quantized}  # stored in one dtype or another
    if is_sharded(model):  # one at a time, since each is gathered whole
        parts = [_tensor_digest(whole(value), name in as_bytes) for name, value in entries]
    else:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            parts = list(pool.map(lambda entry: _tensor_digest(entry[1], entry[0] in as_bytes), entries))
    digest = hashlib.blake2b(digest_size=16)
    for (name, _), part in zip(entries, parts, strict=True):
        digest.update(name.encode() + b"\0" + part)
    return digest.hexdigest()


def model_fingerprint(name: str, key: str) -> str:
    """Fingerprint of a model on disk (its contents) or on the hub (its commit), without loading it.

    Args:
        name: Folder of a model or an adapter, or id on the hub.
        key: The key of the recipe that names it, for messages.

    Raises:
        UserError: it can't be found.
    """
    place = locate(name, key)
    folder = Path(place)
    if not folder.is_dir():
        from transformers import AutoConfig

        return f"{place}@{loaded(AutoConfig.from_pretrained, place)._commit_hash}"
    digest = _folder_digest(folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        digest += f" on {model_fingerprint(str(base), key)}"
    return digest


def _folder_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", ".py") or file.name in ("config.json", "adapter_config.json"):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as content:
                while block := content.read(_CHUNK):
                    digest.update(block)
    return digest.hexdigest()


def _tensor_digest(value: Tensor, as_bytes: bool = False) -> bytes:
    flat = value.detach().cpu().contiguous().view(-1)
    if as_bytes:
        value = flat.view(torch.uint8)[:, None]
    digest = hashlib.blake2b(f"{value.dtype} {list(value.shape)}".encode(), digest_size=16)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
