# SPDX-License-Identifier: Apache-2.0
"""Every option that names an output, of every command, with names that cannot be written: one message, and nothing is changed.

The options are those of the click tree: a new one fails here until `LINES` has a command that uses it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import click
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from surgery_cli.group import surgery
from surgery_cli.options import PATH
from surgery_formats.files.output.manifest import MANIFEST
from tests.oracles.bad_inputs import COMMANDS
from tests.support.small_world import invoke, make_world

# Paths that are read.
READ = {
    "apply": ("recipe",),
    "eval": ("text", "ids"),
    "extract-lora": ("calibration", "eval"),
    "fold": ("model", "adapters"),
    "insert": ("calibration",),
    "prompt nearest": ("text_file",),
    "prompt transfer": ("text_file",),
    "run": ("batch", "audio", "images", "weights"),
    "strip": ("model",),
    "unmerge": ("base_rounding",),
}
# Beside those of the bad inputs: the commands and outputs that these do not have.
MORE = (
    "strip {traced} -o {out}",
    "check {base} {with_head} --for vllm --merge-rest {out}_base --fix {out}",
    "convert {with_head} --for vllm --base {base} --merge-rest {out}_base -o {out}",
    "report {lora} --base {base} --html {out}.html",
    "report {lora} --base {base} --csv {out}.csv",
)
# One decorator gives them to many commands (`surgery_cli.pages`).
SHARED = ("html_file", "csv_file")
# What is replaced by a file with --overwrite, as it is one, or a link in the place of one.
REPLACED = ("a file", "a dangling link", "a link to a folder")
LINES = tuple(
    line for line in (*COMMANDS, *MORE) if "{out}" in line and "--dry-run" not in line and "{lora2}=0.5" not in line
)
ODD = {
    "nothing": ("", {2}),
    "a dash": ("-", {2}),
    "the working folder": (".", {2, 4}),
    "the folder above": ("..", {2, 4}),
    "the root": ("/", {2, 4}),
    "a file": ("file", {2, 4}),
    "a file as a folder": ("file/", {2, 3, 4}),
    "a folder with files": ("full", {2, 4}),
    "a folder with files, and a slash": ("full/", {2, 4}),
    "a dangling link": ("dangling", {2, 4}),
    "a link loop": ("loop", {2, 3, 4}),
    "a pipe": ("pipe", {2, 4}),
    "a link to a folder": ("linked", {2, 4}),
    "a device": ("/dev/null", {2, 4}),
    "below a device": ("/dev/null/out", {3}),
    "below a file": ("file/out", {3}),
    "below nothing": ("missing/out", {3}),
    "below a loop": ("loop/out", {3}),
    "below a kernel's folder": ("/proc/out", {3, 7}),
    "below a folder that is only read": ("/sys/out", {3, 7}),
    "a line break": ("a\nerror: b", {2}),
    "a control character": ("a\x1b[2J", {2}),
    "no UTF-8": (os.fsdecode(b"a\xff\xfe"), {2}),
    "a long name": ("n" * 256, {2}),
    "a long path": ("n/" * 3000 + "out", {2, 3}),
    "a zero byte": ("a\0b", {2, 3}),
}


_INPUT = re.compile(r"\{(?!out\b)(\w+)\}")
_FILES = ("recipe", "onnx_adapter", "traced")


def _around(line: str, world: dict[str, Path]) -> Iterator[tuple[str, str, set[int]]]:
    """Outputs that are an input, are a link to one, lie in one, or hold one."""
    suffix = ".x" if "{out}." in line else ""
    for name in dict.fromkeys(_INPUT.findall(line)):
        if f"{{{name}}}/{MANIFEST}" in line:
            continue  # an output that is made anew where it lies
        if not (line.startswith("export-onnx") and name == "base"):  # it may add files to the folder of its base
            yield f"its {name}", str(world[name]), {2, 4}
            yield f"a link to its {name}", f"to-{name}", {2, 4}
        if name not in _FILES and f"{{{name}}}/" not in line and "--weights-type" not in line:
            yield f"in its {name}", f"{world[name]}/new{suffix}", {2, 4}
            yield f"in a link to its {name}", f"to-{name}/new{suffix}", {2, 4}
        yield f"a folder that holds its {name}", str(world[name].parent), {2, 4}


def _commands(command: click.Command = surgery, above: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, f"{above} {name}".strip())
    else:
        yield above, command


TREE = dict(_commands())


def _outputs(name: str) -> list[click.Parameter]:
    return [one for one in TREE[name].params if isinstance(one.type, click.Path) and one.name not in READ.get(name, ())]


def _name_of(line: str) -> str:
    return next(name for name in sorted(TREE, key=len, reverse=True) if line.startswith(f"{name} "))


def _slots(line: str) -> Iterator[tuple[click.Parameter, int]]:
    """The outputs of a line: each option, and the place of its value among the words."""
    words = line.split()
    for one in _outputs(_name_of(line)):
        at = [place for place, word in enumerate(words) if word in one.opts]
        if at:
            yield one, at[0] + 1


CASES = [(line, one.name, place) for line in LINES for one, place in _slots(line)]


def test_every_path_is_read_or_an_output_with_a_case() -> None:
    tried = {(_name_of(line), name) for line, name, _ in CASES}
    outputs = {(name, one.name) for name in TREE for one in _outputs(name)}
    assert {(command, name) for command, name in outputs if name not in SHARED} <= tried <= outputs
    assert {name for _, name in tried} >= set(SHARED)
    assert all({one.name for one in TREE[name].params} >= set(read) for name, read in READ.items())


def test_every_option_that_is_a_path_refuses_an_empty_one() -> None:
    paths = [
        (name, one) for name, command in TREE.items() for one in command.params if isinstance(one.type, click.Path)
    ]
    assert len(paths) > 30
    assert [(name, one.name) for name, one in paths if one.type is not PATH] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    at = make_world(root)
    at["with_head"], at["traced"] = root / "with_head", root / "traced.onnx"
    shutil.copytree(at["tuned"], root / "grown")
    weights = load_file(root / "grown/model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, root / "grown/model.safetensors", {"format": "pt"})
    words = "extract-lora {base} {root}/grown --rank 2 --embeddings full -o {with_head}"
    assert invoke(*words.format(root=root, **at).split()).exit_code == 0
    _write_traced(at["traced"])
    return at


def _write_traced(path: Path) -> None:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "model.py", line 1, in forward')
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "traced", ends[:1], ends[1:])), path)


def _seen(*folders: Path) -> set[tuple[object, ...]]:
    """Everything under `folders`, as far as a write would show."""
    found = set()
    for folder in folders:
        for at, inner, files in os.walk(folder):
            for name in (*inner, *files):
                status = os.lstat(os.path.join(at, name))
                whole = not stat.S_ISDIR(status.st_mode)  # a folder changes when a staged one comes and goes
                found.add((os.path.join(at, name), *((status.st_size, status.st_mtime_ns) if whole else ())))
    return found


@pytest.mark.parametrize(("line", "option", "place"), CASES, ids=lambda each: str(each))
def test_an_odd_output_changes_nothing(
    line: str, option: str, place: int, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "place"
    (here / "full").mkdir(parents=True)
    (here / "full/notes").write_text("mine")
    (here / "file").write_text("mine")
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    (here / "linked").symlink_to("full")
    os.mkfifo(here / "pipe")
    monkeypatch.chdir(here)
    root = world["base"].parent
    for name in set(_INPUT.findall(line)):
        (here / f"to-{name}").symlink_to(world[name])
    command = TREE[_name_of(line)]
    overwrites = [[], ["--overwrite"]] if any(one.name == "overwrite" for one in command.params) else [[]]
    before = _seen(tmp_path, root)
    wrong = []
    odd_ones = [(odd, value, codes) for odd, (value, codes) in ODD.items()]
    for odd, value, codes in (*odd_ones, *_around(line, world)):
        for overwrite in overwrites:
            if overwrite and command.name == "report" and odd in REPLACED:
                continue
            words = [word.format(out=here / "out", **world) for word in line.split()]
            suffix = Path(line.split()[place]).suffix
            words[place] = value + suffix if odd.startswith("below") and value + suffix else value
            result = invoke(*words, *overwrite)
            told = result.stderr
            said = [text for text in told.splitlines() if text.startswith("error")]
            if result.exit_code not in codes or len(said) != 1 or not all(map(str.isprintable, told.splitlines())):
                wrong.append(f"{odd} {overwrite}: exit {result.exit_code}: {told or result.exception!r}")
            if (after := _seen(tmp_path, root)) != before:
                wrong.append(f"{odd} {overwrite}: changed {sorted(map(str, after ^ before))}")
                before = after
    assert wrong == [], "\n".join(wrong)
