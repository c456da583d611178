"""Every price has a source, a date and a basis; money stays exact."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.recipe.prices import cost, load_calibrations, load_prices

DEVICE = """\
devices:
  h800:
    usd_per_hour: "2.43"
    basis: published
    source: a list
    date: "2024-03-18"
    is_gpu: true
    peak_tflops: 989.5
    peak_source: a data sheet
    mfu: { low: 0.3, expected: 0.4, high: 0.5 }
    mfu_source: assumption
"""


def test_the_shipped_list_says_who_says_so() -> None:
    prices = load_prices()
    assert {"h800", "h100", "cpu-core", "local-gpu"} <= set(prices.devices)
    for name, device in prices.devices.items():
        assert device.source and device.peak_source and device.mfu_source, name
        assert device.source.startswith("assumption") == (device.basis == "assumption"), name


def test_local_prices_are_labelled_as_assumptions_and_a_core_is_no_gpu() -> None:
    prices = load_prices()
    assert {prices.device(name).basis for name in ("cpu-core", "local-gpu")} == {"assumption"}
    assert [prices.device(name).is_gpu for name in ("cpu-core", "local-gpu", "h800")] == [False, True, True]


def test_a_price_is_the_decimal_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(DEVICE.replace("2.43", "0.1"))
    price = load_prices(path).device("h800").usd_per_hour
    assert price == Decimal("0.1")
    assert cost(Decimal(3600), price) * 3 == Decimal("0.3")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    source: a list\n",
            "",
            "{path}:2: devices.h800.source: is missing, and has no default. See `osctl explain prices.devices.h800.source`",
        ),
        (
            '"2.43"',
            '"-1"',
            "{path}:3: devices.h800.usd_per_hour: must be at least 0, found '-1'. See `osctl explain prices.devices.h800.usd_per_hour`",
        ),
        (
            '"2.43"',
            "cheap",
            "{path}:3: devices.h800.usd_per_hour: expected a number in quotes, found 'cheap'. "
            "See `osctl explain prices.devices.h800.usd_per_hour`",
        ),
        ("peak_tflops", "peak_flops", "{path}:8: devices.h800.peak_flops: unknown key 'peak_flops'. Did you mean 'peak_tflops'?"),
        (
            "low: 0.3",
            "low: 0.45",
            "{path}:10: devices.h800.mfu: low 0.45, expected 0.4, high 0.5 do not ascend. See `osctl explain prices.devices.h800.mfu`",
        ),
        (
            '"2024-03-18"',
            "spring",
            "{path}:6: devices.h800.date: expected a date, YYYY-MM-DD, found 'spring'. See `osctl explain prices.devices.h800.date`",
        ),
    ],
)
def test_a_mistake_in_a_price_list_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    assert old in DEVICE
    path.write_text(DEVICE.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_prices(path)
    assert str(caught.value) == message.format(path=path)


def test_shipped_calibrations_are_of_devices_that_have_a_price() -> None:
    shipped = load_calibrations()
    assert shipped, "else this looks at nothing"
    for one in shipped:
        assert one.device in load_prices().devices


def test_a_calibration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^calibration .*nowhere\.json: No such file"):
        load_calibrations(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text('{"schema": 2}')
    with pytest.raises(UsageError, match=r"^calibration .*bad\.json: schema: .*bench/step\.py"):
        load_calibrations(tmp_path / "bad.json")
