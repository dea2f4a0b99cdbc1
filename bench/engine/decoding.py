"""How the tokens of an answer are chosen: the most likely one, or one that is drawn, after what generation settings
make of the logits.

The settings are those of ``generation_config.json``, with those of the request laid over them;
:mod:`tasks.generation` says what becomes of each. transformers itself makes its processors and stopping criteria of
them, one list for each answer, and these see the tokens of that answer's document alone, without padding. What is drawn
comes from a generator of that answer's own, on the CPU: it depends neither on the device nor on who is answered beside
it, and all methods get the same draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from bench.errors import OthersCode, UserError
from tasks.base import Generate
from tasks.generation import DRAWING, RULES, SAMPLING, Fate, asked, listed, refusal

_WHOSE = "the generation settings"
"""How errors of transformers over them begin."""


def settings_of(model: Any, request: Generate | None = None) -> dict[str, Any]:
    """The model's own settings, with those of ``request`` laid over them.

    What transformers has no setting for, such as what a model's own code reads, is left out, as ``generate`` does.
    """
    known = vars(GenerationConfig()).keys()
    own = {
        name: value
        for name, value in vars(model.generation_config).items()
        if name in known and not name.startswith("_")
    }
    return {**own, **(request.generation if request is not None else {})}


def check(model: Any, request: Generate) -> None:
    """Raise :class:`UserError` for a setting that cannot be done, with its name."""
    if said := refusal(settings_of(model, request)):
        raise UserError(f"generation setting {said}")


def neutral(model: Any, *fates: Fate) -> dict[str, Any]:
    """What the model's own settings with these fates are without asking for anything."""
    own = settings_of(model)
    return {name: next(iter(RULES[name].neutral), None) for fate in fates for name in asked(own, fate) if name in RULES}


def end_ids(tokenizer: Any, settings: Mapping[str, Any]) -> set[int]:
    """Tokens that end an answer: those of the settings, and the tokenizer's end-of-sequence token."""
    end = settings.get("eos_token_id")
    ends = end if isinstance(end, list | tuple) else [end]
    return {token for token in [*ends, tokenizer.eos_token_id] if token is not None}


def about(model: Any) -> str | None:
    """What becomes of the model's own settings, for a person; None where they ask for nothing but greedy decoding."""
    settings = settings_of(model)
    applied = {name: value for name, value in asked(settings, Fate.APPLIED).items() if name != "eos_token_id"}
    sampling = {name: value for name, value in asked(settings, Fate.IGNORED).items() if name in SAMPLING}
    said = [
        *([f"{listed(applied)} {_verb(applied)} applied"] if applied else []),
        *([f"{listed(sampling)} {_verb(sampling)} not where answers are decoded greedily"] if sampling else []),
    ]
    return f"of its generation_config.json, {' and '.join(said)}" if said else None


def _verb(settings: Mapping[str, Any]) -> str:
    return "is" if len(settings) == 1 else "are"


