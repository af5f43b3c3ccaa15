"""A model of the hub as its small files and the headers of its weights: enough to plan with, without downloading gigabytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.hub import BASE, SMALL, ModelFiles, find_model, hub_id, snapshot, unavailable, weights
from medusa_export.core.typed_paths import as_recorded

_HEADERS_ONLY = ".safetensors"  # a pickle has no header: its table of contents is at its end, and heads of it are small


def find_headers(
    given: str | Path,
    folder: Path,
    *,
    revision: str | None = None,
    wanted: Sequence[Sequence[str]] = BASE,
    check: Callable[[Path], object] = lambda path: None,
) -> ModelFiles:
    """As :func:`~medusa_export.core.hub.find_model`, but weights that are not in the cache have their header and holes behind it.

    Args:
        folder: where they are put; it does not exist yet, and lives as long as the answer is used.
        given, revision, wanted, check: of a model on the hub; a local one is taken as it is.

    Raises:
        ConfigError: as there, and for a base model in pickles that the cache does not have.
    """
    found = hub_id(given)
    if found is None:
        return find_model(given, revision=revision, wanted=wanted, check=check)
    repo, revision = found["repo"], found["revision"] or revision
    small = snapshot(repo, revision, SMALL)
    check(small)
    folder.mkdir(parents=True)
    for path in small.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    for name in weights(small, repo, wanted):
        place = folder / name
        if place.exists():
            continue
        if name.endswith(_HEADERS_ONLY):
            _write_header(place, repo, name, small.name)
        elif name.endswith(".pt"):
            place.symlink_to((snapshot(repo, revision, [name], commit=small.name) / name).resolve())
        else:
            action = f"run: hf download {repo} {name}"
            raise ConfigError(repo, f"weights in {name}", "safetensors, whose headers can be read alone", action)
    return ModelFiles(folder, as_recorded(given), small.name)


def _write_header(place: Path, repo: str, name: str, commit: str) -> None:
    """A file of the whole size that takes no room: what is behind its header was never written."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)
    except Exception as error:  # as in snapshot
        raise unavailable(repo, commit, error) from error
    body = {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
        for tensor, info in found.tensors.items()
    }
    text = json.dumps(body).encode()
    size = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
