"""The benchmark runs and measures everything. No times are asserted."""

import json

import pytest

import utils
from tests import benchmark


def test_everything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utils, "cpu_count", lambda: 1)
    monkeypatch.setattr(benchmark, "GRID", benchmark.GRID[-2:])  # two runs are enough
    benchmark.main(["--quick", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["spelling"]["same_spellings"]
    committed = json.loads((utils.ROOT / "figures" / "benchmark.json").read_text())
    assert results.keys() - {"analysis_seconds"} == committed.keys() - {"checksum"}
    for name in ("steps", "grid", "memory", "analysis_seconds"):
        assert all(results[name].values())
    assert capsys.readouterr().out.count("| question") == 7


@pytest.mark.parametrize(
    "flop_per_s, linear_layers",
    [(48e6, 1.0), (48e9, 1.0), (4.8e6, 10.0)],
    ids=["as slow as memory", "faster", "slower"],
)
def test_limit_of_step_by_hand(flop_per_s, linear_layers):
    """The linear layers of the network with batch norm: 8 rows take 48 operations per weight, four
    ways through memory 16 bytes."""
    machine = {"convolutions_s": 1, "product_flop_per_s": flop_per_s, "copy_bytes_per_s": 16e6}
    weights = 128 * 1024 + 1024 * 512 + 512 * 6
    limit = 1 + linear_layers * weights / 1e6
    assert benchmark.limit_of_step(machine, batch_norm=True) == pytest.approx(limit)


def test_the_document_has_what_was_measured():
    results = json.loads((utils.ROOT / "figures" / "benchmark.json").read_text())
    assert results["spelling"]["same_spellings"]
    lines = (utils.ROOT / "figures" / "speed.md").read_text(encoding="utf-8").splitlines()
    for row in benchmark.readme_table(results):
        assert row in lines
    machine, text = results["machine"], " ".join(lines)
    assert f"{machine['cores']} cores of an {machine['processor']}" in text
    assert f"torch {machine['torch']}" in text
    assert f"at most {max(results['memory'].values())} MiB" in text
