# SPDX-License-Identifier: Apache-2.0
"""What the generators share: all files are made in an empty folder, and then kept, or compared with those that are kept.

A generator runs in the environment of its peer, by its own name, and finds this file through ``sys.path``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

Same = Callable[[Path, Path], bool]


def same_bytes(kept: Path, made: Path) -> bool:
    """Whether two files have the same content."""
    return kept.read_bytes() == made.read_bytes()


def same_values(kept: Path, made: Path, *, rtol: float = 1e-5, atol: float = 1e-6) -> bool:
    """Whether two files hold the same tensors, for programs whose archives or sums differ from run to run; else the same bytes."""
    import torch
    from safetensors.torch import load_file

    if kept.suffix == ".safetensors":
        first, second = load_file(kept), load_file(made)
    elif kept.suffix in (".pt", ".lora"):
        first, second = (torch.load(path, weights_only=True) for path in (kept, made))
        first, second = first.get("model", first), second.get("model", second)
    else:
        return same_bytes(kept, made)
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.allclose(first[key], second[key], rtol=rtol, atol=atol)
        for key in first
    )


def keep(here: Path, make: Callable[[Path], None], *, check: bool, same: Same = same_bytes) -> None:
    """Make everything; ends with the names of the files that differ, if it is only a check.

    Args:
        here: The generator's folder.
        make: Writes all files into an empty folder.
        check: Whether to compare instead of keeping.
        same: Tells whether a kept file is what was made.

    Raises:
        SystemExit: some differ.
    """
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        make(made)
        names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        if check:
            if bad := [
                str(name) for name in names if not (here / name).is_file() or not same(here / name, made / name)
            ]:
                raise SystemExit("\n".join(f"differs: {name}" for name in bad))
        else:
            for name in names:
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).write_bytes((made / name).read_bytes())
    print(f"{len(names)} files", "are the same" if check else "written")
