"""The benchmark runs and measures everything. No times are asserted."""

import json

import pytest

import utils
from tests import benchmark
from tests.conftest import run_here

FIGURES = utils.ROOT / "figures"
COMMITTED = json.loads((FIGURES / "benchmark.json").read_text())


def test_everything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utils, "cpu_count", lambda: 1)
    monkeypatch.setattr(benchmark, "GRID", benchmark.GRID[-2:])  # two runs are enough
    monkeypatch.setattr(utils, "run_processes", run_here)
    benchmark.main(["--quick", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["spelling"]["same_spellings"] and COMMITTED["spelling"]["same_spellings"]
    assert results.keys() <= COMMITTED.keys()
    assert all(all(results[name].values()) for name in ("steps", "scaling", "grid", "memory"))
    assert capsys.readouterr().out.count("| question") == 7


def test_limit_of_step_by_hand():
    """The linear layers of the network with batch norm: 8 rows take 48 operations per weight, four
    ways through memory 16 bytes."""
    weights = 128 * 1024 + 1024 * 512 + 512 * 6
    for flop_per_s, ratio in ((48e6, 1), (48e9, 1), (4.8e6, 10)):  # the last is slower than memory
        machine = {"product_flop_per_s": flop_per_s, "copy_bytes_per_s": 16e6}
        limit = benchmark.limit_of_step(machine | {"convolutions_s": 1}, batch_norm=True)
        assert limit == pytest.approx(1 + ratio * weights / 1e6)


def test_the_document_has_what_was_measured():
    lines, machine = (FIGURES / "speed.md").read_text("utf-8").splitlines(), COMMITTED["machine"]
    assert set(benchmark.readme_table(COMMITTED)) <= set(lines)
    text = " ".join(lines)
    assert f"{machine['cores']} cores of an {machine['processor']}" in text
    assert f"torch {machine['torch']}" in text
    assert f"at most {max(COMMITTED['memory'].values())} MiB" in text
    gpu, runs = (
        json.loads((FIGURES / f"{name}.json").read_text())
        for name in ("benchmark_gpu", "benchmark_gpu_runs")
    )
    seconds = runs["seconds"]["CUDA graphs, 40 epochs"]
    assert benchmark.gpu_sentence(gpu) in text
    assert f"each took {min(seconds):.0f} to {max(seconds):.0f} s" in text
    assert f"decoding, took {runs['question 3']['seconds']:.0f} s" in text
    assert gpu["machine"]["device"].startswith("NVIDIA H100")
