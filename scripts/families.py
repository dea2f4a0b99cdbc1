#!/usr/bin/env python3
"""Write docs/families.md anew: the table is that of tests/arkv/families.py."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.arkv.families import table  # noqa: E402

TEXT = f"""# Model families

What becomes of a model is decided by what it does, not by its name: how its layers keep keys and values, and whether
its attention goes through [transformers' attention interface](https://huggingface.co/docs/transformers/attention_interface).
Every row is tested on a tiny random model of the family (`tests/arkv/test_families.py`): before tokens are evicted or
quantized, logits are those of the model's own eager attention, for prompts, further blocks, decoding steps, in batches,
and with transformers' own caches. The middle columns are the oldest transformers that is supported and the newest that
is tested.

- **exact**: layers with full attention are compressed; layers with a sliding window, or with chunked attention, keep
  transformers' own layer. Budgets in tokens are per compressed layer.
- **exact, hybrid**: the same, and other layers keep their state (a recurrence, a convolution) as transformers has it.
  `CacheBatch` and `TriStateCache.stack` do not serve them: each row takes a forward of its own.
- **refused**: a `ConfigError` names the model and the reason, when the cache is made, when `attach` is called, or in
  the first forward. Nothing is silently wrong. transformers' own full cache serves such a model as before: the suite
  measures `full` and the `hf:` methods with it, one document at a time, and the other methods' rows give the reason. A
  model that needs a cache of its own kind, or takes none, is not measured.

A layer whose sliding window is at least as wide as the model's context counts as full attention. Tokens beyond the
context are not what the model was made for, and there its window would begin to slide. Of a layer that slides,
transformers stores one token more than the next query sees, and a counter: bytes are what is stored, so that `full`
stands a little above 100 % with a very small window (1.4 % with one of 16 in every second layer, after 60 tokens).

Models with LongRoPE (Phi-3 with a long context, Phi-4-mini) turn keys by factors that depend on the length of the text.
The suite answers documents of such models, and of those with dynamic NTK, one by one, and reads every prompt with the
factors of its whole length, in chunks too; given texts (choices, perplexity, fidelity) are read with those of the text
up to its end. When an answer that began below `original_max_position_embeddings` grows beyond it, `generate` drops the
cache and reads the whole text anew. The suite does the same: prompt and answer so far are read as one prompt, and each
method compresses it anew. Under `attach` so does `generate` with a tri-state cache, which stays the one that it was
given; transformers alone would go on with a full one, and 5.2 with the newest token alone in it.

{table()}

`python scripts/families.py` writes this page.
"""

if __name__ == "__main__":
    ROOT.joinpath("docs", "families.md").write_text(TEXT, encoding="utf-8")
