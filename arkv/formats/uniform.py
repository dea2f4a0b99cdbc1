"""``int4``, ``int2`` and ``k4v3``: uniform levels, rotated, with a bfloat16 scale and zero point per token, keys less
their channels' means. Values may bear coarser codes than keys do, since attention averages them."""

from arkv.formats.base import Format, Layout, uniform_levels


def uniform(name: str, key_bits: int, value_bits: int) -> Format:
    """A format of uniform codes."""
    return Format(
        name,
        Layout(key_bits, uniform_levels(key_bits), rotated=True, centered=True),
        Layout(value_bits, uniform_levels(value_bits), rotated=True),
    )


INT4, INT2, K4V3 = uniform("int4", 4, 4), uniform("int2", 2, 2), uniform("k4v3", 4, 3)
