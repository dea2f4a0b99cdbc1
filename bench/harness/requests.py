"""Requests of lm-eval as requests of ours, by what its Hugging Face model class does to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.harness.options import HarnessOptions
from tasks.base import Continuation, Generate, LogLikelihood, Rolling, TaskError, TaskSettings
from tasks.generation import counting
from tasks.parts import split

_MAX_NEW_TOKENS = 256
"""lm-eval's ``max_gen_toks`` for Hugging Face models, where the task sets none."""

_THINK_END = "</think>"
"""What a thinking model writes between its thoughts and its answer."""


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """Special tokens as the tokenizer adds them, unless the prompt begins with the BOS token already."""
    bos = tokenizer.bos_token
    written = bos is not None and prompt.startswith(bos)
    return tokenizer(prompt, **({"add_special_tokens": False} if written else {}))["input_ids"]


def to_generate(
    task: str, instance: Any, settings: TaskSettings, thinks: bool, boundary: int | None = None
) -> tuple[Generate, int]:
    """The request of an instance, and how many tokens were cut from its beginning. Raises :class:`TaskError`.

    Its question begins at character ``boundary``; it stays inside the prompt for None, and where a cut leaves nothing
    before it.
    """
    prompt, generation = instance.args
    max_new_tokens, stop, others = _generation(task, generation, settings.tokenizer)
    room = settings.max_length - max_new_tokens
    if room < 1:
        raise TaskError(
            f"{task}: an answer of {max_new_tokens} tokens leaves no room for a prompt within "
            f"{settings.max_length}: set max_gen_toks in gen_kwargs"
        )
    ids = _encode(settings.tokenizer, prompt)
    shown = tuple(ids[-room:])
    asked = _question(settings.tokenizer, prompt, ids, boundary)
    if len(asked) >= len(shown):
        asked = ()
    request = Generate(
        prompt_ids=shown[: len(shown) - len(asked)],
        question_ids=asked,
        max_new_tokens=max_new_tokens,
        stop=stop,
        think_end=_THINK_END if thinks else None,
        generation=others,
    )
    return request, max(0, len(ids) - room)


def _question(tokenizer: Any, prompt: str, ids: Sequence[int], boundary: int | None) -> tuple[int, ...]:
    """The last of a prompt's ``ids``, from its question on; none where that has no tokens of its own."""
    if boundary is None:
        return ()
    bos = tokenizer.bos_token
    written = bos is not None and prompt.startswith(bos)
    try:
        parts = split(tokenizer, prompt, boundary, add_special_tokens=not written)
    except TaskError:
        return ()
    return parts.question_ids if parts.context_ids + parts.question_ids == tuple(ids) else ()


def to_log_likelihood(
    what: str, instances: Sequence[Any], settings: TaskSettings, delimiter: str, boundaries: Sequence[int | None]
) -> tuple[LogLikelihood, int]:
    """The request of a document's instances, and how many tokens were cut from the beginning of a context.

    A continuation stays whole and its context loses its beginning, so that contexts of one question can differ once
    they are cut. ``delimiter`` is what lm-eval puts before a choice and counts to it. The question of each instance
    begins at the character that ``boundaries`` have; see :func:`to_generate`. Raises :class:`TaskError`.
    """
    for place, instance in enumerate(instances):
        if instance.args[1] in ("", delimiter):
            raise TaskError(f"{what}: choice {place} is empty, there is nothing to score")
    continuations, most_cut = [], 0
    pairs = _encode_pairs(settings.tokenizer, instances)
    for instance, boundary, (context, tokens) in zip(instances, boundaries, pairs, strict=True):
        if not context or not tokens:
            raise TaskError(f"{what}: a context or a choice without tokens cannot be scored")
        # The last token of a continuation is predicted, not read.
        room = settings.max_length + 1 - len(tokens)
        if room < 1:
            raise TaskError(f"{what}: a choice of {len(tokens)} tokens does not fit {settings.max_length}")
        most_cut = max(most_cut, len(context) - room)
        shown = tuple(context[-room:])
        # White space at the end of a context is counted to the continuation.
        asked = _question(settings.tokenizer, instance.args[0].rstrip(), context, boundary)
        if len(asked) >= len(shown):
            asked = ()
        continuations.append(
            Continuation(context_ids=shown[: len(shown) - len(asked)], question_ids=asked, token_ids=tuple(tokens))
        )
    return LogLikelihood(continuations=tuple(continuations)), max(0, most_cut)


def to_rolling(what: str, instance: Any, settings: TaskSettings, options: HarnessOptions) -> Rolling:
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


def _generation(
    task: str, generation: Mapping[str, Any], tokenizer: Any
) -> tuple[int, tuple[str, ...], dict[str, Any]]:
    """Longest answer in tokens, stop strings, the end-of-sequence token among them, and what else changes an answer of
    what lm-eval passes on to ``generate``. Raises :class:`TaskError`."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(generation), _MAX_NEW_TOKENS))
    max_new_tokens, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
    if "max_length" in kwargs:
        raise TaskError(f"{task}: max_length counts the prompt too: set max_gen_toks in gen_kwargs")
    try:
        others = counting(kwargs)
    except ValueError as error:
        raise TaskError(f"{task}: {error}") from None
    # An empty stop string is in every text: it ends an answer after one token. That of a token without text is none.
    eos = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id) or None
    return max_new_tokens, tuple(handle_stop_sequences(until, eos=eos)), others


def apply_chat_template(
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
