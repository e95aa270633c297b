"""The benchmark runs; how fast is its own affair."""

import json

import utils
from tests import benchmark


def test_the_benchmark_runs(tmp_path, capsys):
    benchmark.main(["--quick", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["spelling"]["same_spellings"]
    lines = capsys.readouterr().out
    for heading in (
        "milliseconds a step",
        "the report's grid",
        "words decoded",
        "Scaling",
        "Ratios",
    ):
        assert heading in lines


def test_the_limit_by_hand():
    """Of the variant: convolutions, and each linear layer by the slower of memory and products."""
    machine = {"convolutions_s": 1, "product_flop_per_s": 48e6, "copy_bytes_per_s": 16e6}
    sizes = 128 * 1024 + 1024 * 512 + 512 * 6
    assert abs(benchmark.limit_of_step(machine, True) - (1 + sizes / 1e6)) < 1e-9
    fast = machine | {"product_flop_per_s": 48e9}
    assert abs(benchmark.limit_of_step(fast, True) - (1 + sizes / 1e6)) < 1e-9
    slow = machine | {"product_flop_per_s": 4.8e6}
    assert abs(benchmark.limit_of_step(slow, True) - (1 + sizes / 1e5)) < 1e-9


def test_the_readme_says_what_was_measured():
    results = json.loads((utils.ROOT / "figures" / "benchmark.json").read_text())
    assert results["spelling"]["same_spellings"]
    lines = (utils.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for row in benchmark.readme_table(results):
        assert row in lines
    machine = results["machine"]
    text = " ".join(lines)
    assert (
        f"{machine['cores']} cores of an {machine['processor']}, torch {machine['torch']}" in text
    )
    assert f"at most {max(results['memory'].values())} MiB" in text
