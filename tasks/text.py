"""Texts: read from a file, or made from a seed, of short everyday sentences that are the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tasks.base import TaskError


def read_text(path: Path) -> str:
    """A text file, without a byte order mark. Raises :class:`TaskError` for one that cannot be read or is not UTF-8."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"the text {path} is not UTF-8 (byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises :class:`TaskError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        raise TaskError(f"cannot read the text {path}: {error.strerror}", usage=absent) from error


def _phrases(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split(",")]


_SUBJECTS = _phrases("""
    The old farmer, A young teacher, My neighbour, The quiet librarian, Her brother, The baker, A tall sailor,
    The doctor, Our cousin, The gardener, A small child, The painter, His grandmother, The postman, A busy cook,
    The tailor, My best friend, The fisherman, A clever student, The shop owner, Her aunt, The carpenter,
    A tired traveller, The singer, The night guard, A kind nurse, The bus driver, Our uncle, The dancer, The mayor
""")
_ACTIONS = _phrases("""
    bought a basket of apples, painted a wooden chair, lost a pair of gloves, wrote a long letter, cooked a warm soup,
    read a story about the sea, fixed a broken bicycle, planted a row of tulips, sang an old song, found a silver key,
    carried a heavy box, watched the birds, fed the hungry cats, drank a cup of tea, built a little boat,
    cleaned the dusty windows, told a funny joke, baked a loaf of bread, sold a bunch of roses, waited for a friend,
    took a photograph, picked ripe cherries, folded the clean towels, mended a torn jacket, drew a picture of a horse,
    played a slow waltz, opened a jar of honey, walked the brown dog, counted the passing trains, hung up a lamp
""")
_PLACES = _phrases("""
    near the river, in the kitchen, behind the church, at the market, under the bridge, beside the lake,
    in the garden, on the hill, at the station, by the harbour, in the village, next to the school,
    across the street, at the library, in the park, outside the bakery, near the old mill, on the beach,
    in the forest, at the corner shop
""")
_TIMES = _phrases("""
    on Monday, early in the morning, after lunch, before sunset, last summer, on a rainy day, late at night,
    in the autumn, during the holidays, after the storm, on Sunday, when the snow fell, in the spring,
    before breakfast, while the sun was shining
""")


def made_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences; none repeats before 270,000 others have passed. The same for a generator of the same seed."""
    seen: set[str] = set()
    everything = len(_SUBJECTS) * len(_ACTIONS) * len(_PLACES) * len(_TIMES)
    while True:
        parts = (_SUBJECTS, _ACTIONS, _PLACES, _TIMES)
        sentence = " ".join(rng.choice(part) for part in parts) + "."
        if sentence not in seen:
            seen.add(sentence)
            yield sentence
        if len(seen) == everything:
            seen.clear()
