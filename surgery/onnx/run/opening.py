# SPDX-License-Identifier: Apache-2.0
"""Opening: from a file or folder to a session whose weights are those the graph was exported with.

onnxruntime does not check offsets into weight files: with another file of the same size the logits are silently
garbage. So size and header of each file are compared with the contract first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.contract import Contract, from_metadata
from surgery.onnx.graph.inserted import inserted_in
from surgery.onnx.graph.pair_names import graph_in, graphs_in, kept_names, only_graph
from surgery.onnx.graph.read_metadata import external_files, read_metadata
from surgery.onnx.graph.weight_files import check_weight_files
from surgery.onnx.run.adapters import past_names
from surgery.onnx.run.foreign import guessed_contract, named_slots
from surgery.onnx.run.memory import HostMemory, Memory
from surgery.onnx.run.ports import Port, ports
from surgery.onnx.run.runtime import load_runtime
from surgery_formats.errors import FitError, MalformedError, NotFoundError, UsageError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file
from surgery_formats.files.remote.path import on_a_disk
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["GraphSession", "find_graph", "open_encoder", "open_graph", "open_prefill", "placed_graph", "side_folder"]

GRAPH = "model.onnx"
_BELOW = ("onnx", "1")  # where transformers.js, sentence-transformers and Triton look for a graph
_HINT = "export it again"
_XQA = "ORT_ENABLE_XQA"
_QUIET = 4  # failures are raised as exceptions, so they need not be logged too


@dataclass(frozen=True, eq=False)
class GraphSession:
    """An open session and the facts about its graph.

    Attributes:
        session: onnxruntime's session.
        contract: Read from the file, or inferred if it has none.
        foreign: Whether the contract was inferred.
        path: The graph.
        memory: Where its tensors lie.
        inputs: Inputs by name, including those with a default.
        optional: Inputs that have a default.
        outputs: Outputs by name.
        cuda_graph: Whether runs may be captured and replayed.
        weights: Folder of the weight files.
        threads: Threads per operation on the cpu; None for one per core.
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
        """Folder of the tokenizer and configuration: the graph's, or that above ``onnx/`` or Triton's ``1/``."""
        return side_folder(self.path)


def placed_graph(folder: Path) -> Path | None:
    """The main graph of a folder, where one of the layouts of `surgery.onnx.export.layouts` has it, or the only one in it."""
    below = (graph for name in _BELOW for graph in sorted((folder / name).glob("model*.onnx")))
    pairs = (graph_in(folder / name) for name in _BELOW)
    placed = next((graph for graph in (graph_in(folder), *below, *pairs) if graph.exists()), None)
    return placed or only_graph(folder)


def side_folder(graph: Path) -> Path:
    """The folder of what belongs to a graph: its own, or that above ``onnx/`` or Triton's ``1/``."""
    here = graph.parent
    if here.name in _BELOW and not (here / "config.json").exists() and (here.parent / "config.json").exists():
        return here.parent
    return here


def find_graph(model: str | os.PathLike[str]) -> Path:
    """Return the graph file of `model`, which is a graph or its folder.

    Raises:
        NotFoundError: it does not exist, or is a folder without ``model.onnx`` and not with one graph alone.
    """
    on_a_disk(model, "onnxruntime reads files")
    path = Path(model)
    if path.is_dir():
        if (found := placed_graph(path)) is None:
            names = listing(graph.name for graph in graphs_in(path))
            what = f", but several graphs: {names}" if names else ""
            hint = "name one of them" if names else "create one with surgery export-onnx"
            raise NotFoundError(f"no {GRAPH} in this folder{what}", file=model, hint=hint)
        path = found
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
) -> GraphSession:
    """Open a graph for running.

    Args:
        model: The graph, or its folder.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the graph's target, if available.
        weights: Folder of the weight files, if it is not the graph's.
        threads: Threads per operation on the cpu; one per core by default.
        cuda_graph: On CUDA, record a decoding step once and replay it.
        provider_options: Further options of the CUDA provider, as onnxruntime names them.
        session_config: Further configuration entries of the session, as onnxruntime names them.
        profile: Prefix of the file that onnxruntime writes the time of each node to; see its ``end_profiling``.

    Raises:
        UsageError: `device` is not a name.
        NotFoundError: the graph or a weight file does not exist.
        MalformedError: not an ONNX file, or a contract that cannot be read.
        ProofError: the weights are not those the graph was exported with.
        FitError: the device is not available, or cannot run the graph.
    """
    if not isinstance(device, str):
        raise UsageError(f"device is a name such as 'cuda:0', not {type(device).__name__}")
    path = find_graph(model)
    props = read_metadata(path)
    contract = from_metadata(props, path)
    folder = path.parent if weights is None else Path(weights)
    if contract is not None:
        check_weight_files(contract.weights, folder, external_files(path))
    memory = _memory(device, contract)
    recordable = contract is None or (contract.cache == "shared" and not contract.sized_late)
    cuda_graph_on = cuda_graph and memory.device == "cuda" and recordable
    session = _session(
        path, folder, contract, memory, threads, cuda_graph_on, provider_options or {}, session_config or {}, profile
    )
    inputs, outputs = ports(session.get_inputs()), ports(session.get_outputs())
    defaults = ports(session.get_overridable_initializers())
    if contract is not None:
        _check_ports(contract, {**inputs, **defaults}, outputs, path)
    contract_or_guess = contract or guessed_contract(path, {**inputs, **defaults}, outputs, memory.device)
    if contract is None:
        known = inserted_in(props, path)
        slots = known.slots or named_slots({**inputs, **defaults})
        contract_or_guess = replace(
            contract_or_guess,
            slots=slots,
            adapters=known.adapters,
            replaceable=known.replaceable,
            inserted=known.modules,
        )
    return GraphSession(
        session=session,
        contract=contract_or_guess,
        foreign=contract is None,
        path=path,
        memory=memory,
        inputs={**inputs, **defaults},
        optional=frozenset(defaults),
        outputs=outputs,
        cuda_graph=cuda_graph_on,
        weights=folder,
        threads=threads,
    )


