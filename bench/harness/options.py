"""What lm-eval's tasks can be told beyond what every task is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tasks.base import Rolling
from tasks.options import Count, TaskOptions


class HarnessOptions(TaskOptions):
    """What is read from ``TaskSettings.options``; all but the last three as in lm-eval."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """None: the task's own."""
    gen_kwargs: Mapping[str, Any] | None = None
    """Laid over the task's generation settings; a mapping, or ``key=value,key=value``, or JSON."""
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    """None: with a chat template."""
    system_instruction: str | None = None
    enable_thinking: bool | None = None
    """Given to the chat template. If True, what comes before ``</think>`` is not part of the answer, nor looked through
    for stop strings."""
    confirm_run_unsafe_code: bool = False
    """Tasks whose metric runs code that the model writes are refused without it."""
    rolling_prefill: Annotated[float, Field(ge=0, lt=1)] = Rolling.prefill_share
    rolling_chunk: Count = Rolling.chunk
    """See :class:`tasks.base.Rolling`."""

    @field_validator("gen_kwargs", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given.lstrip().startswith("{"):
            return json.loads(given)
        from lm_eval.utils import simple_parse_args_string

        return simple_parse_args_string(given)

    @model_validator(mode="after")
    def _of_the_chat_template(self) -> HarnessOptions:
        if not self.apply_chat_template:
            if self.fewshot_as_multiturn:
                raise ValueError("fewshot_as_multiturn needs apply_chat_template")
            if self.enable_thinking is not None:
                raise ValueError("enable_thinking needs apply_chat_template")
        return self

    @property
    def as_multiturn(self) -> bool:
        """Whether examples in the prompt are turns of the chat."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn
