"""Settings of a run: every one is declared here, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from bench.errors import UserError
from bench.methods.variants import Variant, check_unique, name_of, read_methods
from bench.names import FULL
from bench.settings.fields import Affects, Count, SettingError, Settings, Share, setting, setting_of
from bench.settings.mappings import read_mapping
from bench.settings.secrets import redacted, redacted_text
from tasks.base import Rolling
from tasks.chain import ChainOptions
from tasks.fidelity import FidelityOptions
from tasks.longbench.options import LongBenchOptions
from tasks.needle import NeedleOptions
from tasks.options import TaskOptions
from tasks.registry import split_specs

__all__ = ["EXECUTORS", "FIELDS", "METHOD_SETTINGS", "RunConfig", "Variant"]

GRID, SETTINGS, DATA, OUTPUT = "The grid", "Settings of the methods", "Models and data", "Output"
WHERE = "Where it runs"
BUDGETS = (0.25, 0.125)
"""Shares of a run that is told no budget."""


def _of_task(tasks: str, options: type[TaskOptions], name: str, affects: Affects, **more: Any) -> Any:
    """A setting that is an option of tasks: with the default and the words that they give it."""
    field = options.model_fields[name]
    said = field.description or ""
    return setting(field.default, f"{tasks}: {said[0].lower()}{said[1:]}", DATA, affects, **more)


def _read_tasks(option: str, value: Any) -> Any:
    # Commas also stand within a spec, and so within an item of a YAML list.
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str) for item in items):
        return value
    words = [word.strip() for item in items for word in item.split(",")]
    return split_specs(word for word in words if word)


def _read_batch_size(option: str, value: Any) -> Any:
    text = str(value) if type(value) is int else value
    if text != "auto" and not (isinstance(text, str) and text.isdecimal() and int(text)):
        raise UserError(f"{option}={value}: give a whole number of 1 or more, or auto", exit_code=2)
    return text


def _read_kwargs(option: str, value: Any) -> Any:
    """A mapping of a preset as text."""
    import json

    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str):
        read_mapping(option, value)
    return value


class RunConfig(Settings):
    """Everything that ``arkv-bench run`` can be told."""

    model: tuple[str, ...] = setting(
        ("smollm2-135m",), "Models: an embedded one (see list models), a hub id, a folder, a .gguf file.", DATA, "grid"
    )
    tasks: tuple[str, ...] = setting(("needle",), "Tasks, see list tasks.", DATA, "grid", read=_read_tasks)
    methods: tuple[str | Variant, ...] = setting(
        (FULL, "window", "origin", "quant", "mix"),
        "Methods, third-party ones too: see list methods. In a preset also variants of them (docs/tutorial.md).",
        GRID,
        "grid",
        unset="full,window,origin,quant,mix",
        aliases=("quant_type",),
        read=read_methods,
    )
    full: bool = setting(True, "Measure full beside whatever is asked for; it shares the prefill.", GRID, "grid")
    cache_size: tuple[Annotated[int, Field(ge=2)], ...] = setting(
        (),
        "Budgets: tokens held per layer, in the place of shares.",
        GRID,
        "grid",
        unset="none",
        may_be_empty=True,
    )
    cache_ratio: tuple[Share, ...] | None = setting(
        BUDGETS,
        "Budgets as a share of each prompt.",
        GRID,
        "grid",
        unset="0.25,0.125, unless --cache-size is given",
    )
    budget_unit: Literal["tokens", "bytes"] = setting(
        "bytes",
        "bytes, in which what quantization saves buys more tokens, or tokens (published).",
        GRID,
        "grid",
        unset="bytes; tokens with --cache-size",
    )
    window_size: tuple[Count, ...] = setting(
        (),
        "Newest tokens that rank the others, and stay at model precision; of mix-replay in bytes 4 of them do.",
        GRID,
        "grid",
        unset="32",
        may_be_empty=True,
    )
    quant_format: tuple[str, ...] | None = setting(
        None,
        "Formats of quantized tokens: fp8, int8, int4, int2, k4v3.",
        GRID,
        "grid",
        unset="by budget unit",
    )
    tau1: float | None = setting(
        None, "Temperature of the entropy in a layer's OQ score.", SETTINGS, "grid", unset="published"
    )
    tau2: float | None = setting(None, "Temperature of the variance.", SETTINGS, "grid", unset="published")
    tau3: float | None = setting(None, "Temperature of the kurtosis.", SETTINGS, "grid", unset="published")
    gamma: float | None = setting(
        None, "Weight of the variance in a token's importance.", SETTINGS, "grid", unset="published"
    )
    original_share: float | None = setting(
        None,
        "mix: share of the past budget that stays at model precision.",
        SETTINGS,
        "grid",
        unset="by OQ ratio, in bytes 0.05",
    )
    importance: str | None = setting(
        None, "Importance of a prompt's tokens: mean_var (published), mean_max, or replay.", SETTINGS, "grid"
    )
    query_span: int | None = setting(
        None,
        "mean_max: every second of so many newest queries scores too, beside the window's.",
        SETTINGS,
        "grid",
        unset="none, in bytes 128",
    )
    pool_width: int | None = setting(None, "Width of its average pooling, odd.", SETTINGS, "grid", unset="5")
    max_pool_width: int | None = setting(
        None, "mean_max: width of the maximum pooling, odd.", SETTINGS, "grid", unset="15"
    )
    decode_rate: float | None = setting(
        None, "In bytes: weight of the newest step in the scores.", SETTINGS, "grid", unset="1/32"
    )
    limit: Count | None = setting(None, "Use at most so many documents of a task.", DATA, "grid")
    sampling_ratio: Share = setting(1.0, "Use this share of the documents, drawn with the seed.", DATA, "grid")
    seed: int = setting(0, "Seed of everything that is drawn.", DATA, "answer")
    question: Literal["after", "before", "both"] = setting(
        "after",
        "Where the question of a task stands that has one behind a context: after it, read through the compressed "
        "cache; before compression, inside the prompt; or both, as two tasks.",
        DATA,
        "grid",
    )
    lengths: tuple[Count, ...] = _of_task("needle, turns, fidelity, ruler", NeedleOptions, "lengths", "grid")
    samples: Count = _of_task("needle, turns, chain, fidelity, ruler", NeedleOptions, "samples", "answer")
    chain_steps: Annotated[int, Field(ge=2)] = _of_task("chain", ChainOptions, "chain_steps", "answer", sparse=True)
    chain_variables: Annotated[int, Field(ge=1, le=4)] = _of_task(
        "chain", ChainOptions, "chain_variables", "answer", sparse=True
    )
    haystack: Path | None = _of_task("needle, ruler", NeedleOptions, "haystack", "answer", by_content=True)
    text: Path | None = _of_task("fidelity", FidelityOptions, "text", "answer", by_content=True)
    text_field: str = _of_task("fidelity", FidelityOptions, "text_field", "answer", sparse=True)
    continuation: Count = _of_task("fidelity", FidelityOptions, "continuation", "answer")
    per_layer: bool = _of_task("fidelity", FidelityOptions, "per_layer", "grid")
    num_fewshot: Annotated[int, Field(ge=0)] | None = setting(
        None, "lm-eval tasks: examples in the prompt.", DATA, "answer", unset="the task's own"
    )
    apply_chat_template: bool = setting(False, "lm-eval tasks: prompts as the model's chat has them.", DATA, "answer")
    system_instruction: str | None = setting(None, "lm-eval tasks: a text before every prompt.", DATA, "answer")
    enable_thinking: bool | None = setting(
        None,
        "lm-eval tasks, with --apply-chat-template: let the model think or not; its thoughts are not scored.",
        DATA,
        "answer",
        unset="as the chat template has it",
    )
    gen_kwargs: str | None = setting(
        None,
        "Generation settings over the model's own, as repetition_penalty=1.1; max_gen_toks=512 for lm-eval tasks.",
        DATA,
        "answer",
        unset="the model's and the task's own",
    )
    temperature: Annotated[float, Field(gt=0)] | None = setting(
        None,
        "Generated answers are drawn at this temperature, by a seed for each document and repeat that is the same for "
        "every method; else they are greedy.",
        DATA,
        "answer",
        unset="greedy",
        sparse=True,
    )
    top_p: Share | None = setting(
        None,
        "With --temperature: drawn from the fewest tokens that have this probability together.",
        DATA,
        "answer",
        unset="the model's own",
        sparse=True,
    )
    repeats: Count = setting(
        1, "With --temperature: answers of each document; a score is the mean over all, pass@k of any.", DATA, "grid"
    )
    confirm_run_unsafe_code: bool = setting(
        False,
        "lm-eval tasks whose metric runs code that the model writes, such as humaneval: run it, on this machine.",
        DATA,
        "nothing",
        flag_only=True,
    )
    include_path: tuple[str, ...] | None = setting(
        None, "Folders with lm-eval task files of your own.", DATA, "grid", flag_only=True
    )
    rolling_prefill: Annotated[float, Field(ge=0, lt=1)] = setting(
        Rolling.prefill_share,
        "Perplexity tasks: share of a text's window that is prefilled, then compressed.",
        DATA,
        "answer",
    )
    rolling_chunk: Count = setting(
        Rolling.chunk,
        "Perplexity tasks: tokens read at once after that; 1 compresses after every one.",
        DATA,
        "answer",
    )
    prefill_chunk: Count | None = setting(
        None, "Tokens of a prompt that are read in one forward.", DATA, "answer", unset="all at once"
    )
    batch_size: str = setting(
        "1",
        "Documents answered side by side, and choices read in one forward; auto: what takes 1 GiB.",
        DATA,
        "speed",
        read=_read_batch_size,
    )
    data_dir: Path | None = setting(
        None, "Folder with local rows (gsm8k/test.jsonl, ...) instead of a download.", DATA, "grid"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.", DATA, "answer")
    dtype: str = setting("auto", "auto (bfloat16), float32, bfloat16, float16.", DATA, "answer")
    max_length: Annotated[int, Field(ge=2)] | None = setting(
        None,
        "Longest prompt plus answer in tokens (longbench: what prompts are cut to).",
        DATA,
        "answer",
        unset="the model's context",
    )
    skip_cut: bool = _of_task("longbench", LongBenchOptions, "skip_cut", "grid")
    trust_remote_code: bool = setting(
        False,
        "Run code that comes with a hub model. Only if you trust it.",
        DATA,
        "answer",
        flag_only=True,
        sparse=True,
    )
    device_map: str | None = setting(
        None,
        "auto spreads a model over the GPUs that there are (accelerate).",
        DATA,
        "answer",
        unset="one device",
    )
    model_kwargs: str | None = setting(
        None,
        "For transformers when it loads a model: key=value,..., or a mapping as YAML or JSON.",
        DATA,
        "answer",
        read=_read_kwargs,
    )
    executor: Literal["local", "ray"] = setting("local", "local, or ray: on the workers of a cluster.", WHERE, "speed")
    address: str = setting(
        "auto",
        "Ray: host:port or ray://host:port of a cluster, auto for the one of this machine (or RAY_ADDRESS), local for "
        "one of this run's own.",
        WHERE,
        "speed",
    )
    workers: Count | None = setting(
        None,
        "Ray: workers, each with a model of its own.",
        WHERE,
        "speed",
        unset="as many as there is room for",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = setting(
        None, "Ray: GPUs of a worker.", WHERE, "speed", unset="1, or 0 on a cluster without any"
    )
    cpus_per_worker: Count = setting(1, "Ray: cores and threads of a worker.", WHERE, "speed")
    retries: Annotated[int, Field(ge=0)] = setting(
        3, "Ray: how often documents whose worker died are tried again before they fail.", WHERE, "speed"
    )
    plugin: tuple[str, ...] | None = setting(
        None,
        "Python files with methods or tasks of your own (docs/plugins.md); may be repeated.",
        GRID,
        "grid",
        flag_only=True,
        repeated=True,
    )
    outdir: Path | None = setting(
        None, "Run folder; an unfinished run there is continued.", OUTPUT, "nothing", unset="runs/TIME"
    )
    prompts: bool = setting(
        True, "Keep the text of every prompt in documents.jsonl, for the page and view.", OUTPUT, "nothing"
    )
    states: bool = setting(
        False,
        "Leave a states map of the first document of each task for report --html; costs one more prefill of it.",
        OUTPUT,
        "nothing",
    )

    def __init__(self, **values: Any) -> None:
        # A number of tokens is the published budget, and takes the place of shares unless they are given too.
        if values.get("cache_ratio") is not None:
            values = {"budget_unit": "bytes", **values}
        elif values.get("cache_size"):
            values = {"budget_unit": "tokens", **values, "cache_ratio": None}
        super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_unique(self.methods)
        self._check_executor()
        self._check_sampling()
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise SettingError(
                "gpus_per_worker",
                f"--gpus-per-worker={self.gpus_per_worker}: give a share of one GPU, or a whole number",
            )
        if self.device_map is not None and "device_map" in read_mapping("--model-kwargs", self.model_kwargs):
            raise SettingError("model_kwargs", "--model-kwargs: device_map is given by --device-map already")
        return self

    def _check_executor(self) -> None:
        if self.executor != "local":
            return
        for name in ("address", "workers", "gpus_per_worker", "cpus_per_worker", "retries"):
            if getattr(self, name) != FIELDS[name].default:
                said = f"{self.option(name)}={getattr(self, name)}: it needs --executor ray"
                raise SettingError(name, said)

    def _check_sampling(self) -> None:
        if self.temperature is not None:
            return
        if self.repeats > 1:
            said = f"--repeats={self.repeats}: without sampling all would be equal: give --temperature 0.6 too"
            raise SettingError("repeats", said)
        if self.top_p is not None:
            raise SettingError(
                "top_p", f"--top-p={self.top_p:g}: greedy answers draw nothing: give --temperature 0.6 too"
            )

    @property
    def measured_methods(self) -> tuple[str | Variant, ...]:
        """The methods of the grid: with ``full`` beside them, or without it, as it was asked for.

        Raises :class:`UserError` where nothing is left.
        """
        others = tuple(method for method in self.methods if method != FULL)
        if not self.full:
            if not others:
                raise UserError("--no-full leaves no method: give others by --methods", exit_code=2)
            return others
        return self.methods if FULL in self.methods else (FULL, *self.methods)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names of the methods that were asked for."""
        return tuple(map(name_of, self.methods))

    @property
    def loading_kwargs(self) -> dict[str, Any]:
        """What transformers is given, beyond the suite's own settings, when it loads a model."""
        given = {} if self.device_map is None else {"device_map": self.device_map}
        return {**given, **read_mapping("--model-kwargs", self.model_kwargs)}

    @property
    def budgets(self) -> list[dict[str, Any]]:
        """The budgets of the grid, as settings of a cache."""
        if self.cache_ratio is not None:
            return [{"cache_ratio": ratio} for ratio in self.cache_ratio]
        return [{"cache_size": size} for size in self.cache_size]

    @property
    def documents_at_once(self) -> int | None:
        """Documents, and continuations, that are answered side by side; None for as many as fit."""
        return None if self.batch_size == "auto" else int(self.batch_size)

    @property
    def method_settings(self) -> dict[str, Any]:
        """Settings of the cache that were given; each method's own hold for the others."""
        given = {name: getattr(self, name) for name in METHOD_SETTINGS if getattr(self, name) is not None}
        return {"budget_unit": self.budget_unit, **given}

    def to_json(self) -> dict[str, Any]:
        kwargs = self.model_kwargs
        return {**super().to_json(), "model_kwargs": None if kwargs is None else redacted_text(kwargs)}

    def fingerprint(self) -> dict[str, Any]:
        # What a model is loaded with is one thing, however it was given.
        found = {**super().fingerprint(), "model_kwargs": redacted(self.loading_kwargs) or None}
        del found["device_map"]
        return found


FIELDS = RunConfig.model_fields
EXECUTORS: tuple[str, ...] = get_args(FIELDS["executor"].annotation)
METHOD_SETTINGS = tuple(name for name, field in FIELDS.items() if setting_of(field).panel == SETTINGS)
"""Settings of a cache that a run, a preset or a search may change; each method has its own values for the others."""
