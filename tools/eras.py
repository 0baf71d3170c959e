# SPDX-License-Identifier: Apache-2.0
"""Write what the installed transformers renames, merges, splits and turns on loading, as data.

``python tools/eras.py`` writes ``formats/surgery_formats/models/eras.json``; `tests/models/test_eras.py` fails where
the file lacks something that the installed transformers knows.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["FILE", "architectures", "bases", "main", "records", "taken_for_experts", "ties", "transposed"]

FILE = Path(__file__).parents[1] / "formats" / "surgery_formats" / "models" / "eras.json"


def records() -> dict[str, list[list[Any]]]:
    """Every conversion by model type or class: ``[patterns, replacements, steps]``."""
    from transformers import conversion_mapping

    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    return {name: [_record(entry) for entry in entries] for name, entries in sorted(mapping.items())}


def _record(entry: Any) -> list[Any]:
    patterns = []
    for source in entry.source_patterns:
        pattern = source.replace("*.", r"(?P<expert>\d+)\.").replace(r".(?P<expert>", r"\.(?P<expert>")
        pattern = pattern.replace(r"\\.", r"\.")
        if re.search(r"[a-zA-Z0-9]$", pattern):
            pattern += r"(?!\w)"
        re.compile(pattern)
        patterns.append(pattern)
    steps = [_step(operation) for operation in getattr(entry, "operations", ())]
    if hasattr(entry, "offset"):
        steps.append(["Offset", {"offset": entry.offset}])
    if type(entry).__name__ == "GroupWeightRename":
        steps.append(["Together", {}])
    return [patterns, list(entry.target_patterns), steps]


def _step(operation: Any) -> list[Any]:
    given = {name: value for name, value in sorted(vars(operation).items()) if value not in (None, False)}
    return [type(operation).__name__, given]


def bases() -> dict[str, list[str]]:
    """``{model type: [class of the bare model, its prefix in models with a head]}``."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for kind, name in modeling_auto.MODEL_MAPPING_NAMES.items():
        name = name[0] if isinstance(name, tuple | list) else name
        with suppress(ImportError, AttributeError):  # classes that need libraries that are not here
            found[kind] = [name, getattr(transformers, name).base_model_prefix or ""]
    return dict(sorted(found.items()))


def _classes() -> list[str]:
    """Classes that transformers makes by the type of a configuration."""
    from transformers.models.auto import modeling_auto

    values = [
        value
        for mapping in vars(modeling_auto).values()
        if isinstance(mapping, Mapping) and type(mapping).__name__ == "OrderedDict"
        for value in mapping.values()
    ]
    several = [[value] if isinstance(value, str) else value for value in values]
    return sorted({str(name) for names in several if isinstance(names, list | tuple) for name in names})


def architectures() -> dict[str, list[list[str]]]:
    """``{class: [[path of a model inside it, key of its configuration], ...]}`` of composites.

    A bare model has the configuration of the whole: no key, but its class behind it.
    """
    import transformers

    found = {}
    for name in _classes():
        with suppress(ImportError, AttributeError):
            if parts := list(_parts(getattr(transformers, name))):
                found[name] = parts
    return found


def transposed() -> list[str]:
    """Model types whose experts are ``(E, in, out)`` in the model's code."""
    import transformers

    marked = {
        file.parent.name
        for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if "is_transposed=True" in file.read_text()
    }
    found = []
    for kind in transformers.CONFIG_MAPPING:
        with suppress(ImportError, AttributeError, KeyError):
            if transformers.CONFIG_MAPPING[kind].__module__.split(".")[-2] in marked:
                found.append(kind)
    return sorted(found)


def taken_for_experts() -> dict[str, list[str]]:
    """``{model type: names of modules}`` that PEFT takes for experts of releases before 5, wherever they stand."""
    from peft.utils import transformers_weight_conversion as peft
    from transformers import conversion_mapping

    names = peft._MOE_TARGET_MODULE_MAPPING
    return {
        kind: sorted(names[like])
        for kind, like in sorted(peft._MODEL_TO_CONVERSION_PATTERN.items())
        if like in names and conversion_mapping.get_checkpoint_conversion_mapping(kind) is not None
    }


def ties() -> dict[str, dict[str, str]]:
    """``{class: {parameter that is another: that other}}``, by the names of the model's code."""
    import transformers

    found = {}
    for name in _classes():
        with suppress(ImportError, AttributeError):
            tied = getattr(transformers, name)._tied_weights_keys
            plain = {a: b for a, b in (tied or {}).items() if re.fullmatch(r"[\w.]+", a + b)}
            if plain:
                found[name] = plain
    return found


def _parts(made: Any) -> Iterator[list[str]]:
    """Models inside a composite of the class `made`, by the defaults of its configuration."""
    import torch
    from transformers import PreTrainedModel

    kind = getattr(made, "config_class", None)
    if kind is None or not getattr(kind, "sub_configs", None):
        return
    try:
        config = kind()
        for part in (config, *(getattr(config, key, None) for key in kind.sub_configs)):
            for key in ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers"):
                if isinstance(getattr(part, key, None), int) and not getattr(part, "layer_types", None):
                    setattr(part, key, 2)
        with torch.device("meta"):
            model = made(config)
    except Exception as error:  # a default that is no model: the type then has the records of its root alone
        print(f"{made.__name__}: {str(error)[:100]}")
        return
    subs = {id(getattr(config, key, None)): key for key in kind.sub_configs}
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel):
            if module.config is config:
                yield [path, "", type(module).__name__]
            else:
                same = [k for k in kind.sub_configs if _type(getattr(config, k, None)) == module.config.model_type]
                yield [path, subs.get(id(module.config)) or (same[0] if len(same) == 1 else module.config.model_type)]


def _type(config: Any) -> str:
    return getattr(config, "model_type", "")


def main() -> None:
    """Write the file."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    everything = {
        "source": f"transformers {transformers.__version__}, conversion_mapping.py, Apache-2.0",
        "records": _shared(records()),
        "bases": bases(),
        "ties": ties(),
        "taken_for_experts": taken_for_experts(),
        "transposed": dict.fromkeys(transposed(), True),
        "architectures": architectures(),
    }
    lines = []
    for key, value in everything.items():
        if isinstance(value, str):
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
        else:
            inner = ",\n".join(
                f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))}" for k, v in value.items()
            )
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _shared(found: dict[str, list[list[Any]]]) -> dict[str, Any]:
    """The same, with the name of the first of several that are equal in place of its records."""
    first: dict[str, str] = {}
    return {
        name: entries if (known := first.setdefault(json.dumps(entries), name)) == name else known
        for name, entries in found.items()
    }


if __name__ == "__main__":
    main()
