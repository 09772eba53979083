"""Traced schedulers against the classes of diffusers themselves: the same network, the same noise, in float64.

The network is small, fixed and not linear. diffusers keeps sigmas in float32, and rounds samples to it in some classes: that is
what the tolerance of 1e-6 is for.

``python plugins/diffusers/tests/test_traced.py`` writes the README's table of schedulers anew.
"""

import copy
import importlib
import inspect
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import latentmill
from latentmill import registry
from latentmill.errors import PlanError
from latentmill.plugin import Field, NoiseSchedule, tensors
from latentmill.schedulers.noise_schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from latentmill.stages.guidance import to_clean
from latentmill_diffusers import traced

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- schedulers, by tests/test_traced.py -->\n", "<!-- end of schedulers -->\n"
SHAPE = (3, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


class Network:
    """A fixed, smooth, non-linear function of latents ``[B, ...]`` and timesteps ``[B]``."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 3, generator=generator).double() / 2
        self.bias = torch.randn(3, 1, 1, generator=generator).double()

    def __call__(self, x, timestep):
        # One row after another, so that a row's bits are the same in any company.
        mixed = torch.stack([torch.einsum("ij,jhw->ihw", self.weight, row) for row in x])
        swing = torch.tensor([math.cos(t / 300) for t in timestep.tolist()]).double().reshape(-1, 1, 1, 1)
        return 0.6 * x + torch.tanh(mixed + self.bias * swing)


def noise_of(seed, timestep):
    """The noise that a row draws at a timestep."""
    return torch.randn(
        SHAPE, generator=torch.Generator().manual_seed(round(1e4 * timestep) + 10_000_019 * seed)
    ).double()


class NetworkField(Field):
    """Ours: the same network behind what a scheduler may ask."""

    def __init__(self, schedule, prediction, seeds):
        self.noise_schedule, self.prediction, self.seeds, self.network = schedule, prediction, seeds, Network()

    def scale(self, t):
        return tuple(v.reshape(-1, 1, 1, 1) for v in self.noise_schedule.scale(t))

    def time(self, ratio):
        return self.noise_schedule.time(ratio.flatten())

    def clean(self, x, t):
        return to_clean(self.prediction, self.network(x, self.noise_schedule.timestep(t)), x, *self.scale(t))

    def noise(self, t, s):
        return torch.stack(
            [noise_of(seed, at) for seed, at in zip(self.seeds, self.noise_schedule.timestep(t).tolist())]
        )


class Tabled(NoiseSchedule):
    """The path of a diffusers scheduler's own alphas: of CogVideoX, and of UnCLIP's cosines."""

    def __init__(self, bars):
        self.log = torch.cat([torch.zeros(1, dtype=torch.float64), bars.double().log()])

    def scale(self, t):
        place = t * 1000
        below = place.floor().long().clamp(0, 999)
        log = torch.lerp(self.log[below], self.log[below + 1], place - below)
        return (0.5 * log).exp(), torch.sqrt(-torch.expm1(log))

    def time(self, ratio):
        raise AssertionError("its timesteps are linear in t")

    def timestep(self, t):
        return 1000 * t - 1


class Wuerstchen(NoiseSchedule):
    """The path of Stable Cascade: cosines of a time that the network is told as it is."""

    def scale(self, t):
        bar = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        bar = bar.clamp(0.0001, 0.9999)
        return bar.sqrt(), (1 - bar).sqrt()

    def time(self, ratio):
        raise AssertionError("its timesteps are times")

    def timestep(self, t):
        return t


def parameters(name):
    return inspect.signature(getattr(diffusers, name).__init__).parameters


def setting(name, prediction):
    """``(settings, noise schedule, our prediction)`` with which a class is tried."""
    known = parameters(name)
    settings = {key: value for key, value in SD.items() if key in known and name != "UnCLIPScheduler"}
    settings |= {"clip_sample": False} if "clip_sample" in known else {}
    if name.startswith(("FlowMatch", "FlowMap", "LTX")):
        return settings, RectifiedFlow(), "flow"
    if name.startswith("EDM"):
        return {}, VarianceExploding(), "sample"
    if name == "DDPMWuerstchenScheduler":
        return {}, Wuerstchen(), "epsilon"
    settings |= {"prediction_type": prediction}
    if prediction == "flow_prediction":
        return settings | {"use_flow_sigmas": True}, RectifiedFlow(), "flow"
    if name.startswith(("CogVideoX", "UnCLIP")):
        return settings, Tabled(getattr(diffusers, name)(**settings).alphas_cumprod), PREDICTIONS[prediction]
    return settings, VariancePreserving(), PREDICTIONS[prediction]


def directly(monkeypatch, name, steps, kept, settings, seed, trailing=False, in_step=None, prediction=None):
    """The final latents of the class itself, called as the pipelines call it."""
    cls = getattr(diffusers, name)
    scheduler = cls(**settings)
    drawn = {}
    module = importlib.import_module(cls.__module__)
    for where, function in ((module, "randn_tensor"), (torch, "randn_like")):
        if hasattr(module, "randn_tensor") or where is torch:
            monkeypatch.setattr(where, function, lambda *a, **k: drawn["noise"].to(k.get("dtype") or torch.float64))
    if trailing:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist(), **trailing)
    else:
        scheduler.set_timesteps(steps)
    begin = (steps - kept) * getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[begin:]
    if name == "DDPMWuerstchenScheduler":
        timesteps = timesteps[:-1]
    noise = noise_of(seed, 0)[None]
    if begin:
        first, zero = timesteps[:1], torch.zeros_like(noise)
        noiser = copy.deepcopy(scheduler)
        x = (
            noiser.add_noise(zero, noise, first)
            if hasattr(noiser, "add_noise")
            else noiser.scale_noise(zero, first, noise)
        )
    else:
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    network, old = Network(), None
    for k, t in enumerate(timesteps):
        drawn["noise"] = noise_of(seed, float(t))[None]
        at = torch.tensor([float(t)], dtype=torch.float64)
        if name.startswith("EDM"):  # the network is one that answers the clean latents behind the preconditioning
            sigma = scheduler.sigmas[begin + k].double()
            skip, out = (scheduler.precondition_outputs(*pair, sigma) for pair in ((1.0, 0.0), (0.0, 1.0)))
            answer = (network(x, at) - skip * x) / out
        else:
            answer = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, at)
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(answer, old, t, timesteps[k - 1] if k else None, x, return_dict=False)
        elif name == "UnCLIPScheduler":
            following = timesteps[k + 1] if k + 1 < len(timesteps) else None
            x = scheduler.step(answer, t, x, prev_timestep=following).prev_sample
        else:
            t = t[None] if name == "DDPMWuerstchenScheduler" else t
            x = scheduler.step(answer, t, x, **(in_step or {})).prev_sample
    return x[0]


def run(scheduler, schedule, prediction, rows):
    """Latents of rows ``(seed, steps, kept)`` that go together, each at its own place, until the last has arrived."""
    begun = [scheduler.start(schedule, steps, kept, SHAPE) for _, steps, kept in rows]
    x = [start.scale * noise_of(seed, 0) for start, (seed, _, _) in zip(begun, rows)]
    states = [dict(start.state) for start in begun]
    at = [0] * len(rows)
    while going := [i for i, start in enumerate(begun) if at[i] < len(start.times) - 1]:
        t, s = (torch.stack([begun[i].times[at[i] + ahead] for i in going]) for ahead in (0, 1))
        state = {key: torch.stack([states[i][key] for i in going]) for key in states[0]}
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
        field = NetworkField(schedule, prediction, [rows[i][0] for i in going])
        moved, state = scheduler.step(field, torch.stack([x[i] for i in going]), t, s, state)
        for k, i in enumerate(going):
            x[i], states[i], at[i] = moved[k], {key: value[k] for key, value in state.items()}, at[i] + 1
    return x


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def predictions(name):
    """The prediction types that a class has, by its own word: the first step with another raises."""
    if "prediction_type" not in parameters(name) or name.startswith("EDM"):
        return ["epsilon"]
    found = []
    for prediction in PREDICTIONS:
        try:
            settings, _, _ = setting(name, prediction)
            getattr(traced, name)(**settings)
        except ValueError:
            continue
        found.append(prediction)
    return found


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
        for steps in (5, 10, 20):
            for kept in {steps, steps * 3 // 5 if noises else steps}:
                with monkeypatch.context() as patch:
                    wanted = directly(patch, name, steps, kept, settings, 3)
                [found] = run(scheduler, schedule, ours, [(3, steps, kept)])
                wrong = error(found, wanted)
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
    for steps in (5, 10, 20):
        with monkeypatch.context() as patch:
            wanted = directly(patch, name, steps, steps, settings, 3)
        [found] = run(getattr(traced, name)(**settings), schedule, ours, [(3, steps, steps)])
        assert error(found, wanted) <= 1e-6, f"{steps} steps: relative error {error(found, wanted):.1e}"


def limiting():
    """Classes with clipping or thresholding, and the settings of each."""
    for name in traced.TRACED:
        known = parameters(name)
        if "thresholding" in known:
            yield name, {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
        if "clip_sample" in known:
            yield name, {"clip_sample": True, "clip_sample_range": 0.8}


@pytest.mark.parametrize(("name", "limits"), limiting())
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


# -------------------------------------------------------------------------------------------------------- in jobs

NAMES = [
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "diffusers:HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]


def test_two_jobs_are_one_trajectory(tmp_path):
    """Rows of several schedulers and steps, denoised in one go, and stopped half-way and gone on with, to the bit."""
    pytest.importorskip("latentmill_shapes")
    lines = [
        {"prompt": "a red star", "scheduler": NAMES[n % 4], "steps": 4 + n, "guidance_scale": [1.0, 4.0][n % 2]}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["cluster=inline", "deterministic=true", "stages.denoise.batch_size=4", "rows_per_shard=8"]
    begin = [*settings, f"source.path={tmp_path / 'rows.jsonl'}"]
    whole, half, clean = (tmp_path / name for name in ("whole", "half", "clean"))
    assert latentmill.run("denoise", [*begin, f"output={whole}"]).ok == 8
    assert latentmill.run("denoise", [*begin, "sampling.until=0.5", f"output={half}"]).ok == 8
    on = ["source=latents", f"source.path={half}", f"output={clean}"]
    assert latentmill.run("denoise", [*settings, *on]).ok == 8
    wanted, found = ({r["row_id"]: r["latents"] for r in latents_of(folder)} for folder in (whole, clean))
    for name, latents in wanted.items():
        assert np.array_equal(found[name], latents), name


def latents_of(folder):
    return [row for path in sorted(folder.glob("data/*")) for row in pq.read_table(path).to_pylist()]


IN_PIPELINES = {
    "DDIMScheduler": {"clip_sample": False},  # ours without being told, since latents have no range
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace"},
}


@pytest.mark.parametrize("name", IN_PIPELINES)
def test_a_pipeline_with_that_scheduler_makes_the_same_latents(name, model, tmp_path):
    """Rows of several steps and guidance in one batch of ours, against the pipeline, one after another."""
    folder = model("StableDiffusionPipeline")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **IN_PIPELINES[name])
    lines = [{"prompt": "a fox", "seed": n, "steps": 6 + n, "guidance_scale": [4.0, 1.0][n % 2]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"scheduler.{key}={value}" for key, value in IN_PIPELINES[name].items()]
    result = latentmill.run(
        "denoise",
        [
            "model=diffusers",
            f"model.path={folder}",
            f"scheduler=diffusers:{name}",
            f"scheduler.path={folder}",
            *settings,
            "cluster=inline",
            f"source.path={tmp_path / 'rows.jsonl'}",
            "sampling.first_noise=diffusers",
            "sampling.width=32",
            "sampling.height=32",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert result.ok == 4
    for row, line in zip(latents_of(tmp_path / "out"), lines, strict=True):
        wanted = pipeline(
            line["prompt"],
            negative_prompt="",
            num_inference_steps=line["steps"],
            guidance_scale=line["guidance_scale"],
            generator=torch.Generator().manual_seed(line["seed"]),
            height=32,
            width=32,
            output_type="latent",
        ).images[0]
        found = torch.tensor(np.reshape(row["latents"], row["shape"]))
        assert error(found, wanted) <= 1e-4


def test_a_job_that_can_not_be_is_refused_before_it_starts(tmp_path):
    pytest.importorskip("latentmill_shapes")
    on = ["cluster=inline", f"output={tmp_path}"]
    with pytest.raises(PlanError, match="scheduler DDIMScheduler has a grid of its own: leave scheduler.grid out"):
        latentmill.run("txt2img", [*on, "scheduler=DDIMScheduler", "scheduler.grid=karras"])
    with pytest.raises(ValueError, match="another noise schedule than the denoiser: give scheduler.path"):
        latentmill.run("txt2img", [*on, "scheduler=diffusers:FlowMatchEulerDiscreteScheduler"])


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
