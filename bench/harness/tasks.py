"""Any task of lm-eval: its prompts, filters and metrics, with inference arranged by us in between.

This is the only importer of lm_eval, and it imports it late: the import takes a second. lm-eval's own code builds the
requests; they are tokenized, cut and stopped as its Hugging Face model class does it. The answers are scored by replay:
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
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tasks.base import (
    Answer,
    Continuation,
    Document,
    Evaluation,
    Generate,
    Generated,
    LogLikelihood,
    LogLikelihoods,
    Metric,
    Request,
    Rolling,
    Task,
    TaskError,
    TaskGroup,
    TaskSettings,
    draw,
    nearest,
)

DESCRIPTIONS = {
    "gsm8k": "grade-school mathematics, 5 examples in the prompt, free-form answers",
    "mmlu": "multiple-choice questions of 57 subjects, each with a score of its own",
    "commonsense_qa": "multiple-choice questions of common sense",
}
"""Tasks of lm-eval that a list of tasks shows, since all 13,000 are too many."""

_FEWSHOT_SEED = 1234
"""lm-eval's default; with any other seed the prompts would not be the official ones."""

_MAX_NEW_TOKENS = 256
"""lm-eval's ``max_gen_toks`` for Hugging Face models, where the task sets none."""

_THINK_END = "</think>"
"""What a thinking model writes between its thoughts and its answer."""

_GREEDY_IRRELEVANT = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
"""Generation settings that are honoured, or that change nothing when decoding greedily."""


_PROPORTIONS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match"}
"""Metrics of lm-eval that are never outside [0, 1]."""


@dataclass(frozen=True)
class _Options:
    """What is read from ``TaskSettings.options``."""

    num_fewshot: int | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    enable_thinking: bool | None = None
    confirm_run_unsafe_code: bool = False
    rolling_prefill: float = Rolling.prefill_share
    rolling_chunk: int = Rolling.chunk

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
        if "enable_thinking" in values and not chat:
            raise TaskError(f"{task}: enable_thinking needs apply_chat_template", usage=True)
        if isinstance(gen_kwargs := values.get("gen_kwargs"), str):
            from lm_eval.utils import simple_parse_args_string

            values["gen_kwargs"] = simple_parse_args_string(gen_kwargs)
        return cls(**values)


class HarnessTasks:
    """lm-eval's tasks and groups by name: a fallback for :func:`tasks.registry.get_task`.

    Raises:
        TaskError: a folder of ``include_path`` is none.
    """

    def __init__(self, *, include_path: Sequence[Path] = ()) -> None:
        self._include_path = tuple(include_path)
        for folder in self._include_path:
            if not folder.is_dir():
                raise TaskError(f"include_path: {folder} is not a folder", usage=True)

    def get(self, name: str) -> HarnessTask | HarnessGroup | None:
        found = _find_all(self._include_path).get(name)
        if found is None:
            return None
        kind = HarnessGroup if found.is_group else HarnessTask
        return kind(name, include_path=self._include_path)

    def names(self) -> Iterable[str]:
        return _find_all(self._include_path)


