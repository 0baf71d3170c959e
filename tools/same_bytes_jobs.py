# SPDX-License-Identifier: Apache-2.0
"""The jobs of `same_bytes.py`: commands of ``surgery`` on the inputs that `same_bytes_inputs.py` writes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["JOBS", "Job"]


@dataclass(frozen=True)
class Job:
    """Commands whose outputs belong together.

    Attributes:
        name: What it covers.
        commands: Words after ``surgery``, run in this order; ``OUT`` is the job's own folder.
        code: The exit code that each command must have.
        error: The class of the error that each command must report, where `code` is not 0.
        stdout: Compare what the commands print, too.
    """

    name: str
    commands: tuple[str, ...]
    code: int = 0
    error: str = ""
    stdout: bool = False


SD1, SDXL, MLX = "golden/kohya/sd1", "golden/kohya/sdxl", "golden/mlx"

JOBS = (
    # --- merge ----------------------------------------------------------------------------------------------------------
    Job(
        "merge-lora-dora-and-weighted-pair",
        (
            "merge examples/base examples/lora -o OUT/lora --verify full",
            "merge examples/base examples/dora -o OUT/dora",
            "merge examples/base examples/lora=0.7 examples/dora=1 -o OUT/pair",
            "merge llama lora=0.75 lora-patterns=-0.5 -o OUT/small-pair",
            "merge llama lora-dora-embedding -o OUT/dora-embedding",
        ),
    ),
    Job(
        "merge-sharded-base-and-shard-size",
        (
            "merge llama-sharded lora -o OUT/as-base",
            "merge llama-sharded lora --shard-size 40KB -o OUT/resharded",
            "merge llama lora --shard-size 60KB -o OUT/sharded",
        ),
    ),
    Job(
        "merge-half-precision-casts-and-packed-layout",
        (
            "merge llama-bf16 lora-fp16 -o OUT/kept",
            "merge llama-bf16 lora --dtype fp32 -o OUT/fp32",
            "merge llama lora --dtype fp16 -o OUT/fp16",
            "merge llama-bf16 lora --layout packed -o OUT/packed",
        ),
    ),
    Job(
        "merge-torch-files",
        (
            "merge llama-bin lora -o OUT/sharded-bin",
            "merge llama.pt lora-pickled -o OUT/single-file",
        ),
    ),
    Job(
        "merge-tied-and-resized-embeddings",
        (
            "merge qwen2 qwen2-embedding -o OUT/untied",
            "merge qwen2 qwen2-tokens -o OUT/still-tied",
            "merge llama lora-resized -o OUT/resized",
        ),
    ),
    Job(
        "merge-rslora-patterns-and-biases",
        (
            "merge llama lora-patterns -o OUT/patterns",
            "merge qwen2 qwen2-bias-all -o OUT/bias-all",
            "merge qwen2 qwen2-lora-bias=0.5 -o OUT/lora-bias",
        ),
    ),
    Job(
        "merge-saved-modules-and-token-rows",
        (
            "merge llama lora-saved-modules -o OUT/saved-modules",
            "merge llama lora-tokens -o OUT/lora-tokens",
            "merge llama trainable-tokens -o OUT/tokens-alone",
            "merge bert bert-lora -o OUT/classifier",
        ),
    ),
    Job(
        "merge-ia3-oft-loha-lokr-vera-ln",
        (
            "merge llama ia3 oft=0.7 -o OUT/products",
            "merge llama loha=0.6 lokr vera vera-drawn -o OUT/sums",
            "merge llama ln-tuning -o OUT/norms",
            "merge gpt2 gpt2-ia3 -o OUT/ia3-on-conv1d",
        ),
    ),
    Job(
        "merge-experts-one-by-one-and-stacked",
        (
            "merge mixtral mixtral-per-expert -o OUT/per-expert",
            "merge mixtral mixtral-parameters -o OUT/parameters",
            "merge mixtral mixtral-parameters-old -o OUT/parameters-old-axes",
        ),
    ),
    Job(
        "merge-gpt2-conv1d-and-all-kinds-of-layers",
        ("merge gpt2 gpt2-lora -o OUT/gpt2", "merge layers layers-lora -o OUT/layers"),
    ),
    Job(
        "merge-kohya-into-pipelines",
        (
            *(
                f"merge {SD1}/base {SD1}/{name}/adapter.safetensors -o OUT/sd1-{name}"
                for name in ("mixed", "conv", "mid", "dora-in")
            ),
            f"merge {SDXL}/base {SDXL}/sgm-names/adapter.safetensors -o OUT/sdxl",
        ),
    ),
    Job(
        "merge-mlx",
        (
            *(
                f"merge {MLX}/llama/base {MLX}/llama/{name} -o OUT/{name}"
                for name in ("lora-keys", "dora-embed", "full")
            ),
            f"merge {MLX}/qwen2/base {MLX}/qwen2/dora-tied -o OUT/dora-tied",
            f"merge {MLX}/mixtral/base {MLX}/mixtral/lora -o OUT/mixtral",
            f"merge {MLX}/qwen3_moe/base {MLX}/qwen3_moe/lora-switch -o OUT/switch",
        ),
    ),
    # --- extract-lora ---------------------------------------------------------------------------------------------------
    Job(
        "extract-rank-energy-max-error",
        (
            "extract-lora examples/base examples/tuned --rank 4 --rank-pattern mlp.*=12 -o OUT/rank",
            "extract-lora llama llama-tuned --energy 0.9 --kind lora -o OUT/energy",
            "extract-lora mixtral mixtral-tuned --max-error 0.3 -o OUT/experts-max-error",
            "extract-lora llama llama-longer-tuned --rank 4 --embeddings full --rslora --alpha 8 -o OUT/longer",
        ),
    ),
    Job(
        "extract-budget-rank-auto-calibration",
        (
            "extract-lora examples/base examples/tuned --budget 300KB -o OUT/bytes",
            "extract-lora qwen2 qwen2-tuned --budget 8000 --adapter-dtype fp16 -o OUT/parameters",
            "extract-lora gpt2 gpt2-tuned --rank auto -o OUT/auto",
            "extract-lora qwen2 qwen2-tuned --rank 2 --calibration qwen2-inputs.safetensors -o OUT/calibrated",
        ),
    ),
    Job(
        "extract-dora",
        (
            "extract-lora examples/base examples/tuned --rank 8 --kind dora -o OUT/example",
            "extract-lora gpt2 gpt2-tuned --rank 2 --kind dora -o OUT/gpt2",
        ),
    ),
    Job(
        "extract-compact-mlx-kohya",
        (
            "extract-lora examples/base examples/tuned --rank 16 --factors int8 -o OUT/int8",
            "extract-lora llama llama-tuned --rank 8 --factors int4 -o OUT/int4",
            "extract-lora llama llama-tuned --rank 4 --to mlx --dense none --allow-loss -o OUT/mlx",
            f"merge {SD1}/base {SD1}/conv/adapter.safetensors -o OUT/tuned",
            f"extract-lora {SD1}/base/unet OUT/tuned/unet --rank 2 --to kohya -o OUT/kohya.safetensors",
        ),
    ),
    # --- convert --------------------------------------------------------------------------------------------------------
    Job(
        "convert-peft-kohya-and-back",
        (
            f"convert {SD1}/peft-unet --to kohya --base {SD1}/base --component unet -o OUT/unet.safetensors",
            f"convert {SD1}/mixed/adapter.safetensors --to peft --base {SD1}/base --component unet --allow-loss -o OUT/unet",
            f"convert {SD1}/dora/adapter.safetensors --to peft --base {SD1}/base --component unet --allow-loss -o OUT/dora",
            f"convert {SDXL}/diffusers-names/adapter.safetensors --to kohya --base {SDXL}/base -o OUT/sgm.safetensors",
        ),
    ),
    Job(
        "convert-peft-mlx-and-back",
        (
            "convert lora-patterns --to mlx -o OUT/padded",
            "convert examples/dora --to mlx --dtype fp16 -o OUT/dora",
            "convert mixtral-parameters --to mlx --base mixtral -o OUT/experts",
            f"convert {MLX}/llama/lora-keys --to peft -o OUT/keys",
            f"convert {MLX}/mixtral/lora --to peft --base {MLX}/mixtral/base -o OUT/mixtral",
            f"convert {MLX}/llama/full --to peft -o OUT/full",
        ),
    ),
    Job(
        "convert-compact-int4-int8-and-back",
        (
            "convert examples/lora --to compact --factors int4 -o OUT/int4",
            "convert lora-saved-modules --to compact -o OUT/int8",
            "convert mixtral-parameters --to compact -o OUT/experts",
            "convert OUT/int4 --to peft -o OUT/peft",
            "convert OUT/experts --to peft -o OUT/experts-peft",
        ),
    ),
    Job(
        "convert-peft-kinds-to-peft",
        tuple(
            f"convert {name} --to peft -o OUT/{name}{more}"
            for name, more in (
                ("ia3", ""),
                ("loha", " --dtype bf16"),
                ("lokr", ""),
                ("oft", ""),
                ("vera", ""),
                ("ln-tuning", ""),
                ("trainable-tokens", ""),
                ("lora-dora-embedding", " --dtype fp16"),
                ("qwen2-lora-bias", ""),
                ("prefix", ""),
            )
        ),
    ),
    Job(
        "convert-projections-split-and-fused",
        (
            "convert phi3-lora --to peft --projections split --base phi3 -o OUT/split",
            "convert lora --to peft --projections fused --base phi3 -o OUT/fused",
        ),
    ),
    # --- combine and resize ---------------------------------------------------------------------------------------------
    Job(
        "combine-exact-svd-parts-and-dora",
        (
            "combine lora=0.7 lora-patterns=-0.3 -o OUT/exact",
            "combine lora lora-patterns --rank 5 -o OUT/cut",
            "combine lora lora-fp16=0.5 --method svd --energy 0.95 --dtype fp32 -o OUT/svd",
            "combine examples/lora=0.5 --only self_attn.* --without v_proj --to mlx -o OUT/parts",
            "combine mixtral-parameters mixtral-parameters=0.5 --rank 3 -o OUT/experts",
            "combine examples/lora=0.6 examples/dora --base examples/base --rank 12 -o OUT/dora-on-its-base",
            "combine lora-saved-modules lora-tokens -o OUT/whole-parts",
        ),
    ),
    Job(
        "combine-ties-dare-prune",
        tuple(
            f"combine lora=1 lora-fp16=0.8 --method {method} --density 0.4 --rank 6 --seed 3 -o OUT/{method}"
            for method in ("ties", "dare-ties", "dare-linear", "magnitude-prune")
        ),
    ),
    Job(
        "resize-rank-energy-max-error",
        (
            "resize examples/lora --rank 3 -o OUT/rank",
            "resize lora-patterns --energy 0.8 -o OUT/energy",
            "resize examples/lora --max-error 0.3 --to compact -o OUT/max-error",
            f"resize {SD1}/conv/adapter.safetensors --rank 1 --base {SD1}/base -o OUT/kohya.safetensors",
        ),
    ),
    # --- export-onnx ----------------------------------------------------------------------------------------------------
    Job(
        "export-merged-for-each-target",
        (
            "export-onnx examples/base examples/lora -o OUT/cpu --verify full",
            "export-onnx examples/base examples/lora=0.5 -o OUT/cuda --target cuda --merge-to full",
            "export-onnx qwen2 qwen2-lora-bias -o OUT/portable --target portable --dtype fp16",
            "export-onnx qwen2 -o OUT/embedded --target portable --weights embed",
            "merge llama lora -o OUT/beside",
            "export-onnx OUT/beside -o OUT/beside",
        ),
    ),
    Job(
        "export-swappable",
        (
            "export-onnx examples/base --swap examples/lora -o OUT/example",
            "export-onnx llama --swap lora --swap lora-patterns --merge lora-saved-modules -o OUT/two --target portable",
            "export-onnx gpt2 --swap gpt2-lora --dtype fp16 --target cuda -o OUT/conv1d",
        ),
    ),
    Job(
        "export-prefix",
        (
            "export-onnx examples/base examples/prompt -o OUT/prompt",
            "export-onnx examples/base --prefix examples/prompt --prompt-form rows -o OUT/rows",
            'export-onnx examples/base --bake-prompt "def main():" --target portable -o OUT/text',
            "export-onnx llama prefix prompt --mode prefix --target portable -o OUT/keys-and-values",
        ),
    ),
    Job(
        "export-each-family",
        (
            *(
                f"export-onnx {name} -o OUT/{name}"
                for name in ("gpt2", "phi3", "gemma3", "gpt_neox", "mistral", "granite", "smollm3")
            ),
            "export-onnx bert bert-lora -o OUT/bert",
        ),
    ),
    # --- what looks, and what is refused --------------------------------------------------------------------------------------------
    Job(
        "report-inspect-diff-dry-runs-verify-run",
        (
            "report examples/lora examples/dora --base examples/base --md OUT/savings.md --json",
            "inspect examples/base --json",
            "inspect lora-patterns --all",
            "diff llama llama-tuned --spectrum --json",
            "diff lora lora-fp16",
            "combine lora lora-fp16 --dry-run",
            "extract-lora llama llama-tuned --table --dry-run",
            "convert lora-patterns --to mlx --dry-run",
            "formats",
            "merge llama lora -o OUT/merged -q",
            "verify OUT/merged --against llama --json",
            "export-onnx examples/base --swap examples/lora -o OUT/slots -q",
            "verify OUT/slots --against examples/base",
            'run OUT/slots -p "def f(x):" --max-new 12 --adapter OUT/slots/adapters/lora.onnx_adapter',
            "export-onnx examples/base examples/prompt -o OUT/prompted --target portable -q",
            'run OUT/prompted -p "def f(x):" --max-new 12 --temperature 0.8 --seed 7',
        ),
        stdout=True,
    ),
    Job(
        "refuse-what-does-not-fit",
        (
            "merge llama lora-wrong-base -o OUT/wrong-base --json",
            "merge examples/base examples/prompt -o OUT/soft-prompt --json",
            "convert ia3 --to mlx -o OUT/no-such-kind --json",
            "combine examples/lora examples/dora -o OUT/no-base --json",
        ),
        code=4,
        error="FitError",
    ),
)
