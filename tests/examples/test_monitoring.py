"""The dashboard shows what the server counts: every metric in it is one of the server's, and every one of those is in it."""

from __future__ import annotations

import json
import re

import yaml

from medusa_export.engines.serving.meter import FAMILIES, LABELLED, PASSED_OVER, SECONDS
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from tests.paths import ROOT

FOLDER = ROOT / "examples" / "monitoring"
NOT_SHOWN = {"vllm:spec_decode_num_draft_tokens_total"}


def test_metrics_of_the_dashboard() -> None:
    board = json.loads((FOLDER / "grafana" / "dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = {name.removesuffix("_bucket") for name in re.findall(r"\b((?:vllm:|medusa_)\w+)\{", queries)}
    assert shown == {*FAMILIES, *LABELLED, PASSED_OVER} - NOT_SHOWN
    meter = PrometheusMeter("m")
    meter.first_token(SECONDS[0])
    assert 'model_name="m"' in meter.render()[0].decode(), "the label that queries select by"
    assert queries.count('model_name="$model"') == queries.count("{")


def test_compose_mounts_what_is_there_on_loopback_only() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    assert len(mounts) == 4
    assert all((FOLDER / mount).is_file() for mount in mounts)
    assert "127.0.0.1" in " ".join(services["prometheus"]["command"])
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for path in FOLDER.rglob("*.y*ml"):
        assert yaml.safe_load(path.read_text())