class HarnessGroup(TaskGroup):
    """A group of lm-eval, such as ``mmlu``: its tasks, and its score by lm-eval's own rule.

    ``overrides`` are settings that an enclosing group gives its tasks, ``config`` is the definition of a group that
    stands within another one.
    """

    def __init__(
        self,
        name: str,
        *,
        include_path: Sequence[Path] = (),
        overrides: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._include_path = tuple(include_path)
        self._overrides = dict(overrides or {})
        self._config = config

    @functools.cached_property
    def members(self) -> tuple[HarnessTask | HarnessGroup, ...]:  # type: ignore[override]
        """Raises :class:`TaskError` for a member that is defined nowhere."""
        config = self._definition
        overrides = {key: value for key, value in config.items() if key not in _group_fields()} | self._overrides
        found = [member for item in config.get("task") or () for member in self._resolve(item, overrides)]
        if not found:
            raise TaskError(f"the group {self.name} names no tasks", usage=True)
        return tuple(found)

    @functools.cached_property
    def _definition(self) -> Mapping[str, Any]:
        if self._config is not None:
            return self._config
        return _index(_find_all(self._include_path)[self.name].path.parent)[self.name].cfg

    def _resolve(self, item: str | Mapping[str, Any], overrides: Mapping[str, Any]) -> list[HarnessTask | HarnessGroup]:
        if isinstance(item, str):
            name, own = item, {}
        elif "group" in item:
            name = item["group"]
            if name not in _find_all(self._include_path):
                inline = f"{self.name}::{name}"
                return [HarnessGroup(inline, include_path=self._include_path, overrides=overrides, config=item)]
            own = {key: value for key, value in item.items() if key != "group"}
        else:
            name, own = str(item.get("task")), {key: value for key, value in item.items() if key != "task"}
        overrides = {**overrides, **own}
        known = _find_all(self._include_path)
        if (found := known.get(name)) is not None:
            kind = HarnessGroup if found.is_group else HarnessTask
            return [kind(name, include_path=self._include_path, overrides=overrides)]
        # A tag is known where its tasks are defined: beside the group.
        home = next(known[part] for part in (self.name, *self.name.split("::")) if part in known)
        tag = _index(home.path.parent).get(name)
        if tag is None or not tag.tags:
            raise TaskError(f"the group {self.name} names {name!r}, which lm-eval does not define", usage=True)
        return [HarnessTask(task, include_path=self._include_path, overrides=overrides) for task in sorted(tag.tags)]

    def metrics(self) -> tuple[Metric, ...]:
        return tuple({metric.name: metric for task in self.tasks() for metric in task.metrics}.values())

    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        """lm-eval's own aggregate; without values where the group defines none."""
        from lm_eval.api.group import Group

        fields_ = {key: value for key, value in self._definition.items() if key in _group_fields()}
        with _quiet():
            group = Group.from_config({**fields_, "group": self.name})
            for task in self.tasks():
                assert isinstance(task, HarnessTask)
                group.add(task.official)
            metrics: dict[str, Any] = {
                name: _to_results(evaluation) | {"sample_len": counts[name]} for name, evaluation in members.items()
            }
            return _to_evaluation(group.aggregate(metrics))


class HarnessTask(Task):
    """One task of lm-eval.

    ``include_path`` are folders of further task files; they take precedence over lm-eval's own. ``overrides`` are
    settings that a group gives its tasks.

    Options, all but the last two as in lm-eval: ``num_fewshot`` (default: the task's own), ``gen_kwargs`` (a mapping or
    ``"key=value,key=value"``, laid over the task's generation settings), ``apply_chat_template`` (default False),
    ``fewshot_as_multiturn`` (default True with a chat template), ``system_instruction``, ``enable_thinking`` (given to
    the chat template; if True, what comes before ``</think>`` is not part of the answer, nor looked through for stop
    strings), ``confirm_run_unsafe_code`` (default False: tasks whose metric runs code that the model writes are
    refused), and ``rolling_prefill`` and ``rolling_chunk``, see :class:`tasks.base.Rolling`.

    ``limit`` takes the first documents, as lm-eval does. Prompts beyond the model's length lose their beginning.
    ``metrics`` are known after :meth:`load`; a metric is named ``metric,filter``, as lm-eval's tables have it.

    Local rows: with ``TaskSettings.data_dir``, nothing is downloaded. In it, the folder that has the name of the task,
    or else of its data set (``gsm8k`` for ``openai/gsm8k``), holds one JSON-lines file per split: ``test.jsonl``, or
    else the one whose name goes on after an underscore, ``test_first100.jsonl``. Of a data set in several
    configurations (``dataset_name``), a folder in that folder holds each one's files; or one file holds the rows of
    all, told apart by their field ``subject``. Rows have the fields of the original data set. They are held in memory;
    the cache of the datasets library is not touched.
    """

    option_names = tuple(field.name for field in fields(_Options))

    def __init__(
        self, name: str, *, include_path: Sequence[Path] = (), overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.metrics = ()
        self._include_path = tuple(include_path)
        self._overrides = dict(overrides or {})
        self._task: Any = None
        self._instances: dict[str, list[Any]] = {}
        self._rows: dict[str, int] = {}
        self._data_hash = ""
        self._files: list[Path] = []

    @property
    def official(self) -> Any:
        """lm-eval's task object, after :meth:`load`."""
        return self._task

    def load(self, settings: TaskSettings) -> list[Document]:
        options = _Options.parse(self.name, settings.options)
        with _quiet(), self._explained(f"cannot load the task {self.name}"):
            task = self._build(settings, options)
            rows = draw(len(task.eval_docs), settings.sampling_ratio, settings.seed)[: settings.limit]
            task.build_all_requests(
                **_selection(rows),
                rank=0,
                world_size=1,
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
                chat_template=functools.partial(_apply_chat_template, settings.tokenizer, options.enable_thinking),
            )
            self._task = task
            self._instances, self._rows = {}, {}
            for instance in task.instances:
                # lm-eval counts the selected documents; the row in the data set is what stays the same.
                row = rows[instance.doc_id]
                self._instances.setdefault(f"{self.name}-{row}", []).append(instance)
                self._rows[f"{self.name}-{row}"] = row
            documents = [self._document(identifier, settings, options) for identifier in self._instances]
        directions = task.higher_is_better()
        self.metrics = tuple(
            Metric(
                name=f"{metric},{ensemble.name}",
                higher_is_better=directions[metric] is not False,
                low=0.0 if metric in _PROPORTIONS else -math.inf,
                high=1.0 if metric in _PROPORTIONS else math.inf,
            )
            for ensemble in task._filters
            for metric in directions
        )
        self._data_hash = _hash_rows(task)
        return documents

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """Every metric of one answer. A metric that only a whole set defines is that of a set of one."""
        instances = []
        responses = _responses(document.request, answer)
        for instance, response in zip(self._instances[document.id], responses, strict=True):
            instance = copy.copy(instance)
            instance.resps, instance.filtered_resps = [response] * instance.repeats, {}
            instances.append(instance)
        with self._explained(f"{document.id} cannot be scored"):
            return self._scores(instances)

    def _scores(self, instances: Sequence[Any]) -> dict[str, float]:
        """Every metric of one document, whose instances have their responses."""
        # Task.apply_filters would do, but only on the instances that the task itself holds.
        for ensemble in self._task._filters:
            ensemble.apply(instances)
        aggregations = self._task.aggregation()
        scores = {}
        for ensemble in self._task._filters:
            filtered = [instance.filtered_resps[ensemble.name] for instance in instances]
            for metric, value in self._task.process_results(instances[0].doc, filtered).items():
                aggregate = aggregations.get(metric)
                try:
                    score = float(aggregate([value]) if aggregate else value)
                except OverflowError:
                    # The perplexity of few words of improbable text.
                    score = math.inf
                scores[f"{metric},{ensemble.name}"] = score
        return scores

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        """lm-eval's own figures over the answered documents, with the standard errors it defines."""
        from lm_eval.evaluator import evaluate

        stored = {
            self._rows[document.id]: _responses(document.request, answers[document.id])
            for document in documents
            if document.id in answers
        }
        if not stored:
            return Evaluation(values={})
        rows = sorted(stored)
        shots = self._task.config.num_fewshot
        # evaluate() builds every prompt anew, and nobody reads them: leave the examples out, most of the work.
        self._task.set_config("num_fewshot", 0)
        try:
            with _quiet(), self._explained(f"{self.name} cannot be scored"):
                results = evaluate(
                    lm=_replay([stored[row] for row in rows]),
                    task_dict={"tasks": {self.name: self._task}, "groups": {}, "group_map": {}},
                    log_samples=False,
                    # Whoever has not confirmed it could not load the task.
                    confirm_run_unsafe_code=True,
                    **_selection(rows, name=self.name),
                )
        except OverflowError as error:
            raise TaskError(f"{self.name}: a perplexity is too large for a number") from error
        finally:
            self._task.set_config("num_fewshot", shots)
        return _to_evaluation(results["results"][self.name])

    def data_hash(self) -> str:
        return self._data_hash

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn what lm-eval, a task's own code and the datasets library raise over bad data into a :class:`TaskError`.

        ``what`` is how its line begins.
        """
        from datasets.exceptions import DatasetsError
        from jinja2 import TemplateError

        # lm-eval asserts on what users get wrong, such as more examples than there are rows. A task's code meets fields
        # that are absent, null or of another type.
        expected = (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
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
            if self._files:
                reason += f" in rows of {' and '.join(map(str, self._files))}"
            elif isinstance(error, OSError):
                reason += f"; without a connection, give --data-dir with a folder that holds {self.name}/<split>.jsonl"
            raise TaskError(f"{what}: {reason}") from error

    def _build(self, settings: TaskSettings, options: _Options) -> Any:
        """lm-eval's task object, its rows loaded. Raises :class:`TaskError`."""
        found = _find_all(self._include_path).get(self.name)
        if found is None:
            raise TaskError(
                f"lm-eval has no task {self.name!r}: {nearest(self.name, _find_all(self._include_path))}", usage=True
            )
        if found.is_group:
            raise TaskError(f"{self.name} is a group of tasks, not a task", usage=True)
        manager = _manager(found.path.parent)
        config = {**(manager.task_index[self.name].cfg or {}), **self._overrides}
        if options.confirm_run_unsafe_code:
            # The metric of such tasks asks a second time, by this.
            os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
        else:
            self._check_safe(bool(config.get("unsafe_code")))
        shots = config.get("num_fewshot")
        if options.num_fewshot not in (None, shots):
            if shots == 0:
                raise TaskError(f"{self.name} is defined without examples: num_fewshot cannot be changed")
            shots = options.num_fewshot
        overrides: dict[str, Any] = {**self._overrides, "num_fewshot": shots or 0}
        if settings.data_dir is not None:
            local, self._files = _local_rows(self.name, config, settings.data_dir, shots or 0)
            overrides |= local
        # A task in a group is how lm-eval lets a caller change single settings of a task it knows.
        loaded = manager.load([{"group": "arkv-bench", "task": [{"task": self.name, **overrides}]}])
        task = loaded["tasks"][self.name]
        if not options.confirm_run_unsafe_code:
            # Its file may include another one that says so.
            self._check_safe(getattr(task, "UNSAFE_CODE", False))
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"{self.name} asks about images or sound; only text is supported")
        if options.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", dict(options.gen_kwargs), update=True)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return task

    def _check_safe(self, unsafe: bool) -> None:
        if unsafe:
            raise TaskError(
                f"{self.name} runs code that the model writes, on this machine: give --confirm-run-unsafe-code if that "
                "is what you want"
            )

    def _document(self, identifier: str, settings: TaskSettings, options: _Options) -> Document:
        instances = self._instances[identifier]
        what = f"{self.name}, row {self._rows[identifier]}"
        kinds = sorted({instance.request_type for instance in instances})
        if len(kinds) > 1:
            raise TaskError(f"{what}: requests of {' and '.join(kinds)} for one document are not supported")
        if kinds != ["loglikelihood"] and len(instances) > 1:
            raise TaskError(f"{what}: {len(instances)} requests of {kinds[0]} for one document are not supported")
        if options.enable_thinking and kinds != ["generate_until"]:
            raise TaskError(f"{self.name} scores given texts, before which no model thinks: give --no-enable-thinking")
        request: Request
        reference = None
        if kinds == ["loglikelihood_rolling"]:
            request, cut = _rolling(what, instances[0], settings, options), 0
        else:
            reference = self._task.doc_to_target(instances[0].doc)
            if kinds == ["loglikelihood"]:
                request, cut = _log_likelihood(what, instances, settings, self._task.config.target_delimiter)
            else:
                request, cut = _generation(self.name, instances[0], settings, bool(options.enable_thinking))
        return Document(
            id=identifier,
            request=request,
            reference=reference,
            truncated=cut > 0,
            info={"row": self._rows[identifier], "prompt_tokens": request.prompt_tokens, "cut_tokens": cut},
        )


def _to_evaluation(results: Mapping[str, Any]) -> Evaluation:
    """From lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}``."""
    values, stderr = {}, {}
    for key, value in results.items():
        metric, comma, ensemble = key.partition(",")
        if not comma or not isinstance(value, float | int):
            continue
        if metric.endswith("_stderr"):
            stderr[f"{metric.removesuffix('_stderr')},{ensemble}"] = float(value)
        else:
            values[key] = float(value)
    return Evaluation(values=values, stderr=stderr)


def _to_results(evaluation: Evaluation) -> dict[str, Any]:
    """The inverse of :func:`_to_evaluation`."""
    results: dict[str, Any] = dict(evaluation.values)
    for key in evaluation.values:
        metric, _, ensemble = key.partition(",")
        results[f"{metric}_stderr,{ensemble}"] = evaluation.stderr.get(key, "N/A")
    return results


# --- Finding a task ---


@dataclass(frozen=True)
class _Found:
    """Where a task or group is defined."""

    path: Path
    is_group: bool


def _find_all(include_path: Sequence[Path]) -> dict[str, _Found]:
    """The file that defines each task and group, as lm-eval's index would find it.

    lm-eval parses 14,000 YAML files for that; reading their ``task:`` and ``group:`` lines takes half a second.
    Raises :class:`TaskError`.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise TaskError("lm-eval is not installed: pip install lm-eval")
    found = dict(_find(Path(spec.origin).parent / "tasks"))
    for folder in include_path:
        found |= _find(folder)
    return found


@functools.cache
def _find(folder: Path) -> dict[str, _Found]:
    pattern = re.compile(rb"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
    found: dict[str, _Found] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        for kind, name in pattern.findall(path.read_bytes()):
            found.setdefault(name.decode("utf-8", "replace"), _Found(path, kind == b"group"))
    return found


@functools.cache
def _manager(folder: Path) -> Any:
    """lm-eval's manager of the tasks in one folder: the index of all of lm-eval takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder))


def _index(folder: Path) -> Mapping[str, Any]:
    """lm-eval's entries of the tasks, groups and tags in one folder."""
    with _quiet():
        index: Mapping[str, Any] = _manager(folder).task_index
    return index


def _group_fields() -> set[str]:
    """Settings of a group; its other ones are for its tasks."""
    from lm_eval.config.group import GroupConfig

    return {field.name for field in fields(GroupConfig)} | {"tag"}


# --- Local rows ---


def _local_rows(task: str, config: Mapping[str, Any], data_dir: Path, shots: int) -> tuple[dict[str, Any], list[Path]]:
    """Settings that make lm-eval take a task's rows from ``data_dir``, and the files. Raises :class:`TaskError`."""
    import datasets

    if "class" in config:
        raise TaskError(f"{task} loads its rows with code of its own; it cannot read local ones")
    dataset = str(config.get("dataset_path") or task).rpartition("/")[2]
    folder = next((data_dir / name for name in (task, dataset) if (data_dir / name).is_dir()), data_dir / task)
    evaluation = config.get("test_split") or config.get("validation_split")
    fewshot = _fewshot_split(config) if shots else None
    subset = config.get("dataset_name")
    if subset and (folder / subset).is_dir():
        folder, subset = folder / subset, None
    tables, files = {}, []
    for split in dict.fromkeys((evaluation, fewshot)):
        if split is None:
            continue
        path = _split_file(task, folder, split)
        files.append(path)
        rows = _read_rows(path, config, subset)
        # Where examples come from the evaluated rows, the row in question is set aside.
        if split == fewshot and len(rows) < shots + (fewshot == evaluation):
            raise TaskError(f"{path} has {len(rows)} rows, too few to draw {shots} examples from")
        tables[split] = datasets.Dataset.from_list(rows)
    # lm-eval opens every split that the configuration names, asked for or not.
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    unused = {role: None for role in roles if config.get(role) not in (None, *tables)}

    def custom_dataset(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(tables)

    return {"custom_dataset": custom_dataset, **unused}, files


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


def _read_rows(path: Path, config: Mapping[str, Any], subset: str | None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; each must have the fields that the templates in ``config`` read.

    Code of a task may read any field: for one that has some, each row must have the fields that others have. Where rows
    have a field ``subject``, only those whose subject is ``subset``. Raises :class:`TaskError` with the file, line and
    field.
    """
    try:
        stat = path.stat()
        rows = _parse_rows(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise TaskError(f"{path} has no rows")
    if subset and any("subject" in row for _, row in rows):
        for number, row in rows:
            if "subject" not in row:
                raise TaskError(f"{path}, line {number}: no field 'subject', which other rows have")
        subjects = {row["subject"] for _, row in rows}
        rows = [(number, row) for number, row in rows if row["subject"] == subset]
        if not rows:
            raise TaskError(f"{path} has no rows of the subject {subset!r}: {nearest(subset, map(str, subjects))}")
    # What process_docs makes of the rows is what the templates read.
    if not config.get("process_docs"):
        _check_fields(path, rows, config)
    if config.get("process_docs") or config.get("process_results"):
        _check_same_fields(path, rows)
    return [dict(row) for _, row in rows]


@functools.lru_cache(maxsize=8)
def _parse_rows(path: Path, size: int, changed: int) -> list[tuple[int, dict[str, Any]]]:
    """Rows with their line numbers; read once for all the tasks that share a file of this size and time of change."""
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
    return rows


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
        if key in ("doc_to_target", "doc_to_choice") and template.isidentifier() and template not in known:
            raise TaskError(f"{path}, line {rows[0][0]}: no field {template!r}, which the task's {key} names")
        compiled = env.from_string(f"{{{{ {template} }}}}" if template in known else template)
        for number, row in rows:
            try:
                compiled.render(**row)
            except UndefinedError as error:
                raise TaskError(f"{path}, line {number}: the task's {key} misses a field: {error}") from error


def _check_same_fields(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
    known = dict.fromkeys(field for _, row in rows for field in row)
    for number, row in rows:
        for field in known:
            if field not in row:
                raise TaskError(f"{path}, line {number}: no field {field!r}, which other rows have")


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


def _generation(task: str, instance: Any, settings: TaskSettings, thinks: bool) -> tuple[Generate, int]:
    """The request of an instance, and how many tokens were cut from its beginning. Raises :class:`TaskError`."""
    prompt, generation = instance.args
    max_new_tokens, stop = _stopping(task, generation, settings.tokenizer)
    room = settings.max_length - max_new_tokens
    if room < 1:
        raise TaskError(
            f"{task}: an answer of {max_new_tokens} tokens leaves no room for a prompt within "
            f"{settings.max_length}: set max_gen_toks in gen_kwargs"
        )
    ids = _encode(settings.tokenizer, prompt)
    request = Generate(
        prompt_ids=tuple(ids[-room:]),
        max_new_tokens=max_new_tokens,
        stop=stop,
        think_end=_THINK_END if thinks else None,
    )
    return request, max(0, len(ids) - room)


def _log_likelihood(
    what: str, instances: Sequence[Any], settings: TaskSettings, delimiter: str
) -> tuple[LogLikelihood, int]:
    """The request of a document's instances, and how many tokens were cut from the beginning of a context.

    A continuation stays whole and its context loses its beginning, so that contexts of one question can differ once
    they are cut. ``delimiter`` is what lm-eval puts before a choice and counts to it. Raises :class:`TaskError`.
    """
    for place, instance in enumerate(instances):
        if instance.args[1] in ("", delimiter):
            raise TaskError(f"{what}: choice {place} is empty, there is nothing to score")
    continuations, most_cut = [], 0
    for context, tokens in _encode_pairs(settings.tokenizer, instances):
        if not context or not tokens:
            raise TaskError(f"{what}: a context or a choice without tokens cannot be scored")
        # The last token of a continuation is predicted, not read.
        room = settings.max_length + 1 - len(tokens)
        if room < 1:
            raise TaskError(f"{what}: a choice of {len(tokens)} tokens does not fit {settings.max_length}")
        most_cut = max(most_cut, len(context) - room)
        continuations.append(Continuation(context_ids=tuple(context[-room:]), token_ids=tuple(tokens)))
    return LogLikelihood(continuations=tuple(continuations)), max(0, most_cut)


def _rolling(what: str, instance: Any, settings: TaskSettings, options: _Options) -> Rolling:
    """The request of an instance: windows as long as the model, each token scored once. Raises :class:`TaskError`."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    (text,) = instance.args
    prefix, encode = _scoring_encoder(settings.tokenizer)
    windows = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(
            token_list=encode(text), prefix_token=prefix, max_seq_len=settings.max_length, context_len=1
        )
    ]
    if not windows:
        raise TaskError(f"{what}: the text is empty, there is nothing to score")
    return Rolling(
        windows=tuple(Continuation(context_ids=tuple(context), token_ids=tuple(ids)) for context, ids in windows),
        prefill_share=options.rolling_prefill,
        chunk=options.rolling_chunk,
    )


def _scoring_encoder(tokenizer: Any) -> tuple[int, Callable[..., list[int]]]:
    """The token that stands before a text without context, and the encoding of texts that are scored."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise TaskError("the tokenizer has neither a BOS nor an end-of-sequence token to begin a text with")
    begins_with = tokenizer.decode(prefix)

    def encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        if add_special_tokens is None and text.startswith(begins_with):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = tokenizer(text, **more)["input_ids"]
        return ids

    return prefix, encode


def _encode_pairs(tokenizer: Any, instances: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Token ids of context and continuation, divided by lm-eval's own rule for white space between them."""
    from lm_eval.api.model import TemplateLM

    prefix, encode = _scoring_encoder(tokenizer)

    class Encoder:
        """What lm-eval's own encoding of pairs asks of a model, which is no model otherwise."""

        backend = TemplateLM.backend
        prefix_token_id = prefix
        loglikelihood: Any = TemplateLM.loglikelihood
        _encode_pair: Any = TemplateLM._encode_pair

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
            return [(context, continuation) for _, context, continuation in requests]

    pairs: list[Any] = Encoder().loglikelihood(list(instances), disable_tqdm=True)
    return pairs


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


def _apply_chat_template(
    tokenizer: Any, enable_thinking: bool | None, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    from jinja2 import TemplateError

    render = functools.partial(
        tokenizer.apply_chat_template,
        **({} if enable_thinking is None else {"enable_thinking": enable_thinking}),
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


def _responses(request: Request, answer: Answer) -> list[Any]:
    """An answer as lm-eval's models give it: one response for each instance of the document, in their order."""
    if isinstance(answer, Generated):
        return [answer.text]
    assert isinstance(answer, LogLikelihoods)
    if isinstance(request, Rolling):
        return [sum(window.log_likelihood for window in answer.scored)]
    return [tuple(scored) for scored in answer.scored]


def _replay(responses: Sequence[Sequence[Any]]) -> Any:
    """An lm-eval model that answers from a store: ``responses[document]`` has one for each instance, in their order."""
    from lm_eval.api.model import LM

    class Replay(LM):
        def generate_until(self, requests: list[Any]) -> list[Any]:
            # An instance comes as often as the task repeats it, and its number within the document need not be unique.
            places: dict[int, dict[int, int]] = {}
            answers = []
            for request in requests:
                seen = places.setdefault(request.doc_id, {})
                answers.append(responses[request.doc_id][seen.setdefault(id(request), len(seen))])
            return answers

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
