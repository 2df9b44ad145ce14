"""The benches' arithmetic and their table; the benches themselves run with `make bench`."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.bench import gpu
from tests.bench.harness import Result, Row, alternate
from tests.bench.table import BEGIN, END, render, replace_between_markers, write_into

FASTER = Row(what="download", unit="images/s", ours=1800, peer=2000, peer_name="plain", at_least=0.9)
SMALLER = Row(what="memory", unit="GiB", ours=1.5, peer=1.2, peer_name="5k", at_most=1.15)
PLAIN = Row(what="p50", unit="ms", ours=2.0, peer=0.5, peer_name="faiss")


def _result(*rows: Row, bench: str = "download", machine: str = "a CPU", date: str = "2026-01-02") -> Result:
    return Result(bench=bench, machine=machine, date=date, rows=rows)


def test_the_ratio_is_ours_over_the_peers() -> None:
    assert (FASTER.ratio, SMALLER.ratio, PLAIN.ratio) == (0.9, 1.25, 4.0)


def test_a_bar_is_met_at_its_value_and_not_beyond() -> None:
    assert FASTER.met
    assert not replace(FASTER, ours=1799).met
    assert not SMALLER.met
    assert replace(SMALLER, ours=1.2 * 1.15).met
    assert PLAIN.met


def test_measures_take_turns() -> None:
    calls: list[str] = []
    values = alternate(2, partial(_record, calls, "ours"), partial(_record, calls, "peer"))
    assert calls == ["ours", "peer", "ours", "peer"]
    assert values == [[1, 3], [2, 4]]


def _record(calls: list[str], name: str) -> int:
    calls.append(name)
    return len(calls)


def test_the_table_says_plainly_what_is_met() -> None:
    table = render([_result(FASTER, SMALLER, PLAIN)])
    assert table.startswith("Measured on a CPU; 2026-01-02.\n\n| |")
    assert "| download | download | 1,800 images/s | plain: 2,000 images/s | 0.9 | ≥ 0.9 | met |" in table
    assert "| 1.5 GiB | 5k: 1.2 GiB | 1.25 | ≤ 1.15 | **not met** |" in table
    assert table.endswith("| 2 ms | faiss: 0.5 ms | 4 |  |  |")


def test_results_of_two_machines_are_two_tables() -> None:
    first, second = _result(FASTER), _result(SMALLER, bench="memory")
    assert render([first, second]).count("Measured on") == 1
    assert render([first, replace(second, machine="another CPU")]).count("Measured on") == 2


def test_the_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    (tmp_path / "results").mkdir()
    result = _result(FASTER, SMALLER)
    result.write(tmp_path / "results")
    assert Result.read(tmp_path / "results" / "download.json") == result
    for _ in range(2):
        write_into(page, tmp_path / "results")
        assert page.read_text() == f"above\n{BEGIN}\n{render([result])}\n{END}\nbelow\n"


def test_a_step_is_taken_apart_on_any_device() -> None:
    """The GPU's bench, at a size that a CPU measures in a second."""
    small = {"sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 16,
             "attention_head_dim": 8, "layers_per_block": 1,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    device = torch.device("cpu")
    training = gpu.make_training(device, small)
    one, four = (gpu.measure(training, rows, device, repetitions=1) for rows in (1, 4))
    assert four.tflop / one.tflop == pytest.approx(4, rel=0.01)
    for step in (one, four):
        assert 0 < step.products_s < step.busy_s <= step.watched_s
        assert step.seconds > 0
    assert gpu.bare_tflops(device, size=256) > 0


@pytest.mark.parametrize(
    "text", ["no markers", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_a_page_without_a_place_for_the_table_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no such place"):
        replace_between_markers(text, "table")
