"""One prefill, many methods: each context is computed once, then every cell of the grid compresses its own copy of the
cache and answers from it.

All cells go through the same steps (:mod:`bench.engine.steps`): decode greedily, token by token, or read given tokens
and score them, one file per kind of request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from bench.engine import choices, decoding, distributions, generation, texts
from bench.engine.jobs import Job, cells_of, noting
from bench.engine.measurement import Failure, Measurement
from bench.engine.shared import context_of
from bench.engine.steps import AUTO_BYTES, Steps
from bench.methods.cell import Cell
from bench.methods.prompt import stand_in_question
from tasks.base import Compare, Document, Generate, LogLikelihood, Request, Rolling
from tasks.generation import Fate

__all__ = ["AUTO_DOCUMENTS", "Engine", "Failure", "Measurement"]

AUTO_DOCUMENTS = 32
"""Most documents of an automatic batch, which is what a killed run has to measure again."""

_WARM_UP_TOKENS = 256
"""Least tokens of the prompt that a warm-up compresses to half."""

_KINDS: dict[type, Callable[[Steps, Sequence[Job]], Iterator[tuple[Job, Measurement]]]] = {
    Generate: generation.answer,
    LogLikelihood: choices.answer,
    Rolling: texts.answer,
    Compare: distributions.answer,
}


class Engine(Steps):
    """Answers documents with one model through every cell of a grid.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        cells: the grid.
        batch_size: documents that are answered side by side, and continuations that are read in one forward, each from
            a cache of its own; None for as many as take a gibibyte. Methods that cannot go side by side answer one by
            one, and so do all where a text is read as a whole or distributions are compared.
        prefill_chunk: tokens of a prompt that are read in one forward, to save memory; None for all.
    """

    def warm_up(self) -> str:
        """Run a short prompt through every cell, compression included, so that one-time costs do not count for the
        first document. Budgets that would hold it are made smaller for that.

        Returns:
            What was done, for the record: with the cells that could not answer, or had a budget and kept all.
        """
        windows = [cell.window_size or 0 for cell in self.cells]
        tokens = max(_WARM_UP_TOKENS, 2 * self.recorded_queries, 4 * max(windows, default=0))
        new = 3
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is not None:
            tokens = max(1, min(tokens, context - new))
        budget = max(tokens // 2, 1)
        smaller = list(dict.fromkeys(cell.resized(budget) for cell in self.cells))
        # What the model's settings refuse may be put right by those of a request.
        settings = decoding.neutral(self.model, Fate.REFUSED)
        asking = stand_in_question(tokens)
        request = Generate(prompt_ids=(0,) * tokens, question_tokens=asking, max_new_tokens=new, generation=settings)
        cold = [
            outcome.cell.label
            for outcome in self.answer(Document(id="warm-up", request=request), smaller)
            if isinstance(outcome, Failure)
            or (outcome.cell.impl.has_budget and not outcome.tokens_evicted + outcome.tokens_quantized)
        ]
        done = f"a prompt of {tokens} tokens through every cell, budgets of {budget}"
        return f"{done}; not compressed: {', '.join(cold)}" if cold else done

    def answer(self, document: Document, cells: Sequence[Cell]) -> Iterator[Measurement | Failure]:
        """Compute the document's contexts once, then answer with each of ``cells``, in their order, but for those that
        share a prefill of their own, which come together.

        Cells that fail come last and do not stop the others. What all share is the failure of all.
        """
        for _, outcome in self.answer_batch([(document, cells)]):
            yield outcome

    @torch.inference_mode()
    def answer_batch(
        self, work: Sequence[tuple[Document, Sequence[Cell]]]
    ) -> Iterator[tuple[Document, Measurement | Failure]]:
        """Answer any number of documents with the cells of each, ``batch_size`` of them side by side.

        There is one outcome for each document and cell. Batches come in the order of ``work`` and each one's failures
        come last. What fails where the documents of a batch share a step, such as a forward, is tried again one by one:
        the fault, or the want of memory, may be that of a single one.
        """
        for jobs in self._side_by_side([Job(document, cells) for document, cells in work]):
            yield from self._answer_jobs(jobs)
            for job in jobs:
                alone = Job(job.document, [cell for cell in job.cells if cell.key in job.together])
                if alone.cells:
                    yield from self._answer_jobs([alone])
                    job.failed = {**job.failed, **alone.failed}
                for key, failure in job.failed.items():
                    if key not in alone.answered:
                        yield job.document, failure

    def _answer_jobs(self, jobs: Sequence[Job]) -> Iterator[tuple[Document, Measurement]]:
        """The answers of a batch; failures stay in its jobs."""
        with noting(jobs, cells_of(jobs)):
            for job, measured in _KINDS[type(jobs[0].document.request)](self, jobs):
                job.answered.add(measured.cell.key)
                yield job.document, measured

    def _side_by_side(self, jobs: Iterable[Job]) -> Iterator[list[Job]]:
        """Batches of jobs in their order, each of requests of one kind. Neighbours with one context stay together, as
        far as a batch of all sizes goes: they share its prefill."""
        batch: list[Job] = []
        held = 0
        for job in jobs:
            request = job.document.request
            needed = self._bytes_needed(request)
            full = len(batch) >= (self.batch_size or AUTO_DOCUMENTS)
            if self.batch_size is None:
                full = full or held + needed > AUTO_BYTES
            context = context_of(job.document)
            if context is not None and batch and context == context_of(batch[-1].document):
                full = len(batch) >= max(self.batch_size or 0, AUTO_DOCUMENTS)
            if batch and (full or type(request) is not type(batch[0].document.request)):
                yield batch
                batch, held = [], 0
            batch.append(job)
            held += needed
        if batch:
            yield batch

    def _bytes_needed(self, request: Request) -> int:
        """About what a document takes while a cell answers it: its prefill, and a cache as large as the full one."""
        config: Any = self.model.config.get_text_config(decoder=True)
        if not hasattr(config, "num_attention_heads"):
            # A model without attention, of which nothing is known: alone.
            return AUTO_BYTES + 1
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token: int = 2 * config.num_hidden_layers * heads * head_dim * self.model.dtype.itemsize
        new = (1 + len(request.turns)) * request.max_new_tokens if isinstance(request, Generate) else 0
        return per_token * (2 * request.prompt_tokens + new)
