"""Over the table of metrics: each has a column in the rows, and is read by people."""

import pytest

from pipeline.results import SCHEMA
from pipeline.tasks import METRICS


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_column_and_a_text(name):
    assert str(SCHEMA.get(name)) == "Float64", f"give results.Row a field {name}: float | None = None"
    assert METRICS[name].name == name
    assert METRICS[name].heading[0].isupper()
    assert float(METRICS[name].short(0.5)) == pytest.approx(METRICS[name].scale * 0.5, abs=0.06)
