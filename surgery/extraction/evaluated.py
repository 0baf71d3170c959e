# SPDX-License-Identifier: Apache-2.0
"""Both checkpoints of an extraction opened for predictions, so that what it is worth is measured on a text.

Nothing is written for it: the adapter is attached as it lies in memory, or as it was read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.evaluation.evaluate import Evaluation, plan_evaluation
from surgery.evaluation.measure import Score
from surgery.evaluation.opening import open_predictor
from surgery.evaluation.predictor import Predictor
from surgery.evaluation.result import ScoredModel
from surgery.evaluation.text import check_same_vocabulary, read_evaluation_text
from surgery.extraction.adapter import FactorSettings, extracted_adapter
from surgery.extraction.extraction_plan import CheckpointPair, ExtractionPlan
from surgery.extraction.ranks import table_ranks
from surgery.extraction.recovery import Recovery, TextScore, least_gain
from surgery.onnx.run.tokenizer import NAME
from surgery.progress import Callback
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError

__all__ = ["EvaluatedPair", "open_evaluated_pair"]


@dataclass(frozen=True)
class EvaluatedPair:
    """BASE and TUNED beside a text.

    Attributes:
        path: The text.
        base: BASE.
        tuned: TUNED.
        evaluation: The text, in windows that fit both.
    """

    path: Path
    base: Predictor
    tuned: Predictor
    evaluation: Evaluation

    def measured(self, plan: ExtractionPlan, progress: Callback | None) -> ExtractionPlan:
        """`plan` with the recovery of the adapter that it has; its id tells texts apart, since the model card does.

        Raises:
            FitError: a model cannot be computed.
        """
        recovery = self.recovery(plan, plan.adapter, progress)
        told = f"{plan.id} {recovery.text_digest} {sorted(recovery.ranks)}"
        return replace(plan, recovery=recovery, id=hashlib.sha256(told.encode()).hexdigest())

    def recovery(self, plan: ExtractionPlan, adapter: Adapter, progress: Callback | None) -> Recovery:
        """Score BASE, BASE with `adapter`, and with the ranks of the table if `plan` has one, beside TUNED.

        Raises:
            FitError: a model cannot be computed.
        """
        base, text = plan.checkpoints.base, self.evaluation.text
        others = _of_ranks(plan)
        attached = [
            open_predictor(base, one, "base", device="cpu", threads=None) for one in (adapter, *others.values())
        ]
        scores = self.evaluation.scores([self.base, *attached], self.tuned, progress)
        tokens, nbytes = self.evaluation.tokens, text.nbytes or 1
        first, own, *rest = (_score(score, tokens, nbytes) for score in scores)
        return Recovery(
            text=self.path,
            text_digest=text.digest,
            text_bytes=nbytes,
            tokens=tokens,
            base=first,
            adapter=own,
            tuned=ScoredModel.bits_of(scores[0].other) / nbytes,
            least=least_gain(scores[0].nats - scores[0].other, scores[0].squares, tokens, nbytes),
            ranks=dict(zip(others, rest, strict=True)),
            remarks=_remarks(plan),
        )


def open_evaluated_pair(checkpoints: CheckpointPair, text: Path) -> EvaluatedPair:
    """Open both for predictions of `text`, so that what cannot be evaluated is refused before anything is compared.

    Raises:
        InputError: no text, or no tokenizer.
        FitError: models that predict no next token, or whose tokens are not the same.
        MissingPackageError: torch or tokenizers are not installed.
    """
    base, tuned = (
        open_predictor(side, (), name, device="cpu", threads=None)
        for side, name in ((checkpoints.base, "base"), (checkpoints.tuned, "tuned"))
    )
    if base.vocabulary != tuned.vocabulary:
        raise FitError(
            f"has {tuned.vocabulary} tokens, and BASE {base.vocabulary}: what BASE lacks it cannot predict",
            file=tuned.path,
            hint="leave out the evaluation; `surgery eval` measures each by itself",
        )
    check_same_vocabulary(base.folder, tuned.folder)
    folder = base.folder if (base.folder / NAME).exists() else tuned.folder
    return EvaluatedPair(
        text, base, tuned, plan_evaluation([base, tuned], read_evaluation_text(folder, text, None, None))
    )


def _chosen_alone(plan: ExtractionPlan) -> bool:
    return plan.request.coding is not None or plan.request.calibration is not None


def _of_ranks(plan: ExtractionPlan) -> Mapping[tuple[int, str], Adapter]:
    """LoRAs of the ranks of the table for all layers, of the factors that were computed; none where there is no table.

    Codes and factors that were weighted by inputs exist at the chosen rank alone.
    """
    request = plan.request
    if not request.table or _chosen_alone(plan):
        return {}
    adapters = {}
    for key, ranks in table_ranks(plan.storage, plan.scan.factored):
        settings = FactorSettings(ranks, request.scaling, request.dtype, {})
        base, tuned = plan.checkpoints.base, plan.checkpoints.tuned.path
        adapters[key] = extracted_adapter(plan.storage, plan.scan.factored, settings, base, plan.adapter.base_id, tuned)
    return adapters


def _remarks(plan: ExtractionPlan) -> tuple[str, ...]:
    if not (plan.request.table and _chosen_alone(plan)):
        return ()
    what = "codes" if plan.request.coding is not None else "factors for given inputs"
    return (f"{what} are made of the chosen rank alone: the ranks of the table were not evaluated",)


def _score(score: Score, tokens: int, nbytes: int) -> TextScore:
    bits = ScoredModel.bits_of(score.nats) / nbytes
    return TextScore(bits, max(score.divergence / tokens, 0.0), score.same / tokens)