def open_prefill(graph: GraphSession) -> GraphSession | None:
    """Open the companion graph that takes several rows on top of a past (`Contract.prefill`); None if there is none.

    On the cpu both sessions map the same weight files. On CUDA a second session would hold all weights again, because
    onnxruntime copies initializers to the device for each session, so the result is None there too.

    Raises:
        MalformedError: the name points outside the folder, or the graph has other weights.
        ProofError, FitError: see `open_graph`.
    """
    contract = graph.contract
    if not contract.prefill or graph.memory.device != "cpu":
        return None
    if not is_safe_name(contract.prefill):
        raise MalformedError(f"the graph refers to '{show(contract.prefill)}' for prefills", file=graph.path)
    path = graph.path.parent / contract.prefill
    if not path.exists():  # the main graph also works alone, row by row
        return None
    prefill = open_graph(path, device="cpu", weights=graph.weights, threads=graph.threads)
    for field in ("dtype", "layers", "kv_heads", "head_dim", "vocabulary", "weights", "slots", "replaceable"):
        if getattr(prefill.contract, field) != getattr(contract, field):
            raise MalformedError(
                f"belongs to another model than {GRAPH}: {field} differs", file=path, hint="export it again"
            )
    return prefill


def open_encoder(graph: GraphSession) -> GraphSession:
    """Open the encoder that a decoder looks at (`Contract.encoder`).

    Raises:
        MalformedError: the name points outside the folder, or the graph is none of an encoder.
        NotFoundError, ProofError, FitError: see `open_graph`.
    """
    name = graph.contract.encoder
    if not is_safe_name(name):
        raise MalformedError(f"the graph refers to '{show(name)}' for its encoder", file=graph.path)
    device = "cpu" if graph.memory.device == "cpu" else f"{graph.memory.device}:{graph.memory.index}"
    encoder = open_graph(graph.path.parent / name, device=device, weights=graph.weights, threads=graph.threads)
    if encoder.contract.kind != "encoder" or encoder.contract.dtype != graph.contract.dtype:
        raise MalformedError("no encoder of this decoder", file=encoder.path, hint="export it again")
    return encoder


def _check_ports(contract: Contract, inputs: Mapping[str, Port], outputs: Mapping[str, Port], path: Path) -> None:
    """Check a decoder's inputs and outputs against its contract, by which buffers are allocated.

    Raises:
        MalformedError: they differ.
    """
    if contract.kind != "decoder":
        return
    checks: list[tuple[str, Port | None, int, int]] = [("vocabulary", outputs.get("logits"), -1, contract.vocabulary)]
    names = kept_names(contract.layers, "decoder") + kept_names(contract.layers, "encoder")
    names = names if contract.encoder else past_names(contract)
    begins = contract.encoder and not any(name in inputs for name in names)  # a decoder's first run
    for name in () if begins else names:
        checks += [
            ("kv_heads", inputs.get(name), 1, contract.kv_heads),
            ("head_dim", inputs.get(name), 3, contract.head_dim),
        ]
    for name in (f"past_conv.{layer}" for layer in contract.convolutions):
        checks += [("state", inputs.get(name), axis, size) for axis, size in enumerate(contract.state, 1)]
    past = [name for name in inputs if name.startswith("past_key_values.")]
    if any(port is None for _, port, _, _ in checks) or len(past) != (0 if begins else len(names)):
        raise MalformedError("the graph's inputs or outputs are not those of its contract", file=path, hint=_HINT)
    for field, port, axis, size in checks:
        actual = port.shape[axis] if port is not None and len(port.shape) > max(axis, 0) else None
        if isinstance(actual, int) and actual != size:
            text = f"the contract has {field} {size}, but the graph has {actual}"
            raise MalformedError(text, file=path, tensor=port.name if port else None, hint=_HINT)


