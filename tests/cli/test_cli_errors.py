# SPDX-License-Identifier: Apache-2.0
"""Every fault ends in one message and the exit code that is its own."""

from __future__ import annotations

import ast
import errno
import inspect
import json
import re
import subprocess
import sys

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery as library
from surgery_cli.errors import fault_of, guarded
from surgery_cli.group import COMMANDS, surgery
from surgery_cli.options import Settings
from surgery_formats.errors import FitError, MalformedError, NotFoundError, OutputExistsError, ProofError, ResourceError
from surgery_formats.testing.plugins import installed_project
from tests.support.kit import ROOT, Run, environment, make_base, make_lora, spawn

HOSTILE = "evil\x1b[2J\x1b]0;owned\x07\nerror: forged\u202e"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (click.UsageError("no"), 2),
        (OutputExistsError("there"), 2),
        (NotFoundError("gone"), 3),
        (MalformedError("bad"), 3),
        (PermissionError(errno.EACCES, "denied", "model.safetensors"), 3),
        (FitError("shape"), 4),
        (ProofError("differs"), 5),
        (ResourceError("full"), 7),
        (MemoryError(), 7),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 7),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 7),
        (torch.OutOfMemoryError("CUDA out of memory"), 7),
        (KeyboardInterrupt(), 130),
        (RuntimeError("what"), 1),
        (OSError(errno.EIO, "Input/output error"), 7),
        (OSError(errno.EMFILE, "Too many open files"), 7),
        (OSError(errno.EBADF, "Bad file descriptor"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int):
    assert fault_of(error).exit_code == code


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("give another name, or `overwrite=True`", "give another name, or --overwrite"),
        ('`merge_to="delta"`, or `workers=2`', "--merge-to delta, or --workers 2"),
        ("give it with `base=`, or `output=/x y`", "give it with --base, or -o '/x y'"),
        ('without them: `without="text_encoder:*"`', "without them: --without 'text_encoder:*'"),
        ("`as_lora=True`, or resize it", "--as lora, or resize it"),
        ('bake it: `form="kv"`', "bake it: --as kv"),
        ("`surgery merge` makes one", "`surgery merge` makes one"),
        (None, None),
    ],
)
def test_an_argument_in_a_hint_is_shown_as_its_option(hint: str | None, shown: str | None):
    assert fault_of(FitError("no", hint=hint)).hint == shown


def test_hints_of_the_library_name_arguments_that_the_command_has_options_for():
    trees = [ast.parse(path.read_text()) for room in ("surgery", "formats") for path in (ROOT / room).rglob("*.py")]
    hints = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "hint"]
    texts = [ast.unparse(hint.value) for hint in hints]
    assert not [text for text in texts if re.search(r"(?<![\w-])--[a-z]", text)]
    named = {name for text in texts for name in re.findall(r"`(\w+)=[^`]*`", text)}
    assert {"overwrite", "base", "allow_loss"} <= named
    context = click.Context(surgery)
    groups = {name: command for name in COMMANDS if (command := surgery.get_command(context, name))}
    commands = dict(groups)
    for name, group in groups.items():
        if isinstance(group, click.Group):
            commands |= {f"{name} {inner}": command for inner, command in group.commands.items()}
    functions = (getattr(library, name.replace("-", "_").replace(" ", "_"), None) for name in commands)
    assert named <= {name for function in functions if function for name in inspect.signature(function).parameters}
    options = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    assert {
        "--" + name.replace("_", "-") for name in named - {"as_lora", "consumer", "form", "graph_of", "inputs"}
    } <= options
    assert "--as" in options


PLUGIN = """
class Plugin:
    name, title, needs_base, single_file, file_stems = "faulty", "", False, False, ()
    written_as, suffixes = "faulty", (".faulty",)

    def detect(self, path):
        return {detected!r} and path.name.startswith("faulty")

    def __getattribute__(self, name):
        return object.__getattribute__(self, name) if name != {broken!r} else self.fail

    def fail(self, *given):
        raise ZeroDivisionError("oh")

    read = render = open = lay_out = claim = None


PLUGIN = Plugin()
"""


@pytest.mark.parametrize(
    ("group", "broken", "words"),
    [
        ("adapter_formats", "detect", "inspect FAULTY"),
        ("adapter_formats", "read", "inspect FAULTY"),
        ("adapter_formats", "render", "convert LORA --to faulty -o OUT"),
        ("containers", "detect", "inspect BASE"),
        ("containers", "open", "inspect FAULTY"),
        ("storages", "claim", "inspect BASE"),
    ],
)
def test_a_plugin_that_fails_is_named(run: Run, base, lora, tmp_path, group: str, broken: str, words: str):
    project = tmp_path / "project"
    project.mkdir()
    (project / "faulty_plugin.py").write_text(PLUGIN.format(broken=broken, detected=broken != "render"))
    entry = f'[project.entry-points."surgery.{group}"]\nfault = "faulty_plugin:PLUGIN"\n'
    (project / "pyproject.toml").write_text(f'[project]\nname = "faulty"\n{entry}')
    faulty = tmp_path / "faulty.faulty"
    faulty.write_bytes(b"faulty")
    places = {"FAULTY": faulty, "BASE": base, "LORA": lora, "OUT": tmp_path / "out"}
    with installed_project(project):
        sys.modules.pop("faulty_plugin", None)
        result = run(*(places.get(word, word) for word in words.split()))
    assert result.exit_code == 1
    name = r"'fault' of surgery_plugin_under_test\w* 0"
    assert re.search(f"internal error in the plugin {name}: ZeroDivisionError: oh", result.stderr)
    assert "report to its authors" in result.stderr


