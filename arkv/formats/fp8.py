"""``fp8``: e4m3 numbers with a float32 scale per token and KV head, as published for ARKV (arXiv 2603.08727)."""

from arkv.formats.base import Format, Layout

FP8 = Format("fp8", Layout(8, floating=True), Layout(8, floating=True))
