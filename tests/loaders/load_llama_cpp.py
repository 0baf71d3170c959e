# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: ``convert_lora_to_gguf.py`` of the folder that LLAMA_CPP names, then its library, by llama-cpp-python.

Bases and adapters that are GGUF are loaded as they are; ``--base BASE OUT`` makes a base GGUF.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from loading import IDS, Found, run

SOURCE = Path(os.environ["LLAMA_CPP"])
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]

import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class


def to_gguf(base: Path, output: Path) -> None:
    """The base without a tokeniser, which it has not got."""
    hparams = ModelBase.load_hparams(base, False)

    family = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class Plain(family):
        model_arch = family.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("no_vocab")
            if not any(key.endswith(".vocab_size") for data in self.gguf_writer.kv_data for key in data):
                self.gguf_writer.add_vocab_size(hparams["vocab_size"])  # without tokens nothing else says it

    Plain(base, gguf.LlamaFileType.ALL_F32, output, hparams=hparams).write()


class Errors(logging.Handler):
    """What the script says before it exits with 1."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def adapter_to_gguf(base: Path, adapter: Path, output: Path) -> None:
    script, errors = str(SOURCE / "convert_lora_to_gguf.py"), Errors()
    logging.getLogger("lora-to-gguf").addHandler(errors)
    sys.argv = [script, "--outtype", "f32", "--base", str(base), "--outfile", str(output), str(adapter)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        raise SystemExit(errors.said[0] if errors.said else "") from exit


def opened(base: Path) -> Callable[[Path | None], Found]:
    folder = Path(tempfile.mkdtemp())
    model = base if base.suffix == ".gguf" else folder / "base.gguf"
    if model != base:
        to_gguf(base, model)

    def load(adapter: Path | None) -> Found:
        lora = adapter
        if adapter is not None and adapter.suffix != ".gguf":
            lora = folder / "adapter.gguf"
            adapter_to_gguf(base, adapter, lora)
        llama = llama_cpp.Llama(
            str(model),
            lora_path=None if lora is None else str(lora),
            n_ctx=64,
            logits_all=True,
            n_threads=1,
            type_k=0,
            type_v=0,
            flash_attn=False,
            verbose=False,
        )
        llama.eval(IDS)
        return {"logits": np.array(llama.scores[: llama.n_tokens])}

    return load


if __name__ == "__main__":
    if sys.argv[1] == "--base":  # BASE OUT: the base as this program has it
        to_gguf(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.exit()
    run(opened, "llama-cpp-python")
