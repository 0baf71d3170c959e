# SPDX-License-Identifier: Apache-2.0
"""Run a script of kohya's sd-scripts on Stable Diffusion 1.5 in small, or make the files for it; for `peers_kohya.py`, in its environment.

    VENV/bin/python benchmarks/kohya_run.py CHECKOUT make FOLDER
    VENV/bin/python benchmarks/kohya_run.py CHECKOUT flux FOLDER
    VENV/bin/python benchmarks/kohya_run.py CHECKOUT merge_lora.py --sd_model ...

The scripts have the sizes of Stable Diffusion as constants. These are set to a tenth before a script runs, whose code and whose names
of layers stay as they are. With ``--full`` in front of CHECKOUT nothing is set.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

WIDTH, TEXT = 32, 64
# By name: seed, and the rank of convolutions; those last, for afterwards the class has them as targets for good.
LORAS = (("linear", 1, {}), ("other", 3, {}), ("conv", 2, {"conv_dim": 4, "conv_alpha": 2}))


def shrink() -> None:
    """Set the constants of the network, the VAE and the text encoder."""
    from library import model_util, original_unet

    widths = (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH)
    original_unet.BLOCK_OUT_CHANNELS = widths
    original_unet.TIMESTEP_INPUT_DIM, original_unet.TIME_EMBED_DIM = WIDTH, 4 * WIDTH
    model_util.UNET_PARAMS_MODEL_CHANNELS, model_util.UNET_PARAMS_CONTEXT_DIM = WIDTH, TEXT
    model_util.VAE_PARAMS_CH = WIDTH
    whole = model_util.CLIPTextConfig
    small = {"vocab_size": 99, "hidden_size": TEXT, "intermediate_size": 2 * TEXT, "num_hidden_layers": 2}
    model_util.CLIPTextConfig = lambda **given: whole(**given | small | {"num_attention_heads": 4})


def without_torchvision() -> None:
    """Let its import pass where there is none: what is run here has no use for it, and its build must be the one of torch's."""
    import diffusers  # noqa: F401 - looks for it first, as does the next
    import transformers  # noqa: F401

    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = MagicMock()


def make(folder: Path) -> None:
    """A base in three types, a fine-tune of rank 2 in every matrix, and LoRAs, all random, as these scripts write them."""
    import torch
    from library import model_util
    from safetensors.torch import save_file
    from transformers import CLIPTextModel

    torch.manual_seed(5)
    unet = model_util.UNet2DConditionModel(**model_util.create_unet_diffusers_config(False, True))
    with torch.device("cpu"):
        vae = model_util.AutoencoderKL(**model_util.create_vae_diffusers_config())
    text = CLIPTextModel._from_config(model_util.CLIPTextConfig(**_CLIP))
    folder.mkdir(parents=True)

    def checkpoint(name: str, dtype: torch.dtype) -> None:
        model_util.save_stable_diffusion_checkpoint(
            False, str(folder / name), text, unet, None, 0, 0, {"modelspec.title": "a base"}, dtype, vae
        )

    for part in (unet, text):  # norms are made as ones and zeros
        for value in part.parameters():
            if value.ndim == 1:
                torch.nn.init.normal_(value, std=0.1)
    for name, dtype in (("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        checkpoint(f"{name}.safetensors", dtype)

    names = model_util.convert_unet_state_dict_to_sd(False, {name: name for name in unet.state_dict()})
    keys = {_flat("lora_unet", own): f"model.diffusion_model.{there}" for there, own in names.items()}
    keys |= {_flat("lora_te", name): f"cond_stage_model.transformer.{name}" for name in text.state_dict()}
    (folder / "names.json").write_text(json.dumps(keys))

    import lora

    for name, seed, conv in LORAS:
        torch.manual_seed(seed)
        network = lora.create_network(1.0, 8, 4, vae, text, unet, **conv)
        factors = {}
        for module in network.text_encoder_loras + network.unet_loras:
            for end, value in (
                ("lora_down.weight", module.lora_down.weight),
                ("lora_up.weight", module.lora_up.weight),
            ):
                factors[f"{module.lora_name}.{end}"] = torch.randn_like(value) * 0.05
            factors[f"{module.lora_name}.alpha"] = torch.tensor(float(module.alpha))
        rank, alpha = ("8", "4.0")
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": alpha,
            "ss_v2": "False",
        }
        save_file(
            factors, str(folder / f"{name}.lora.safetensors"), metadata | {"ss_tag_frequency": '{"set": {"tag": 3}}'}
        )

    torch.manual_seed(4)
    with torch.no_grad():
        for part in (unet, text):
            for value in part.parameters():
                flat = value.reshape(len(value), -1)
                if value.ndim > 1:
                    change = torch.randn(len(flat), 2) @ torch.randn(2, flat.shape[1])
                    value.add_(change.reshape(value.shape) * 0.002)
                else:
                    value.add_(torch.randn_like(value) * 0.002)
    checkpoint("tuned.safetensors", torch.float32)


def _flat(prefix: str, name: str) -> str:
    """How a LoRA calls a parameter: the module in underscores, and the parameter."""
    module, _, leaf = name.rpartition(".")
    return f"{prefix}_{module.replace('.', '_')}.{leaf}"


_CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


def main() -> None:
    words = sys.argv[1:]
    full = words[0] == "--full"
    checkout, what, *rest = words[full:]
    sys.path[:0] = [checkout, f"{checkout}/networks"]
    without_torchvision()
    import kohya_networks

    if not full:
        shrink()
        kohya_networks.shrink_sdxl()
    if what == "make":
        make(Path(rest[0]))
    elif what in kohya_networks.NETWORKS:
        kohya_networks.NETWORKS[what](Path(rest[0]))
    else:
        script = Path(checkout, "networks", what)
        sys.argv = [str(script), *rest]
        if what == "convert_flux_lora.py" and not full:  # it has Flux's width in a call
            text = script.read_text().replace("12288", str(4 * kohya_networks.WIDTH))
            exec(compile(text.replace("3072", str(kohya_networks.WIDTH)), script, "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