class Decoder:
    """Chooses the tokens of one answer.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        request: the prompt and the settings that are laid over the model's own.
        draws: what a sampled answer goes on drawing from, where it is not the first one of its document.

    Raises:
        UserError: a setting cannot be done, or has a value that transformers cannot use.
    """

    def __init__(self, model: Any, tokenizer: Any, request: Generate, draws: torch.Generator | None = None) -> None:
        check(model, request)
        settings = settings_of(model, request)
        self.end_ids = end_ids(tokenizer, settings) | set(request.end_ids)
        # Where there are further ends, no answer begins with one; see :class:`tasks.base.Generate`.
        self._first = sorted(self.end_ids) if request.end_ids else []
        self._processors: LogitsProcessorList | None = None
        self._criteria: StoppingCriteriaList | None = None
        self.draws = draws
        """None where the most likely token is taken."""
        if request.sampling is not None and draws is None:
            self.draws = torch.Generator().manual_seed(request.sampling.seed)
        if request.sampling is not None or asked(settings, Fate.APPLIED).keys() - {"eos_token_id"}:
            self._ids = torch.tensor([request.input_ids], device=model.device)
            with OthersCode(_WHOSE):
                self._processors, self._criteria = self._prepare(model, tokenizer, request, settings)

    def _prepare(
        self, model: Any, tokenizer: Any, request: Generate, settings: Mapping[str, Any]
    ) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """What ``model.generate`` would choose and end with: it hands that to a decoding loop, which does nothing."""
        without = neutral(model, Fate.IGNORED, Fate.REFUSED)
        sampled = DRAWING if request.sampling is not None else frozenset()
        given = {
            name: value
            for name, value in request.generation.items()
            if RULES[name].fate is Fate.APPLIED or name in sampled
        }
        # Some are objects, made of what a file says.
        given |= {name: getattr(GenerationConfig(**{name: value}), name) for name, value in given.items()}
        if request.sampling is not None:
            # How the model itself samples, but for what was asked for; --top-p wins over other ways to say it.
            top_p = {} if request.sampling.top_p is None else {"top_p": request.sampling.top_p}
            given |= {"do_sample": True, "temperature": request.sampling.temperature, **top_p}
            without = {name: value for name, value in without.items() if name not in SAMPLING}
        if request.end_ids:
            given["eos_token_id"] = sorted(self.end_ids)
        loop = {
            "custom_generate": _hand_over,
            "max_new_tokens": request.max_new_tokens,
            "use_cache": False,
            # Nothing is padded; without one, generate() says that it takes another.
            "pad_token_id": 0,
            # For their criterion generate() has no tokenizer left, where the loop is not its own.
            "stop_strings": None,
        }
        processors, criteria = model.generate(
            self._ids, attention_mask=torch.ones_like(self._ids), **{"do_sample": False, **without, **given, **loop}
        )
        if stop := settings.get("stop_strings"):
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop))
        return processors, criteria

    @property
    def is_plain(self) -> bool:
        """Tokens behind the first are the most likely ones."""
        return self._processors is None

    def choose(self, logits: torch.Tensor, first: bool = False) -> int:
        """The next token, of logits [1, V]. Raises :class:`UserError`."""
        if first and self._first:
            logits = logits.index_fill(-1, torch.tensor(self._first, device=logits.device), -torch.inf)
        if self._processors is None:
            return int(logits.argmax(dim=-1))
        with OthersCode(_WHOSE, RuntimeError, MemoryError):
            # In float32, as generate() does: half precision would make ties of different numbers.
            process: Any = self._processors
            scores: torch.Tensor = process(self._ids, logits.to(self._ids.device, torch.float32, copy=True))
            if self.draws is None:
                token = scores.argmax(dim=-1)
            else:
                chances = scores.softmax(dim=-1).cpu()
                token = torch.multinomial(chances, 1, generator=self.draws)[:, 0].to(self._ids.device)
        self._ids = torch.cat([self._ids, token[:, None]], dim=-1)
        return int(token)

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """The newest token ends the answer."""
        if tokens[-1] in self.end_ids:
            return True
        if self._criteria is None:
            return False
        with OthersCode(_WHOSE, RuntimeError, MemoryError):
            # Criteria look at tokens only: scores are asked for where generate() returns them.
            return bool(self._criteria(self._ids, None).all())  # type: ignore[arg-type]


def _hand_over(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    **more: Any,
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """A decoding loop for ``generate``'s argument ``custom_generate``."""
    return logits_processor, stopping_criteria


def choose_all(decoders: Iterable[Decoder], logits: torch.Tensor) -> list[int]:
    """The next token of every row, of logits [B, V]."""
    decoders = list(decoders)
    if all(decoder.is_plain for decoder in decoders):
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens
    return [decoder.choose(row[None]) for decoder, row in zip(decoders, logits, strict=True)]