def _memory(device: str, contract: Contract | None) -> Memory:
    """Memory of the requested device; FitError if it is not available."""
    name, _, number = device.partition(":")
    if name == "cpu":
        return HostMemory()
    if name == "auto" and contract is not None and contract.target != "cuda":
        return HostMemory()
    from surgery.onnx.run.cudart import CudaMemory, device_count

    index, count = int(number or 0), device_count()
    if index < count:
        return CudaMemory(index)
    if name == "auto":
        return HostMemory()
    raise FitError(f"'{show(device)}' is not available: this machine has {count} CUDA devices")


def _session(
    path: Path,
    folder: Path,
    contract: Contract | None,
    memory: Memory,
    threads: int | None,
    cuda_graph: bool,
    provider_options: Mapping[str, str],
    session_config: Mapping[str, str],
    profile: str | os.PathLike[str] | None,
) -> Any:
    from surgery.onnx.run.cudart import INSTALL

    onnxruntime = load_runtime()
    if memory.device == "cpu" and contract is not None and contract.dtype == "bf16":
        raise FitError(
            "a bf16 graph does not run on the cpu", file=path, hint='export with `dtype="fp32"` or `target="cpu"`'
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if contract is not None and contract.target == "cpu" and not contract.quantised:
        # Prepacking copies all weights into process memory and gains nothing for Gemm(transB): they stay mapped.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if contract is not None and contract.has_float_codes:
        # Weights of fp8 become numbers once, at load, instead of in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    if memory.device == "cuda" and contract is not None and contract.slots:
        # x A has few columns, for which cuBLAS picks a kernel of one block; those it measures take 4 % off a step (docs/benchmarks.md).
        options.add_session_config_entry("ep.cuda.enable_gemm_auto_tune", "1")
    for key, value in session_config.items():
        options.add_session_config_entry(key, value)
    providers: list[Any] = ["CPUExecutionProvider"]
    if memory.device == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise FitError("onnxruntime is installed without CUDA", hint=INSTALL)
        cuda_options = {"enable_cuda_graph": str(int(cuda_graph)), "user_compute_stream": str(memory.stream)}
        if (
            memory.index
        ):  # onnxruntime 1.31 warns on the terminal wherever the option is there, for the first device too
            cuda_options["device_id"] = str(memory.index)
        providers.insert(0, ("CUDAExecutionProvider", {**cuda_options, **provider_options}))
    source: str | bytes = os.fspath(path)
    names = {weight.name: (folder / weight.name).resolve() for weight in contract.weights} if contract else {}
    folders = {target.parent for target in names.values()} or {folder.resolve()}
    if folder != path.parent or any(target != folder.resolve() / name for name, target in names.items()):
        # onnxruntime follows no links out of the graph's folder, but accepts another folder for a graph given as bytes.
        if len(folders) > 1:
            raise FitError("links lead to weight files in several folders", file=folder, hint="copy them to one folder")
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, os.fspath(next(iter(folders))))
        source = _renamed(path, {name: target.name for name, target in names.items()})
    try:
        with _kernels(memory.device):
            session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's own types, which share no base class
        hint = "try without a CUDA graph" if cuda_graph else None
        raise FitError(f"onnxruntime cannot load it: {show(error, 500)}", file=path, hint=hint) from error
    if memory.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise FitError("onnxruntime could not use CUDA", hint=INSTALL)
    return session


@contextmanager
def _kernels(device: str) -> Iterator[None]:
    """On CUDA, leave decoding to cuDNN's attention instead of XQA: a step takes 1 to 8 % less (docs/benchmarks.md).

    onnxruntime reads this from the environment alone, when a session makes its kernels; what the user has set there stays.
    """
    if device != "cuda" or _XQA in os.environ:
        yield
        return
    os.environ[_XQA] = "0"
    try:
        yield
    finally:
        os.environ.pop(_XQA, None)


def _renamed(path: Path, names: Mapping[str, str]) -> bytes:
    """The graph's bytes, with its weight files renamed to the targets of their links."""
    if all(name == target for name, target in names.items()):
        file = open_file(path)
        return bytes(file.read(0, file.size))
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names.get(entry.value, entry.value)
    data: bytes = model.SerializeToString()
    return data
