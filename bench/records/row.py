"""A row of ``results.csv``: one model, task, metric and cell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from bench.errors import UserError
from bench.names import BUDGET_UNITS, FULL, RESULTS, SAMPLES
from bench.records.files.csv_ import DIGITS, csv_text, read_models
from bench.records.lacking import no_run_folder

Share = Annotated[float, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


def _unit(text: str) -> str:
    if text not in BUDGET_UNITS:
        raise ValueError(f"{text!r} is neither {' nor '.join(BUDGET_UNITS)}")
    return text


def _truth(value: Any) -> Any:
    """A cell is True or False and nothing else that could be meant so."""
    if isinstance(value, str):
        if value not in ("True", "False"):
            raise ValueError(f"{value!r} is neither True nor False")
        return value == "True"
    return value


Truth = Annotated[bool, BeforeValidator(_truth)]


class Row(BaseModel):
    """One row; what is unknown is None."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: str
    task: str
    metric: str
    method: str
    quant_format: str | None = None
    budget_unit: Annotated[str, AfterValidator(_unit)] | None = None
    cache_size: Count | None = None
    window_size: Count | None = None
    cache_ratio: Amount | None = None
    n: Annotated[int, Field(ge=1)]
    """Documents."""
    repeats: Count | None = None
    """Sampled answers of each, which scores are means over. None where answers are greedy, and in older files."""
    sources: Count | None = None
    """What the documents are made of; fewer than these where some share a text. Unknown in older files."""
    score: float
    metric_low: float | None = None
    """No score can be smaller; likewise larger. None where there is no such end, and in older files."""
    metric_high: float | None = None
    binary: Truth | None = None
    """Every score of a document is one of the two ends, as right and wrong are. Unknown in older files."""
    of_full: float | None = None
    """What ``full`` scores by definition, where the score is a distance from it. Unknown in older files."""
    chance: Share | None = None
    """What guessing would score, where answers are choices."""
    score_full: float | None = None
    """Of ``full`` on the same documents."""
    retention: float | None = None
    """``score / score_full``, where that says how much of the score is kept: see
    :func:`bench.judge.retention.add_retention`."""
    retention_low: float | None = None
    """Ends of its 95 % interval over documents."""
    retention_high: float | None = None
    score_low: float | None = None
    """Ends of the 95 % interval over documents; likewise of the difference."""
    score_high: float | None = None
    difference: float | None = None
    """Paired, to ``full`` on the same documents."""
    difference_low: float | None = None
    difference_high: float | None = None
    """The ends of a difference hold together with those of the other rows of the task and metric."""
    p_value: Share | None = None
    """Of this row alone."""
    p_adjusted: Share | None = None
    """Of all rows of the task and metric together: below 0.05 if and only if the interval of the difference is without
    0. Unknown in older files."""
    p_holm: Share | None = None
    """``p_value`` adjusted by Holm's method, and by Benjamini and Hochberg's; no verdict follows from them."""
    p_bh: Share | None = None
    detectable_difference: Amount | None = None
    """The smallest that so many documents would have shown, by the test of ``p_adjusted``."""
    cannot_tell: Literal["floor", "chance", "ceiling"] | None = None
    """Why documents cannot show a difference to ``full``, however many they are: what ``full`` itself scores is next to
    nothing, or to what guessing scores; or everything here is about as good as can be."""
    best: str | None = None
    """The cell with the best score at the same budget, which the row is compared with. Unknown in older files."""
    to_best: float | None = None
    """Paired difference to it on the same documents; of a divergence, the ratio of the two."""
    to_best_low: float | None = None
    """Ends of its interval, which holds together with those of the other rows of the budget."""
    to_best_high: float | None = None
    p_to_best: Share | None = None
    """Of all rows of the budget together."""
    leading: Truth | None = None
    """The best of its budget, or not to be told from it; None where nobody is."""
    kv_bytes_mean: Amount | None = None
    kv_bytes_peak: Count | None = None
    kv_share: Share | None = None
    """Of the full cache's bytes."""
    ragged_share: Share | None = None
    """Where tokens of single heads are masked, and so stay stored: the same as if each head stored only what it attends
    to. Unknown in older files."""
    kv_share_of_prompt: Share | None = None
    """Of the bytes of the prompt alone, which a budget is meant of."""
    original_share: Share | None = None
    """Of the tokens seen; likewise the next two."""
    quantized_share: Share | None = None
    evicted_share: Share | None = None
    compressed_documents: Count | None = None
    prefill_s: Amount | None = None
    compress_s: Amount | None = None
    ttft_ms: Amount | None = None
    decode_tokens_per_s: Amount | None = None
    tpot_ms: Amount | None = None
    peak_memory_bytes: Count | None = None
    timed_documents: Count | None = None
    """Those that the times and the memory are of: measured on the same hardware, threads and batches, like those of the
    other rows. Unknown in older files."""
    prompt_tokens: Amount | None = None
    """Means over documents, as are the tokens generated."""
    generated_tokens: Amount | None = None
    truncated_documents: Count | None = None
    higher_is_better: Truth
    question: Literal["after", "before", "inside", "mixed"] | None = None
    """Where the questions stood, see :data:`bench.records.sample.Place`; ``mixed`` is not the same in all documents.
    None where there are none, and in older files: inside the compressed prompt."""
    cell: str
    part_of: str | None = None
    """The group of tasks that the row was asked for through."""
    run: str | None = None
    """Which run it is of, where several stand together; no column of a run's own file."""

    @property
    def not_exercised(self) -> bool:
        """Nothing was compressed: the row says nothing about its method."""
        return self.method != FULL and self.compressed_documents == 0

    @property
    def ragged_share_of_prompt(self) -> float | None:
        """``ragged_share`` of the bytes of the prompt alone."""
        if self.ragged_share is None or not self.kv_share or self.kv_share_of_prompt is None:
            return None
        # Both are of the same sums.
        return self.ragged_share * self.kv_share_of_prompt / self.kv_share


RUN = "run"
COLUMNS = [name for name in Row.model_fields if name != RUN]
"""Columns of ``results.csv``; unknown is empty."""
NEWER = {
    *("timed_documents", "p_adjusted", "best", "to_best", "to_best_low", "to_best_high", "p_to_best"),
    *(
        "sources",
        "repeats",
        "question",
        "ragged_share",
        "metric_low",
        "metric_high",
        "binary",
        "of_full",
        "chance",
        "retention_low",
        "retention_high",
        "cannot_tell",
    ),
}
NEEDED = [name for name in COLUMNS if name not in NEWER]
"""Those that every file has."""
STATISTICS = COLUMNS[COLUMNS.index("score_low") : COLUMNS.index("leading") + 1]
"""Columns about how sure a score is: 95 % intervals over documents, the paired difference to ``full`` with its p-value,
plain and of the whole table, the smallest difference that so many documents would have shown, and how the row
stands to the best of its budget."""


def rows_csv(rows: Iterable[Row]) -> str:
    """The rows of one run as CSV."""
    return csv_text(COLUMNS, rows, DIGITS)


def read_results(path: Path) -> list[Row]:
    """Rows of a run's ``results.csv``, of the folder or of the file itself.

    Raises:
        UserError: no such file, no rows, a missing column, or a cell that makes no sense (line and column are named).
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        if (path / SAMPLES).is_file():
            raise UserError(f"{path} has no {RESULTS}: no task of the run has ended yet")
        raise no_run_folder(path, RESULTS)
    rows = read_models(file, Row, NEEDED, "the run's own command writes the file anew")
    if not rows:
        raise UserError(f"{file} has no rows: no task of the run has ended yet, or all have failed")
    return rows
