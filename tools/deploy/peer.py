# SPDX-License-Identifier: Apache-2.0
"""Run a folder as the users of one program do, and print what comes out as JSON: ``peer.py PROGRAM KIND FOLDER WANTED``.

It runs in that program's own environment, without this toolkit. KIND is ``generate``, ``batch``, ``text``, ``coded``
(``text`` of an int4 graph), ``embed``, ``classify`` or ``seq2seq``; WANTED is a JSON file with token ids, texts and numbers of new
tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np


def graph_of(folder: Path) -> Path:
    """The graph, wherever the layout has it."""
    return next(
        path for path in (folder / "model.onnx", folder / "onnx/model.onnx", folder / "1/model.onnx") if path.exists()
    )


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """Token ids and mask of rows that are padded on the right."""
    lengths = np.array([len(row) for row in rows])
    ids = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)


def own_numbers(found: Any, rows: list[list[int]], kind: str) -> list[float]:
    """What an encoder says of the rows themselves, without that of padding."""
    parts = [one[: len(row)] if kind == "embed" else one for one, row in zip(found, rows, strict=True)]
    return [float(number) for part in parts for number in np.ravel(part)]


def onnxruntime_alone(kind: str, folder: Path, wanted: dict[str, Any]) -> tuple[str, Any]:
    """Arrays in, arrays out; a batch is padded on the right."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(graph_of(folder)), providers=["CPUExecutionProvider"])
    ports = session.get_inputs()
    if kind not in ("generate", "batch"):
        numbers: list[float] = []
        for rows in ([wanted["ids"]], wanted["rows"]):  # alone, then in a batch
            ids, mask = padded(rows)
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
            numbers += own_numbers(session.run(None, {port.name: given[port.name] for port in ports})[0], rows, kind)
        return onnxruntime.__version__, numbers
    rows = wanted["rows"] if kind == "batch" else [wanted["ids"]]
    lengths = np.array([len(row) for row in rows])
    ids, mask = padded(rows)
    past = {
        port.name: np.zeros((len(rows), port.shape[1], 0, port.shape[3]), np.float32)
        for port in ports
        if port.name.startswith("past")
    }
    names = [port.name for port in session.get_outputs()]
    out: list[list[int]] = [[] for _ in rows]
    ends = lengths - 1
    for _ in range(wanted["new"]):
        found = dict(zip(names, session.run(None, {"input_ids": ids, "attention_mask": mask, **past}), strict=True))
        new = found["logits"][np.arange(len(rows)), ends].argmax(-1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        for row, token in zip(out, new, strict=True):
            row.append(int(token))
        ids, ends = new[:, None].astype(np.int64), np.zeros(len(rows), int)
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], 1)
        if wanted["counted"]:  # GroupQueryAttention: the mask of a row is its length
            mask = (np.arange(mask.shape[1]) < mask.sum(1, keepdims=True)).astype(np.int64)
    return onnxruntime.__version__, out if kind == "batch" else out[0]


def genai(kind: str, folder: Path, wanted: dict[str, Any]) -> tuple[str, Any]:
    """onnxruntime-genai, which pads a batch itself."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    if kind in ("text", "coded"):  # with the folder's own settings: only the length is given
        tokenizer = og.Tokenizer(model)
        tokenizer.update_options(add_special_tokens="true")
        prompt = tokenizer.encode(wanted["prompt"])
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + wanted["text_new"])
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return og.__version__, tokenizer.decode(generator.get_sequence(0)[len(prompt) :])
    rows = wanted["rows"] if kind == "batch" else [wanted["ids"]]
    params = og.GeneratorParams(model)
    longest = max(map(len, rows))
    params.set_search_options(max_length=longest + wanted["new"], do_sample=False, batch_size=len(rows))
    generator = og.Generator(model, params)
    pad = wanted["pad"]
    generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in rows], np.int32))
    out: list[list[int]] = [[] for _ in rows]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(out, generator.get_next_tokens(), strict=True):
            row.append(int(token))
    return og.__version__, out if kind == "batch" else out[0]


def optimum(kind: str, folder: Path, wanted: dict[str, Any]) -> tuple[str, Any]:
    """optimum-onnx, which pads a batch of a decoder on the left."""
    import importlib.metadata

    import torch
    from optimum.onnxruntime import (
        ORTModelForCausalLM,
        ORTModelForFeatureExtraction,
        ORTModelForSeq2SeqLM,
        ORTModelForSequenceClassification,
    )

    version = importlib.metadata.version("optimum-onnx")
    if kind in ("text", "coded"):
        from transformers import AutoTokenizer  # noqa: TID251 - optimum's users have it

        tokenizer = AutoTokenizer.from_pretrained(folder)
        given = tokenizer(wanted["prompt"], return_tensors="pt", return_token_type_ids=False)
        out = ORTModelForCausalLM.from_pretrained(folder).generate(**given, max_new_tokens=wanted["text_new"])
        return version, tokenizer.decode(out[0, given["input_ids"].shape[1] :])
    ids = torch.tensor([wanted["ids"]])
    if kind == "seq2seq":
        options = {"max_new_tokens": wanted["new"], "do_sample": False, "num_beams": 1, "eos_token_id": None}
        pair = ORTModelForSeq2SeqLM.from_pretrained(folder)
        return version, pair.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist()
    if kind in ("generate", "batch"):
        rows = wanted["rows"] if kind == "batch" else [wanted["ids"]]
        longest = max(map(len, rows))
        ids = torch.tensor([[wanted["pad"]] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        model = ORTModelForCausalLM.from_pretrained(folder)
        options = {
            "max_new_tokens": wanted["new"],
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": wanted["pad"],
        }
        out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
        return version, out if kind == "batch" else out[0]
    one = ORTModelForFeatureExtraction if kind == "embed" else ORTModelForSequenceClassification
    encoder, numbers = one.from_pretrained(folder), list[float]()
    for rows in ([wanted["ids"]], wanted["rows"]):  # alone, then in a batch
        ids, mask = map(torch.tensor, padded(rows))
        found = encoder(input_ids=ids, attention_mask=mask, token_type_ids=ids * 0)
        state = found.last_hidden_state if kind == "embed" else found.logits
        numbers += own_numbers(state.detach().numpy(), rows, kind)
    return version, numbers


def sentence_transformers(kind: str, folder: Path, wanted: dict[str, Any]) -> tuple[str, Any]:
    """sentence-transformers with backend="onnx", from text."""
    import sentence_transformers as st

    if kind == "embed":
        model = st.SentenceTransformer(str(folder), backend="onnx", device="cpu")
        return st.__version__, model.encode(wanted["texts"]).ravel().tolist()
    model = st.CrossEncoder(str(folder), backend="onnx", device="cpu", max_length=64)
    return st.__version__, np.ravel(model.predict(list(map(tuple, wanted["pairs"])), apply_softmax=False)).tolist()


PROGRAMS = {
    "onnxruntime": onnxruntime_alone,
    "genai": genai,
    "optimum": optimum,
    "sentence-transformers": sentence_transformers,
}


def main() -> None:
    """Run, and print version and result."""
    program, kind, folder, wanted = sys.argv[1:]
    try:
        version, result = PROGRAMS[program](kind, Path(folder), json.loads(Path(wanted).read_text()))
        print(json.dumps({"version": version, "result": result}))
    except Exception as error:  # whatever a program raises is what a user of it sees
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[-300:]}))


if __name__ == "__main__":
    main()
