# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes is proved, the same every time, and whole or not there; nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from surgery import convert
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import OutputExistsError, ProofError, ResourceError, UsageError
from tests.support.adapter_files import (
    draw,
    llama_lora,
    unet,
    unet_lora,
    write_peft,
)


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    source = llama_lora(tmp_path / "a")
    for name in ("b", "c"):
        convert(source, "mlx", output=tmp_path / name)
    for file in sorted(os.listdir(tmp_path / "b")):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes(), file
    base = unet(tmp_path / "base")
    unet_adapter = unet_lora(tmp_path / "u")
    for name in ("b", "c"):
        convert(unet_adapter, "kohya", output=tmp_path / f"{name}.safetensors", base=base)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = convert(llama_lora(tmp_path / "a"), "mlx", output=tmp_path / "b", dry_run=True)
    assert result.output is None
    assert [entry.outcome for entry in result.entries] == ["exact"]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("target", ["mlx", "kohya"])
def test_an_output_that_exists_stays(tmp_path: Path, target: str) -> None:
    if target == "mlx":
        source, base, out = llama_lora(tmp_path / "a"), None, tmp_path / "b"
        out.mkdir()
        (out / "mine").write_text("x")
    else:
        base, out = unet(tmp_path / "base"), tmp_path / "b.safetensors"
        source = unet_lora(tmp_path / "a")
        out.write_text("x")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputExistsError):
        convert(source, target, output=out, base=base)
    assert sorted(os.listdir(tmp_path)) == before
    if target == "mlx":  # a folder that is not of this tool's making is never replaced
        with pytest.raises(OutputExistsError, match="not written by surgery"):
            convert(source, target, output=out, base=base, overwrite=True)
        (out / "surgery_manifest.json").write_text("{}")
    assert convert(source, target, output=out, base=base, overwrite=True).output == out
    assert read_adapter(out).format == target
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("target", ["mlx", "kohya", "peft"])
def test_a_writer_that_errs_is_caught_by_the_proof(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = unet(tmp_path / "base") if target == "kohya" else None
    if base:
        source = unet_lora(tmp_path / "a")
    else:
        source = llama_lora(tmp_path / "a")
    room = sys.modules["surgery.verbs.convert_adapter"]
    honest = room.format_to_write(target)

    class Liar:
        single_file, name = honest.single_file, honest.name

        def read(self, path: Path) -> object:
            return honest.read(path)

        def detect(self, path: Path) -> bool:
            return honest.detect(path)

        def render(self, adapter: object, base: object) -> object:
            rendering = honest.render(adapter, base)  # type: ignore[arg-type]

            def off(tensor: NewTensor) -> NewTensor:
                return (
                    replace(tensor, load=lambda: tensor.load() * 1.00001)
                    if "lora_" in tensor.name and tensor.shape
                    else tensor
                )

            return replace(rendering, tensors=tuple(off(tensor) for tensor in rendering.tensors))

    monkeypatch.setattr(room, "format_to_write", lambda name: Liar())
    before, out = sorted(os.listdir(tmp_path)), "out.safetensors" if honest.single_file else "out"
    with pytest.raises(ProofError, match="differ") as caught:
        convert(source, target, output=tmp_path / out, base=base)
    assert caught.value.exit_code == 5
    assert caught.value.file == out  # the hidden file is gone
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("target", "config", "number"),
    [("mlx", "adapter_config.json", "'scale' is 5e"), ("compact", "compact.json", "'alpha' is 1e")],
)
def test_what_a_format_cannot_read_back_is_named_by_the_output(
    target: str, config: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery_formats.adapters.peft.config_fields.LARGEST_ALPHA", 1e301)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{q}.lora_A.weight": draw(1, 2, 6), f"{q}.lora_B.weight": draw(2, 6, 2)}
    source = write_peft(tmp_path / "a", tensors, r=2, lora_alpha=1e300)
    with pytest.raises(ProofError, match=f"{target} cannot read what was written: {number}") as caught:
        convert(source, target, output=tmp_path / "out")
    assert caught.value.file == str(tmp_path / "out" / config)
    assert ".surgery-" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]


def test_the_name_of_a_kohya_file_must_say_so(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    with pytest.raises(UsageError, match=r"must end in \.safetensors; write to .*x\.safetensors"):
        convert(unet_lora(tmp_path / "a"), "kohya", output=tmp_path / "x", base=base)


def test_a_tokenizer_beside_the_adapter_comes_along(tmp_path: Path) -> None:
    source = llama_lora(tmp_path / "a")
    (source / "tokenizer.json").write_text("{}")
    convert(source, "mlx", output=tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_text() == "{}"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from surgery_formats.files.output import single

    base = unet(tmp_path / "base")
    source = unet_lora(tmp_path / "a")

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(single, "write_all", full)
    with pytest.raises(ResourceError, match="no space"):
        convert(source, "kohya", output=tmp_path / "x.safetensors", base=base)
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


_KILLED = """
import os, signal, sys
from surgery_formats.files.output import single
from surgery import convert
place = sys.argv[1]
if place == "written":
    single.write_all = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
elif place == "synced":
    single.rename_new = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
else:
    single.sync_folder = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[2], "kohya", output=sys.argv[3], base=sys.argv[4])
"""


@pytest.mark.parametrize("place", ["written", "synced", "renamed"])
def test_a_killed_run_leaves_a_whole_file_or_none_and_the_next_cleans_up(tmp_path: Path, place: str) -> None:
    base, out = unet(tmp_path / "base"), tmp_path / "x.safetensors"
    source = unet_lora(tmp_path / "a")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "formats")])}
    done = subprocess.run([sys.executable, "-c", _KILLED, place, source, out, base], env=env, check=False)
    assert done.returncode == -9
    assert out.exists() == (place == "renamed")
    if not out.exists():
        convert(source, "kohya", output=out, base=base)
    assert len(read_adapter(out).updates) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "x.safetensors"]
