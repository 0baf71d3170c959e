# SPDX-License-Identifier: Apache-2.0
"""``--push``: an output that goes to the hub once it is complete, and what is refused before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from surgery_cli.group import surgery as program
from surgery_cli.schemas import schema_of
from surgery_formats.files.remote.hub_push import Pushed, PushTarget, push
from tests.support.hub import SIGNATURE, TOKEN, Hub, contents, pushed, reached
from tests.support.hub_uploads import ATTRIBUTES
from tests.support.kit import Run, make_base, make_lora, spawn

REPO = "org/merged"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # of its repetitions
    with reached(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def merge(tmp_path: Path) -> tuple[str, ...]:
    """The words of a merge."""
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    return ("merge", str(base), str(lora), "-o", "out")


def refused(run: Run, code: int, *words: str) -> str:
    result = run(*words)
    assert result.exit_code == code, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert SIGNATURE not in result.stdout + result.stderr
    return result.stderr


def test_what_arrives_is_what_was_written(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    done = run(*merge, "--push", REPO)
    assert done.exit_code == 0, done.stderr
    assert pushed(hub, REPO) == contents(Path("out"))
    assert len(hub.repositories[REPO]) == 2  # as it was made, and one commit
    assert hub.messages == ["Upload the output of surgery merge"]
    assert f"pushed to {hub.url}/{REPO}" in done.stderr
    again = run("inspect", f"hf://{REPO}")
    assert again.exit_code == 0, again.stderr


def test_json_has_the_commit(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    done = run(*merge, "--push", f"{REPO}@v1", "--commit-message", "the first", "--private", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)["pushed"]
    assert told["repo"] == REPO
    assert told["commit"] == hub.heads[REPO]["v1"]
    assert told["files"] == len(contents(Path("out")))
    assert told["nbytes"] == sum(map(len, contents(Path("out")).values()))
    assert hub.messages == ["the first"]
    assert REPO in hub.uploads.private
    assert pushed(hub, REPO, branch="v1") == contents(Path("out"))
    assert hub.files(REPO) == ATTRIBUTES


def test_a_dry_run_asks_and_pushes_nothing(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    done = run(*merge, "--push", REPO, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert {asked.method for asked in hub.asked} == {"GET"}
    hub.uploads.read_only.add(REPO)
    hub.put(REPO, dict(ATTRIBUTES))
    assert "denies access" in refused(run, 7, *merge, "--push", REPO, "--dry-run")


# Before any work: nothing is written, here or there.


@pytest.mark.parametrize(
    "name",
    [
        "merged",
        "datasets/org/name",
        "https://huggingface.co/org/name",
        "org/name:file",
        "org/",
        "org/na me",
        "org/a--b",
        "org/name.git",
        "org/name.",
        f"org/{'n' * 97}",
        f"org/name@{'a' * 40}",
        "",
        "org/\x1b[2J",
    ],
)
def test_a_malformed_name_is_a_fault_of_usage(hub: Hub, run: Run, merge: tuple[str, ...], name: str) -> None:
    said = refused(run, 2, *merge, "--push", name)
    assert "\x1b" not in said
    assert hub.asked == []
    assert not Path("out").exists()


@pytest.mark.parametrize("words", [("--private",), ("--commit-message", "x")])
def test_what_goes_with_push_needs_it(hub: Hub, run: Run, merge: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert "go with --push" in refused(run, 2, *merge, *words)
    assert not Path("out").exists()


def test_an_output_in_a_bucket_is_not_pushed(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    assert "in a bucket" in refused(run, 2, *merge[:-1], "s3://bucket/out", "--push", REPO)


def test_without_a_network_it_is_said_at_once(
    hub: Hub, run: Run, merge: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in refused(run, 2, *merge, "--push", REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(run, 7, *merge, "--push", REPO)
    assert not Path("out").exists()


def test_without_a_token_it_is_said_at_once(
    hub: Hub, run: Run, merge: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token" in refused(run, 7, *merge, "--push", REPO)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("locked", "words"),
    [
        ((401, "Invalid credentials in Authorization header"), "does not accept the token"),
        ((403, "GatedRepo"), "denies access"),
        ((403, ""), "denies access"),
        ((500, ""), "the hub answers 500"),
        ((429, ""), "too many requests"),
    ],
)
def test_who_is_not_let_in_is_told_before_the_work(
    hub: Hub, run: Run, merge: tuple[str, ...], locked: tuple[int, str], words: str
) -> None:
    hub.locked[REPO] = locked
    assert words in refused(run, 7, *merge, "--push", REPO)
    assert not Path("out").exists()


def test_who_may_not_write_is_told_before_the_work(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    hub.put(REPO, dict(ATTRIBUTES))
    hub.uploads.read_only.add(REPO)
    assert "denies access" in refused(run, 7, *merge, "--push", REPO)
    assert "may make none for 'other'" in refused(run, 7, *merge, "--push", "other/merged")
    hub.uploads.account["auth"] = {"accessToken": {"role": "read"}}
    assert "may only read" in refused(run, 7, *merge, "--push", "me/merged")
    assert not Path("out").exists()


def test_files_that_are_there_and_a_public_repository_are_refused_before_the_work(
    hub: Hub, run: Run, merge: tuple[str, ...]
) -> None:
    hub.put(REPO, {**ATTRIBUTES, "config.json": b"{}"})
    said = refused(run, 2, *merge, "--push", REPO)
    assert "holds files already" in said
    assert "pass --overwrite" in said
    assert "the repository is public" in refused(run, 2, *merge, "--push", REPO, "--overwrite", "--private")
    assert not Path("out").exists()
    hub.uploads.private.add(REPO)
    assert run(*merge, "--push", REPO, "--overwrite", "--private").exit_code == 0
    assert pushed(hub, REPO) == contents(Path("out"))


# A push that fails.


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        ({"create": [409]}, "something is in the way"),
        ({"create": [403]}, "denies access"),
        ({"create": [402]}, "payment"),
        ({"preupload": [401]}, "does not accept the token"),
        ({"preupload": [500] * 9}, "the hub answers 500"),
        ({"batch": [403]}, "denies access"),
        ({"upload": [403]}, "denies access"),
        ({"upload": [500] * 99}, "the hub answers 500"),
        ({"commit": [409]}, "something is in the way"),
        ({"commit": [413]}, "too large"),
        ({"commit": [500]}, "the hub answers 500"),
        ({"commit": [503]}, "the hub answers 503"),
    ],
)
def test_a_push_that_fails_keeps_the_output_and_shows_nothing_on_the_hub(
    hub: Hub, run: Run, merge: tuple[str, ...], failing: dict[str, list[int]], words: str
) -> None:
    hub.uploads.failing = failing
    said = refused(run, 7, *merge, "--push", f"{REPO}", "--private")
    assert words in said
    assert f"'out' is complete; to push it again: hf upload {REPO} out . --private" in said
    assert hub.repositories.get(REPO) in (None, {hub.heads.get(REPO, {}).get("main"): ATTRIBUTES})
    assert run("verify", "out").exit_code == 0
    hub.uploads.failing = {}
    push(Path("out"), PushTarget(REPO))
    assert pushed(hub, REPO) == contents(Path("out"))


def test_the_result_is_shown_though_its_push_fails(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    hub.uploads.failing = {"commit": [500]}
    done = run(*merge, "--push", REPO, "--json")
    assert done.exit_code == 7
    document = json.loads(done.stdout)
    assert document["result"]["output"] == "out"
    assert "pushed" not in document
    assert json.loads(done.stderr.splitlines()[-1])["error"]["file"] == f"hf://{REPO}"


def test_an_interrupt_keeps_the_output_and_says_how_to_push_it(
    hub: Hub, run: Run, merge: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery_formats.files.remote.hub_push._files", lambda output: interrupted())
    done = run(*merge, "--push", REPO)
    assert done.exit_code == 130
    assert f"to push it again: hf upload {REPO} out ." in done.stderr
    assert run("verify", "out").exit_code == 0


def test_what_the_hub_says_of_the_card_is_a_warning(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    hub.uploads.remarks.append("empty or missing yaml metadata \x1b[2J")
    done = run(*merge, "--push", REPO)
    assert done.exit_code == 0
    assert "warning: Warnings while validating metadata in README.md" in done.stderr
    assert "\x1b" not in done.stderr


def test_nothing_is_printed_by_the_client(hub: Hub, run: Run, merge: tuple[str, ...]) -> None:
    done = run(*merge, "--push", REPO, "-q")
    assert done.exit_code == 0
    assert done.stdout + done.stderr == ""


def test_the_command_as_a_process(hub: Hub, merge: tuple[str, ...], tmp_path: Path) -> None:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }
    done = spawn("resize", merge[2], "--rank", "2", "-o", "out", "--push", REPO, **settings)
    assert done.returncode == 0, done.stderr
    assert pushed(hub, REPO) == contents(Path("out"))
    assert [line for line in done.stderr.splitlines() if "push" in line][-1] == f"pushed to {hub.url}/{REPO}"
    assert "%" not in done.stderr.partition("pushing")[2]  # no bars into a log
    assert TOKEN not in done.stderr + done.stdout


def test_every_command_with_an_output_can_push_it() -> None:
    def commands(command: click.Command, above: str = "") -> Iterator[tuple[str, set[str]]]:
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                inner = command.get_command(click.Context(command), name)
                assert inner is not None
                yield from commands(inner, f"{above} {name}".strip())
        else:
            yield above, {word for one in command.params for word in one.opts}

    options = dict(commands(program))
    writers = {name for name, words in options.items() if "--output" in words}
    pushers = {name for name, words in options.items() if "--push" in words}
    assert writers - pushers == {"apply"}  # which writes several
    assert pushers - writers == set()
    assert len(pushers) == 15
    documented = {name: schema_of(name)["properties"].get("pushed") for name in options}
    assert {name for name, schema in documented.items() if schema} == pushers
    assert all(set(documented[name]["properties"]) == {field.name for field in fields(Pushed)} for name in pushers)
