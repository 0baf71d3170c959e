# SPDX-License-Identifier: Apache-2.0
"""What a merge promises beyond the right numbers: the same bytes, every file carried, options that do what they say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import (
    FitError,
    NothingChangedError,
    OutputExistsError,
    ProofError,
    ResourceError,
    UsageError,
)
from surgery_formats.files.output.manifest import verify_folder
from tests.support.hand_made import write_adapter, write_model
from tests.support.kit import environment, make_base, make_lora, spawn


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base"), make_lora(tmp_path / "lora")


def test_same_bytes_from_any_number_of_workers_folder_and_hash_seed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runs = []
    for workers, seed, place in ((1, "0", "a"), (2, "1", "b"), (8, "random", "c/d")):
        inputs = tmp_path / place
        inputs.mkdir(parents=True)
        shutil.copytree(pair[0], inputs / "base")
        shutil.copytree(pair[1], inputs / "lora")
        command = [sys.executable, "-m", "surgery_cli", "merge", "base", "lora", "-o", "out", "--workers", str(workers)]
        locale = {"PYTHONHASHSEED": seed, "LC_ALL": "C" if workers == 1 else "C.UTF-8"}
        subprocess.run(command, cwd=inputs, env=environment(**locale), check=True, capture_output=True)
        runs.append(digests(inputs / "out"))
    assert runs[0] == runs[1] == runs[2]


def test_everything_that_belongs_to_the_model_is_carried(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    for name in ("generation_config.json", "chat_template.jinja", "modeling_custom.py", "special_tokens_map.json"):
        (base / name).write_text(f"# {name}")
    (base / "adapter_config.json").write_text("{}")
    surgery.merge(base, lora, output=tmp_path / "out")
    names = set(os.listdir(tmp_path / "out"))
    assert {"generation_config.json", "chat_template.jinja", "modeling_custom.py", "tokenizer.json"} <= names
    assert {"config.json", "README.md", "surgery_manifest.json", "model.safetensors"} <= names
    assert "adapter_config.json" not in names
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    verify_folder(tmp_path / "out")


def test_shards_order_and_header_are_the_base_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    surgery.merge(*pair, output=tmp_path / "out")
    base, out = (p / "model.safetensors" for p in (pair[0], tmp_path / "out"))
    length = int.from_bytes(base.read_bytes()[:8], "little") + 8
    assert base.read_bytes()[:length] == out.read_bytes()[:length]
    assert base.stat().st_size == out.stat().st_size
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_tensor_is_in_the_manifest_with_its_class(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.merge(*pair, output=tmp_path / "out")
    ledger = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["ledger"]
    stored = load_file(pair[0] / "model.safetensors")
    assert set(ledger["tensors"]) == set(stored)
    assert ledger["classes"] == {"copied": len(stored) - 4, "updated": 4} == result.ledger.classes
    for name, row in ledger["tensors"].items():
        assert ("xxh3" in row) == (row["class"] == "updated"), name
        assert ("source" in row) == (row["class"] == "copied"), name


def test_a_sharded_fp32_merge_rounds_to_the_bf16_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    exact = surgery.merge(*pair, output=tmp_path / "fp32", dtype="fp32", shard_size=20_000)
    kept = surgery.merge(*pair, output=tmp_path / "kept")
    index = json.loads((tmp_path / "fp32" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "fp32" / name) for name in sorted(set(index["weight_map"].values()))}
    assert len(shards) > 2
    assert all((tmp_path / "fp32" / name).stat().st_size < 22_000 for name in shards)
    merged = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert sum(tensor.nbytes for tensor in merged.values()) == index["metadata"]["total_size"]
    for name, tensor in load_file(tmp_path / "kept" / "model.safetensors").items():
        assert torch.equal(merged[name].bfloat16(), tensor), name
    assert exact.ledger.survival == pytest.approx(1.0, abs=1e-6)
    assert kept.ledger.rounding > 1e-4


def test_an_update_below_the_resolution_of_bf16_warns_with_the_number(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength=1e-5)
    result = surgery.merge(base, lora, output=tmp_path / "out")
    assert result.ledger.survival < 0.9
    assert any(f"only {result.ledger.survival:.0%} of the update survives" in warning for warning in result.warnings)


def test_survival_is_what_storage_really_keeps(tmp_path: Path) -> None:
    """The measured share against the whole tensors, computed here from the files."""
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength=1e-3)
    result = surgery.merge(base, lora, output=tmp_path / "out")
    factors, before, after = (
        load_file(lora / "adapter_model.safetensors"),
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    kept = wanted = 0.0
    for name in (n for n, m in result.ledger.measured.items() if m.changed):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        update = 2.0 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
        stored = after[name].double() - before[name].double()
        kept, wanted = kept + float((stored * update).sum()), wanted + float(update.square().sum())
    assert result.ledger.survival == pytest.approx(kept / wanted, rel=1e-3)


def test_nothing_changed_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength=0.0)
    with pytest.raises(NothingChangedError):
        surgery.merge(base, lora, output=tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {"base", "lora"}


def test_weights_scale_and_add(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base", torch.float32), make_lora(tmp_path / "lora")
    surgery.merge(base, [(lora, 0.7), (lora, 0.3)], output=tmp_path / "split")
    surgery.merge(base, lora, output=tmp_path / "whole")
    surgery.merge(tmp_path / "whole", (lora, -1.0), output=tmp_path / "back")
    split, whole, back, start = (
        load_file(p / "model.safetensors") for p in (tmp_path / "split", tmp_path / "whole", tmp_path / "back", base)
    )
    for name in start:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(back[name], start[name], rtol=0, atol=1e-5)


def test_dry_run_plans_all_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = digests(tmp_path)
    planned = surgery.merge(*pair, dry_run=True)
    assert digests(tmp_path) == before
    done = surgery.merge(*pair, output=tmp_path / "out")
    assert planned.ledger.plan.id == done.ledger.plan.id
    assert planned.ledger.classes == done.ledger.classes
    assert planned.ledger.plan.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_memory_limit_is_kept_or_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the limit is") as caught:
        surgery.merge(*pair, output=tmp_path / "out", memory_limit=1000)
    (enough,) = re.findall(r"raise the limit to (\d+) MB", str(caught.value.hint))
    surgery.merge(*pair, output=tmp_path / "told", memory_limit=int(enough) * 1_000_000)
    assert not (tmp_path / "out").exists()
    surgery.merge(*pair, output=tmp_path / "out", memory_limit=100_000_000)


def test_an_existing_output_is_replaced_only_when_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    surgery.merge(*pair, output=tmp_path / "out")
    with pytest.raises(OutputExistsError):
        surgery.merge(*pair, output=tmp_path / "out")
    surgery.merge(*pair, output=tmp_path / "out", dtype="fp32", overwrite=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    with pytest.raises(FitError):
        surgery.merge(*pair, output=pair[0], overwrite=True)


def test_an_input_that_changes_meanwhile_fails_the_proof(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = pair[0] / "model.safetensors"

    def touch(_: surgery.Progress) -> None:
        os.utime(base, ns=(1, 1))

    with pytest.raises(ProofError, match="changed while it was read"):
        surgery.merge(*pair, output=tmp_path / "out", progress=touch)
    assert set(os.listdir(tmp_path)) == {"base", "lora"}


@pytest.mark.parametrize("flip", ["computed", "copied"])
def test_a_byte_that_rots_on_its_way_fails_the_proof(
    flip: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_formats.files.output.output_file import OutputFile

    name = "pwrite" if flip == "computed" else "copy_from"
    write = getattr(OutputFile, name)

    def rotten(self: OutputFile, *args: object) -> None:
        write(self, *args)
        offset = args[1] if flip == "computed" else args[2]
        with self._descriptor as fd:
            byte = os.pread(fd, 1, offset)  # type: ignore[arg-type]
            os.pwrite(fd, bytes([byte[0] ^ 1]), offset)  # type: ignore[arg-type]

    monkeypatch.setattr(OutputFile, name, rotten)
    with pytest.raises(ProofError):
        surgery.merge(*pair, output=tmp_path / "out", verify_copies=True)
    assert set(os.listdir(tmp_path)) == {"base", "lora"}


def test_another_content_id_is_another_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from surgery_formats.models.checkpoint import open_checkpoint
    from surgery_formats.models.identity import content_id

    file = pair[1] / "adapter_model.safetensors"
    factors = load_file(file)
    save_file(factors, file, {"format": "pt", "surgery.base": content_id(open_checkpoint(pair[0]))})
    surgery.merge(*pair, output=tmp_path / "right")
    save_file(factors, file, {"format": "pt", "surgery.base": "0" * 64})
    with pytest.raises(FitError, match="content id"):
        surgery.merge(*pair, output=tmp_path / "wrong")


def test_content_id_does_not_depend_on_sharding(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from surgery_formats.models.checkpoint import open_checkpoint
    from surgery_formats.models.identity import content_id

    surgery.merge(*pair, output=tmp_path / "one")
    surgery.merge(*pair, output=tmp_path / "many", shard_size=10_000)
    assert content_id(open_checkpoint(tmp_path / "one")) == content_id(open_checkpoint(tmp_path / "many"))


def test_gpt_oss_experts_are_in_out(tmp_path: Path) -> None:
    """A family that holds experts as (E, in, out): PEFT keeps the old order of factors there, whatever its version."""
    torch.manual_seed(0)
    experts, rank, inner, outer = 2, 3, 8, 8  # square, so that no shape gives the order away
    (tmp_path / "base").mkdir()
    weight = torch.randn(experts, inner, outer)
    save_file({"model.layers.0.mlp.experts.down_proj": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    a, b = torch.randn(experts * rank, inner), torch.randn(outer, rank * experts)
    (tmp_path / "lora").mkdir()
    stem = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "peft_version": "0.21.2"}
    config["target_parameters"] = ["mlp.experts.down_proj"]
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    surgery.merge(tmp_path / "base", tmp_path / "lora", output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    delta = torch.einsum("ore,eri->eio", b.reshape(outer, rank, experts), a.reshape(experts, rank, inner))
    torch.testing.assert_close(merged, weight + delta, rtol=0, atol=1e-5)


def test_a_full_disk_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """RLIMIT_FSIZE below the size of the weights: exit 7, one message, no litter."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from surgery_cli.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, "merge", str(pair[0]), str(pair[1]), "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 7, ran.stderr
    assert "Traceback" not in ran.stderr
    assert set(os.listdir(tmp_path)) == {"base", "lora"}
    assert spawn("merge", *pair, "-o", tmp_path / "out").returncode == 0


