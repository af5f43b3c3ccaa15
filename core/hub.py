"""Models by the name that the Hugging Face hub has for them: ``owner/name`` or ``owner/name@revision``, as every command takes it.

huggingface_hub downloads them, with its cache, its progress bar, its tokens and its rules for machines that are offline. Small files
come first, so that what cannot be used is refused before gigabytes are on their way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.typed_paths import as_recorded

# Weights as save_pretrained writes them and heads as Medusa does, the preferred first.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
BASE, HEADS = (WEIGHT_FILES,), ((*HEAD_FILES, *WEIGHT_FILES),)
BASE_WITH_HEADS = (WEIGHT_FILES, HEAD_FILES)

SMALL = (
    "config.json", "generation_config.json", "adapter_config.json", "*.index.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "followers.npz",
)  # fmt: skip
REVISION_HELP = "Branch, tag or commit of the base model on the hub. Heads take theirs as owner/name@revision."
EXPECTED = "a local directory, or a model of the Hugging Face hub"
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".json")


@dataclass(frozen=True)
class ModelFiles:
    """A model, or heads, on this machine.

    Attributes:
        path: the directory, or the file where one was given.
        name: how artefacts call it: see :func:`~medusa_export.core.typed_paths.as_recorded`.
        commit: of the hub's repository; None for a local directory.
    """

    path: Path
    name: str
    commit: str | None = None

    def recorded(self, files: Mapping[str, str]) -> dict[str, str]:
        """How an artefact names what it was made from, the same on every machine.

        Args:
            files: SHA-256 of the files by name: what tells a local directory from another one of that name.
        """
        if self.commit is not None:
            return {"checkpoint": self.name, "commit": self.commit}
        import hashlib

        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
        return {"checkpoint": self.name, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def source_name(recorded: Mapping[str, str]) -> str:
    """What rows of data say of the model that answered: its name, and the commit or hash that tells which one it was."""
    mark = recorded.get("commit") or recorded.get("sha256")
    return f"{recorded.get('checkpoint', '')}@{mark[:12]}" if mark else recorded.get("checkpoint", "")


def hub_id(given: str | Path) -> re.Match[str] | None:
    """The parts ``repo`` and ``revision`` of a name on the hub; None where it is a path. What lies on the disk wins."""
    text = str(given)
    match = _ID.fullmatch(text)
    return None if match is None or lexists(text) or text.endswith(_FILE_SUFFIXES) else match


def find_model(
    given: str | Path,
    *,
    revision: str | None = None,
    wanted: Sequence[Sequence[str]] = BASE,
    check: Callable[[Path], object] = lambda path: None,
) -> ModelFiles:
    """The files of a model that is given as a path or by its name on the hub, which is downloaded unless the cache has it.

    Args:
        given: a local path is taken as it is, whether something is there or not: whoever opens it reports what is wrong.
        revision: branch, tag or commit on the hub; one after the name's "@" wins.
        wanted: groups of weights files; of each the first one that the repository has is downloaded.
        check: refuses a model by its small files, before its weights are downloaded.

    Raises:
        ConfigError: the hub or the cache has no such model, or a revision is given for a local directory.
    """
    found = hub_id(given)
    if found is None:
        if revision is not None:
            expected = "the name of a model on the hub with it (of heads: owner/name@revision)"
            raise ConfigError("--revision", f"{revision} for the local path {given}", expected, "leave it out")
        return ModelFiles(Path(given), as_recorded(given))
    repo, revision = found["repo"], found["revision"] or revision
    small = snapshot(repo, revision, SMALL)
    check(small)
    names = weights(small, repo, wanted)
    path = snapshot(repo, revision, names, commit=small.name) if names else small
    if missing := [name for name in names if not (path / name).is_file()]:
        got = f"a copy in the Hugging Face cache without {missing[0]}, and no connection to the hub"
        raise ConfigError(repo, got, "a whole one", _download(repo, revision))
    return ModelFiles(path, as_recorded(given), path.name)


def cached_snapshot(name: str, commit: str) -> Path | None:
    """The cache's directory of a commit, if it has one; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.partition("@")[0], "config.json", revision=commit)
    return Path(found).parent if isinstance(found, str) else None


def weights(directory: Path, repo: str, wanted: Sequence[Sequence[str]]) -> list[str]:
    """The weights files to download.

    Args:
        directory: what is there of the model, an index included.
        repo: its name on the hub, ``owner/name``.
        wanted: groups of names; of each the first that there is, and of an index all files that it names.
    """
    present = _listing(repo, directory)
    names: list[str] = []
    for group in wanted:
        chosen = next((name for name in group if name in present), None)
        if chosen is not None:
            names += _shards(directory / chosen) if chosen.endswith(".index.json") else [chosen]
    return names


def _listing(repo: str, directory: Path) -> set[str]:
    """Files of the repository's top level; without a way to the hub those that the cache has."""
    from huggingface_hub import HfApi

    try:
        return set(HfApi().list_repo_files(repo, revision=directory.name))
    except Exception:  # as in snapshot; that it answered a moment ago does not matter where the cache is complete
        return {path.name for path in directory.iterdir()}


def _shards(index: Path) -> Iterator[str]:
    """Shards that an index names; whoever opens it checks it."""
    try:
        body = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return
    shards = body.get("weight_map") if isinstance(body, dict) else None
    yield from dict.fromkeys(name for name in (shards or {}).values() if isinstance(name, str))


def snapshot(repo: str, revision: str | None, patterns: Sequence[str], *, commit: str | None = None) -> Path:
    """The cache's directory of a revision, with the files of some patterns.

    Args:
        commit: what the revision was found to be: branches move.

    Raises:
        ConfigError: no such repository or revision, or no connection to the hub and no copy in the cache.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=commit or revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        action = f"accept its terms at https://huggingface.co/{repo}, then run: hf auth login"
        raise ConfigError(repo, "a model whose terms this account has not accepted", "access", action) from error
    except errors.RevisionNotFoundError as error:
        got = f"no revision {revision}"
        raise ConfigError(repo, got, "a branch, tag or commit of it", "correct --revision") from error
    except errors.RepositoryNotFoundError as error:
        got = "no such directory, and no such model on the hub that this account may read"
        raise ConfigError(repo, got, EXPECTED, "check the name; for a private model run: hf auth login") from error
    except Exception as error:  # huggingface_hub passes on what its HTTP client raises, and that has changed
        raise unavailable(repo, revision, error) from error


def unavailable(repo: str, revision: str | None, error: Exception) -> ConfigError:
    """What to say without a connection to the hub, and no copy.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit that was asked for.
        error: of the library.
    """
    got = f"no such directory, and no whole copy in the Hugging Face cache ({_reason(error)})"
    return ConfigError(repo, got, EXPECTED, _download(repo, revision))


def _reason(error: BaseException) -> str:
    """Why there was no download, without the library's advice for programmers."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "offline, as HF_HUB_OFFLINE says"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    said = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {said[0][:120]}"


def _download(repo: str, revision: str | None) -> str:
    """What fills the cache."""
    option = f" --revision {revision}" if revision else ""
    return f"with access to the network, run: hf download {repo}{option}"
