"""Names that artefacts written earlier import stay importable."""

from __future__ import annotations

import importlib
import re

import pytest

from medusa_export.engines.serving.triton import repository


@pytest.mark.parametrize("name", ["triton_model:MedusaModel", "triton_unary:UnaryModel"])
def test_models_of_triton_repositories_that_were_written_before(name: str) -> None:
    module, _, attribute = name.partition(":")
    old = getattr(importlib.import_module(f"medusa_export.engines.{module}"), attribute)
    new = "model" if attribute == "MedusaModel" else "unary"
    assert old is getattr(importlib.import_module(f"medusa_export.engines.serving.triton.{new}"), attribute)


@pytest.mark.parametrize("model", ["model", "model_unary"])
def test_models_of_triton_repositories_that_are_written_now(model: str) -> None:
    found = re.search(r"from (\S+) import (\S+) as TritonPythonModel", repository.model_code(model, "model"))
    assert found is not None
    assert hasattr(importlib.import_module(found[1]), found[2])
