# SPDX-License-Identifier: Apache-2.0
"""Models on the hub: what is asked for and what is not, whom the token is shown to, and what is said when nobody answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import InputError, NotFoundError, ProofError, SurgeryError
from surgery_formats.files.remote import hub as hub_files
from surgery_formats.files.remote.hub_faults import fault_of
from surgery_formats.refs import resolve
from tests.support.hub import SIGNATURE, TOKEN, Hub, reached
from tests.support.kit import make_base, make_lora, spawn

REPO = "org/llama"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with reached(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards of 16 MB."""
    folder = make_base(tmp_path / "base", **{"model.embed_tokens.weight": torch.randn(1 << 18, 32)})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = torch.randn(1 << 18, 32).bfloat16()
    last = {name for name in tensors if name.startswith(("lm_head", "model.layers.1"))}
    shards = {"model-00001-of-00002.safetensors": tensors.keys() - last, "model-00002-of-00002.safetensors": last}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in sorted(keys)}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"the same again" * 100_000)
    (folder / "llama-q4.gguf").write_bytes(b"and smaller" * 100_000)
    return folder


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in ("README.md", "surgery_manifest.json")
    }


def test_looking_at_a_model_brings_its_headers(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add(REPO, base)
    surgery.inspect(f"hf://{REPO}")
    assert 0 < hub.bytes_of(SHARDS[0]) <= 1 << 18
    surgery.merge(f"hf://{REPO}", make_lora(tmp_path / "lora"), dry_run=True)
    assert all(0 < hub.bytes_of(name) < (base / name).stat().st_size / 4 for name in SHARDS)
    assert not [asked for asked in hub.asked if asked.path.endswith((".bin", ".gguf"))]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_merge_is_the_one_of_the_downloaded_folder_and_downloads_once(hub: Hub, base: Path, tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora")
    hub.add(REPO, base)
    hub.add("org/lora", lora)
    (base / "pytorch_model.bin").unlink()
    (base / "llama-q4.gguf").unlink()
    surgery.merge(base, lora, output=tmp_path / "here-out")
    surgery.merge(f"hf://{REPO}", "hf://org/lora", output=tmp_path / "hub-out")
    assert contents(tmp_path / "hub-out") == contents(tmp_path / "here-out")
    size = sum((base / name).stat().st_size for name in SHARDS)
    assert sum(map(hub.bytes_of, SHARDS)) < size * 1.3
    hub.asked.clear()
    surgery.merge(f"hf://{REPO}", "hf://org/lora", output=tmp_path / "again")
    assert sum(map(hub.bytes_of, SHARDS)) == 0


def test_the_manifest_says_which_commit_was_read(hub: Hub, base: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, base)
    surgery.merge(f"hf://{REPO}", make_lora(tmp_path / "lora"), output=tmp_path / "out")
    told = json.loads((tmp_path / "out/surgery_manifest.json").read_text())["objects"]
    assert {entry["version"] for entry in told} == {commit}
    assert all(len(entry["etag"]) == 64 for entry in told)


def test_a_branch_that_moves_meanwhile_is_not_followed(hub: Hub, base: Path, tmp_path: Path) -> None:
    old = hub.add(REPO, base)
    opened = surgery.open(f"hf://{REPO}")
    (base / "config.json").write_text("{}")
    (base / SHARDS[0]).write_bytes(bytes(17_000_000))
    hub.add(REPO, base)
    surgery.merge(opened, make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert isinstance(path := resolve(f"hf://{REPO}"), Path)
    assert old in str(path)


def test_a_path_in_a_message_can_be_given_again(hub: Hub, base: Path) -> None:
    commit = hub.add(REPO, base)
    path = resolve(REPO)
    assert str(path) == f"hf://{REPO}@{commit}"
    assert resolve(f"{path}/{SHARDS[0]}") == path / SHARDS[0]
    assert (path / "config.json").read_text() == (base / "config.json").read_text()
    assert sorted(p.name for p in path.iterdir()) == sorted({*contents(base)} - {"pytorch_model.bin", "llama-q4.gguf"})


def test_a_file_that_is_named_is_seen_though_listings_hide_its_kind(hub: Hub, base: Path) -> None:
    hub.add(REPO, base)
    path = resolve(f"{REPO}:llama-q4.gguf")
    assert path.is_file()
    assert path.name not in [p.name for p in path.parent.iterdir()]


def test_pickles_are_seen_where_there_is_nothing_better(hub: Hub) -> None:
    hub.put("org/old", {"pytorch_model.bin": b"p" * 5000, "model.onnx": b"o" * 5000, "config.json": b"{}"})
    assert sorted(p.name for p in resolve("org/old").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_the_token_goes_to_the_hub_alone_and_into_no_output(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add(REPO, base)
    surgery.merge(f"hf://{REPO}", make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert {asked.token for asked in hub.asked if asked.host == "hub"} == {f"Bearer {TOKEN}"}
    assert {asked.token for asked in hub.asked if asked.host == "elsewhere"} == {None}
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert TOKEN.encode() not in written
    assert SIGNATURE.encode() not in written


@pytest.mark.parametrize("fault", ["drop", "expire"])
def test_connections_that_break_and_addresses_that_expire_lose_nothing(
    fault: str, hub: Hub, base: Path, tmp_path: Path
) -> None:
    hub.add(REPO, base)
    lora = make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "right")
    opened = surgery.open(f"hf://{REPO}")
    setattr(hub, fault, 2 if fault == "drop" else 1)
    surgery.merge(opened, lora, output=tmp_path / "out")
    assert getattr(hub, fault) == 0
    assert all(contents(tmp_path / "out")[name] == contents(tmp_path / "right")[name] for name in SHARDS)


def test_an_address_that_another_thread_has_given_up_is_asked_for_again(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, base)
    lora = make_lora(tmp_path / "lora")
    opened = surgery.open(f"hf://{REPO}")
    ranged = hub_files.HubRepository._ranged

    def given_up(repository: hub_files.HubRepository, key: str, *asked: Any) -> bytes:
        try:
            return ranged(repository, key, *asked)
        except Exception:
            repository._locations.pop(key, None)
            raise

    monkeypatch.setattr(hub_files.HubRepository, "_ranged", given_up)
    hub.expire = 1
    surgery.merge(opened, lora, output=tmp_path / "out")
    assert hub.expire == 0


def test_a_host_without_ranges_is_refused_by_name(hub: Hub, base: Path) -> None:
    hub.add(REPO, base)
    hub.whole = True
    with pytest.raises(InputError, match="range"):
        surgery.inspect(f"hf://{REPO}")


def test_another_file_than_was_listed_is_refused(hub: Hub, base: Path) -> None:
    commit = hub.add(REPO, base)
    path = resolve(f"hf://{REPO}")
    hub.repositories[REPO][commit][SHARDS[0]] = bytes(17_000_000)
    with pytest.raises(ProofError, match="another file"):
        surgery.inspect(path)


@pytest.mark.parametrize(
    ("locked", "kind", "words"),
    [
        ((403, "GatedRepo"), InputError, "gated"),
        ((401, "RepoNotFound"), NotFoundError, "no such repository"),
        ((401, "Invalid credentials in Authorization header"), InputError, "does not accept the token"),
        ((403, ""), InputError, "denies access"),
        ((404, "RepoNotFound"), NotFoundError, "no such repository"),
        ((404, "RevisionNotFound"), NotFoundError, "no such revision"),
        ((500, ""), InputError, "answers 500"),
        ((429, ""), InputError, "too many requests"),
    ],
)
def test_who_is_not_let_in_is_told_why(locked: tuple[int, str], kind: type[SurgeryError], words: str, hub: Hub) -> None:
    hub.locked[REPO] = locked
    with pytest.raises(kind, match=words) as caught:
        surgery.inspect(f"hf://{REPO}")
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert TOKEN not in f"{caught.value} {caught.value.hint}"


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(NotFoundError, match="no such repository"):
        resolve("hf://org/none")
    hub.put(REPO, {"config.json": b"{}"})
    with pytest.raises(NotFoundError, match="no such revision"):
        resolve(f"hf://{REPO}@v9")
    with pytest.raises(NotFoundError, match="no such file"):
        resolve(f"hf://{REPO}:none.safetensors")


def test_without_a_network_the_cache_is_what_there_is(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, base)
    lora = make_lora(tmp_path / "lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE") as caught:
        surgery.inspect(f"hf://{REPO}")
    assert f"hf download {REPO}" in str(caught.value.hint)
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    surgery.merge(f"hf://{REPO}", lora, output=tmp_path / "out")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    surgery.merge(f"hf://{REPO}", lora, output=tmp_path / "again")
    assert hub.asked == []
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_hub_that_cannot_be_reached(hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, base)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        surgery.inspect(f"hf://{REPO}")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    surgery.merge(f"hf://{REPO}", make_lora(tmp_path / "lora"), output=tmp_path / "out")
    monkeypatch.setattr(hub_files, "_opened", {})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    surgery.inspect(f"hf://{REPO}")


def test_nothing_is_written_to_the_hub(hub: Hub, base: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, base)
    with pytest.raises(SurgeryError, match="nothing is written to the hub"):
        surgery.merge(base, make_lora(tmp_path / "lora"), output=f"hf://{REPO}@{commit}/merged")


def test_the_command_takes_the_endpoint_from_the_environment(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add(REPO, base)
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN": TOKEN,
    }
    done = spawn("inspect", REPO, **settings)
    assert done.returncode == 0, done.stderr
    hub.locked[REPO] = 403, "GatedRepo"
    done = spawn("inspect", REPO, **settings)
    assert done.returncode == 3
    assert "gated" in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_written_is_named_with_the_cure(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add(REPO, base)
    (tmp_path / "file").touch()
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "file" / "hub")}
    done = spawn("merge", REPO, make_lora(tmp_path / "lora"), "-o", tmp_path / "merged", **settings)
    assert done.returncode == 7, done.stderr
    message, hint = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert re.fullmatch(
        rf"error: {re.escape(str(tmp_path / 'file'))}\S*: the hub's cache cannot be written \(.+\)", message
    )
    assert hint == "  hint: set HF_HOME to a folder that can be"


def test_what_is_unknown_is_passed_on_as_one_line() -> None:
    told = fault_of(RuntimeError("something\x1b[2J\nmore"), "hf://org/x", "org/x")
    assert "something" in str(told)
    assert "\x1b" not in str(told)


def test_what_is_kept_of_a_file_does_not_grow_with_what_is_read_of_it(hub: Hub) -> None:
    data = bytes(range(256)) * (20 << 12)  # 20 MB
    hub.put(REPO, {"model.safetensors": data})
    repository = hub_files.open_repository(REPO, None, REPO)
    for stop in (100, 3 << 20, 1000):
        assert repository.read("model.safetensors", 0, stop).data == data[:stop]
    assert sum(map(len, repository._heads.values())) <= hub_files.HEAD
    assert [asked.range for asked in hub.asked if asked.range] == ["bytes=0-99", f"bytes=0-{(3 << 20) - 1}"]
