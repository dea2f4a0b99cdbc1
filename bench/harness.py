"""Any task of lm-eval: its prompts, filters and metrics, with inference arranged by us in between.

This is the only importer of lm_eval, and it imports it late: the import takes a second. lm-eval's own code builds the
prompts; they are tokenized, cut and stopped as its Hugging Face model class does it. The answers are scored by replay:
lm-eval evaluates a stand-in model that looks each stored answer up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tasks.base import (
    Answer,
    Document,
    Evaluation,
    Generate,
    Metric,
    Task,
    TaskError,
    TaskSettings,
    draw,
    nearest,
)

DESCRIPTIONS = {"gsm8k": "grade-school mathematics, 5 examples in the prompt, free-form answers"}
"""Tasks of lm-eval that a list of tasks shows, since all 13,000 are too many."""

_FEWSHOT_SEED = 1234
"""lm-eval's default; with any other seed the prompts would not be the official ones."""

_MAX_NEW_TOKENS = 256
"""lm-eval's ``max_gen_toks`` for Hugging Face models, where the task sets none."""

_GREEDY_IRRELEVANT = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
"""Generation settings that are honoured, or that change nothing when decoding greedily."""


@dataclass(frozen=True)
class _Options:
    """What is read from ``TaskSettings.options``."""

    num_fewshot: int | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None

    @classmethod
    def parse(cls, task: str, options: Mapping[str, Any]) -> _Options:
        """Check the options. Raises :class:`TaskError`."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TaskError(f"{task} has no option {name!r}: {nearest(name, known)}", usage=True)
        values = {name: value for name, value in options.items() if value is not None}
        shots = values.get("num_fewshot")
        if shots is not None and (type(shots) is not int or shots < 0):
            raise TaskError(f"{task}: num_fewshot must be a whole number of at least 0, not {shots!r}", usage=True)
        chat = values.get("apply_chat_template", False)
        if values.setdefault("fewshot_as_multiturn", chat) and not chat:
            raise TaskError(f"{task}: fewshot_as_multiturn needs apply_chat_template", usage=True)
        if isinstance(gen_kwargs := values.get("gen_kwargs"), str):
            from lm_eval.utils import simple_parse_args_string

            values["gen_kwargs"] = simple_parse_args_string(gen_kwargs)
        return cls(**values)


class HarnessTasks:
    """lm-eval's tasks by name: a fallback for :func:`tasks.registry.get_task`."""

    def __init__(self, *, include_path: Sequence[Path] = ()) -> None:
        self._include_path = tuple(include_path)

    def get(self, name: str) -> HarnessTask | None:
        if name not in _find_all(self._include_path):
            return None
        return HarnessTask(name, include_path=self._include_path)

    def names(self) -> Iterable[str]:
        return _find_all(self._include_path)


