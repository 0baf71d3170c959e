# SPDX-License-Identifier: Apache-2.0
"""numpy and torch behind one set of names."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery_formats import arrays
from surgery_formats.dtypes import DType
from surgery_formats.threads import one_thread

BOTH = [dtype for dtype in DType if dtype.torch_name is not None]


@pytest.mark.parametrize("dtype", BOTH, ids=lambda dtype: dtype.label)
def test_a_numpy_array_and_a_torch_tensor_of_one_type_have_the_same_bytes(dtype: DType) -> None:
    raw = np.random.default_rng(0).integers(0, 2, 64, np.uint8)
    array = raw.view(dtype.numpy)
    tensor = torch.from_numpy(raw).view(dtype.torch)
    assert arrays.dtype_of(array) is dtype
    assert arrays.dtype_of(tensor) is dtype
    assert arrays.to_cpu(tensor).tobytes() == array.tobytes()
    assert arrays.as_torch(array).view(torch.uint8).numpy().tobytes() == raw.tobytes()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F8_E4M3, DType.F8_E5M2], ids=lambda dtype: dtype.label)
def test_numpy_rounds_every_float32_near_a_narrow_value_as_torch_does(dtype: DType) -> None:
    narrow = np.arange(1 << dtype.bits, dtype=np.uint32).astype(f"u{dtype.bits // 8}").view(dtype.numpy)
    values = narrow.astype(np.float32)
    values = values[np.isfinite(values)]
    largest = np.abs(values).max()
    steps = [np.nextafter(values, np.float32(side)) for side in (-np.inf, np.inf)]
    middles = np.sort(values)[1:] / 2 + np.sort(values)[:-1] / 2
    grid = np.concatenate([values, *steps, middles, np.nextafter(middles, np.float32(np.inf))])
    grid = grid[np.abs(grid) <= largest]
    assert arrays.cast(grid, dtype).tobytes() == arrays.to_cpu(torch.from_numpy(grid).to(dtype.torch)).tobytes()


def test_namespaces_are_those_of_the_library() -> None:
    assert arrays.namespace(np.ones(2)) is np
    assert arrays.namespace(torch.ones(2)).sum(torch.ones(2)) == 2


def test_a_process_that_uses_numpy_only_does_not_import_torch() -> None:
    code = (
        "import sys, numpy; from surgery_formats import arrays; from surgery_formats.dtypes import DType;"
        "x = arrays.cast(numpy.ones(3), DType.BF16); arrays.namespace(x); arrays.to_device(x, 'cpu', DType.F32);"
        "arrays.is_torch(x); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_limit_of_one_thread_holds_until_the_last_caller_leaves() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    before = threads()
    first, second = one_thread(), one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert threads() == {1}
    second.__exit__(None, None, None)
    assert threads() == before


def test_a_bfloat16_file_is_read_in_a_process_that_has_not_imported_its_type(tmp_path: Path) -> None:
    """`safetensors.numpy` cannot: see docs/precision.md."""
    save_file({"w": torch.tensor([1.0, -2.5]).bfloat16()}, tmp_path / "model.safetensors")
    code = (
        "import sys, surgery; weight = surgery.open(sys.argv[1]).main.tensors['w'];"
        "assert 'ml_dtypes' not in sys.modules;"
        "values = weight.read(); print(values.dtype, values.astype('float32').tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "bfloat16 [1.0, -2.5]\n"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_products_beyond_their_type_warn_of_nothing(dtype: type) -> None:
    largest = np.finfo(dtype).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arrays.energy(np.array([largest, largest], dtype)) == np.inf
        assert np.isnan(arrays.inner(np.array([np.inf, np.inf], dtype), np.array([1, -1], dtype)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 1000, 1 << 19])
def test_sums_of_products_have_the_bits_of_numpys_dot(dtype: type, size: int) -> None:
    left, right = np.random.default_rng(size).normal(size=(2, size)).astype(dtype)
    assert arrays.inner(left, right) == float(np.dot(left, right))
