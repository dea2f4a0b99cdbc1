"""One task of lm-eval: its prompts, filters and metrics, with inference arranged by us in between.

lm-eval's own code builds the requests; they are tokenized, cut and stopped as its Hugging Face model class does it. The
answers are scored by replay.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.definition import definition_sha256
from bench.harness.index import find_all, task_manager
from bench.harness.options import HarnessOptions
from bench.harness.parts import has_parts, question_at, source_of
from bench.harness.quiet import quiet
from bench.harness.replay import replay, selection, to_evaluation, to_responses
from bench.harness.requests import apply_chat_template, to_generate, to_log_likelihood, to_rolling
from bench.harness.rows import hash_rows, local_rows
from tasks.base import Answer, Document, Evaluation, Metric, Request, Task, TaskSettings, draw, missing_rows
from tasks.errors import TaskError, nearest

_FEWSHOT_SEED = 1234
"""lm-eval's default; with any other seed the prompts would not be the official ones."""

_PROPORTIONS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match"}
"""Metrics of lm-eval of which a document has 0 or 1."""


class HarnessTask(Task):
    """One task of lm-eval.

    ``include_path`` are folders of further task files; they take precedence over lm-eval's own. ``overrides`` are
    settings that a group gives its tasks. ``num_fewshot`` is what a user asks for, as far as :attr:`has_parts` goes.

    Options: :class:`bench.harness.options.HarnessOptions`.

    ``limit`` takes the first documents, as lm-eval does. Prompts beyond the model's length lose their beginning.
    ``metrics`` are known after :meth:`load`; a metric is named ``metric,filter``, as lm-eval's tables have it.

    Local rows: with ``TaskSettings.data_dir``, nothing is downloaded. In it, the folder that has the name of the task,
    or else of its data set (``gsm8k`` for ``openai/gsm8k``), holds one JSON-lines file per split: ``test.jsonl``, or
    else the one whose name goes on after an underscore, ``test_first100.jsonl``. Of a data set in several
    configurations (``dataset_name``), a folder in that folder holds each one's files; or one file holds the rows of
    all, told apart by their field ``subject``. Rows have the fields of the original data set; one that only some rows
    have is None in the others, which :attr:`notes` say. They are held in memory; the cache of the datasets library is
    not touched.
    """

    Options = HarnessOptions

    def __init__(
        self,
        name: str,
        *,
        include_path: Sequence[Path] = (),
        overrides: Mapping[str, Any] | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        self.name = name
        self._num_fewshot = num_fewshot
        self.metrics = ()
        self._include_path = tuple(include_path)
        self._overrides = dict(overrides or {})
        self._task: Any = None
        self._instances: dict[str, list[Any]] = {}
        self._rows: dict[str, int] = {}
        self._data_hash = ""
        self._files: list[Path] = []

    @functools.cached_property
    def has_parts(self) -> bool:  # type: ignore[override]
        """There are examples before the question, or the template names a passage that it is about."""
        found = find_all(self._include_path).get(self.name)
        if found is None or found.is_group:
            return False
        try:
            with quiet(), self._explained(self.name):
                config = {**(task_manager(found.path.parent).task_index[self.name].cfg or {}), **self._overrides}
        except TaskError:
            # Loading the task meets the same, and tells it.
            return False
        return has_parts(config, self._num_fewshot)

    @property
    def official(self) -> Any:
        """lm-eval's task object, after :meth:`load`."""
        return self._task

    def load(self, settings: TaskSettings) -> list[Document]:
        options = HarnessOptions.parse(self.name, settings.options)
        with quiet(), self._explained(f"cannot load the task {self.name}"):
            task = self._build(settings, options)
            rows = draw(len(task.eval_docs), settings.sampling_ratio, settings.seed)[: settings.limit]
            task.build_all_requests(
                **selection(rows),
                rank=0,
                world_size=1,
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.as_multiturn,
                chat_template=functools.partial(apply_chat_template, settings.tokenizer, options.enable_thinking),
            )
            self._task = task
            found: dict[str, list[Any]] = {}
            for instance in task.instances:
                # lm-eval counts the selected documents; the row in the data set is what stays the same.
                row = rows[instance.doc_id]
                found.setdefault(f"{self.name}-{row}", []).append(instance)
                self._rows[f"{self.name}-{row}"] = row
            # Documents of an earlier call can be scored too.
            self._instances |= found
            documents = [self._document(identifier, settings, options) for identifier in found]
        directions = task.higher_is_better()
        self.metrics = tuple(
            Metric(
                name=f"{metric},{ensemble.name}",
                higher_is_better=directions[metric] is not False,
                low=0.0 if metric in _PROPORTIONS else -math.inf,
                high=1.0 if metric in _PROPORTIONS else math.inf,
                binary=True if metric in _PROPORTIONS else None,
            )
            for ensemble in task._filters
            for metric in directions
        )
        self._data_hash = hash_rows(task)
        return documents

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """Every metric of one answer. A metric that only a whole set defines is that of a set of one."""
        instances = []
        responses = to_responses(document.request, answer)
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
            self._rows[document.id]: to_responses(document.request, answers[document.id])
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
            with quiet(), self._explained(f"{self.name} cannot be scored"):
                results = evaluate(
                    lm=replay([stored[row] for row in rows]),
                    task_dict={"tasks": {self.name: self._task}, "groups": {}, "group_map": {}},
                    log_samples=False,
                    # Whoever has not confirmed it could not load the task.
                    confirm_run_unsafe_code=True,
                    **selection(rows, name=self.name),
                )
        except OverflowError as error:
            raise TaskError(f"{self.name}: a perplexity is too large for a number") from error
        finally:
            self._task.set_config("num_fewshot", shots)
        return to_evaluation(results["results"][self.name])

    def data_hash(self) -> str:
        return self._data_hash

    def definition_hash(self) -> str:
        """Of the settings that its YAML files come to, and of the files of the functions that these name."""
        return definition_sha256(self._task)

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
            said, reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0], ""
            if self._files:
                said += f" in rows of {' and '.join(map(str, self._files))}"
            elif isinstance(error, OSError):
                said += f"; without a connection, give --data-dir with a folder that holds {self.name}/<split>.jsonl"
                reason = missing_rows(None)
            raise TaskError(f"{what}: {said}", reason=reason) from error

    def _build(self, settings: TaskSettings, options: HarnessOptions) -> Any:
        """lm-eval's task object, its rows loaded. Raises :class:`TaskError`."""
        found = find_all(self._include_path).get(self.name)
        if found is None:
            raise TaskError(
                f"lm-eval has no task {self.name!r}: {nearest(self.name, find_all(self._include_path))}", usage=True
            )
        if found.is_group:
            raise TaskError(f"{self.name} is a group of tasks, not a task", usage=True)
        manager = task_manager(found.path.parent)
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
            local = local_rows(self.name, config, settings.data_dir, shots or 0)
            self._files, self.notes = local.files, local.notes
            overrides |= local.settings
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

    def _document(self, identifier: str, settings: TaskSettings, options: HarnessOptions) -> Document:
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
        is_after = settings.question == "after" and self.has_parts and kinds != ["loglikelihood_rolling"]
        begins = [question_at(self._task, item) if is_after else None for item in instances]
        if kinds == ["loglikelihood_rolling"]:
            request, cut = to_rolling(what, instances[0], settings, options), 0
        else:
            reference = self._task.doc_to_target(instances[0].doc)
            if kinds == ["loglikelihood"]:
                delimiter = self._task.config.target_delimiter
                request, cut = to_log_likelihood(what, instances, settings, delimiter, begins)
            else:
                thinks = bool(options.enable_thinking)
                request, cut = to_generate(self.name, instances[0], settings, thinks, begins[0])
        source = source_of(self._task, instances[0].doc)
        return Document(
            id=identifier,
            request=request,
            reference=reference,
            truncated=cut > 0,
            info={
                "row": self._rows[identifier],
                "prompt_tokens": request.prompt_tokens,
                "cut_tokens": cut,
                **({} if source is None else {"source": source}),
            },
        )
