# SPDX-License-Identifier: Apache-2.0
"""No plan passes that loses a tensor of its base or of an adapter, writes one twice, or forgets to account for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from surgery.engine.merge.merge_plan import plan_merge
from surgery.engine.plan import Account, Compute, Plan, PlannedTensor, check_conservation
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import make_base, make_lora

COPIED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Binding, Plan]:
    folder = tmp_path_factory.mktemp("planned")
    base, lora = make_base(folder / "base"), make_lora(folder / "lora")
    binding = bind([(read_adapter(lora), 1.0)], open_checkpoint(base))
    plan = plan_merge(binding)
    check_conservation(binding, plan)
    return binding, plan


def with_tensors(plan: Plan, change: Callable[[tuple[PlannedTensor, ...]], tuple[PlannedTensor, ...]]) -> Plan:
    (file,) = plan.files
    return replace(plan, files=(replace(file, tensors=change(file.tensors)),))


def test_a_tensor_of_the_base_that_ends_nowhere_is_named(planned: tuple[Binding, Plan]) -> None:
    binding, plan = planned
    lost = with_tensors(plan, lambda tensors: tuple(each for each in tensors if each.name != COPIED))
    with pytest.raises(FitError, match="1 tensors would end nowhere") as refused:
        check_conservation(binding, lost)
    assert refused.value.tensor == COPIED
    assert refused.value.file is not None


def test_a_tensor_that_would_be_written_twice_is_named(planned: tuple[Binding, Plan]) -> None:
    binding, plan = planned
    twice = with_tensors(plan, lambda tensors: (*tensors, next(each for each in tensors if each.name == COPIED)))
    with pytest.raises(FitError, match="written twice") as refused:
        check_conservation(binding, twice)
    assert refused.value.tensor == COPIED


def test_factors_that_no_step_uses_are_named(planned: tuple[Binding, Plan]) -> None:
    binding, plan = planned

    def without_update(tensor: PlannedTensor) -> PlannedTensor:
        if not isinstance(tensor.step, Compute) or not tensor.name.endswith("layers.1.self_attn.q_proj.weight"):
            return tensor
        return replace(tensor, step=replace(tensor.step, operations=()))

    unused = with_tensors(plan, lambda tensors: tuple(map(without_update, tensors)))
    with pytest.raises(FitError, match="2 tensors would end nowhere") as refused:
        check_conservation(binding, unused)
    assert "layers.1.self_attn.q_proj.lora_" in str(refused.value.tensor)


def test_an_input_is_excused_by_an_account_alone(planned: tuple[Binding, Plan]) -> None:
    binding, plan = planned
    lost = with_tensors(plan, lambda tensors: tuple(each for each in tensors if each.name != COPIED))
    source = binding.checkpoint.main.tensors[COPIED]
    check_conservation(binding, replace(lost, accounts=(*lost.accounts, Account(source, "dropped", "a reason"))))