class HarnessTask(Task):
    """One task of lm-eval whose requests are all ``generate_until``.

    ``include_path`` are folders of further task files; they take precedence over lm-eval's own.

    Options, all as in lm-eval: ``num_fewshot`` (default: the task's own), ``gen_kwargs`` (a mapping or
    ``"key=value,key=value"``, laid over the task's generation settings), ``apply_chat_template`` (default False),
    ``fewshot_as_multiturn`` (default True with a chat template), ``system_instruction``.

    ``limit`` takes the first documents, as lm-eval does. Prompts beyond the model's length lose their beginning.
    ``metrics`` are known after :meth:`load`; a metric is named ``metric,filter``, as lm-eval's tables have it.

    Local rows: with ``TaskSettings.data_dir``, nothing is downloaded. In it, the folder that has the name of the task,
    or else of its data set (``gsm8k`` for ``openai/gsm8k``), holds one JSON-lines file per split: ``test.jsonl``, or
    else the one whose name goes on after an underscore, ``test_first100.jsonl``. Rows have the fields of the original
    data set. They are held in memory; the cache of the datasets library is not touched.
    """

    option_names = tuple(field.name for field in fields(_Options))

    def __init__(self, name: str, *, include_path: Sequence[Path] = ()) -> None:
        self.name = name
        self.metrics = ()
        self._include_path = tuple(include_path)
        self._task: Any = None
        self._instances: dict[str, list[Any]] = {}
        self._rows: dict[str, int] = {}
        self._data_hash = ""

    def load(self, settings: TaskSettings) -> list[Document]:
        options = _Options.parse(self.name, settings.options)
        with _quiet(), _explained(self.name, local=settings.data_dir is not None):
            task = self._build(settings, options)
            rows = draw(len(task.eval_docs), settings.sampling_ratio, settings.seed)[: settings.limit]
            task.build_all_requests(
                **_selection(rows),
                rank=0,
                world_size=1,
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
                chat_template=functools.partial(_apply_chat_template, settings.tokenizer),
            )
        self._task = task
        self._instances, self._rows = {}, {}
        for instance in task.instances:
            # lm-eval counts the selected documents; the row in the data set is what stays the same.
            row = rows[instance.doc_id]
            self._instances.setdefault(f"{self.name}-{row}", []).append(instance)
            self._rows[f"{self.name}-{row}"] = row
        documents = [self._document(identifier, settings) for identifier in self._instances]
        directions = task.higher_is_better()
        self.metrics = tuple(
            Metric(name=f"{metric},{ensemble.name}", higher_is_better=directions[metric] is not False)
            for ensemble in task._filters
            for metric in directions
        )
        self._data_hash = _hash_rows(task)
        return documents

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """Every metric of one answer. A metric that only a whole set defines is that of a set of one."""
        instances = []
        for instance in self._instances[document.id]:
            instance = copy.copy(instance)
            instance.resps, instance.filtered_resps = [answer.text] * instance.repeats, {}
            instances.append(instance)
        # Task.apply_filters would do, but only on the instances that the task itself holds.
        for ensemble in self._task._filters:
            ensemble.apply(instances)
        aggregations = self._task.aggregation()
        scores = {}
        for ensemble in self._task._filters:
            filtered = [instance.filtered_resps[ensemble.name] for instance in instances]
            for metric, value in self._task.process_results(instances[0].doc, filtered).items():
                aggregate = aggregations.get(metric)
                scores[f"{metric},{ensemble.name}"] = float(aggregate([value]) if aggregate else value)
        return scores

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        """lm-eval's own figures over the answered documents, with the standard errors it defines."""
        from lm_eval.evaluator import evaluate

        stored = {self._rows[document.id]: answers[document.id] for document in documents if document.id in answers}
        if not stored:
            return Evaluation(values={})
        rows = sorted(stored)
        shots = self._task.config.num_fewshot
        # evaluate() builds every prompt anew, and nobody reads them: leave the examples out, most of the work.
        self._task.set_config("num_fewshot", 0)
        try:
            with _quiet():
                results = evaluate(
                    lm=_replay(lambda instance: stored[rows[instance.doc_id]].text),
                    task_dict={"tasks": {self.name: self._task}, "groups": {}, "group_map": {}},
                    log_samples=False,
                    **_selection(rows, name=self.name),
                )
        finally:
            self._task.set_config("num_fewshot", shots)
        values, stderr = {}, {}
        for key, value in results["results"][self.name].items():
            metric, comma, ensemble = key.partition(",")
            if not comma or not isinstance(value, float | int):
                continue
            if metric.endswith("_stderr"):
                stderr[f"{metric.removesuffix('_stderr')},{ensemble}"] = float(value)
            else:
                values[key] = float(value)
        return Evaluation(values=values, stderr=stderr)

    def data_hash(self) -> str:
        return self._data_hash

    def _build(self, settings: TaskSettings, options: _Options) -> Any:
        """lm-eval's task object, its rows loaded. Raises :class:`TaskError`."""
        path = _find_all(self._include_path).get(self.name)
        if path is None:
            raise TaskError(
                f"lm-eval has no task {self.name!r}: {nearest(self.name, _find_all(self._include_path))}", usage=True
            )
        from lm_eval.tasks import TaskManager

        # The index of all of lm-eval takes ten seconds to read; that of one folder takes none.
        manager = TaskManager(include_defaults=False, include_path=str(path.parent))
        config = manager.task_index[self.name].cfg or {}
        if "group" in config:
            members = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in config.get("task") or []]
            names = ", ".join(map(str, members[:10]))
            raise TaskError(f"{self.name} is a group of tasks; name one of them: {names}", usage=True)
        _require_generation(self.name, config.get("output_type", "generate_until"))
        shots = config.get("num_fewshot")
        if options.num_fewshot not in (None, shots):
            if shots == 0:
                raise TaskError(f"{self.name} is defined without examples: num_fewshot cannot be changed", usage=True)
            shots = options.num_fewshot
        overrides: dict[str, Any] = {"num_fewshot": shots or 0}
        if settings.data_dir is not None:
            overrides |= _local_rows(self.name, config, settings.data_dir, shots or 0)
        # A task in a group is how lm-eval lets a caller change single settings of a task it knows.
        loaded = manager.load([{"group": "arkv-bench", "task": [{"task": self.name, **overrides}]}])
        task = loaded["tasks"][self.name]
        _require_generation(self.name, task.OUTPUT_TYPE)
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"{self.name} asks about images or sound; only text is supported")
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"{self.name} runs code that the model writes; that is not supported")
        if options.gen_kwargs:
            task.set_config("generation_kwargs", dict(options.gen_kwargs), update=True)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return task

    def _document(self, identifier: str, settings: TaskSettings) -> Document:
        instance, *others = self._instances[identifier]
        _require_generation(self.name, instance.request_type)
        if others:
            raise TaskError(f"{self.name} makes {1 + len(others)} requests for a document; only one is supported")
        prompt, generation = instance.args
        max_new_tokens, stop = _stopping(self.name, generation, settings.tokenizer)
        room = settings.max_length - max_new_tokens
        if room < 1:
            raise TaskError(
                f"{self.name}: an answer of {max_new_tokens} tokens leaves no room for a prompt within "
                f"{settings.max_length}: set max_gen_toks in gen_kwargs"
            )
        prompt_ids = _encode(settings.tokenizer, prompt)
        return Document(
            id=identifier,
            request=Generate(prompt_ids=tuple(prompt_ids[-room:]), max_new_tokens=max_new_tokens, stop=stop),
            reference=self._task.doc_to_target(instance.doc),
            truncated=len(prompt_ids) > room,
            info={
                "row": self._rows[identifier],
                "prompt_tokens": min(len(prompt_ids), room),
                "cut_tokens": max(0, len(prompt_ids) - room),
            },
        )


