# SPDX-License-Identifier: Apache-2.0
"""What a push makes of a branch: what was written and nothing else, in one commit; and what becomes of it when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import _http

from surgery_formats.errors import InputError, MalformedError, ProofError, SurgeryError, UsageError
from surgery_formats.files.remote.hub_push import PushTarget, push
from tests.support.hub import TOKEN, Hub, contents, pushed, reached
from tests.support.hub_uploads import ATTRIBUTES

REPO = "org/merged"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # of its repetitions
    with reached(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished output: small files, a large one, and a folder in it."""
    folder = tmp_path / "output"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 200)
    (folder / "onnx" / "model.onnx").write_bytes(b"graph" * 2000)
    (folder / "empty.txt").write_bytes(b"")
    return folder


def test_large_files_go_to_the_other_host_without_the_token(hub: Hub, output: Path) -> None:
    push(output, PushTarget(REPO))
    assert pushed(hub, REPO) == contents(output)
    sent = [asked for asked in hub.asked if asked.method == "PUT"]
    assert len(sent) == 2
    assert {(asked.host, asked.token) for asked in sent} == {("elsewhere", None)}
    assert {asked.token for asked in hub.asked if REPO in asked.path} == {f"Bearer {TOKEN}"}


def test_files_of_the_hub_are_replaced_when_asked_for_and_in_one_commit(hub: Hub, output: Path) -> None:
    hub.put(REPO, {**ATTRIBUTES, "model-00001-of-00002.safetensors": b"old", "config.json": b"old"})
    with pytest.raises(SurgeryError, match=r"holds files already: 'config\.json' and 1 more") as caught:
        push(output, PushTarget(REPO))
    assert caught.value.exit_code == 2
    assert pushed(hub, REPO)["config.json"] == b"old"
    push(output, PushTarget(REPO, overwrite=True))
    assert pushed(hub, REPO) == contents(output)
    assert len(hub.repositories[REPO]) == 2
    same = push(output, PushTarget(REPO, overwrite=True))
    assert same.commit == hub.heads[REPO]["main"]
    assert len(hub.repositories[REPO]) == 2


def test_a_new_branch_holds_the_output_alone(hub: Hub, output: Path) -> None:
    hub.put(REPO, {**ATTRIBUTES, "model.gguf": b"old"})
    push(output, PushTarget(REPO, branch="fp16/v2"))
    assert pushed(hub, REPO, branch="fp16/v2") == contents(output)
    assert pushed(hub, REPO) == {"model.gguf": b"old"}


def test_a_single_file_is_added_to_those_that_are_there(hub: Hub, output: Path) -> None:
    hub.put(REPO, {**ATTRIBUTES, "style.safetensors": b"other"})
    push(output / "model.safetensors", PushTarget(REPO))
    assert pushed(hub, REPO) == {"style.safetensors": b"other", "model.safetensors": bytes(range(256)) * 200}
    with pytest.raises(SurgeryError, match=r"holds files already: 'model\.safetensors'"):
        push(output / "model.safetensors", PushTarget(REPO))


def test_what_is_hidden_stays_and_links_that_lead_out_are_refused(hub: Hub, output: Path, tmp_path: Path) -> None:
    shown = contents(output)
    (output / ".cache").mkdir()
    (output / ".cache" / "token").write_text("secret")
    (output / ".env").write_text("secret")
    push(output, PushTarget(REPO))
    assert pushed(hub, REPO) == shown
    (tmp_path / "mine").write_text("secret")
    (output / "notes.txt").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="leads out"):
        push(output, PushTarget("org/other"))
    assert "org/other" not in hub.repositories


def test_an_upload_that_fails_at_first_is_repeated(hub: Hub, output: Path) -> None:
    hub.uploads.failing = {"upload": [500, 503], "preupload": [502]}
    push(output, PushTarget(REPO))
    assert pushed(hub, REPO) == contents(output)


def test_a_commit_whose_answer_was_lost_is_found(hub: Hub, output: Path) -> None:
    hub.uploads.lost = 1
    assert push(output, PushTarget(REPO)).commit == hub.heads[REPO]["main"]
    assert pushed(hub, REPO) == contents(output)
    assert len(hub.repositories[REPO]) == 2


def test_a_branch_that_moves_meanwhile_is_left_as_it_is(hub: Hub, output: Path) -> None:
    hub.put(REPO, dict(ATTRIBUTES))
    hub.uploads.before_commit.append(lambda: hub.put(REPO, {**ATTRIBUTES, "theirs.txt": b"x"}))
    with pytest.raises(ProofError, match="the branch moved"):
        push(output, PushTarget(REPO))
    assert pushed(hub, REPO) == {"theirs.txt": b"x"}


def test_what_the_hub_leaves_out_or_changes_is_seen(hub: Hub, output: Path) -> None:
    hub.uploads.ignored.add("config.json")
    with pytest.raises(ProofError, match="left a file out"):
        push(output, PushTarget(REPO))
    hub.uploads.ignored.clear()
    hub.put("org/flipped", dict(ATTRIBUTES))
    hub.uploads.arrived = {sha: b"x" * len(data) for sha, data in hub.uploads.arrived.items()}
    with pytest.raises(ProofError, match="another file"):
        push(output, PushTarget("org/flipped"))


def test_a_card_that_the_hub_refuses_is_told_in_its_words(hub: Hub, output: Path) -> None:
    (output / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(MalformedError, match=r"does not take the metadata of README\.md: while parsing"):
        push(output, PushTarget(REPO))


def test_a_target_is_checked_by_the_function_too(hub: Hub, output: Path) -> None:
    with pytest.raises(UsageError, match="is not ORG/NAME"):
        push(output, PushTarget("merged"))
