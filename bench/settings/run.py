"""Settings of a run: defaults, then presets and files in the order given, then what was typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bench.errors import UserError
from tasks.base import Rolling, nearest
from tasks.registry import split_specs


def _parse_list(value: Any, kind: type, name: str, *, unique: bool = True) -> tuple[Any, ...]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    parsed = []
    for item in items:
        text = item.strip() if isinstance(item, str) else item
        if text == "":
            continue
        try:
            parsed.append(kind(text))
        except ValueError:
            raise UserError(f"{name}: {item!r} is not {_KINDS[kind]}", exit_code=2) from None
    if not parsed:
        raise UserError(f"{name}: give at least one value", exit_code=2)
    return tuple(dict.fromkeys(parsed) if unique else parsed)


def _parse_mapping(text: str | None, name: str) -> dict[str, Any]:
    """``key=value,...``, or a mapping in YAML or JSON where values have parts. Values are those of YAML."""
    import yaml

    if not text:
        return {}
    if not text.lstrip().startswith("{"):
        pairs = [item.partition("=") for item in text.split(",")]
        if wrong := [key for key, equals, _ in pairs if not key.strip() or not equals]:
            raise UserError(f"{name}: {wrong[0]!r} is not of the form key=value", exit_code=2)
        text = "{" + ", ".join(f"{key.strip()}: {value}" for key, _, value in pairs) + "}"
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}", exit_code=2) from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: {text!r} is no mapping", exit_code=2)
    return {str(key): value for key, value in content.items()}


EXECUTORS = ("local", "ray")
METHOD_SETTINGS = (
    *("tau1", "tau2", "tau3", "gamma"),
    *("original_share", "importance", "query_span", "pool_width", "max_pool_width", "decode_rate"),
)
"""Settings of a cache that a run, a preset or a search may change; each method has its own values for the others."""

_KINDS = {int: "a whole number", float: "a number", str: "a name"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that ``arkv-bench run`` can be told."""

    model: tuple[str, ...] = ("smollm2-135m",)
    tasks: tuple[str, ...] = ("needle",)
    quant_type: tuple[str, ...] = ("full", "window", "origin", "quant", "mix")
    cache_size: tuple[int, ...] = (512,)
    cache_ratio: tuple[float, ...] | None = None
    budget_unit: str = "tokens"
    window_size: tuple[int, ...] = ()
    """Empty: each method's own."""
    quant_format: tuple[str, ...] | None = None
    tau1: float | None = None
    tau2: float | None = None
    tau3: float | None = None
    gamma: float | None = None
    original_share: float | None = None
    importance: str | None = None
    query_span: int | None = None
    pool_width: int | None = None
    max_pool_width: int | None = None
    decode_rate: float | None = None
    limit: int | None = None
    sampling_ratio: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    skip_cut: bool = False
    data_dir: Path | None = None
    outdir: Path | None = None
    lengths: tuple[int, ...] = (2000,)
    samples: int = 8
    haystack: Path | None = None
    text: Path | None = None
    text_field: str = "text"
    continuation: int = 64
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    enable_thinking: bool | None = None
    confirm_run_unsafe_code: bool = False
    gen_kwargs: str | None = None
    include_path: tuple[str, ...] | None = None
    rolling_prefill: float = Rolling.prefill_share
    rolling_chunk: int = Rolling.chunk
    prefill_chunk: int | None = None
    batch_size: str = "1"
    states: bool = False
    trust_remote_code: bool = False
    device_map: str | None = None
    model_kwargs: str | None = None
    executor: str = "local"
    address: str = "auto"
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1
    retries: int = 3
    plugin: tuple[str, ...] | None = None
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name, low in (("cache_size", 2), ("window_size", 1), ("lengths", 1)):
            for value in getattr(self, name):
                if value < low:
                    raise UserError(f"--{name.replace('_', '-')}={value}: give {low} or more", exit_code=2)
        for ratio in self.cache_ratio or ():
            if not 0.0 < ratio <= 1.0:
                raise UserError(f"--cache-ratio={ratio}: give a share above 0 and up to 1", exit_code=2)
        if self.budget_unit not in ("tokens", "bytes"):
            raise UserError(f"--budget-unit={self.budget_unit}: use tokens or bytes", exit_code=2)
        for name, low in (
            ("limit", 1),
            ("samples", 1),
            ("max_length", 2),
            ("num_fewshot", 0),
            ("rolling_chunk", 1),
            ("prefill_chunk", 1),
            ("continuation", 1),
            ("workers", 1),
            ("gpus_per_worker", 0),
            ("cpus_per_worker", 1),
            ("retries", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')}={value}: give {low} or more", exit_code=2)
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise UserError(f"--batch-size={self.batch_size}: give a whole number of 1 or more, or auto", exit_code=2)
        if not 0.0 <= self.rolling_prefill < 1.0:
            raise UserError(
                f"--rolling-prefill={self.rolling_prefill}: give a share of 0 or more, below 1", exit_code=2
            )
        if not 0.0 < self.sampling_ratio <= 1.0:
            raise UserError(f"--sampling-ratio={self.sampling_ratio}: give a share above 0 and up to 1", exit_code=2)

        if self.executor not in EXECUTORS:
            raise UserError(f"--executor={self.executor}: use {' or '.join(EXECUTORS)}", exit_code=2)
        if self.executor == "local":
            for name in ("address", "workers", "gpus_per_worker", "cpus_per_worker", "retries"):
                if getattr(self, name) != FIELDS[name].default:
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option}={getattr(self, name)}: it needs --executor ray", exit_code=2)
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise UserError(
                f"--gpus-per-worker={self.gpus_per_worker}: give a share of one GPU, or a whole number", exit_code=2
            )
        if self.device_map is not None and "device_map" in _parse_mapping(self.model_kwargs, "--model-kwargs"):
            raise UserError("--model-kwargs: device_map is given by --device-map already", exit_code=2)

    @property
    def loading_kwargs(self) -> dict[str, Any]:
        """What transformers is given, beyond the suite's own settings, when it loads a model."""
        given = {} if self.device_map is None else {"device_map": self.device_map}
        return {**given, **_parse_mapping(self.model_kwargs, "--model-kwargs")}

    @property
    def budgets(self) -> list[dict[str, Any]]:
        """The budgets of the grid, as settings of a cache."""
        if self.cache_ratio is not None:
            return [{"cache_ratio": ratio} for ratio in self.cache_ratio]
        return [{"cache_size": size} for size in self.cache_size]

    @property
    def batch(self) -> int | None:
        """Documents, and continuations, that are answered side by side; None for as many as fit."""
        return None if self.batch_size == "auto" else int(self.batch_size)

    @property
    def method_settings(self) -> dict[str, Any]:
        """Settings of the cache that were given; each method's own hold for the others."""
        given = {name: getattr(self, name) for name in METHOD_SETTINGS if getattr(self, name) is not None}
        return {"budget_unit": self.budget_unit, **given}

    def to_json(self) -> dict[str, Any]:
        """As JSON, with paths as text and lists as lists."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) or None if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
_ANNOTATIONS = {name: str(field.type) for name, field in FIELDS.items()}


def parse_value(name: str, value: Any) -> Any:
    """The value of field ``name`` from text or YAML. Raises :class:`UserError` when it has the wrong form."""
    option = f"--{name.replace('_', '-')}"
    annotation = _ANNOTATIONS[name]
    if value is None:
        if "None" not in annotation:
            raise UserError(f"{option}: a value is needed", exit_code=2)
        return None
    if name == "tasks":
        # Commas also stand within a spec, and so within an item of a YAML list.
        text = value if isinstance(value, str) else ",".join(map(str, value if isinstance(value, list) else [value]))
        return split_specs(_parse_list(text, str, option, unique=False))
    for kind in (int, float, str):
        if annotation.startswith(f"tuple[{kind.__name__}"):
            return _parse_list(value, kind, option)
        if annotation.split(" ")[0] == kind.__name__:
            try:
                return kind(value)
            except (TypeError, ValueError):
                raise UserError(f"{option}: {value!r} is not {_KINDS[kind]}", exit_code=2) from None
    if annotation.startswith("Path"):
        return Path(value).expanduser()
    if not isinstance(value, bool):
        raise UserError(f"{option}: {value!r} is neither true nor false", exit_code=2)
    return value


def preset_names() -> list[str]:
    """Names of the presets that come with the suite."""
    folder = resources.files("bench").joinpath("presets")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset by name, or of a YAML file of the user's.

    Raises:
        UserError: unknown preset, unreadable file, not a mapping of known settings.
    """
    import yaml

    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"preset file {name} does not exist", exit_code=2)
    elif name in preset_names():
        path = resources.files("bench").joinpath("presets", f"{name}.yaml")
    else:
        raise UserError(f"unknown preset {name!r}: {nearest(name, preset_names())}", exit_code=2)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"preset {name}: not valid YAML: {' '.join(str(error).split())}", exit_code=2) from None
    if not isinstance(content, dict):
        raise UserError(f"preset {name}: needs lines of the form 'setting: value'", exit_code=2)
    settings = {str(key).replace("-", "_"): value for key, value in content.items() if key != "description"}
    for key in settings:
        if key == "plugin":
            raise UserError(f"preset {name}: no setting 'plugin': its code is run only where --plugin names it", 2)
        if key not in FIELDS:
            raise UserError(f"preset {name}: unknown setting {key!r}: {nearest(key, FIELDS)}", exit_code=2)
    return settings


def preset_description(name: str) -> str:
    """The first comment-free ``description`` of a preset."""
    import yaml

    text = resources.files("bench").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return str(yaml.safe_load(text).get("description", ""))


def resolve(flags: Mapping[str, Any], preset: str | None) -> tuple[RunConfig, dict[str, str]]:
    """The settings of a run and where each came from: ``default``, ``preset NAME`` or ``flag``.

    Args:
        flags: what was typed; None means not given.
        preset: names and files, separated by commas; of two that set the same, the later one wins.
    """
    values: dict[str, Any] = {}
    origin = dict.fromkeys(FIELDS, "default")
    for source in _parse_list(preset, str, "--preset") if preset is not None else ():
        for name, value in load_preset(source).items():
            values[name] = parse_value(name, value)
            origin[name] = f"preset {source}"
    for name, value in flags.items():
        if value is not None:
            values[name] = parse_value(name, value)
            origin[name] = "flag"
    return RunConfig(**values), origin
