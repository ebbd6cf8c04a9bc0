"""Random effects: shrinkage, pooling across devices and stacks, and the search for a profile."""

import json
import math
from pathlib import Path

import pytest

from fastllm_planner.arch import preset
from fastllm_planner.efficiency import (
    SPREAD_PARTLY,
    SPREAD_UNKNOWN,
    Cell,
    default_profile,
    fit_effects,
    interval,
    shipped_cells,
)
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import gpu
from fastllm_planner.layout import Layout
from fastllm_planner.profile import Measurement, Profile, fit_profile, load_profile, save_profile


def cell(series: str, gpu: str, backend: str, log_ratio: float, rows: int = 50) -> Cell:
    return Cell(series, gpu, backend, rows, log_ratio)


def test_no_evidence_leaves_the_model_alone() -> None:
    profile = fit_effects([]).profile("H100-SXM", "fsdp")
    assert (profile.compute, profile.communication) == (1.0, 1.0)
    assert profile.spread == 0.30


def test_one_series_moves_its_pair_part_of_the_way() -> None:
    effects = fit_effects([cell("a", "H100-SXM", "fsdp", 0.2)])
    factor = math.log(effects.profile("H100-SXM", "fsdp").compute)
    assert 0.03 < factor < 0.15


def test_many_rows_of_one_series_are_one_witness() -> None:
    few = fit_effects([cell("a", "H100-SXM", "fsdp", 0.2, rows=20)])
    many = fit_effects([cell("a", "H100-SXM", "fsdp", 0.2, rows=20_000)])
    a = math.log(few.profile("H100-SXM", "fsdp").compute)
    b = math.log(many.profile("H100-SXM", "fsdp").compute)
    assert b - a < 0.02
    two = fit_effects([cell("a", "H100-SXM", "fsdp", 0.2), cell("b", "H100-SXM", "fsdp", 0.2)])
    assert math.log(two.profile("H100-SXM", "fsdp").compute) > b + 0.01


def test_a_strange_series_moves_nothing_far() -> None:
    """Two series agree, a third is 60 % off: it is the odd one, not the news."""
    agreeing = [cell("a", "H100-SXM", "fsdp", 0.05), cell("b", "H100-SXM", "fsdp", 0.05)]
    without = math.log(fit_effects(agreeing).profile("H100-SXM", "fsdp").compute)
    strange = [*agreeing, cell("c", "H100-SXM", "fsdp", 0.9)]
    assert math.log(fit_effects(strange).profile("H100-SXM", "fsdp").compute) < without + 0.03
    alone = fit_effects([cell("c", "H100-SXM", "fsdp", 0.9)])
    assert 0 < math.log(alone.profile("H100-SXM", "fsdp").compute) < 0.12


def test_an_interval_widens_with_what_was_hardly_compared() -> None:
    profile = fit_effects([cell("a", "H100-SXM", "fsdp", 0.0)]).profile("H100-SXM", "fsdp")
    dense, sparse, device = preset("llama-3-8b"), preset("mixtral-8x7b"), gpu("H100-SXM")
    plain = interval(profile, dense, Layout(), device)
    assert plain == profile.spread
    assert interval(profile, sparse, Layout(), device) > plain
    assert interval(profile, dense, Layout(dtype="fp8"), device) > plain
    assert interval(profile, dense, Layout(offload="optimizer"), device) > plain
    assert interval(profile, dense, Layout(), gpu("cpu")) > plain
    calibrated = Profile(spread=0.07, measurements=9)
    assert interval(calibrated, sparse, Layout(offload="optimizer"), device) == 0.07


def test_a_relative_alone_is_not_this_stack() -> None:
    effects = fit_effects([cell("a", "H100-SXM", "fsdp", 0.1)])
    assert effects.profile("A100-80G", "llm-foundry").spread == SPREAD_UNKNOWN
    assert effects.profile("A100-80G", "fsdp").spread == SPREAD_PARTLY


def test_unseen_pairs_borrow_from_their_device_family_and_stack() -> None:
    effects = fit_effects([cell("a", "H100-SXM", "fsdp", 0.2)])

    def log(gpu: str, backend: str) -> float:
        return math.log(effects.profile(gpu, backend).compute)

    seen = log("H100-SXM", "fsdp")
    same_stack, same_family, same_device = (
        log("A100-80G", "fsdp"),
        log("A100-80G", "llm-foundry"),
        log("H100-SXM", "nanotron"),
    )
    assert seen > same_stack > same_family > 0
    assert seen > same_device > 0
    assert log("A100-80G", "nanotron") == 0
    assert effects.profile("A100-80G", "fsdp").spread > effects.profile("H100-SXM", "fsdp").spread


def test_effects_reproduce_contradicting_evidence_in_between() -> None:
    cells = [cell("a", "H100-SXM", "fsdp", 0.2), cell("b", "H100-SXM", "fsdp", -0.2)]
    assert math.log(fit_effects(cells).profile("H100-SXM", "fsdp").compute) == pytest.approx(0)


def test_shipped_cells_are_modest() -> None:
    """The mechanistic model alone is within 20 % of every published series' median."""
    cells = shipped_cells()
    assert len({c.series for c in cells}) >= 9
    assert max(abs(c.log_ratio) for c in cells) < 0.20
    assert 0.8 < default_profile("H100-SXM", "megatron-fused").compute < 1.25


def measured(compute: float, communication: float, seconds: float) -> Measurement:
    return Measurement(seconds, lambda p: compute * p.compute + communication * p.communication)


def test_fit_finds_the_factors_that_made_the_measurements() -> None:
    truth = Profile(compute=1.3, communication=1.6)
    shares = [(10.0, 0.5), (1.0, 6.0), (5.0, 5.0), (8.0, 3.0), (2.0, 9.0)] * 4
    runs = [measured(c, k, c * truth.compute + k * truth.communication) for c, k in shares]
    fitted = fit_profile(runs)
    assert fitted.compute == pytest.approx(1.3, rel=0.05)
    assert fitted.communication == pytest.approx(1.6, rel=0.05)
    assert fitted.measurements == 20
    assert fitted.spread < 0.1


def test_a_factor_without_evidence_stays() -> None:
    fitted = fit_profile([measured(10.0, 0.0, 14.0)] * 5)
    assert fitted.communication == 1.0
    assert fitted.compute == pytest.approx(1.4, rel=0.05)


def test_one_wild_measurement_does_not_lead() -> None:
    runs = [measured(10.0, 0.0, 12.0)] * 9 + [measured(10.0, 0.0, 400.0)]
    assert fit_profile(runs).compute == pytest.approx(1.2, rel=0.06)


def test_nothing_measured_returns_the_start() -> None:
    start = Profile("g", "b", 1.1, 0.9)
    assert fit_profile([], start) == start


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = Profile("H100-SXM", "fastllm", 1.25, 0.8, 0.1, 7)
    path = tmp_path / "profile.json"
    path.write_text(save_profile(profile))
    assert load_profile(path) == profile


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 1, "compute": -1}', '{"schema": 1, "nonsense": 1}', "{"],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError):
        load_profile(path)


def test_the_profile_file_names_its_schema() -> None:
    assert json.loads(save_profile(Profile()))["schema"] == 1


def test_one_measurement_is_weaker_evidence_than_many() -> None:
    one = fit_profile([measured(10.0, 0.0, 20.0)]).compute
    many = fit_profile([measured(10.0, 0.0, 20.0)] * 50).compute
    assert 1.2 < one < many - 0.02
