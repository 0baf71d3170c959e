# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp makes of a GGUF; run by the python of an environment with llama-cpp-python, which shares none with ours.

llama_cpp_peer.py quantise SOURCE OUTPUT FTYPE
llama_cpp_peer.py greedy MODEL IDS COUNT     prints {"tokens": [...]}: the most likely token after each, COUNT times
llama_cpp_peer.py logits MODEL IDS OUTPUT [LORA]   saves the logits after every one of IDS, float32 (len, vocabulary)
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import llama_cpp
import numpy as np


def quantise(source: str, output: str, file_type: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(file_type), 1
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)) == 0


def opened(model: str, lora: str | None = None) -> llama_cpp.Llama:
    """In float32 wherever llama.cpp allows it; it rounds what meets quantised weights to 8 bits."""
    return llama_cpp.Llama(
        model,
        n_ctx=256,
        logits_all=True,
        n_threads=1,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
        lora_path=lora,
    )


def greedy(model: str, ids: str, count: str) -> None:
    llama, tokens = opened(model), []
    llama.eval(json.loads(ids))
    for _ in range(int(count)):
        tokens.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(tokens[-1:])
    print(json.dumps({"tokens": tokens}))


def logits(model: str, ids: str, output: str, lora: str | None = None) -> None:
    llama = opened(model, lora)
    llama.eval(json.loads(ids))
    np.save(output, np.array(llama.scores[: llama.n_tokens], np.float32))


if __name__ == "__main__":
    {"quantise": quantise, "greedy": greedy, "logits": logits}[sys.argv[1]](*sys.argv[2:])
