#!/usr/bin/env python
"""Time of a search whose trials share the prefills, beside that of as many separate runs.

A separate run computes its prompts and the full cache's distributions for itself and measures one trial. Only a few of
them are timed, half before the search and half after it, for a machine whose speed drifts; loading the
model counts for neither.

    scripts/time_tune.py --trials 30 --separate 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.models.loading import LoadedModel, load
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from bench.search.config import TuneConfig
from bench.search.documents import load_splits
from bench.search.objective import Objective
from bench.search.study import Study, fingerprint, search
from bench.settings.tune import TuneSettings


def timed_search(config: TuneConfig, model: LoadedModel, folder: Path, advance: Callable[[str], None]) -> float:
    """Seconds of a study from loading the documents on."""
    begin = time.perf_counter()
    objective = Objective(config, model, load_splits(config, model))
    settings = fingerprint(config, model, objective.splits)
    with Study(folder, settings, objective.directions, seed=config.run.seed, fresh=True) as study:
        search(study, objective, advance)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--separate", type=int, default=3, help="separate runs that are timed")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--cache-size", type=int, default=512)
    parser.add_argument("--outdir", type=Path)
    options = parser.parse_args()
    model = load(options.model)

    def config(trials: int, seed: int) -> TuneConfig:
        run = TuneSettings(
            model=(options.model,),
            tasks=("fidelity",),
            methods=("mix",),
            cache_size=(options.cache_size,),
            lengths=(options.length,),
            limit=options.prompts,
            seed=seed,
            n_trials=trials,
        )
        return TuneConfig(run=run)

    separate = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed_search(config(1, 0), model, folder / "warm-up", lambda note: None)
        half = options.separate // 2
        for number in range(half):
            separate.append(timed_search(config(1, number), model, folder / f"run-{number}", lambda note: None))
        shared = timed_search(config(options.trials, 0), model, folder / "shared", lambda note: None)
        for number in range(half, options.separate):
            separate.append(timed_search(config(1, number), model, folder / f"run-{number}", lambda note: None))
    expected = options.trials * sum(separate) / len(separate)
    share = shared / expected
    print(
        f"{options.trials} trials on {options.prompts} prompts of {options.length} tokens, {model.name}, {model.dtype}:"
    )
    print(f"  sharing the prefills      {shared:8.1f} s")
    each = ", ".join(f"{seconds:.1f}" for seconds in separate)
    print(f"  as many separate runs     {expected:8.1f} s (each of {len(separate)}: {each} s)")
    print(f"  share                     {100 * share:8.1f} %")
    if options.outdir is not None:
        options.outdir.mkdir(parents=True, exist_ok=True)
        record = {
            "command": records.command_line(),
            "finished": records.now(),
            "trials": options.trials,
            "prompts": options.prompts,
            "length": options.length,
            "cache_size": options.cache_size,
            "shared_s": shared,
            "separate_s": separate,
            "share": share,
            "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype},
            **records.environment(),
        }
        write_atomic(options.outdir / "time.json", json_text(record))


if __name__ == "__main__":
    main()
