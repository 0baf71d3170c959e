# SPDX-License-Identifier: Apache-2.0
"""References: local first, the hub only by its name, and never by accident. The hub here is a server that notes what it is asked."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.weight_files import ENTRY_POINTS
from surgery_formats.errors import InputError, MissingPackageError, NotFoundError
from surgery_formats.refs import HubName, parse_hub_name, resolve
from surgery_formats.testing.plugins import installed
from tests.support.hub import Hub, reached
from tests.support.kit import Run, make_lora


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with reached(monkeypatch, tmp_path) as served:
        yield served


def names(path: Path) -> list[str]:
    return sorted(inner.name for inner in path.iterdir())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("hf://org/name", HubName("org/name")),
        ("hf://gpt2", HubName("gpt2")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3:sub/a.safetensors", HubName("org/name", "refs/pr/3", "sub/a.safetensors")),
        ("org/na.me_1:a b.safetensors", HubName("org/na.me_1", None, "a b.safetensors")),
    ],
)
def test_a_hub_name_has_a_repository_a_revision_and_a_file(text: str, name: HubName):
    assert parse_hub_name(text) == name


@pytest.mark.parametrize(
    "text",
    ["name", "./org/name", "/org/name", "a/b/c", "org/", "/", "", "org/name@", "org/name:", "org/n:../x", "org/n:/etc/x",
     "org/n:a/../../x", "hf://", "hf://-x/y", "or g/name", "org/name\n", "s3://a/b"],
)  # fmt: skip
def test_paths_and_malformed_references_are_no_hub_names(text: str):
    assert parse_hub_name(text) is None


def test_a_local_path_wins_over_a_hub_name(hub: Hub):
    Path("org/name").mkdir(parents=True)
    Path("hf:").mkdir()
    Path("hf:/file").touch()
    assert resolve("org/name") == Path("org/name")
    assert resolve("hf://file") == Path("hf://file")
    assert hub.asked == []


def test_a_name_of_the_hub(hub: Hub):
    old = hub.put("org/name", {"config.json": b"{}", "unet/a.safetensors": b"a" * 5000})
    new = hub.put("org/name", {"config.json": b"{}"})
    assert str(resolve("org/name")) == f"hf://org/name@{new}"
    assert str(resolve(f"hf://org/name@{old}")) == f"hf://org/name@{old}"
    assert str(resolve(f"org/name@{old}:unet/a.safetensors")) == f"hf://org/name@{old}/unet/a.safetensors"
    assert {asked.path.split("/")[1] for asked in hub.asked} == {"api"}, "nothing but listings"


@pytest.mark.parametrize(
    "text", ["models/lama", "./org/name", "../x/y", "lora", "/a/b", "run/model.safetensors", "~/x/y"]
)
def test_a_misspelt_path_asks_nobody(hub: Hub, text: str):
    Path("models/llama").mkdir(parents=True)
    with pytest.raises(NotFoundError) as caught:
        resolve(text)
    assert hub.asked == []
    assert caught.value.file == text
    if text == "models/lama":
        assert "llama" in (caught.value.hint or "")


def test_the_way_to_the_hub_is_told(hub: Hub):
    Path("models").mkdir()
    with pytest.raises(NotFoundError, match="hf://models/mine"):
        resolve("models/mine")


@pytest.mark.parametrize(
    "text",
    ["https://huggingface.co/org/name", "https://huggingface.co/org/name/tree/main", "hf:/org/name", "hf:org/name"],
)
def test_a_name_of_the_hub_in_another_spelling_is_told_as_it_is_written(hub: Hub, text: str):
    with pytest.raises(NotFoundError, match="write hf://org/name if"):
        resolve(text)
    assert hub.asked == []


def test_a_misspelt_path_that_looks_like_a_name_of_the_hub_is_told_so_first(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    Path("examples").mkdir()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"no file or folder of this name is here.*cannot be reached; .*'examples'"):
        resolve("exampls/lora")
    with pytest.raises(InputError, match=r"no file or folder of this name.* cannot be reached.*hf download org/name"):
        resolve("org/name")
    with pytest.raises(InputError) as caught:
        resolve("hf://org/name")
    assert caught.value.message == "the hub cannot be reached"
    assert "hf download org/name" in (caught.value.hint or "")


@pytest.mark.parametrize("way", ["offline", "unreachable", "not there"])
def test_half_of_a_name_of_the_hub_is_told_as_that(way: str, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for text in ("hf://nobody", "hf://nobody@main:a.safetensors"):
        with pytest.raises(InputError) as caught:
            resolve(text)
        hint = caught.value.hint or ""
        assert "hf download" not in hint
        assert "write hf://ORG/nobody or hf://nobody/NAME: all repositories but a few old ones are ORG/NAME" in hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("hf://org/name/", "write hf://org/name"),
        ("hf://org/name/unet/a.safetensors", "write hf://org/name:unet/a.safetensors, a file follows a colon"),
        ("hf://", "write hf://org/name; @revision and :file are optional"),
    ],
)
def test_a_name_of_the_hub_with_a_slash_too_many_is_told_as_it_is_written(hub: Hub, text: str, hint: str):
    with pytest.raises(NotFoundError) as caught:
        resolve(text)
    assert caught.value.hint == hint
    assert hub.asked == []


def test_a_hub_name_without_the_hub_package_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "huggingface_hub":
                raise ModuleNotFoundError(name, name=name)

    for module in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=r"pip install 'model-surgery\[hub\]', or download") as caught:
        resolve("org/name")
    assert str(caught.value).startswith("org/name: no file or folder of this name is here, so it was taken for one on")


def test_a_full_disk_is_not_the_hubs_fault(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.put("org/name", {"config.json": b"{}"})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space") as caught:
        (resolve("org/name") / "config.json").read_bytes()
    assert not isinstance(caught.value, NotFoundError)


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 5000, "\udcff/\udcfe"])
def test_what_cannot_be_a_name_at_all(hub: Hub, text: str):
    with pytest.raises(NotFoundError):
        resolve(text)
    assert hub.asked == []


def test_commands_take_names_of_the_hub(hub: Hub, run: Run, tmp_path: Path):
    hub.add("org/lora", make_lora(tmp_path / "made"))
    result = run("inspect", "org/lora")
    assert result.exit_code == 0, result.stderr
    assert "LoRA" in result.stdout


def test_weights_that_a_plugin_reads_are_seen_where_there_is_no_safetensors(hub: Hub):
    hub.put("org/name", {"model.npz": b"z" * 5000, "model.onnx": b"o" * 5000})
    with pytest.raises(NotFoundError, match="hf://org/name:model"):
        resolve("hf://org/name")
    with installed(ENTRY_POINTS, "npz", replace(SAFETENSORS, name="npz", suffixes=(".npz",))):
        assert names(resolve("hf://org/name")) == ["model.npz"]


def test_a_file_of_a_split_gguf_has_the_others_beside_it(hub: Hub):
    files = {f"big/m-0000{i}-of-00003.gguf": b"g" * 5000 for i in (1, 2, 3)}
    hub.put("org/name", files)
    path = resolve("hf://org/name:big/m-00002-of-00003.gguf")
    assert path.name == "m-00002-of-00003.gguf"
    assert all(path.with_name(name.partition("/")[2]).is_file() for name in files)


def test_a_repository_of_gguf_is_not_one_model_in_all_its_sizes(hub: Hub):
    hub.put("org/name", {"model-Q4_K_M.gguf": b"4" * 5000, "model-Q8_0.gguf": b"8" * 5000})
    with pytest.raises(NotFoundError, match=r"2 files of weights.*hf://org/name:model-Q4_K_M\.gguf"):
        resolve("hf://org/name")


def test_the_files_that_a_graph_has_its_weights_in_come_with_it(hub: Hub, monkeypatch):
    from surgery_formats import refs

    hub.put("org/name", {f"onnx/{name}": name.encode() for name in ("model.onnx", "model.onnx_data", "sub/b.bin")})
    monkeypatch.setattr(refs, "external_locations", lambda path: ("model.onnx_data", "sub/b.bin"))
    path = resolve("hf://org/name:onnx/model.onnx")
    assert {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file()} == {
        "model.onnx", "model.onnx_data", "sub/b.bin",
    }  # fmt: skip
