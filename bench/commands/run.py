"""``arkv-bench run``: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from bench.runs.run import Outcome

GRID, SETTINGS, DATA, OUTPUT = "The grid", "Settings of the methods", "Models and data", "Output"
WHERE = "Where it runs"


def _option(help_: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, show_default=False)


def run(
    model: Annotated[
        str | None,
        _option(
            "Models: an embedded one (see list models), a hub id, a folder, a .gguf file. Default: smollm2-135m.", DATA
        ),
    ] = None,
    tasks: Annotated[str | None, _option("Tasks, see list tasks. Default: needle.", DATA)] = None,
    quant_type: Annotated[
        str | None, _option("Methods, those of others too: see list methods. Default: all five of arkv.", GRID)
    ] = None,
    cache_size: Annotated[str | None, _option("Budgets: tokens held per layer. Default: 512.", GRID)] = None,
    cache_ratio: Annotated[
        str | None, _option("Budgets as a share of each prompt, in the place of --cache-size: 0.25,0.125.", GRID)
    ] = None,
    budget_unit: Annotated[
        str | None,
        _option("tokens (published), or bytes: what quantization saves buys more tokens. Default: tokens.", GRID),
    ] = None,
    window_size: Annotated[
        str | None, _option("Newest tokens that always stay at model precision. Default: 32.", GRID)
    ] = None,
    quant_format: Annotated[
        str | None, _option("Formats of quantized tokens: fp8, int8, int4, int2, k4v3. Default: by budget unit.", GRID)
    ] = None,
    tau1: Annotated[
        float | None, _option("Temperature of the entropy in a layer's OQ score. Default: published.", SETTINGS)
    ] = None,
    tau2: Annotated[float | None, _option("Temperature of the variance. Default: published.", SETTINGS)] = None,
    tau3: Annotated[float | None, _option("Temperature of the kurtosis. Default: published.", SETTINGS)] = None,
    gamma: Annotated[
        float | None, _option("Weight of the variance in a token's importance. Default: published.", SETTINGS)
    ] = None,
    original_share: Annotated[
        float | None,
        _option("mix: share of the past budget that stays at model precision. Default: by OQ ratio.", SETTINGS),
    ] = None,
    importance: Annotated[
        str | None, _option("Importance of a prompt's tokens: mean_var (published) or mean_max.", SETTINGS)
    ] = None,
    query_span: Annotated[
        int | None,
        _option(
            "mean_max: every second of so many newest queries scores too, beside the window's. Default in bytes: 128.",
            SETTINGS,
        ),
    ] = None,
    pool_width: Annotated[int | None, _option("Width of its average pooling, odd. Default: 5.", SETTINGS)] = None,
    max_pool_width: Annotated[
        int | None, _option("mean_max: width of the maximum pooling, odd. Default: 15.", SETTINGS)
    ] = None,
    decode_rate: Annotated[
        float | None,
        _option("In bytes: weight of the newest step in the scores. Default: 1/32.", SETTINGS),
    ] = None,
    limit: Annotated[int | None, _option("Use at most so many documents of a task.", DATA)] = None,
    sampling_ratio: Annotated[
        float | None, _option("Use this share of the documents, drawn with the seed. Default: 1.0.", DATA)
    ] = None,
    seed: Annotated[int | None, _option("Seed of everything that is drawn. Default: 0.", DATA)] = None,
    lengths: Annotated[str | None, _option("needle, fidelity: prompt lengths in tokens. Default: 2000.", DATA)] = None,
    samples: Annotated[
        int | None, _option("needle, fidelity: prompts per length, spread evenly over depth or text. Default: 8.", DATA)
    ] = None,
    haystack: Annotated[
        str | None, _option("needle: a text file to hide the needle in. Default: generated sentences.", DATA)
    ] = None,
    text: Annotated[
        str | None,
        _option(
            "fidelity: a text file, JSON lines, or sentences: made ones, the same everywhere. Default: the reference "
            "texts that come with Python.",
            DATA,
        ),
    ] = None,
    text_field: Annotated[
        str | None, _option("fidelity: field of the text in a file of JSON lines. Default: text.", DATA)
    ] = None,
    continuation: Annotated[
        int | None, _option("fidelity: tokens that are read and compared behind a prompt. Default: 64.", DATA)
    ] = None,
    per_layer: Annotated[
        bool | None,
        _option(
            "fidelity: the error of every layer's attention output too. Default: no.",
            DATA,
            "--per-layer/--no-per-layer",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, _option("lm-eval tasks: examples in the prompt. Default: the task's own.", DATA)
    ] = None,
    apply_chat_template: Annotated[
        bool | None,
        _option(
            "lm-eval tasks: prompts as the model's chat has them. Default: no.",
            DATA,
            "--apply-chat-template/--no-apply-chat-template",
        ),
    ] = None,
    system_instruction: Annotated[str | None, _option("lm-eval tasks: a text before every prompt.", DATA)] = None,
    enable_thinking: Annotated[
        bool | None,
        _option(
            "lm-eval tasks, with --apply-chat-template: let the model think or not; its thoughts are not scored. "
            "Default: as the chat template has it.",
            DATA,
            "--enable-thinking/--no-enable-thinking",
        ),
    ] = None,
    gen_kwargs: Annotated[
        str | None, _option("lm-eval tasks: generation settings, as max_gen_toks=512. Default: the task's own.", DATA)
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool | None,
        _option(
            "lm-eval tasks whose metric runs code that the model writes, such as humaneval: run it, on this machine.",
            DATA,
            "--confirm-run-unsafe-code",
        ),
    ] = None,
    include_path: Annotated[str | None, _option("Folders with lm-eval task files of your own.", DATA)] = None,
    rolling_prefill: Annotated[
        float | None,
        _option("Perplexity tasks: share of a text's window that is prefilled, then compressed. Default: 0.5.", DATA),
    ] = None,
    rolling_chunk: Annotated[
        int | None,
        _option("Perplexity tasks: tokens read at once after that; 1 compresses after every one. Default: 32.", DATA),
    ] = None,
    prefill_chunk: Annotated[
        int | None, _option("Tokens of a prompt that are read in one forward. Default: all at once.", DATA)
    ] = None,
    batch_size: Annotated[
        str | None,
        _option(
            "Documents answered side by side, and choices read in one forward; auto: what takes 1 GiB. Default: 1.",
            DATA,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, _option("Folder with local rows (gsm8k/test.jsonl, ...) instead of a download.", DATA)
    ] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, cuda:1, mps.", DATA)] = None,
    dtype: Annotated[str | None, _option("auto (bfloat16), float32, bfloat16, float16.", DATA)] = None,
    max_length: Annotated[
        int | None,
        _option(
            "Longest prompt plus answer in tokens (longbench: what prompts are cut to). Default: the model's context.",
            DATA,
        ),
    ] = None,
    skip_cut: Annotated[
        bool,
        _option("longbench: leave out documents that would have to be cut, before --limit counts.", DATA, "--skip-cut"),
    ] = False,
    trust_remote_code: Annotated[
        bool, _option("Run code that comes with a hub model. Only if you trust it.", DATA, "--trust-remote-code")
    ] = False,
    device_map: Annotated[
        str | None,
        _option("auto spreads a model over the GPUs that there are (accelerate). Default: one device.", DATA),
    ] = None,
    model_kwargs: Annotated[
        str | None,
        _option("For transformers when it loads a model: key=value,..., or a mapping as YAML or JSON.", DATA),
    ] = None,
    executor: Annotated[
        str | None, _option("local, or ray: on the workers of a cluster. Default: local.", WHERE)
    ] = None,
    address: Annotated[
        str | None,
        _option(
            "Ray: host:port or ray://host:port of a cluster, auto for the one of this machine (or RAY_ADDRESS), local "
            "for one of this run's own. Default: auto.",
            WHERE,
        ),
    ] = None,
    workers: Annotated[
        int | None, _option("Ray: workers, each with a model of its own. Default: as many as there is room for.", WHERE)
    ] = None,
    gpus_per_worker: Annotated[
        float | None, _option("Ray: GPUs of a worker. Default: 1, or 0 on a cluster without any.", WHERE)
    ] = None,
    cpus_per_worker: Annotated[int | None, _option("Ray: cores and threads of a worker. Default: 1.", WHERE)] = None,
    retries: Annotated[
        int | None,
        _option("Ray: how often documents whose worker died are tried again before they fail. Default: 3.", WHERE),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        _option("Python files with methods or tasks of your own (docs/plugins.md); may be repeated.", GRID),
    ] = None,
    preset: Annotated[
        str | None,
        _option(
            "Settings by name (see list presets) or from a YAML file; of several the last wins, and flags win.", OUTPUT
        ),
    ] = None,
    outdir: Annotated[
        str | None, _option("Run folder; an unfinished run there is continued. Default: runs/TIME.", OUTPUT)
    ] = None,
    fresh: Annotated[bool, _option("Forget what an earlier run left in the folder.", OUTPUT, "--fresh")] = False,
    states: Annotated[
        bool | None,
        _option(
            "Leave a states map of the first document of each task for report --html; costs one more prefill of it. "
            "Default: no.",
            OUTPUT,
            "--states/--no-states",
        ),
    ] = None,
    print_config: Annotated[
        bool, _option("Print the settings and where each comes from, and stop.", OUTPUT, "--print-config")
    ] = False,
) -> None:
    """Compare cache methods: answers kept, true KV bytes, speed.

    Each document's prompt is computed once; every method compresses its own copy of the cache and answers from it.
    Lists are comma-separated.

    [bold]arkv-bench run --preset demo[/bold]
    [bold]arkv-bench run --tasks needle,gsm8k --data-dir DATA --quant-type full,mix --cache-size 512,1024[/bold]
    """
    flags = settings_of(
        {key: value for key, value in locals().items() if key not in ("preset", "fresh", "print_config")}
    )
    from bench.settings.run import FIELDS, resolve

    config, origin = resolve(flags, preset)
    if print_config:
        shown = config.to_json()
        width = max(map(len, FIELDS))
        for name in FIELDS:
            typer.echo(f"{name:{width}}  {shown[name]!s:44}  {origin[name]}")
        return

    from rich.console import Console

    from bench.runs.folder import DISK_FULL
    from bench.runs.kinds import new_folder
    from bench.runs.run import execute

    console = Console()
    path = config.outdir or new_folder(Path(preset).stem if preset else None)
    try:
        outcome = execute(config, path, console, fresh=fresh, origin=origin)
    except KeyboardInterrupt:
        message = f"stopped; what was measured is in {path}: the same command with --outdir {path} continues"
        raise UserError(message, exit_code=130) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"stopped: {error.strerror}; free some: the same command with --outdir {path} continues"
        raise UserError(message) from None
    _summarize(outcome, console)
    if outcome.failures:
        raise typer.Exit(1)


def _summarize(outcome: Outcome, console: Console) -> None:
    """The tables, what failed, where everything is, and what to type next."""
    import shlex

    from bench.report.averages import print_averages
    from bench.report.rows import headline
    from bench.report.terminal import print_comparison
    from bench.runs.failures import failure_lines

    if asked_for := headline(outcome.rows):
        print_comparison([asked_for], console)
        print_averages(outcome.rows, console)
    if parts := len({row["task"] for row in outcome.rows} - {row["task"] for row in asked_for}):
        console.print(f"{parts} tasks and groups that these consist of have rows of their own in results.csv.")
    if outcome.failures:
        typer.echo("arkv-bench: not everything could be measured:", err=True)
        for line in failure_lines(outcome.failures):
            typer.echo(f"  {line}", err=True)
    folder = shlex.quote(str(outcome.path))
    after = [f"Run folder: {outcome.path}"]
    if outcome.failures:
        after.append(f"What failed is tried again by the same command with --outdir {folder}")
    if outcome.rows:
        after.append(f"Next, a page to look at: arkv-bench report {folder} --html page.html")
    for line in after:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as :func:`bench.settings.run.resolve` takes it."""
    # A switch without an opposite that was not given leaves the preset's value.
    given = {key: value for key, value in options.items() if not (key == "trust_remote_code" and value is False)}
    plugins = options.get("plugin")
    return {**given, "plugin": ",".join(plugins) if plugins else None}
