"""The Grafana dashboard asks for metrics and labels that there are, and for every metric that there is."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from serve.app import create_app
from tests.support.fake_text_model import NAME, fake_text_model

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "headrace.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def served_samples() -> dict[str, set[str]]:
    """Names of the samples of a server that has answered something, each with its labels."""
    model = fake_text_model()
    model.start()
    client = create_app(model).test_client()
    client.post("/v1/completions", json={"model": NAME, "prompt": "a"}, buffered=True)
    client.get("/healthz", buffered=True)
    text = client.get("/metrics").get_data(as_text=True)
    model.close()
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }


def test_every_metric_and_label_it_queries_exists() -> None:
    samples = served_samples()
    asked = [*EXPRESSIONS, *(str(item["query"]) for item in DASHBOARD["templating"]["list"])]
    names = {name for text in asked for name in re.findall(r"\bheadrace_\w+", text)}
    assert len(names) > 10 and names <= set(samples)
    for text in EXPRESSIONS:
        for name, selector in re.findall(r"\b(headrace_\w+)\{([^}]*)\}", text):
            assert {part.split("=")[0].strip() for part in selector.split(",")} <= samples[name], text


def test_panels_do_not_overlap_and_have_a_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
