"""A tiny real model in a folder, for whole runs in seconds."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "There is a special magic number hidden in the following text. Find it and remember it.",
    "I will ask you about it later. What is the special magic number mentioned in the text?",
    "The old farmer bought a basket of apples near the river on Monday. 0 1 2 3 4 5 6 7 8 9",
]


TIMES = (
    "prefill_s",
    "compress_s",
    "ttft_ms",
    "question_s",
    "decode_s",
    "tpot_ms",
    "decode_tokens_per_s",
    "peak_memory_bytes",
)
"""Fields of a sample that are measured anew in every run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What quanto quantizes in comes with the slow tests: in a new environment its kernels are compiled first, for most
    of a minute."""
    for item in items:
        if "quanto-int" in getattr(getattr(item, "callspec", None), "id", ""):
            item.add_marker(pytest.mark.slow)


def save_tiny_model(folder: Path, *, context: int = 512, seed: int = 0, family: str = "Llama") -> Path:
    """A random Llama or Qwen3 of two layers and a byte-level tokenizer with a few words, as transformers saves them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        # Wide, so that attention is far from uniform and every token kept or lost matters.
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The tiny model, loaded in float32."""
    from bench.models.loading import load

    return load(str(tiny_folder), dtype="float32", device="cpu")


TOYS = {
    "toys.yaml": """
        group: toys
        task: [toy_choice_tag, {task: toy_text, num_fewshot: 0}]
        aggregate_metric_list: [{metric: acc, weight_by_size: true}]
    """,
    "_choice": """
        dataset_path: nobody/toy_choice
        test_split: test
        fewshot_split: dev
        fewshot_config: {sampler: first_n}
        output_type: multiple_choice
        doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        num_fewshot: 2
        tag: toy_choice_tag
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "east.yaml": """
        include: _choice
        task: toy_east
        dataset_name: east
    """,
    "west.yaml": """
        include: _choice
        task: toy_west
        dataset_name: west
    """,
    "text.yaml": """
        task: toy_text
        dataset_path: nobody/toy_text
        test_split: test
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{page}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
}
"""A group of two multiple-choice tasks, which share their files, and of a perplexity task."""


def define_toys(folder: Path) -> tuple[Path, Path]:
    """Task files and rows of :data:`TOYS` in ``folder``: what ``include_path`` and ``data_dir`` are given."""
    tasks, data = folder / "tasks", folder / "data"
    tasks.mkdir(parents=True)
    for name, text in TOYS.items():
        (tasks / name).write_text(textwrap.dedent(text))
    rows = [
        {"question": f"What is {i} + {i}?", "subject": subject, "choices": [f"{2 * i}", f"many, {i}"], "answer": i % 2}
        for subject, count in (("east", 3), ("west", 5))
        for i in range(10, 10 + count)
    ]
    pages = [{"page": " ".join(SENTENCES[i % 3 :] * 3)} for i in range(2)]
    for file, lines in (("toy_choice/test", rows), ("toy_choice/dev", rows), ("toy_text/test", pages)):
        path = data / f"{file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tasks, data


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quiet_environment(**more: str) -> dict[str, str]:
    """For a process of the suite's own: one thread, no network, no terminal."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **more}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Any:
    """Tiny tensors lose more to threads than they gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
