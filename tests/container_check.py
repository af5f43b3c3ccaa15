"""engines/ in an environment with only numpy, safetensors, tokenizers and transformers 4.57; run by ``make container-check``."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = (
    "torch",
    "modelopt",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "rich",
    "typer",
    "jinja2",
    "platformdirs",
    "tritonclient",
)


def main() -> None:
    present = [name for name in OURS if _is_installed(name)]
    assert not present, f"the environment has {present}"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "medusa_export"
        package.mkdir()
        for name in ("core", "heads", "engines"):
            (package / name).symlink_to(ROOT / name)
        sys.path.insert(0, folder)
        paths = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "engines").rglob("*.py")))
        names = [".".join(("medusa_export", *path.parts)).removesuffix(".__init__") for path in paths]
        for name in names:
            importlib.import_module(name)
        _refuses(Path(folder))
    versions = {
        name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "numpy", "safetensors")
    }
    print(f"{len(names)} modules of engines/ import with {versions}")


def _refuses(folder: Path) -> None:
    """An engine directory whose engines are not built gives one clear line here too."""
    from medusa_export.core.errors import ConfigError
    from medusa_export.engines.backends import open_engine
    from medusa_export.heads.contract.engine_info import EngineInfo

    EngineInfo(
        backend="tensorrt-llm", form="fp8", precision="FP8", max_length=512, max_depth=2, top_k=16, num_hidden_layers=1,
        num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=97, eos_token_ids=(2,), session_options={},
        heads_session_options={}, source={},
    ).save(folder)  # fmt: skip
    found = ""
    try:
        open_engine(folder)
    except ConfigError as error:
        found = str(error)
    assert "run build.sh" in found, found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
