"""Traced schedulers against the classes of diffusers themselves: see tracing.

``python plugins/diffusers/tests/test_traced.py`` writes the README's table of schedulers anew.
"""

from functools import wraps
from pathlib import Path

import diffusers
import pyarrow as pa
import pytest
import torch
from tracing import (
    PREDICTIONS,
    SD,
    SHAPE,
    NetworkField,
    directly,
    error,
    noise_of,
    parameters,
    predictions,
    run,
    setting,
)

from latentmill import registry
from latentmill.plugin import tensors
from latentmill.schedulers.noise_schedules import RectifiedFlow, VariancePreserving
from latentmill_diffusers import traced

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- schedulers, by tests/test_traced.py -->\n", "<!-- end of schedulers -->\n"


# ------------------------------------------------------------------------------------------------------- the list


def exported():
    """All scheduler classes of diffusers, those included that need torchsde."""
    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


def table():
    """The README's table."""
    lines = [
        "| scheduler of diffusers | order | evaluations | noise | predictions | |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name in exported():
        if name in traced.TRACED:
            order, evaluations, noise = traced.TRACED[name]
            kinds = ["flow"] if name.startswith(("Flow", "LTX")) else [PREDICTIONS[p] for p in predictions(name)]
            kinds = ["as preconditioned"] if name.startswith("EDM") else kinds
            lines.append(f"| {name} | {order} | {evaluations} | {'yes' * noise} | {', '.join(kinds)} | traced |\n")
        else:
            lines.append(f"| {name} | | | | | no: {traced.NOT_TRACED[name]} |\n")
    return "".join(lines)


def test_every_scheduler_of_diffusers_has_a_verdict():
    assert set(traced.TRACED) | set(traced.NOT_TRACED) == set(exported())
    assert not set(traced.TRACED) & set(traced.NOT_TRACED)
    ours = {e.name for e in registry.entries("scheduler") if e.distribution == "latentmill-diffusers"}
    assert set(traced.TRACED) <= ours


def test_the_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"python {Path(__file__).name} writes it anew"


# ------------------------------------------------------------------------------------------- equal to themselves


@pytest.mark.parametrize("name", traced.TRACED)
def test_it_is_what_the_class_itself_makes(name, monkeypatch):
    for prediction in predictions(name):
        settings, schedule, ours = setting(name, prediction)
        scheduler = getattr(traced, name)(**settings)
        # LTX's can't noise a picture, and SASolver's forgets the flow when it does.
        noises = name != "LTXEulerAncestralRFScheduler" and (name, ours) != ("SASolverScheduler", "flow")
        rows = [(3, steps, kept) for steps in (5, 10, 20) for kept in {steps, steps * 3 // 5 if noises else steps}]
        for (seed, steps, kept), found in zip(rows, run(scheduler, schedule, ours, rows), strict=True):
            with monkeypatch.context() as patch:
                wrong = error(found, directly(patch, name, steps, kept, settings, seed))
            assert wrong <= 1e-6, f"{prediction}, the last {kept} of {steps} steps: relative error {wrong:.1e}"


VARIANTS = {
    "karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "third order": ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "singlestep of third order": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "UniPC of third order": ("UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "DEIS of third order": ("DEISMultistepScheduler", {"solver_order": 3}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "not to alpha one": ("DDIMScheduler", {"set_alpha_to_one": False, "timestep_spacing": "leading"}),
    "stochastic flow": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 3.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_other_settings(variant, monkeypatch):
    name, more = VARIANTS[variant]
    settings, schedule, ours = setting(name, "epsilon")
    settings |= more
    rows = [(3, steps, steps) for steps in (5, 10, 20)]
    for (seed, steps, _), found in zip(rows, run(getattr(traced, name)(**settings), schedule, ours, rows), strict=True):
        with monkeypatch.context() as patch:
            wrong = error(found, directly(patch, name, steps, steps, settings, seed))
        assert wrong <= 1e-6, f"{steps} steps: relative error {wrong:.1e}"


def limiting():
    """Classes with clipping or thresholding, and the settings of each."""
    for name in traced.TRACED:
        known = parameters(name)
        if "thresholding" in known:
            yield name, {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
        if "clip_sample" in known:
            yield name, {"clip_sample": True, "clip_sample_range": 0.8}


@pytest.mark.parametrize(("name", "limits"), list(limiting()))
def test_clipping_and_thresholding(name, limits, monkeypatch):
    """In a batch of rows that need their limits at different steps, each is what the class itself makes of it alone."""
    settings, schedule, ours = setting(name, "epsilon")
    rows = [(3, 5, 5), (4, 20, 20), (5, 10, 6)]
    unlimited = run(getattr(traced, name)(**settings), schedule, ours, rows)
    settings |= limits
    together = run(getattr(traced, name)(**settings), schedule, ours, rows)
    for (seed, steps, kept), found, other in zip(rows, together, unlimited):
        with monkeypatch.context() as patch:
            wanted = directly(patch, name, steps, kept, settings, seed)
        assert error(found, wanted) <= 1e-6, f"the last {kept} of {steps} steps: {error(found, wanted):.1e}"
        # The limits were met, but for classes that have the settings and don't look at them.
        assert (error(found, other) > 1e-2) != name.startswith(("CogVideoX", "TCD"))


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_a_parameter_of_step_is_a_setting(name, monkeypatch):
    settings, schedule, ours = setting(name, "epsilon")
    with monkeypatch.context() as patch:
        wanted = directly(patch, name, 10, 10, settings, 3, in_step={"eta": 0.7})
    [found] = run(getattr(traced, name)(**settings, eta=0.7), schedule, ours, [(3, 10, 10)])
    assert error(found, wanted) <= 1e-6


def test_the_grid_of_flux(monkeypatch):
    """Sigmas from 1 to 1/n, shifted by how many 2x2 patches the latent has."""
    settings = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    mu = 0.5 + (1.15 - 0.5) * (4 * 4 / 4 - 256) / (4096 - 256)
    with monkeypatch.context() as patch:
        wanted = directly(patch, "FlowMatchEulerDiscreteScheduler", 8, 8, settings, 3, trailing={"mu": mu})
    scheduler = traced.FlowMatchEulerDiscreteScheduler(**settings, sigmas="trailing")
    [found] = run(scheduler, RectifiedFlow(), "flow", [(3, 8, 8)])
    assert error(found, wanted) <= 1e-6


# ------------------------------------------------------------------------------------------------- rows and state


@pytest.mark.parametrize("name", traced.TRACED)
def test_rows_of_other_steps_strengths_and_seeds_do_not_touch_each_other(name):
    settings, schedule, ours = setting(name, "epsilon")
    scheduler = getattr(traced, name)(**settings)
    rows = [(1, 5, 5), (2, 20, 20), (3, 10, 10), (4, 10, 6 if name != "LTXEulerAncestralRFScheduler" else 10)]
    together = run(scheduler, schedule, ours, rows)
    for row, found in zip(rows, together):
        [alone] = run(scheduler, schedule, ours, [row])
        assert torch.equal(found, alone), f"row {row} came out otherwise than alone"


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_state_is_a_value(name):
    """Rows saved to Arrow half-way, read back in another order by another instance, go on as if nothing was."""
    settings, schedule, ours = setting(name, "epsilon")
    make = getattr(traced, name)
    starts = [make(**settings).start(schedule, steps, steps, SHAPE) for steps in (8, 12, 10)]
    x = torch.stack([start.scale * noise_of(seed, 0) for seed, start in enumerate(starts)])
    state = {key: torch.stack([start.state[key] for start in starts]) for key in starts[0].state}
    times = torch.stack([start.times[:8] for start in starts])

    def go(scheduler, x, state, order, steps):
        field = NetworkField(schedule, ours, order)
        for i in steps:
            x, state = scheduler.step(field, x, times[order, i], times[order, i + 1], state)
        return x, state

    half, kept = go(make(**settings), x, state, [0, 1, 2], range(3))
    wanted, _ = go(make(**settings), half, kept, [0, 1, 2], range(3, 7))
    saved = tensors.with_tensor(pa.table({"row": [0, 1, 2]}), "x", half)
    for key, value in kept.items():
        saved = tensors.with_tensor(saved, f"state:{key}", value)
    saved = saved.take([2, 0, 1])
    state = {key: tensors.from_arrow(saved, f"state:{key}").clone() for key in kept}
    found, _ = go(make(**settings), tensors.from_arrow(saved, "x").clone(), state, [2, 0, 1], range(3, 7))
    assert torch.equal(found, wanted[[2, 0, 1]])


def test_what_its_class_says_of_it_is_true():
    for name, (_, evaluations, stochastic) in traced.TRACED.items():
        settings, schedule, ours = setting(name, "epsilon")
        scheduler = getattr(traced, name)(**settings)
        start = scheduler.start(schedule, 20, 20, SHAPE)
        field = NetworkField(schedule, ours, [1])
        asked = {"clean": [], "noise": 0}
        clean, noise = field.clean, field.noise

        def counted(x, t, clean=clean, asked=asked):
            asked["clean"][-1] += 1
            return clean(x, t)

        def drawn(t, s, noise=noise, asked=asked):
            asked["noise"] += 1
            return noise(t, s)

        field.clean, field.noise = counted, drawn
        x, state = start.scale * noise_of(1, 0)[None], {key: value[None] for key, value in start.state.items()}
        for t, s in zip(start.times, start.times[1:]):
            asked["clean"].append(0)
            x, state = scheduler.step(field, x, t[None], s[None], state)
        assert asked["clean"][10] == evaluations and bool(asked["noise"]) == stochastic, name


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "EulerDiscreteScheduler",
            {"use_karas_sigmas": True},
            r"no setting 'use_karas_sigmas' \(did you mean 'use_karras",
        ),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "KDPM2DiscreteScheduler: prediction_type"),
    ],
)
def test_settings_that_it_can_not_have(name, settings, said):
    with pytest.raises(ValueError, match=said):
        getattr(traced, name)(**settings)


def test_a_class_that_is_not_linear(monkeypatch):
    step = diffusers.DDIMScheduler.step

    @wraps(step)
    def squared(self, output, timestep, sample, **more):
        return step(self, output, timestep, sample.square(), **more)

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", squared)
    with pytest.raises(ValueError, match="DDIMScheduler isn't linear in the latents"):
        traced.DDIMScheduler(beta_start=0.0007)  # as no other test has it: what is traced is kept


def test_another_noise_path_than_the_denoiser_s():
    with pytest.raises(ValueError, match="another noise schedule than the denoiser"):
        traced.EulerDiscreteScheduler(beta_schedule="linear").start(VariancePreserving(), 10, 10, SHAPE)
    with pytest.raises(ValueError, match="another noise schedule than the denoiser"):
        traced.FlowMatchEulerDiscreteScheduler().start(VariancePreserving(), 10, 10, SHAPE)
    with pytest.raises(ValueError, match="LCMScheduler has no grid of 51 steps"):
        traced.LCMScheduler().start(VariancePreserving(), 51, 51, SHAPE)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "CogVideoXDDIMScheduler", "UniPCMultistepScheduler"])
def test_without_settings_the_path_is_the_denoiser_s(name, monkeypatch):
    """To 1e-4: the betas that are read off a path are rounded to float32, a thousand of them."""
    more = {"snr_shift_scale": 1.0} if name.startswith("Cog") else {}
    with monkeypatch.context() as patch:
        wanted = directly(patch, name, 10, 10, {**SD, **more}, 3)
    [found] = run(getattr(traced, name)(), VariancePreserving(), "epsilon", [(3, 10, 10)])
    assert error(found, wanted) <= 1e-4


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
