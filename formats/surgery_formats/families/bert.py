# SPDX-License-Identifier: Apache-2.0
"""BERT and its relatives; the masked-language head shares its matrix and its bias."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"),
    embedding="bert.embeddings.word_embeddings",
    head="cls.predictions.decoder",
    tied=True,
    ties=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    derivable=("embeddings.position_ids", "embeddings.token_type_ids"),
)