def test_a_t5_head_that_would_have_to_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(
        {"shared.weight": torch.randn(16, 8), "decoder.x.weight": torch.randn(8, 8)},
        tmp_path / "base" / "model.safetensors",
    )
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lora").mkdir()
    stem = "base_model.model.lm_head"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 8), f"{stem}.lora_B.weight": torch.randn(16, 2)}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(FitError, match="only while the head is tied"):
        surgery.merge(tmp_path / "base", tmp_path / "lora", output=tmp_path / "out")


def test_a_link_out_of_the_folder_is_not_carried(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A model from a stranger must not make its user publish a file of theirs."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (pair[0] / "notes.txt").symlink_to(secret)
    result = surgery.merge(*pair, output=tmp_path / "out")
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert any("notes.txt" in warning for warning in result.warnings)


def test_a_large_side_file_is_carried_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "merges.txt").write_bytes(os.urandom(17 << 20))
    surgery.merge(*pair, output=tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").read_bytes() == (pair[0] / "merges.txt").read_bytes()
    verify_folder(tmp_path / "out")


def test_an_index_has_the_name_that_loaders_expect(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    halves = {f"model-0000{i}-of-000002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, half in halves.items():
        save_file(half, base / name)
    weight_map = {key: name for name, half in halves.items() for key in half}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    surgery.merge(base, make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_integers_of_a_pickle_are_copied_exactly(tmp_path: Path) -> None:
    big = (torch.arange(12).reshape(3, 4) + (1 << 40)).T
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4), "ids": big}
    base = write_model(tmp_path / "base", tensors, pickled=True, model_type="llama")
    stem = "model.layers.0.self_attn.q_proj"
    lora = {f"{stem}.lora_A.weight": torch.randn(2, 4), f"{stem}.lora_B.weight": torch.randn(4, 2)}
    surgery.merge(base, write_adapter(tmp_path / "lora", lora), output=tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["ids"], big)


def test_a_change_of_type_alone_is_refused(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength=0.0)
    with pytest.raises(NothingChangedError):
        surgery.merge(base, lora, output=tmp_path / "out", dtype="fp32")


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"dtype": "banana"}, {"workers": -1}, {"shard_size": -5}])
def test_invalid_options_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    with pytest.raises(FitError):
        surgery.merge(base, lora, output=tmp_path / "out", **wrong)


def test_subfolders_are_carried(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    surgery.merge(base, lora, output=tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"


def test_a_folder_that_surgery_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="not written by surgery"):
        surgery.merge(base, lora, output=tmp_path / "work", overwrite=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"


def test_small_blocks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real matrices are many blocks; test models are one."""
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "one")
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", 100)
    surgery.merge(base, lora, output=tmp_path / "many")
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_folder_is_not_called_like_a_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a base in one file a file is expected, and a folder of that name would hold it."""
    with pytest.raises(UsageError, match=r"the name is that of a file; write to .*merged$"):
        surgery.merge(*pair, output=tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()
    surgery.merge(*pair, output=tmp_path / "llama-3.2")  # a version is no ending
