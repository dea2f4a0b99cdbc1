"""Models by reference (:mod:`bench.models.references`), all loaded the same way.

Weights come from safetensors or GGUF only, so loading a model never unpickles anything. Heavy imports stand inside the
functions: a command that loads no model does not wait for torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.models import embedded, gguf
from bench.models.hub import fetch_hub
from bench.models.kernels import prepare_kernels
from bench.models.library import check_complete, load_transformers, transformers_errors
from bench.models.references import ModelSource, resolve
from bench.models.storage import remembered_sha256
from tasks.errors import nearest

if TYPE_CHECKING:
    import torch


DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class DescribedModel:
    """A model without its weights: what prompts are made with, and the facts about it that a record keeps."""

    config: Any
    """The transformers config."""
    tokenizer: Any
    name: str
    source: str
    """A path, a hub id or a pinned requirement."""
    reference: str
    """What :func:`load` takes for the same model in any working directory."""
    folder: Path
    """The folder that config and tokenizer were read from."""
    revision: str | None
    """Commit on the hub; None for local and embedded models."""
    fingerprint: str
    """SHA-256 over weights and config, see :func:`fingerprint`; on the hub the commit."""
    context_length: int | None
    """In tokens; None where the config does not say."""
    is_chat: bool
    """The tokenizer has a chat template."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel(DescribedModel):
    """A model ready to run (evaluation mode, no gradients)."""

    model: Any
    """A transformers causal language model."""
    dtype: str
    device: str
    """Where its first layer is; with a device map the others may be elsewhere."""


def fetch(source: ModelSource, *, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """A local folder with config, tokenizer and safetensors of ``source``, downloaded and converted where needed.

    The last component of a hub model's folder is the commit. Python files of a hub repository are downloaded only with
    ``trust_remote_code``, weights only with ``weights``. Raises :class:`UserError`.
    """
    if source.kind == "hub":
        return fetch_hub(source, trust_remote_code, weights)
    if source.kind == "embedded":
        model = embedded.EMBEDDED[source.name]
        return gguf.convert_once(model.gguf_sha256, lambda: embedded.fetched(model))
    assert source.path is not None
    if source.kind == "folder":
        return source.path
    file = source.path
    try:
        digest = remembered_sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return gguf.convert_once(digest, lambda: contextlib.nullcontext(file))


_OWN_KWARGS = frozenset(
    {"attn_implementation", "dtype", "gguf_file", "output_loading_info", "revision", "torch_dtype"}
    | {"trust_remote_code", "use_safetensors", "weights_only"}
)


def load(
    reference: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load the model and tokenizer that ``reference`` stands for (see :func:`resolve`), fetching them where needed.

    ``dtype``: one of ``DTYPES``; ``auto`` is bfloat16, or float16 where the device lacks it. ``device``: ``auto``,
    ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. ``model_kwargs`` go to ``from_pretrained``; with a ``device_map`` among
    them ``device`` only chooses the dtype. Code that a model brings along runs only with ``trust_remote_code``. On a
    CPU the linear layers keep copies of their weights that multiply faster (:mod:`bench.models.products`). Raises
    :class:`UserError` on everything that the user can put right.
    """
    from bench.models import products
    from bench.telemetry import free_memory_bytes

    extra = dict(model_kwargs or {})
    if own := sorted(_OWN_KWARGS & extra.keys()):
        raise UserError(f"model_kwargs cannot set {', '.join(own)}", exit_code=2)
    resolve(reference)
    target = find_device(device)
    torch_dtype = _dtype(dtype, target)
    described = describe(reference, trust_remote_code=trust_remote_code)
    prepare_kernels(target)

    library = load_transformers()
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    with transformers_errors(f"{described.name} cannot be loaded"):
        model, info = library.AutoModelForCausalLM.from_pretrained(
            described.folder,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
        check_complete(info, described.name)
        if "device_map" not in extra:
            model.to(target)
    model.eval().requires_grad_(False)
    if target.type == "cpu" and "device_map" not in extra:
        products.multiply_faster(model, free_memory_bytes(target))
    facts = {field.name: getattr(described, field.name) for field in dataclasses.fields(described)}
    return LoadedModel(
        **{**facts, "config": model.config},
        model=model,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def describe(reference: str, *, trust_remote_code: bool = False, weights: bool = True) -> DescribedModel:
    """Find the model that ``reference`` stands for and read its config and tokenizer.

    Without ``weights`` those of a hub model are not downloaded, and a folder need not have any. Raises
    :class:`UserError`.
    """
    source = resolve(reference, weights=weights)
    folder = fetch(source, trust_remote_code=trust_remote_code, weights=weights)
    library = load_transformers()
    # AutoTokenizer may replace the class that a converted model names by its architecture's.
    converted = source.kind in ("embedded", "gguf")
    tokenizer_class = library.PreTrainedTokenizerFast if converted else library.AutoTokenizer
    with transformers_errors(f"{source.name} cannot be loaded"):
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = library.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    commit = folder.name if source.kind == "hub" else None
    return DescribedModel(
        config=config,
        tokenizer=tokenizer,
        name=source.name,
        source=source.origin,
        reference=f"{source.name}@{commit}" if commit else str(source.path or reference),
        folder=folder,
        revision=commit,
        fingerprint=commit or fingerprint(folder),
        context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        is_chat=bool(tokenizer.chat_template),
    )


def describe_config(reference: str, *, trust_remote_code: bool = False) -> tuple[str, Any]:
    """The name of the model that ``reference`` stands for, and its transformers config. A folder need not have more
    than its ``config.json``. Raises :class:`UserError`."""
    folder = Path(reference).expanduser().resolve()
    name = folder.name
    if reference in embedded.EMBEDDED or not (folder / "config.json").is_file():
        source = resolve(reference, weights=False)
        folder, name = fetch(source, trust_remote_code=trust_remote_code, weights=False), source.name
    with transformers_errors(f"{name} cannot be loaded"):
        return name, load_transformers().AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def fingerprint(folder: Path) -> str:
    """SHA-256 that identifies the weights and config in a local folder.

    It covers every safetensors file and ``config.json`` without the transformers version that wrote it, so the same
    weights converted under two versions have one fingerprint. Hashes of large files are remembered in the cache folder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"\n{file.name} {remembered_sha256(file)}".encode())
    return digest.hexdigest()


def find_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first of cuda, mps and cpu. Raises :class:`UserError` on others."""
    import torch

    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if count[kind]))
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", name)
    if not match:
        raise UserError(f"Unknown device {name!r}: it is auto, cpu, cuda, cuda:N or mps", exit_code=2)
    if int(match[2] or 0) >= count[match[1]]:
        raise UserError(f"The device {name} is not available here", exit_code=2)
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}: {nearest(name, DTYPES)}", exit_code=2)
    if name == "auto":
        has_bfloat16 = True
        if device.type == "cuda":
            with torch.cuda.device(device):
                has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "mps":
            has_bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
        name = "bfloat16" if has_bfloat16 else "float16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