def _require_generation(task: str, output_type: str) -> None:
    if output_type != "generate_until":
        raise TaskError(
            f"{task} asks for {output_type}; only tasks that generate text (generate_until) are supported", usage=True
        )


# --- Finding a task ---


def _find_all(include_path: Sequence[Path]) -> dict[str, Path]:
    """The file that defines each task and group, as lm-eval's index would find it.

    lm-eval parses 14,000 YAML files for that; reading their ``task:`` and ``group:`` lines takes half a second.
    Raises :class:`TaskError`.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise TaskError("lm-eval is not installed: pip install lm-eval")
    found = dict(_find(Path(spec.origin).parent / "tasks"))
    for folder in include_path:
        if not folder.is_dir():
            raise TaskError(f"include_path: {folder} is not a folder", usage=True)
        found |= _find(folder)
    return found


@functools.cache
def _find(folder: Path) -> dict[str, Path]:
    pattern = re.compile(rb"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        for name in pattern.findall(path.read_bytes()):
            found.setdefault(name.decode("utf-8", "replace"), path)
    return found


# --- Local rows ---


def _local_rows(task: str, config: Mapping[str, Any], data_dir: Path, shots: int) -> dict[str, Any]:
    """Settings that make lm-eval take a task's rows from ``data_dir``. Raises :class:`TaskError`."""
    import datasets

    if "class" in config:
        raise TaskError(f"{task} loads its rows with code of its own; it cannot read local ones")
    dataset = str(config.get("dataset_path") or task).rpartition("/")[2]
    folder = next((data_dir / name for name in (task, dataset) if (data_dir / name).is_dir()), data_dir / task)
    evaluation = config.get("test_split") or config.get("validation_split")
    fewshot = _fewshot_split(config) if shots else None
    tables = {}
    for split in dict.fromkeys((evaluation, fewshot)):
        if split is None:
            continue
        path = _split_file(task, folder, split)
        # What process_docs makes of the rows is what the templates read: only lm-eval can tell what is missing.
        rows = _read_rows(path, {} if config.get("process_docs") else config)
        # Where examples come from the evaluated rows, the row in question is set aside.
        if split == fewshot and len(rows) < shots + (fewshot == evaluation):
            raise TaskError(f"{path} has {len(rows)} rows, too few to draw {shots} examples from")
        tables[split] = datasets.Dataset.from_list(rows)
    # lm-eval opens every split that the configuration names, asked for or not.
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    unused = {role: None for role in roles if config.get(role) not in (None, *tables)}

    def custom_dataset(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(tables)

    return {"custom_dataset": custom_dataset, **unused}


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """The split that examples are drawn from, by lm-eval's order; None where the configuration holds them itself."""
    fewshot = config.get("fewshot_config") or {}
    if split := fewshot.get("split") or config.get("fewshot_split"):
        return split
    if fewshot.get("samples") is not None:
        return None
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def _split_file(task: str, folder: Path, split: str) -> Path:
    """``<split>.jsonl``, or else the one ``<split>_*.jsonl``. Raises :class:`TaskError`."""
    if (exact := folder / f"{split}.jsonl").is_file():
        return exact
    files = sorted(folder.glob(f"{split}_*.jsonl"))
    if not files:
        raise TaskError(
            f"{task}: no local rows for its split {split!r}: looked for {exact} and {split}_*.jsonl beside it"
        )
    if len(files) > 1:
        raise TaskError(f"{task}: {len(files)} files for the split {split!r}: keep one of {', '.join(map(str, files))}")
    return files[0]


def _read_rows(path: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; each must have the fields that the templates in ``config`` read.

    Raises :class:`TaskError` with the file, line and field.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number}: not a JSON object")
            rows.append((number, row))
    if not rows:
        raise TaskError(f"{path} has no rows")
    _check_fields(path, rows, config)
    return [row for _, row in rows]


def _check_fields(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], config: Mapping[str, Any]) -> None:
    """Render every template with every numbered row: which fields a template needs may depend on the row."""
    from jinja2 import UndefinedError
    from lm_eval.utils import env

    known = {field for _, row in rows for field in row}
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description"):
        template = config.get(key)
        if not isinstance(template, str):
            continue
        # Templates may name a field outright.
        compiled = env.from_string(f"{{{{ {template} }}}}" if template in known else template)
        for number, row in rows:
            try:
                compiled.render(**row)
            except UndefinedError as error:
                raise TaskError(f"{path}, line {number}: the task's {key} misses a field: {error}") from error


