# SPDX-License-Identifier: Apache-2.0
"""``surgery eval``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, runtime_device_option, subcommand, weighted
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("eval")
@pages()
@click.argument("model", shell_complete=complete_files)
@option.path("--text", metavar="FILE", help="What is predicted, in UTF-8.")
@option.path("--ids", metavar="FILE", help="Its token ids (.npy), instead of those of the model's tokenizer.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=weighted,
    metavar="ADAPTER[=WEIGHT]",
    shell_complete=complete_files,
    help="Attached to MODEL, unmerged; of a graph .onnx_adapter for its slots, or a name; may be given several times.",
)
@option.reference("--against", metavar="OTHER", help="Compare with this model: KL divergence and top tokens.")
@click.option(
    "--against-adapter",
    "against_adapters",
    multiple=True,
    type=weighted,
    metavar="ADAPTER[=WEIGHT]",
    shell_complete=complete_files,
    help="The same for OTHER.",
)
@click.option("--context", type=option.count(), default=480, show_default=True, help="Most tokens of a window.")
@click.option("--stride", type=option.count(), default=240, show_default=True, help="Tokens between two windows.")
@click.option("--limit", type=option.size, metavar="BYTES", help="Most bytes of the text: 20kB, 1MB.")
@option.threads("--threads", help="Of graphs, on the cpu; by default one per core.")
@runtime_device_option
def command(settings: Settings, model: str, **options: Any) -> None:
    """Measure how well a model predicts a text: bits per byte.

    MODEL is a base, a merge, a fine-tune or a folder with a graph. A graph is run by onnxruntime, everything else is
    computed by the reference that `surgery verify` uses, in fp32 on the weights as they are stored. Fewer bits are better.

    \b
    Examples:
      surgery eval llama/ --text held-out.txt
      surgery eval llama/ --adapter my-lora --text held-out.txt
      surgery eval int4-graph/ --against merged/ --text held-out.txt
      surgery eval merged/ --against llama/ --against-adapter my-lora --text held-out.txt --limit 100kB
    """
    from surgery.verbs.eval import eval as evaluated

    with bar(settings, "evaluating", unit="tokens" if options["ids"] else "bytes") as progress:
        result = evaluated(model, progress=progress, **options)
    show_result("eval", result, settings)
