# SPDX-License-Identifier: Apache-2.0
"""ViT and its relatives: transformers 5 flattened the module tree, but checkpoints keep the old names."""

from surgery_formats.models.families.family import Family, Rename

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("vit", "deit", "beit", "vit_mae", "vit_msn", "ijepa", "vivit", "audio-spectrogram-transformer"),
    renames=(
        Rename("layers", "encoder.layer"),
        Rename("attention.q_proj", "attention.attention.query"),
        Rename("attention.k_proj", "attention.attention.key"),
        Rename("attention.v_proj", "attention.attention.value"),
        Rename("attention.o_proj", "attention.output.dense"),
        Rename("mlp.fc1", "intermediate.dense"),
        Rename("mlp.fc2", "output.dense"),
    ),
)
