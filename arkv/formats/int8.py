"""``int8``: integers symmetric around zero with a float32 scale per token and KV head."""

from arkv.formats.base import Format, Layout

INT8 = Format("int8", Layout(8), Layout(8))