def test_a_missing_adapter_is_named_and_exits_with_3(run: Run, tmp_path):
    result = run("merge", tmp_path / "no", tmp_path / "none", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "none" in result.stderr
    assert "Traceback" not in result.stderr


def test_invalid_options_exit_with_2_and_write_nothing(run: Run, base, lora, tmp_path):
    for words in (
        ("--memory-limit", "0"),
        ("--shard-size", "-5"),
        ("--workers", "0"),
        ("--dtype", "int8"),
        ("--device", "abacus"),
        ("--verify", "slowly"),
        ("--what",),
    ):
        result = run("merge", base, lora, "-o", tmp_path / "out", *words)
        assert result.exit_code == 2, words
        assert result.stderr.startswith("error: ")
        assert "surgery merge --help" in result.stderr
        assert not (tmp_path / "out").exists()
    assert run("merge", base, lora).exit_code == 2
    assert run("merge", base, "-o", tmp_path / "out").exit_code == 2


def test_a_message_names_file_and_tensor(run: Run, base, lora, tmp_path):
    tensors = load_file(lora / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, lora / "adapter_model.safetensors")
    result = run("merge", base, lora, "-o", tmp_path / "out")
    assert result.exit_code in (3, 4)
    assert "model.layers.0.self_attn.q_proj" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_malformed_file_is_named(run: Run, base, tmp_path):
    (base / "model.safetensors").write_bytes(b"\xff" * 64)
    result = run("inspect", base)
    assert result.exit_code == 3
    assert "model.safetensors" in result.stderr


def test_an_adapter_that_does_not_fit(run: Run, base, tmp_path):
    other = make_lora(tmp_path / "other", targets=("self_attn.query",))
    result = run("merge", base, other, "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "query" in result.stderr
    assert str(other) in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_zeros_changes_nothing(run: Run, base, tmp_path):
    result = run("merge", base, make_lora(tmp_path / "zero", 0.0), "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "no weight of the base would change" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "zero"]


def test_an_output_that_is_there(run: Run, base, lora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    result = run("merge", base, lora, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert (tmp_path / "out/mine").read_text() == "keep"


def test_hostile_names_are_escaped_in_messages(run: Run, base, tmp_path):
    other = make_lora(tmp_path / "other", targets=(HOSTILE,))
    result = run("merge", base, other, "-o", tmp_path / "out")
    assert result.exit_code in (3, 4)
    assert "\x1b" not in result.stderr
    assert "\u202e" not in result.stderr
    assert "\nerror: forged" not in result.stderr
    assert "evil\\x1b" in result.stderr


def test_hostile_file_names_are_escaped(run: Run, tmp_path):
    result = run("inspect", tmp_path / HOSTILE)
    assert result.exit_code == 3
    assert "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("flags", [("--json", "inspect"), ("inspect", "--json")])
def test_json_errors_name_code_message_hint_file_and_tensor(run: Run, tmp_path, flags):
    result = run(*flags, tmp_path / "gone")
    document = json.loads(result.stderr)
    assert document["schema_version"] == 1
    assert set(document["error"]) == {"code", "message", "hint", "file", "tensor"}
    assert document["error"]["code"] == "NotFoundError"
    assert document["error"]["file"] == str(tmp_path / "gone")
    assert result.stdout == ""


def test_usage_errors_as_json_even_where_parsing_stopped_before_the_flag(run: Run):
    result = run("merge", "--nonsense", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stderr)["error"]["code"] == "UsageError"
    assert not run("merge", "--nonsense", "--", "--json").stderr.startswith("{")


def test_an_unexpected_error_is_one_line_and_a_way_on(capsys):
    def broken() -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    assert guarded(broken, Settings(), []) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    assert "ZeroDivisionError: division by zero" in told.err
    assert "--debug" in told.err
    assert guarded(broken, Settings(debug=True), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(base):
    command = [sys.executable, "-m", "surgery_cli", "inspect", str(base), "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything can have been written
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(300) == 0


def test_a_disk_that_is_full(base, lora, tmp_path):
    """RLIMIT_FSIZE makes every write beyond it fail."""
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from surgery_cli.__main__ import main
main()
"""
    command = [sys.executable, "-c", script, "merge", str(base), str(lora), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_names_that_no_encoding_has_do_not_crash(tmp_path):
    folder = make_base(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"über.weight": torch.ones(2)}, folder / "model.safetensors")
    done = spawn("inspect", folder, "--all", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert "ber.weight" in done.stdout
