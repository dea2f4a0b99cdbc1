#!/usr/bin/env python
"""The full cache of the suite beside lm-eval's own ``hf`` model: the same documents, answers and scores, in float32.

Multiple choice with five examples is also read through caches that hold a quarter of each prompt, where every document
must differ, and through caches with room for everything, where none may.

    scripts/parity.py --data-dir DATA --outdir results/parity
    scripts/parity.py --data-dir DATA --model qwen2.5-coder-0.5b --tasks gsm8k --limit 20

A model whose own generation config asks for more than greedy decoding, such as a repetition penalty, is asked one
document at a time by lm-eval: in batches its penalties would count padding too.

DATA holds rows of gsm8k, mmlu and commonsense_qa as ``arkv-bench run --data-dir`` reads them. Exit code 1 if anything
is not as it must be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.engine.decoding import settings_of
from bench.engine.engine import Engine, Failure
from bench.harness.task import HarnessTask
from bench.methods.grid import full_cell, grid
from bench.models.loading import load
from bench.names import FULL
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from tasks.base import Document, Generated, LogLikelihoods, Rolling, TaskSettings
from tasks.generation import Fate, asked

DEFAULT = "smollm2-135m"
SUBJECTS = ("anatomy", "global_facts", "sociology", "virology", "world_religions")
DOCUMENTS = {"gsm8k": 8, **{f"mmlu_{subject}": 8 for subject in SUBJECTS}, "commonsense_qa": 40, "local_text": 3}
SHOTS = {"gsm8k": 5, "commonsense_qa": 0, "local_text": None} | {f"mmlu_{subject}": 5 for subject in SUBJECTS}

LOCAL_TEXT = """
task: local_text
dataset_path: nobody/local_text
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""

MAX_LENGTH = {"local_text": 512}
"""Tokens of a prompt or window; 2,048 for other tasks. A text is read in several windows, and the sum over one is a
number that float32 still holds to well within the tolerance."""

TOLERANCE = 1e-3
"""Nats that log-likelihoods may differ by."""


@dataclasses.dataclass(kw_only=True)
class Row:
    """One model and task; what does not apply is None."""

    model: str
    task: str
    documents: int
    truncated: int
    same_texts: int | None = None
    log_likelihoods: int | None = None
    largest_difference: float | None = None
    same_greedy: bool | None = None
    same_metrics: bool
    differ_at_quarter: int | None = None
    """Documents of which any log-likelihood differs from that of the full cache; likewise the next."""
    differ_with_room: int | None = None

    @property
    def passed(self) -> bool:
        return (
            self.same_metrics
            and self.same_texts in (None, self.documents)
            and (self.largest_difference is None or self.largest_difference < TOLERANCE)
            and self.same_greedy is not False
            and self.differ_at_quarter in (None, self.documents)
            and self.differ_with_room in (None, 0)
        )