def _hash_rows(task: Any) -> str:
    """SHA-256 over the rows of the evaluated split and those that examples are drawn from."""
    digest = hashlib.sha256()
    for rows in (task.eval_docs, getattr(getattr(task, "sampler", None), "df", ())):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
            digest.update(b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


# --- What lm-eval's Hugging Face model class does to a request ---


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """Special tokens as the tokenizer adds them, unless the prompt begins with the BOS token already."""
    bos = tokenizer.bos_token
    written = bos is not None and prompt.startswith(bos)
    return tokenizer(prompt, **({"add_special_tokens": False} if written else {}))["input_ids"]


def _stopping(task: str, generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, tuple[str, ...]]:
    """Longest answer in tokens, and stop strings, the end-of-sequence token among them. Raises :class:`TaskError`."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    kwargs: Mapping[str, Any] = normalize_gen_kwargs(dict(generation), _MAX_NEW_TOKENS)
    if kwargs["do_sample"]:
        raise TaskError(
            f"{task} samples its answers; only greedy decoding is supported: set do_sample=False in gen_kwargs"
        )
    if unsupported := sorted(kwargs.keys() - _GREEDY_IRRELEVANT):
        raise TaskError(f"{task}: the generation setting {unsupported[0]}={kwargs[unsupported[0]]!r} is not supported")
    eos = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)
    return kwargs["max_gen_toks"], tuple(s for s in handle_stop_sequences(kwargs["until"], eos=eos) if s)


def _apply_chat_template(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    from jinja2 import TemplateError

    render = functools.partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    try:
        return render(messages)
    except TemplateError:
        # Some templates refuse a system message.
        return render([message for message in messages if message["role"] != "system"])


# --- Replay ---


def _replay(response: Callable[[Any], Any]) -> Any:
    """An lm-eval model that answers every request from a store."""
    from lm_eval.api.model import LM

    class Replay(LM):
        def generate_until(self, requests: list[Any]) -> list[Any]:
            return [response(request) for request in requests]

        loglikelihood = generate_until
        loglikelihood_rolling = generate_until

    return Replay()


def _selection(rows: Sequence[int], *, name: str | None = None) -> dict[str, Any]:
    """lm-eval's ``limit`` where ``rows`` are the first ones, else its ``samples``, which costs a pass over all rows.

    ``name`` wraps the rows for an evaluation, which takes them by task.
    """
    if list(rows) == list(range(len(rows))):
        return {"limit": len(rows)}
    return {"samples": list(rows) if name is None else {name: list(rows)}}


@contextlib.contextmanager
def _explained(task: str, *, local: bool) -> Iterator[None]:
    """Turn what lm-eval and the datasets library raise over bad data into a :class:`TaskError`."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    # lm-eval asserts on what users get wrong, such as more examples than there are rows.
    expected = (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        ImportError,
        AssertionError,
        TemplateError,
        DatasetsError,
    )
    try:
        yield
    except TaskError:
        raise
    except expected as error:
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        if isinstance(error, OSError) and not local:
            reason += f"; without a connection, give a data folder with {task}/<split>.jsonl"
        raise TaskError(f"cannot load the task {task}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval: bars and prints that have no switch of their own, and advice on settings that we chose."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars_disabled = logger.level, datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars_disabled:
            datasets.enable_progress_bars()
