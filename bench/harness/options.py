"""The options of a task of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tasks.base import Rolling, TaskError, nearest


@dataclass(frozen=True)
class Options:
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
    def parse(cls, task: str, options: Mapping[str, Any]) -> Options:
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
