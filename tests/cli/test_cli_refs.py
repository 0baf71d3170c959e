# SPDX-License-Identifier: Apache-2.0
"""References: local first, the hub only by its name, and never by accident. The hub here is a fake that notes what it is asked."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.weight_files import ENTRY_POINTS
from surgery_formats.errors import MissingPackageError, NotFoundError
from surgery_formats.refs import HubName, parse_hub_name, resolve
from surgery_formats.testing.plugins import installed
from tests.support.kit import Run, make_lora


class FakeHub(ModuleType):
    """As much of huggingface_hub as is used."""

    def __init__(self, cache: Path) -> None:
        super().__init__("huggingface_hub")
        self.cache = cache
        self.asked: list[tuple[Any, ...]] = []
        self.fault: Exception | None = None
        self.ignored: list[str] = []
        self.holds = ["model.safetensors"]

    def snapshot_download(self, repo: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        self.asked.append((repo, revision, "*.bin" not in ignore_patterns))
        self.ignored = ignore_patterns
        if self.fault:
            raise self.fault
        folder = self.cache / repo.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.holds:
            (folder / name).touch()
        return str(folder)

    def hf_hub_download(self, repo: str, file: str, *, revision: str | None) -> str:
        self.asked.append((repo, revision, file))
        path = self.cache / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


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


def test_a_local_path_wins_over_a_hub_name(hub: FakeHub):
    Path("org/name").mkdir(parents=True)
    Path("hf:").mkdir()
    Path("hf:/file").touch()
    assert resolve("org/name") == Path("org/name")
    assert resolve("hf://file") == Path("hf://file")
    assert hub.asked == []


def test_a_name_of_the_hub(hub: FakeHub):
    assert resolve("org/name@v2") == hub.cache / "org--name"
    assert resolve("hf://gpt2") == hub.cache / "gpt2"
    assert resolve("org/name:unet/a.safetensors") == hub.cache / "unet/a.safetensors"
    assert hub.asked == [
        ("org/name", "v2", False),
        ("gpt2", None, False),
        ("org/name", None, "unet/a.safetensors"),
    ]


def test_pickles_only_where_there_is_nothing_better(hub: FakeHub):
    hub.holds = ["pytorch_model.bin"]
    resolve("org/old")
    assert hub.asked == [("org/old", None, False), ("org/old", None, True)]


@pytest.mark.parametrize(
    "text", ["models/lama", "./org/name", "../x/y", "lora", "/a/b", "run/model.safetensors", "~/x/y"]
)
def test_a_misspelt_path_asks_nobody(hub: FakeHub, text: str):
    Path("models/llama").mkdir(parents=True)
    with pytest.raises(NotFoundError) as caught:
        resolve(text)
    assert hub.asked == []
    assert caught.value.file == text
    if text == "models/lama":
        assert "llama" in (caught.value.hint or "")


def test_the_way_to_the_hub_is_told(hub: FakeHub):
    Path("models").mkdir()
    with pytest.raises(NotFoundError, match="hf://models/mine"):
        resolve("models/mine")


def test_a_hub_name_without_the_hub_package_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "huggingface_hub":
                raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=r"pip install 'model-surgery\[hub\]', or download"):
        resolve("org/name")


def test_what_the_hub_says_is_passed_on(hub: FakeHub):
    hub.fault = RuntimeError("401 Client Error\x1b[2J\nmore")
    with pytest.raises(NotFoundError) as caught:
        resolve("org/secret")
    assert "401 Client Error" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "hf auth login" in str(caught.value)
    assert caught.value.__cause__ is hub.fault


def test_a_full_disk_is_not_the_hubs_fault(hub: FakeHub):
    hub.fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space") as caught:
        resolve("org/name")
    assert not isinstance(caught.value, NotFoundError)


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 5000, "\udcff/\udcfe"])
def test_what_cannot_be_a_name_at_all(hub: FakeHub, text: str):
    with pytest.raises(NotFoundError):
        resolve(text)
    assert hub.asked == []


def test_commands_take_names_of_the_hub(hub: FakeHub, run: Run):
    make_lora(hub.cache.parent / "made").rename(hub.cache.parent / "moved")
    hub.cache.mkdir()
    (hub.cache.parent / "moved").rename(hub.cache / "org--lora")
    hub.holds = []
    result = run("inspect", "org/lora")
    assert result.exit_code == 0, result.stderr
    assert "LORA" in result.stdout
    assert hub.asked == [("org/lora", None, False)]


def test_weights_that_a_plugin_reads_are_downloaded_where_there_is_no_safetensors(hub: FakeHub):
    hub.holds = ["model.npz"]
    resolve("hf://org/name")
    assert {"*.npz", "*.onnx"} <= set(hub.ignored)
    with installed(ENTRY_POINTS, "npz", replace(SAFETENSORS, name="npz", suffixes=(".npz",))):
        resolve("hf://org/name")
    assert "*.npz" not in hub.ignored
    assert "*.onnx" in hub.ignored


def test_a_file_of_a_split_gguf_brings_the_others(hub: FakeHub):
    path = resolve("hf://org/name:big/m-00002-of-00003.gguf")
    assert path.name == "m-00002-of-00003.gguf"
    asked = [file for _, _, file in hub.asked]
    assert sorted(asked) == [f"big/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_a_repository_of_gguf_is_not_downloaded_in_all_its_sizes(hub: FakeHub):
    hub.holds = ["model-Q4_K_M.gguf", "model-Q8_0.gguf"]
    resolve("hf://org/name")
    assert "*.gguf" in hub.ignored


def test_the_files_that_a_graph_has_its_weights_in_come_with_it(hub: FakeHub, monkeypatch):
    from surgery_formats import refs

    monkeypatch.setattr(refs, "external_locations", lambda path: ("model.onnx_data", "sub/b.bin"))
    assert resolve("hf://org/name:onnx/model.onnx") == hub.cache / "onnx" / "model.onnx"
    assert [asked[2] for asked in hub.asked] == ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/sub/b.bin"]