def tiny_qwen3(tokenizer: Any) -> Any:
    """A random model with the default model's tokenizer, wide enough that attention is far from uniform."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


def likelihoods(answer: Any) -> list[float]:
    assert isinstance(answer, LogLikelihoods)
    return [item.log_likelihood for item in answer.scored]


def differing(documents: list[Document], answers: Mapping[str, Any], others: Mapping[str, Any]) -> int:
    """Documents of which any log-likelihood is another one."""
    return sum(
        any(
            abs(one - other) >= TOLERANCE
            for one, other in zip(likelihoods(answers[d.id]), likelihoods(others[d.id]), strict=True)
        )
        for d in documents
    )


def compare(model: Any, tokenizer: Any, label: str, name: str, data: Path, limit: int, include: Path) -> Row:
    """One task by both."""
    longest = MAX_LENGTH.get(name, 2048)
    task = HarnessTask(name, include_path=(include,))
    documents = task.load(
        TaskSettings(
            tokenizer=tokenizer,
            max_length=longest,
            limit=limit,
            data_dir=include if name == "local_text" else data,
            options={"num_fewshot": SHOTS[name]},
        )
    )
    cells = [full_cell()]
    if name.startswith("mmlu"):
        cells += grid(["origin"], [{"cache_ratio": 0.25}, {"cache_size": 2 * longest}], [32], None, {})
    engine = Engine(model, tokenizer, cells, batch_size=8)
    answers: dict[str, dict[str, Any]] = {cell.key: {} for cell in cells}
    for document, outcome in engine.answer_batch([(document, cells) for document in documents]):
        if isinstance(outcome, Failure):
            raise SystemExit(f"{name}, {document.id}: {outcome.error}")
        answers[outcome.cell.key][document.id] = outcome.answer
    full = answers[FULL]
    # Prompts are built a second time: the examples are drawn as at first, with lm-eval's default seed.
    task.official.set_fewshot_seed(seed=1234)
    size = 1 if asked(settings_of(model), Fate.APPLIED).keys() - {"eos_token_id"} else 8
    official = evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, max_length=longest, batch_size=size, device=str(model.device)),
        {"tasks": {name: task.official}, "groups": {}, "group_map": {}},
        limit=limit,
        log_samples=True,
    )
    # One for each filter; all hold the same responses.
    samples = {sample["doc_id"]: sample["resps"] for sample in official["samples"][name]}
    theirs = [response for place in sorted(samples) for (response,) in samples[place]]
    values, reference = task.evaluate(documents, full).values, official["results"][name]
    row = Row(
        model=label,
        task=name,
        documents=len(documents),
        truncated=sum(document.truncated for document in documents),
        same_metrics=all(abs(value - reference[key]) <= 1e-4 * abs(reference[key]) for key, value in values.items()),
    )
    ours = [full[document.id] for document in documents]
    if isinstance(ours[0], Generated):
        row.same_texts = sum(mine.text == text for mine, text in zip(ours, theirs, strict=True))
        return row
    if isinstance(documents[0].request, Rolling):
        mine = [sum(likelihoods(answer)) for answer in ours]
    else:
        mine = [number for answer in ours for number in likelihoods(answer)]
        greedy = [item.is_greedy for answer in ours for item in answer.scored]
        row.same_greedy = greedy == [flag for _, flag in theirs]
        theirs = [number for number, _ in theirs]
    row.log_likelihoods = len(mine)
    row.largest_difference = max(abs(one - other) for one, other in zip(mine, theirs, strict=True))
    if len(cells) > 1:
        row.differ_at_quarter, row.differ_with_room = (
            differing(documents, full, answers[cell.key]) for cell in cells[1:]
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--outdir", type=Path)
    parser.add_argument("--model", default=DEFAULT, help="as in arkv-bench run; the default also with a random Qwen3")
    parser.add_argument("--limit", type=int, help="so many documents of each task, in the place of the usual number")
    parser.add_argument("--tasks", default=",".join(DOCUMENTS))
    options = parser.parse_args()
    started = records.now()
    loaded = load(options.model, dtype="float32", device="cpu")
    models = {loaded.name: loaded.model}
    if options.model == DEFAULT:
        models["tiny-random-qwen3"] = tiny_qwen3(loaded.tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        include = Path(folder)
        (include / "local_text.yaml").write_text(LOCAL_TEXT)
        (include / "local_text").mkdir()
        # The longest pages of Python's reference, of which the beginning makes two windows.
        pages = sorted(topics.values(), key=len)[-DOCUMENTS["local_text"] :]
        lines = [json.dumps({"page": page[:4_000]}) + "\n" for page in pages]
        (include / "local_text" / "test.jsonl").write_text("".join(lines))
        for label, model in models.items():
            for name in options.tasks.split(","):
                limit = options.limit or DOCUMENTS[name]
                row = compare(model, loaded.tokenizer, label, name, options.data_dir, limit, include)
                rows.append(row)
                print("passed" if row.passed else "FAILED", row, flush=True)
    if options.outdir is not None:
        options.outdir.mkdir(parents=True, exist_ok=True)
        columns = [*(field.name for field in dataclasses.fields(Row)), "passed"]
        lines = [{**dataclasses.asdict(row), "passed": row.passed} for row in rows]
        write_atomic(options.outdir / "parity.csv", csv_text(columns, lines, digits=None))
        record = {
            "command": "scripts/parity.py",
            "started": started,
            "finished": records.now(),
            "tolerance": TOLERANCE,
            "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
            **records.environment(),
        }
        write_atomic(options.outdir / "record.json", json_text(record))
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
