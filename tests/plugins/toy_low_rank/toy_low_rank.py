# SPDX-License-Identifier: Apache-2.0
"""A kind of update, and how a PEFT folder holds it: ``W' = W + s B diag(c) A``, whose trained vector c weighs the directions."""

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.adapters.peft.kinds.kind import ModuleUpdates, PeftKind
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import ranks_and_alphas, targets
from surgery_formats.updates import Effect, Factor, LoRA


@dataclass(frozen=True, slots=True)
class Core:
    kind: ClassVar[str] = "Core"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    untrained: ClassVar[tuple[()]] = ()

    A: Factor
    c: Factor
    B: Factor
    scale: float
    alpha: float | None = None

    @property
    def rank(self):
        return self.c.shape[0]

    @property
    def shape(self):
        return self.B.shape[0], self.A.shape[1]

    @property
    def tensors(self):
        return (*self.A.tensors, *self.c.tensors, *self.B.tensors)

    def factors(self):
        return {"A": self.A, "c": self.c, "B": self.B}

    def scaled(self, weight):
        return replace(self, scale=self.scale * weight)

    def low_rank(self):
        weighed = Factor.computed((self.B, self.c), self.B.shape, lambda B, c: B * c)
        return LoRA(self.A, weighed, self.scale, self.alpha)

    def parts(self):
        return ((0, self),)

    def prepare(self, weight):
        return self.low_rank().prepare(weight)


def read(module):
    A, c, B = module.matrix("core_A"), module.vector("core_c"), module.matrix("core_B")
    update = Core(*map(Factor.of, (A, c, B)), module.config.scale_of(module.path, c.numel), module.config.alpha)
    return ModuleUpdates({module.site(): (update,)})


def write(file, updates):
    for site, update in updates:
        if not isinstance(update, Core):
            file.hold_other(site, update)
            continue
        module = file.module_of(site, update)[0]
        for name, factor in update.factors().items():
            file.put(f"{file.prefix}{module}.core_{name}", factor)
        file.settings[module] = (update.rank, file.alpha_of(update.rank, update.scale))
        file.ledger.keep(site, update, "exact", f"{file.prefix}{module}.core_A")
    file.fields = {**ranks_and_alphas(file), "target_modules": targets(file)}


CORE = PeftKind(
    name="CORE",
    factors=frozenset(["core_A", "core_c", "core_B"]),
    read=read,
    writes=frozenset([Core.kind]),
    write=write,
    switches=Switches(COMMON, frozenset(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save"])),
)
