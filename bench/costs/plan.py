"""What a run would take, before it is run: documents, bytes, whether a model fits, and an estimate of the time.

Letters: ``N`` prompt tokens, ``P`` parameters. Nothing here needs the weights of a model: its config says how many
parameters it has, and what a token takes in the cache. Time comes from a short calibration on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from bench.engine.engine import Engine, Failure, Measurement
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.models.loading import DescribedModel
from bench.settings.run import RunConfig
from tasks.base import Compare, Document, Generate, LogLikelihood, Rolling

CALIBRATION_LENGTHS = (256, 1024)
"""Prompts of the calibration, in tokens: two, since attention's share of a prefill grows with the square."""
CALIBRATION_STEPS = 8
"""Tokens read behind each."""
LOGIT_ROWS = 2 * 512
"""Rows of float32 logits that there are at once: those of a block, twice."""
USABLE = 0.9
"""Share of a GPU's memory that a model and its caches can count on."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """``80GB``, ``24GiB`` or a number of bytes. Raises :class:`UserError`."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise UserError(f"{option}={text}: give a size such as 80GB or 24GiB", exit_code=2)
    return size


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model's geometry, from its config alone."""

    parameters: int
    itemsize: int
    """Bytes of a parameter, and of a number in the full cache."""
    layers: int
    """That can be compressed."""
    sliding_layers: int
    sliding_window: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    intermediate: int
    context: int | None

    @property
    def weights_bytes(self) -> int:
        return self.parameters * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Key and value of one token in one layer at model precision."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    def full_bytes(self, tokens: int) -> int:
        """The full cache of a prompt."""
        sliding = self.sliding_layers * min(tokens, self.sliding_window)
        return self.layer_bytes * (self.layers * tokens + sliding)

    def kv_bytes(self, cell: Cell, tokens: int) -> int | None:
        """What a cell's cache of a prompt takes at most, once compressed; None for a method that does not say."""
        return cell.planned_bytes(self, tokens)


def model_size(model: DescribedModel, dtype: str) -> ModelSize:
    """Count the parameters of a model that is built without memory. Raises :class:`UserError`."""
    return config_size(model.config, model.name, dtype)


