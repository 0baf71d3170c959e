# SPDX-License-Identifier: Apache-2.0
"""An adapter format: a folder with toy.json and toy.safetensors, whose keys are ``PATH:down`` and ``PATH:up``, the scale in ``up``."""

import json
from dataclasses import dataclass

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.writing import ConversionLedger, factor_tensor, surviving_metadata
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import first_bytes
from surgery_formats.updates import Factor, LoRA


@dataclass(frozen=True)
class Toy:
    name: str = "toy"
    title: str = "toy folder: LoRA"
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = ("toy",)

    def detect(self, path):
        return b'"toy"' in (first_bytes(path / "toy.json", 4096) or b"")

    def read(self, path):
        shard, config = open_shard(path / "toy.safetensors"), read_object(path / "toy.json")
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        updates = {}
        for name, tensor in tensors.items():
            module, _, side = name.rpartition(":")
            if side not in ("down", "up") or f"{module}:{'up' if side == 'down' else 'down'}" not in tensors:
                raise MalformedError("not one of a pair", file=path, tensor=name)
            if side == "down":
                A, B = Factor.of(tensor), Factor.of(tensors[f"{module}:up"])
                updates[Site(f"{module}.weight")] = (LoRA(A, B, 1.0),)
        metadata = dict(shard.metadata)
        return Adapter(
            path, self.name, "LORA", updates, shard.tensors, base_name=config.get("toy", ""), metadata=metadata
        )

    def render(self, adapter, base):
        ledger, tensors = ConversionLedger(), {}
        for site, chain in adapter.updates.items():
            module = site.path.removesuffix(".weight")
            for update in chain:
                lora = update.low_rank()
                if lora is None or site.flat or site.component or f"{module}:down" in tensors:
                    ledger.drop(site, update, f"this format has no {update.kind} here")
                    continue
                new = [
                    factor_tensor(f"{module}:down", lora.A, lora.A.shape),
                    factor_tensor(f"{module}:up", lora.B, lora.B.shape, times=lora.scale),
                ]
                tensors |= {tensor.name: tensor for tensor in new}
                ledger.keep(site, update, "exact" if lora.scale == 1.0 else "folded")
        ledger.drop_prompt(adapter)
        small = {"toy.json": json.dumps({"toy": adapter.base_name}).encode()}
        ordered, metadata = tuple(tensors.values()), surviving_metadata(adapter)
        return Rendering("toy.safetensors", ordered, metadata, small, tuple(ledger.entries), ledger.held)


TOY = Toy()
