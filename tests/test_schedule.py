"""The noise schedule's numbers and the direction of the guidance."""
import pytest
import torch

from mcl.schedule import NoiseSchedule, ddim_step


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule()


@pytest.mark.parametrize("t, alpha_bar", [
    (0, 0.99914998), (1, 0.99828953), (20, 0.97999913), (400, 0.28989962), (500, 0.16077162),
    (981, 0.00195883), (999, 0.00157896), (-1, 1.0)])
def test_betas_are_linear_in_beta(schedule, t, alpha_bar):
    assert float(schedule.alpha_bar(t)) == pytest.approx(alpha_bar, rel=1e-5)


def test_motionclone_timesteps_are_the_published_ones(schedule):
    t = schedule.timesteps(100, "motionclone", 50, 0.3)
    assert t[:4] == [999, 993, 987, 981] and t[48:53] == [706, 700, 699, 685, 670]
    assert t[-3:] == [29, 14, 0] and len(t) == 100
    t = schedule.timesteps(300, "motionclone", 180, 0.4)
    assert t[:4] == [999, 997, 995, 992] and t[178:183] == [602, 600, 599, 594, 589]
    assert t[-2:] == [5, 0]


@pytest.mark.parametrize("noise_range, border", [(0.55, 449), (0.8, 199), (0.9, 99), (0.3, 700)])
def test_border_of_the_guided_timesteps_is_truncated_as_published(schedule, noise_range, border):
    assert schedule.timesteps(20, "motionclone", 10, noise_range)[9] == border


def test_leading_and_linspace_timesteps(schedule):
    assert schedule.timesteps(25, "leading", 0, 0.3) == list(range(961, 0, -40))
    assert schedule.timesteps(5, "linspace", 0, 0.3) == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("arguments", [
    (3, "motionclone", 1, 1e-300), (5, "motionclone", 2, 1.0), (1000, "leading", 0, 0.3)])
def test_timesteps_stay_in_range_for_extreme_settings(schedule, arguments):
    timesteps = schedule.timesteps(*arguments)
    assert len(timesteps) == arguments[0] and 0 <= min(timesteps) <= max(timesteps) <= 999


@pytest.mark.parametrize("steps, guidance_steps", [(1, 0), (1, 1), (7, 7), (7, 0), (1000, 500)])
def test_timesteps_fall_for_all_numbers_of_steps(schedule, steps, guidance_steps):
    t = schedule.timesteps(steps, "motionclone", guidance_steps, 0.4)
    assert len(t) == steps and t == sorted(t, reverse=True) and 0 <= t[-1] and t[0] <= 999


def test_ddim_step_with_the_true_noise_reaches_the_clean_clip(schedule):
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    z = schedule.add_noise(x0, noise, 700)
    less_noisy = ddim_step(z, noise, noise, schedule.alpha_bar(700), schedule.alpha_bar(300))
    assert torch.allclose(less_noisy, schedule.add_noise(x0, noise, 300), atol=1e-5)
    clean = ddim_step(less_noisy, noise, noise, schedule.alpha_bar(300), schedule.alpha_bar(-1))
    assert torch.allclose(clean, x0, atol=1e-5)


def test_guidance_descends_by_the_closed_form(schedule):
    """z_prev -= sqrt(1 - alpha_bar_prev) * sqrt(1 - alpha_bar) * grad, with this sign."""
    z, eps, grad = torch.randn(3, 50).double()
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(993).double(), schedule.alpha_bar(987).double()
    plain = ddim_step(z, eps, eps, alpha_bar, alpha_bar_prev)
    guided = ddim_step(z, eps, eps - (1 - alpha_bar).sqrt() * grad, alpha_bar, alpha_bar_prev)
    expected = -(1 - alpha_bar_prev).sqrt() * (1 - alpha_bar).sqrt() * grad
    assert torch.allclose(guided - plain, expected)
