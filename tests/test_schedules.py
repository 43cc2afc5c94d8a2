"""Learning rates as functions of the step."""

from __future__ import annotations

import itertools

import pytest

from revq.stages.training.schedules import decay, rectifier_rate

SCHEDULES = ("exponential", "cosine", "constant")


@pytest.mark.parametrize(("schedule", "end"), [("exponential", 0.05), ("cosine", 0.0), ("constant", 1.0)])
def test_a_schedule_starts_at_one_falls_and_ends_where_it_says(schedule: str, end: float) -> None:
    values = [decay(schedule, step, 1000) for step in range(1001)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(end)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_latent_phase_warms_up_to_its_peak(schedule: str) -> None:
    values = [rectifier_rate(schedule, step, 10_000) for step in range(10_000)]
    assert values[0] == pytest.approx(0.01)
    assert max(values) == pytest.approx(1, abs=0.04)
    assert 95 <= values.index(max(values)) <= 100


def test_only_the_constant_schedule_is_the_same_for_every_length() -> None:
    differing = [name for name in SCHEDULES if any(rectifier_rate(name, step, 50) != rectifier_rate(name, step, 5000) for step in range(50))]
    assert differing == ["exponential", "cosine"]


def test_the_decoder_phase_warms_up_and_falls_to_zero() -> None:
    values = [rectifier_rate("decoder", step, 100) for step in range(101)]
    assert values[0] < values[10] < values[19]
    assert values[30] > values[60] > values[100] == pytest.approx(0)
