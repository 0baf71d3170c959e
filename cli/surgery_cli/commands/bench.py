# SPDX-License-Identifier: Apache-2.0
"""``surgery bench``."""

from __future__ import annotations

import click

from surgery_cli.commands.run import runtime_device_option
from surgery_cli.options import Settings, complete_files
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, note, table
from surgery_formats.text import nbytes, show

__all__ = ["command"]


@sub_command("bench")
@click.argument("model", shell_complete=complete_files)
@click.option(
    "--against", metavar="OTHER", shell_complete=complete_files, help="Another graph, measured in turns with MODEL."
)
@click.option("--prompt-length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a row.")
@click.option("--new-tokens", type=click.IntRange(min=0), default=100, show_default=True, help="Steps to measure.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows.")
@click.option(
    "--cache", type=click.IntRange(min=1), metavar="TOKENS", help="Size of a shared cache; default: as needed."
)
@click.option("--no-cuda-graph", is_flag=True, help="Launch every step anew instead of replaying a recording.")
@click.option("--threads", type=click.IntRange(min=1), help="On the cpu; by default one per core.")
@runtime_device_option
def command(
    settings: Settings,
    model: str,
    against: str | None,
    prompt_length: int,
    new_tokens: int,
    batch: int,
    cache: int | None,
    no_cuda_graph: bool,
    threads: int | None,
    device: str,
) -> None:
    """Measure an exported model: load, prefill, time per token, memory.

    Medians over random tokens. With --against both graphs are measured in turns, so that a busy machine hurts both alike. On
    CUDA the floor is measured too: the time to read the weights of a step once. Graphs of other exporters can be measured if
    their inputs have the usual names.

    \b
    Examples:
      surgery bench out/
      surgery bench merged/ --against base/ --new-tokens 200
      surgery bench out/ --device cuda --batch 8
    """
    from surgery.verbs.bench import bench

    result = bench(
        model,
        against,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        batch=batch,
        cache=cache,
        device=device,
        cuda_graph=not no_cuda_graph,
        threads=threads,
    )
    if settings.json:
        emit_json("bench", result.as_json())
        return
    floors: tuple[float | None, ...] = result.floors or (None,) * len(result.sides)
    table(
        ("model", "load s", "prefill ms", "ms/token", "tokens/s", "x floor", "memory", "weights"),
        (
            (
                side.model,
                f"{side.load_seconds:.2f}",
                f"{side.prefill_seconds * 1e3:.2f}",
                "" if side.token_seconds is None else f"{side.token_seconds * 1e3:.3f}",
                "" if side.token_seconds is None else f"{result.batch / side.token_seconds:.1f}",
                "" if side.token_seconds is None or floor is None else f"{side.token_seconds / floor:.2f}",
                nbytes(side.memory_nbytes),
                nbytes(side.step_nbytes),
            )
            for side, floor in zip(result.sides, floors, strict=True)
        ),
        right=range(1, 8),
    )
    if settings.quiet:
        return
    note(f"{result.device}, {result.batch} x {result.prompt_length} tokens, median of {result.new_tokens} steps")
    if result.bandwidth is not None:
        times = ", ".join(f"{floor * 1e3:.3f} ms" for floor in result.floors)
        note(f"floor: {times} per step to read the weights once, at {nbytes(result.bandwidth)}/s copied on this device")
    if (ratio := result.token_ratio) is not None:
        spread = f"half of {ratio.pairs} pairs within {ratio.low:.3f} to {ratio.high:.3f}"
        mine, other = (show(side.model, 200) for side in result.sides)
        note(f"{mine} takes {ratio.median:.3f} times the time of {other} per token ({spread})")
