from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.contract.trtllm_releases import DEFAULT_RELEASE, RELEASES, find_release


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        ("0.17", "0.17.0.post1", (0, 17, 0)),
        ("0.17.0.post1", "0.17.0.post1", (0, 17, 0)),
        ("0.18", "0.18.2", (0, 18, 2)),
        ("1.2.0", "1.2.0", (1, 2, 0)),
        ("1.2.1", "1.2.1", (1, 2, 1)),
    ],
)
def test_find(text: str, name: str, numbers: tuple[int, ...]) -> None:
    assert (find_release(text).name, find_release(text).numbers) == (name, numbers)


def test_every_release_is_found() -> None:
    assert [find_release(release.name) for release in RELEASES] == list(RELEASES)
    assert find_release(DEFAULT_RELEASE).numbers == (1, 2, 1)
    assert [release.numbers for release in RELEASES] == sorted(release.numbers for release in RELEASES)


def test_containers() -> None:
    assert find_release("1.1").container == "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3"
    assert find_release("0.18.1").container == "nvcr.io/nvidia/tensorrt-llm/release:0.18.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.3.0", r"no Medusa; expected at most 1.2.1; stay on 1.2.1, or serve the ONNX graph"),
        ("1.3.0rc12", "no Medusa"),
        ("2.0", "no Medusa"),
        ("0.16.0", "0.17 or later"),
        ("0.22", "which was not released"),
        ("latest", "'latest'; expected one of 0.17.0, 0.18.0"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_release(text)