def config_size(whole: Any, name: str, dtype: str) -> ModelSize:
    """The same of a transformers config alone."""
    from transformers import AutoModelForCausalLM

    itemsize = 4 if dtype == "float32" else 2
    config = whole.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(whole)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{name} cannot be built from its config: {' '.join(str(error).split())}") from error
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    compressible = sum(kind == "full_attention" for kind in kinds)
    heads = config.num_attention_heads
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        itemsize=itemsize,
        layers=compressible,
        sliding_layers=len(kinds) - compressible,
        sliding_window=getattr(config, "sliding_window", None) or 0,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        context=getattr(config, "max_position_embeddings", None),
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the documents of one task ask of a model."""

    task: str
    documents: int
    prefills: int
    """Contexts to be computed, each once for all cells."""
    context_lengths: tuple[int, ...]
    """Of the prefills, in tokens."""
    longest: int
    """Tokens of the longest document, with its answer."""
    steps: int
    """Forwards that every cell does behind the prefills, at most."""
    block_tokens: int
    """Tokens that every cell reads in blocks behind the prefills: choices, texts."""

    @classmethod
    def of(cls, task: str, documents: Sequence[Document]) -> Load:
        contexts: list[int] = []
        shared: set[tuple[int, ...]] = set()
        longest = steps = block = 0
        for document in documents:
            request = document.request
            if isinstance(request, Generate):
                # Questions to one context share its prefill.
                if request.prompt_ids not in shared:
                    contexts.append(len(request.prompt_ids))
                if request.question_ids:
                    shared.add(request.prompt_ids)
                block += request.prompt_tokens - len(request.prompt_ids)
                new = (1 + len(request.turns)) * request.max_new_tokens
                steps += new
                longest = max(longest, request.prompt_tokens + new)
            elif isinstance(request, Compare):
                contexts.append(request.prompt_tokens)
                steps += len(request.continuation_ids)
                longest = max(longest, request.prompt_tokens + len(request.continuation_ids))
            elif isinstance(request, LogLikelihood):
                mine = {item.context_ids for item in request.continuations}
                contexts += [len(ids) for ids in mine - shared]
                asked = {(item.context_ids, item.question_ids) for item in request.continuations}
                shared |= {context for context, question in asked if question}
                steps += sum(not question for _, question in asked)
                block += sum(len(question) for _, question in asked)
                block += sum(len(item.token_ids) for item in request.continuations)
                longest = max(longest, request.prompt_tokens + max(len(c.token_ids) for c in request.continuations))
            else:
                assert isinstance(request, Rolling)
                for window in request.windows:
                    tokens = len(window.context_ids) + len(window.token_ids)
                    prompt = max(1, int(request.prefill_share * tokens))
                    contexts.append(prompt)
                    steps += -(-(tokens - prompt) // request.chunk)
                    block += tokens - prompt
                    longest = max(longest, tokens)
        return cls(
            task=task,
            documents=len(documents),
            prefills=len(contexts),
            context_lengths=tuple(contexts),
            longest=longest,
            steps=steps,
            block_tokens=block,
        )

    @property
    def mean_context(self) -> int:
        return round(fmean(self.context_lengths)) if self.context_lengths else 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a worker needs at its largest moment, in bytes."""

    weights: int
    caches: int
    """Two full caches of the longest documents that are answered side by side: the prefill and a cell's copy."""
    activations: int
    available: int

    @property
    def needed(self) -> int:
        return self.weights + self.caches + self.activations

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def fit(size: ModelSize, loads: Sequence[Load], config: RunConfig, available: int) -> Fit:
    """Whether a model, its caches and one forward fit in ``available`` bytes."""
    longest = max((load.longest for load in loads), default=0)
    side_by_side = config.documents_at_once or 1
    read = min(longest, config.prefill_chunk or longest)
    # One layer's widest product and its input, and the logits of a block in float32, twice.
    activations = 3 * side_by_side * read * size.intermediate * size.itemsize + LOGIT_ROWS * size.vocabulary * 4
    caches = 2 * side_by_side * size.full_bytes(longest)
    return Fit(weights=size.weights_bytes, caches=caches, activations=activations, available=int(USABLE * available))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How long things took on this machine, with one model."""

    model: str
    parameters: int
    device: str
    linear_s: float
    """Prefill: seconds per token."""
    square_s: float
    """Prefill: seconds per token squared."""
    compress_s: Mapping[str, float]
    """By cell, per token of the prompt."""
    step_s: Mapping[str, float]
    """By cell, per token decoded."""

    def seconds(self, load: Load, cells: Sequence[Cell], parameters: int) -> float:
        """Estimate for one worker; both parts grow with the parameters of the model."""
        tokens = sum(load.context_lengths)
        prefill = self.linear_s * tokens + self.square_s * sum(length**2 for length in load.context_lengths)
        # Cells that share a prefill of their own have one beside that of all others.
        groups = {cell.impl.prefill_group for cell in cells} - {None}
        total = prefill * (1 + len(groups))
        for cell in cells:
            total += self.compress_s[cell.key] * tokens
            total += self.step_s[cell.key] * load.steps + self.linear_s * load.block_tokens
        return total * parameters / self.parameters


def calibrate(engine: Engine, name: str, parameters: int, vocabulary: int) -> Calibration:
    """Answer two made-up documents through every cell.

    Raises:
        UserError: a cell cannot be timed.
    """
    generator = torch.Generator().manual_seed(0)
    measured: dict[int, dict[str, Measurement]] = {}
    for length in CALIBRATION_LENGTHS:
        ids = torch.randint(vocabulary, (length + CALIBRATION_STEPS,), generator=generator).tolist()
        request = Compare(context_ids=tuple(ids[:length]), continuation_ids=tuple(ids[length:]))
        measured[length] = {}
        for answered in engine.answer(Document(id=f"{length}", request=request), engine.cells):
            if isinstance(answered, Failure):
                raise UserError(f"calibration: {answered.cell.label}: {answered.error}")
            measured[length][answered.cell.key] = answered
    short, long = CALIBRATION_LENGTHS
    first, second = (min(item.prefill_s for item in measured[length].values()) for length in CALIBRATION_LENGTHS)
    # t = a N + b N^2 through both, as long as neither part is negative.
    square = max((second / long - first / short) / (long - short), 0.0)
    linear = max(second / long - square * long, 0.0)
    newest = measured[long]
    return Calibration(
        model=name,
        parameters=parameters,
        device=str(engine.device),
        linear_s=linear,
        square_s=square,
        compress_s={key: (item.compress_s or item.prefill_s) / long for key, item in newest.items()},
        step_s={key: item.decode_s / CALIBRATION_STEPS for key, item in newest.items()},
    )


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model of the grid."""

    name: str
    size: ModelSize
    loads: tuple[Load, ...]
    failures: Mapping[str, str]
    """Tasks whose documents cannot be made here, and why."""
    fit: Fit
    seconds: float | None
    """Of one worker, None without a calibration."""


def cells_table(plan: ModelPlan, cells: Sequence[Cell]) -> list[tuple[str, int | None, int | None]]:
    """Label of each cell, and bytes of its cache after compression: of a mean document and of the longest one."""
    lengths = [length for load in plan.loads for length in load.context_lengths]
    if not lengths:
        return []
    mean, most = round(fmean(lengths)), max(lengths)
    return [(cell.label, plan.size.kv_bytes(cell, mean), plan.size.kv_bytes(cell, most)) for cell in cells]
