#!/usr/bin/env python
"""KL divergence of caches to the full cache on the next tokens of real text, to compare settings.

A context is prefilled once, every variant compresses its own copy, and the tokens that follow are fed through its
cache: one at a time (``--feed step``, so that decoding-time compression takes part) or all at once (``--feed block``).

    scripts/fidelity.py --text pydoc --cache-ratio 0.25,0.125 origin mix mix:original_share=0.1 --outdir results/x

A text is ``pydoc`` (the English reference text that comes with Python), a plain text file, or ``FILE.jsonl:FIELD``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from arkv import CacheConfig, PrefillCache, TriStateCache, attach
from bench.files.csv_ import csv_text
from bench.files.json_ import json_text
from bench.files.text import write_atomic
from bench.models.loading import load
from bench.runs import folder as records

COLUMNS = ["variant", "cache_ratio", "text", "prompt", "kl", "top1_agreement", "kv_share", "compress_s"]


def read_texts(spec: str) -> list[str]:
    """The texts that ``spec`` names."""
    if spec == "pydoc":
        from pydoc_data.topics import topics

        return ["\n\n".join(topics[name] for name in sorted(topics))]
    name, _, field = spec.partition(":")
    content = Path(name).read_text(encoding="utf-8")
    return [json.loads(line)[field] for line in content.splitlines() if line.strip()] if field else [content]


def contexts(tokenizer: Any, texts: list[str], count: int, length: int) -> list[list[int]]:
    """``count`` runs of ``length`` tokens: one from each text that is long enough, or spread over a single text."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if len(encoded) == 1:
        step = (len(encoded[0]) - length) // max(count - 1, 1)
        return [encoded[0][index * step : index * step + length] for index in range(count)]
    return [ids[:length] for ids in encoded if len(ids) >= length][:count]


def parse_variant(text: str, ratio: float) -> CacheConfig:
    """``mix`` or ``mix:original_share=0.1,window_size=16``, in byte units unless it says otherwise."""
    method, _, rest = text.partition(":")
    settings: dict[str, Any] = {"budget_unit": "bytes", "cache_ratio": ratio}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return CacheConfig.for_method(method, **settings)


def divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) of each position over the whole vocabulary, from logits [T, V]."""
    own, theirs = full.float().log_softmax(-1), other.float().log_softmax(-1)
    return (own.exp() * (own - theirs)).sum(-1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--prompts", type=int, default=8, help="per text")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--cache-ratio", default="0.25")
    parser.add_argument("--feed", choices=["step", "block"], default="step")
    parser.add_argument("--outdir", type=Path)
    options = parser.parse_args()
    loaded = load(options.model)
    model, length, count = loaded.model, options.length, options.continuation
    ratios = [float(item) for item in options.cache_ratio.split(",")]
    configs = {(variant, ratio): parse_variant(variant, ratio) for variant in options.variants for ratio in ratios}
    queries = max(config.recorded_queries for config in configs.values())
    rows: list[dict[str, Any]] = []
    hashes = {}
    for spec in options.text:
        texts = read_texts(spec)
        name = Path(spec.partition(":")[0]).stem
        hashes[name] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        for index, ids in enumerate(contexts(loaded.tokenizer, texts, options.prompts, length + count)):
            tokens = torch.tensor([ids], device=model.device)
            prefill = PrefillCache(model, queries)
            with attach(model):
                model(tokens[:, :length], past_key_values=prefill, logits_to_keep=1)
            following = tokens[:, length:]
            reference = model(following, past_key_values=prefill.to_dynamic()).logits[0]
            for variant in options.variants:
                for ratio in ratios:
                    start = time.perf_counter()
                    cache = TriStateCache.from_prefill(prefill, configs[variant, ratio])
                    seconds = time.perf_counter() - start
                    share = cache.nbytes() / prefill.full_bytes(length)
                    with attach(model):
                        if options.feed == "block":
                            logits = model(following, past_key_values=cache).logits[0]
                        else:
                            steps = [model(following[:, i : i + 1], past_key_values=cache).logits for i in range(count)]
                            logits = torch.cat(steps, dim=1)[0]
                    rows.append(
                        {
                            "variant": variant,
                            "cache_ratio": ratio,
                            "text": name,
                            "prompt": index,
                            "kl": divergence(reference, logits).mean().item(),
                            "top1_agreement": (reference.argmax(-1) == logits.argmax(-1)).float().mean().item(),
                            "kv_share": share,
                            "compress_s": seconds,
                        }
                    )
    for ratio in ratios:
        for variant in options.variants:
            mine = [row for row in rows if (row["variant"], row["cache_ratio"]) == (variant, ratio)]
            means = {key: sum(row[key] for row in mine) / len(mine) for key in ("kl", "top1_agreement", "kv_share")}
            print(
                f"{ratio:6} {variant:44} n={len(mine):3}  KL {means['kl']:.4f}  "
                f"top-1 {means['top1_agreement']:.3f}  bytes {100 * means['kv_share']:.1f} %"
            )
    if options.outdir is not None:
        options.outdir.mkdir(parents=True, exist_ok=True)
        write_atomic(options.outdir / "fidelity.csv", csv_text(COLUMNS, rows, digits=None))
        record = {
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            "texts_sha256": hashes,
            "finished": records.now(),
            "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
            **records.environment(),
        }
        record["settings"]["text"] = sorted(hashes)
        record["settings"]["outdir"] = options.outdir.name
        write_atomic(options.outdir / "record.json", json_text(record))


if __name__ == "__main__":
    main()
