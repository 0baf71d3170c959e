# SPDX-License-Identifier: Apache-2.0
"""Opening: from a file or folder to a session whose weights are the ones the graph was made for.

Offsets into a weight file are not checked by onnxruntime: with another file of the same size the logits are garbage, without a word. So
size and header of each file are compared with the contract first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.contract import Contract, from_metadata
from surgery.onnx.graph.metadata import read_metadata
from surgery.onnx.graph.weight_files import check_weight_files
from surgery.onnx.run.adapters import past_names
from surgery.onnx.run.foreign import guessed_contract
from surgery.onnx.run.memory import HostMemory, Memory
from surgery.onnx.run.ports import Port, ports
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Opened", "find_graph", "open_graph", "open_prefill"]

GRAPH = "model.onnx"
_AGAIN = "export it again"
_QUIET = 4  # what goes wrong is an exception, and told once


@dataclass(frozen=True, eq=False)
class Opened:
    """A session and what it needs to know.

    Attributes:
        session: onnxruntime's.
        contract: Read from the file, or guessed where it has none.
        foreign: Whether it was guessed.
        path: The graph.
        memory: Where its tensors lie.
        inputs: By name, those with a default included.
        optional: Inputs that have a default.
        outputs: By name.
        cuda_graph: Whether runs may be captured and replayed.
        weights: Folder of the weight files.
        threads: Of one operation on the cpu; None for one per core.
    """

    session: onnxruntime.InferenceSession
    contract: Contract
    foreign: bool
    path: Path
    memory: Memory
    inputs: Mapping[str, Port]
    optional: frozenset[str]
    outputs: Mapping[str, Port]
    cuda_graph: bool
    weights: Path
    threads: int | None

    @property
    def folder(self) -> Path:
        """Where tokenizer and configuration lie."""
        return self.path.parent


def find_graph(model: str | os.PathLike[str]) -> Path:
    """The graph file of `model`, which is it or its folder.

    Raises:
        NotFoundError: nothing there, or a folder without ``model.onnx``.
    """
    path = Path(model)
    if path.is_dir():
        path = path / GRAPH
        if not path.exists():
            raise NotFoundError(f"no {GRAPH} in this folder", file=model, hint="surgery export-onnx makes one")
    elif not path.exists():
        raise NotFoundError("no such file or folder", file=model)
    return path


def open_graph(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    cuda_graph: bool = True,
    provider_options: Mapping[str, str] | None = None,
    session_config: Mapping[str, str] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> Opened:
    """Open a graph for running.

    Args:
        model: The graph, or its folder.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: where the graph was made for, if that is here.
        weights: Folder of the weight files, where it is not the graph's own.
        threads: Of one operation on the cpu; by default one per core.
        cuda_graph: On CUDA, record a decoding step once and replay it.
        provider_options: More for the CUDA provider, as onnxruntime names them.
        session_config: More configuration entries of the session, as onnxruntime names them.
        profile: Where onnxruntime writes the time of each node to (the beginning of a file's name); see its ``end_profiling``.

    Raises:
        NotFoundError: no such file, or a weight file is missing.
        MalformedError: not an ONNX file, or a contract that cannot be read.
        ProofError: the weights are not those the graph was made for.
        FitError: the device is not here, or cannot run the graph.
    """
    path = find_graph(model)
    contract = from_metadata(read_metadata(path), path)
    folder = path.parent if weights is None else Path(weights)
    if contract is not None:
        check_weight_files(contract.weights, folder)
    memory = _memory(device, contract)
    recorded = cuda_graph and memory.device == "cuda" and (contract is None or contract.cache == "shared")
    session = _session(
        path, folder, contract, memory, threads, recorded, provider_options or {}, session_config or {}, profile
    )
    inputs, outputs = ports(session.get_inputs()), ports(session.get_outputs())
    defaults = ports(session.get_overridable_initializers())
    if contract is not None:
        _check_ports(contract, {**inputs, **defaults}, outputs, path)
    known = contract or guessed_contract(path, {**inputs, **defaults}, outputs, memory.device)
    return Opened(
        session, known, contract is None, path, memory, {**inputs, **defaults}, frozenset(defaults), outputs,
        recorded, folder, threads,
    )  # fmt: skip


def open_prefill(opened: Opened) -> Opened | None:
    """The graph over the same weights that takes several rows on top of a past (`Contract.prefill`); None where there is none.

    On the cpu both sessions map the same weight files. A second session on CUDA would hold every weight again, as onnxruntime copies
    initializers to the device for each session of its own, so there it is None too.

    Raises:
        MalformedError: a name that leads out of the folder, or a graph over other weights.
        ProofError, FitError: see `open_graph`.
    """
    contract = opened.contract
    if not contract.prefill or opened.memory.device != "cpu":
        return None
    if not is_safe_name(contract.prefill):
        raise MalformedError(f"the graph names '{show(contract.prefill)}' for prefills", file=opened.path)
    path = opened.folder / contract.prefill
    if not path.exists():  # whoever takes the main graph alone has all there is, row by row
        return None
    found = open_graph(path, device="cpu", weights=opened.weights, threads=opened.threads)
    for field in ("dtype", "layers", "kv_heads", "head_dim", "vocabulary", "weights", "slots"):
        if getattr(found.contract, field) != getattr(contract, field):
            raise MalformedError(
                f"not of the same model as {GRAPH}: another {field}", file=path, hint="export it again"
            )
    return found


def _check_ports(contract: Contract, inputs: Mapping[str, Port], outputs: Mapping[str, Port], path: Path) -> None:
    """Compare what the contract says of a decoder with the graph's own inputs and outputs: buffers are made by the contract.

    Raises:
        MalformedError: they differ.
    """
    if contract.kind != "decoder":
        return
    said: list[tuple[str, Port | None, int, int]] = [("vocabulary", outputs.get("logits"), -1, contract.vocabulary)]
    for name in past_names(contract.layers):
        said += [
            ("kv_heads", inputs.get(name), 1, contract.kv_heads),
            ("head_dim", inputs.get(name), 3, contract.head_dim),
        ]
    past = [name for name in inputs if name.startswith("past_key_values.")]
    if any(port is None for _, port, _, _ in said) or len(past) != 2 * contract.layers:
        raise MalformedError("the graph's inputs or outputs are not those of its contract", file=path, hint=_AGAIN)
    for field, port, axis, size in said:
        found = port.shape[axis] if port is not None and len(port.shape) > max(axis, 0) else None
        if isinstance(found, int) and found != size:
            text = f"the contract says {field} {size}, the graph has {found}"
            raise MalformedError(text, file=path, tensor=port.name if port else None, hint=_AGAIN)


def _memory(device: str, contract: Contract | None) -> Memory:
    """The device asked for; FitError if it is not here."""
    name, _, number = device.partition(":")
    if name == "cpu":
        return HostMemory()
    if name == "auto" and contract is not None and contract.target != "cuda":
        return HostMemory()
    from surgery.onnx.run.cudart import CudaMemory, device_count

    index, there = int(number or 0), device_count()
    if index < there:
        return CudaMemory(index)
    if name == "auto":
        return HostMemory()
    raise FitError(f"'{show(device)}' is not on this machine, which has {there} CUDA devices")


def _session(
    path: Path,
    folder: Path,
    contract: Contract | None,
    memory: Memory,
    threads: int | None,
    cuda_graph: bool,
    more: Mapping[str, str],
    config: Mapping[str, str],
    profile: str | os.PathLike[str] | None,
) -> Any:
    import onnxruntime

    if memory.device == "cpu" and contract is not None and contract.dtype == "bf16":
        raise FitError(
            "a bf16 graph does not run on the cpu", file=path, hint="export with --dtype fp32 or --target cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if contract is not None and contract.target == "cpu":
        # Prepacking copies every weight into memory of the process and gains nothing for Gemm(transB): they stay mapped.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    providers: list[Any] = ["CPUExecutionProvider"]
    if memory.device == "cuda":
        chosen = {"device_id": str(memory.index), "enable_cuda_graph": str(int(cuda_graph))}
        chosen["user_compute_stream"] = str(memory.stream)
        providers.insert(0, ("CUDAExecutionProvider", {**chosen, **more}))
    source: str | bytes = os.fspath(path)
    names = {weight.name: (folder / weight.name).resolve() for weight in contract.weights} if contract else {}
    places = {target.parent for target in names.values()} or {folder.resolve()}
    if folder != path.parent or any(target != folder.resolve() / name for name, target in names.items()):
        # onnxruntime follows no link out of the graph's folder, but takes another folder by name for a graph given as bytes.
        if len(places) > 1:
            raise FitError("links lead to weight files in several folders", file=folder, hint="copy them into one")
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, os.fspath(next(iter(places))))
        source = _renamed(path, {name: target.name for name, target in names.items()})
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's own types, which share no base class
        hint = "try without a CUDA graph" if cuda_graph else None
        raise FitError(f"onnxruntime cannot load it: {show(error, 500)}", file=path, hint=hint) from error
    if memory.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        from surgery.onnx.run.cudart import INSTALL

        raise FitError("onnxruntime could not use CUDA", hint=INSTALL)
    return session


def _renamed(path: Path, names: Mapping[str, str]) -> bytes:
    """The graph's bytes, its weight files called by their names behind the links."""
    if all(name == target for name, target in names.items()):
        file = open_file(path)
        return bytes(file.read(0, file.size))
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names.get(entry.value, entry.value)
    found: bytes = model.SerializeToString()
    return found
