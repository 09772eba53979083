"""Every setting of every scheduler of diffusers that we know, with a value that is not its default, and what comes of it."""

import inspect
import json
import os

import diffusers
import torch

from latentmill_diffusers import traced

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
KARRAS = {"use_karras_sigmas": True}
LIMITS = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

VALUES = {
    "num_train_timesteps": [{"num_train_timesteps": 500}],
    "beta_start": [{"beta_start": 0.0005}],
    "beta_end": [{"beta_end": 0.015}],
    "beta_schedule": [{"beta_schedule": "linear"}],
    "trained_betas": [{"trained_betas": torch.linspace(2e-4, 0.015, 1000).tolist(), "num_train_timesteps": 1000}],
    "snr_shift_scale": [{"snr_shift_scale": 1.0}],
    "rescale_betas_zero_snr": [ZERO_SNR],
    "prediction_type": [{"prediction_type": name} for name in ("v_prediction", "sample", "flow_prediction")],
    "clip_sample": [{"clip_sample": True}],
    "clip_sample_range": [{"clip_sample": True, "clip_sample_range": 0.8}],
    "thresholding": [LIMITS],
    "dynamic_thresholding_ratio": [LIMITS],
    "sample_max_value": [LIMITS],
    "set_alpha_to_one": [{"set_alpha_to_one": False}, {"set_alpha_to_one": True}],
    "timestep_spacing": [{"timestep_spacing": name} for name in ("leading", "linspace", "trailing")],
    "steps_offset": [{"timestep_spacing": "leading", "steps_offset": 1}],
    "timestep_type": [{"timestep_type": "continuous", "prediction_type": "v_prediction", **KARRAS}],
    "interpolation_type": [{"interpolation_type": "log_linear"}],
    "use_karras_sigmas": [KARRAS, {**KARRAS, "final_sigmas_type": "sigma_min"}],
    "use_exponential_sigmas": [{"use_exponential_sigmas": True}],
    "use_beta_sigmas": [{"use_beta_sigmas": True}],
    "use_lu_lambdas": [{"use_lu_lambdas": True}],
    "use_flow_sigmas": [FLOW, {"use_flow_sigmas": True}],
    "flow_shift": [{**FLOW, "flow_shift": 3.0}],
    "use_dynamic_shifting": [{**FLOW, "use_dynamic_shifting": True}],
    "time_shift_type": [{**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"}],
    "sigma_min": [{**KARRAS, "sigma_min": 0.1}],
    "sigma_max": [{**KARRAS, "sigma_max": 10.0}],
    "final_sigmas_type": [{"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", **KARRAS}],
    "lambda_min_clipped": [{"lambda_min_clipped": -1.5}],
    "variance_type": [{"variance_type": "fixed_large"}, {"variance_type": "learned_range"}],
    "original_inference_steps": [{"original_inference_steps": 30}],
    "timestep_scaling": [{"timestep_scaling": 0.01}],
    "solver_order": [{"solver_order": 1}, {"solver_order": 3}],
    "solver_type": [
        {"solver_type": "heun"},
        {"solver_type": "bh1"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ],
    "solver_p": [{"solver_p": "UniPCMultistepScheduler"}],
    "algorithm_type": [
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "noise_prediction"},
    ],
    "lower_order_final": [
        {"lower_order_final": False, "solver_order": 2, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": True, "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ],
    "euler_at_final": [{"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}],
    "predict_x0": [{"predict_x0": False}, {"predict_x0": False, "final_sigmas_type": "sigma_min"}],
    "disable_corrector": [{"disable_corrector": [0, 2]}],
    "predictor_order": [{"predictor_order": 3}],
    "corrector_order": [{"corrector_order": 3}],
    "tau_func": [{"tau_func": "a function"}],
    "skip_prk_steps": [{"skip_prk_steps": True}],
    "noise_sampler_seed": [{"noise_sampler_seed": 1}],
    # of flow paths alone
    "shift": [{"shift": 3.0}],
    "base_shift": [{"use_dynamic_shifting": True, "base_shift": 0.8}],
    "max_shift": [{"use_dynamic_shifting": True, "max_shift": 2.0}],
    "base_image_seq_len": [{"use_dynamic_shifting": True, "base_image_seq_len": 16}],
    "max_image_seq_len": [{"use_dynamic_shifting": True, "max_image_seq_len": 1024}],
    "shift_terminal": [{**FLOW, "shift_terminal": 0.1}],
    "invert_sigmas": [{"invert_sigmas": True}],
    "stochastic_sampling": [{"stochastic_sampling": True}],
    "scale_factors": [{"scale_factors": [1.0] * 4}],
    "upscale_mode": [{"upscale_mode": "nearest"}],
    "eta": [{"eta": 0.5}],
    "s_noise": [{"s_noise": 0.9}],
    # of paths of their own
    "sigma_data": [{"sigma_data": 0.8}],
    "sigma_schedule": [{"sigma_schedule": "exponential"}],
    "rho": [{"rho": 5.0}],
    "scaler": [{"scaler": 2.0}],
    "s": [{"s": 0.02}],
}
"""Values of a setting that are not its default, each with others that it needs to have an effect."""


OF_THE_PATH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale")
"""Settings of the alphas alone, which know of no steps: tried in 10."""
WITHOUT_EFFECT = {
    "CogVideoXDDIMScheduler": "clip_sample clip_sample_range sample_max_value",
    "CogVideoXDPMScheduler": "clip_sample clip_sample_range sample_max_value",
    "DEISMultistepScheduler": "algorithm_type solver_type",
    "DPMSolverMultistepScheduler": "variance_type",
    "DPMSolverSDEScheduler": "noise_sampler_seed",  # each row draws noise of its own
    "DPMSolverSinglestepScheduler": "variance_type",
    "EDMDPMSolverMultistepScheduler": "num_train_timesteps prediction_type euler_at_final lower_order_final solver_type",
    "EDMEulerScheduler": "num_train_timesteps prediction_type",
    "FlowMatchLCMScheduler": "upscale_mode",
    "LCMScheduler": "set_alpha_to_one steps_offset timestep_spacing",
    "SASolverScheduler": "variance_type",
    "TCDScheduler": "clip_sample clip_sample_range dynamic_thresholding_ratio sample_max_value set_alpha_to_one steps_offset "
    "thresholding timestep_scaling timestep_spacing",
}
"""Settings that a class has and doesn't look at, or that are of the noise that it would draw."""
PATH = "a noise schedule that is neither of betas nor a flow"
REFUSED = {
    (
        "KDPM2AncestralDiscreteScheduler",
        "use_karras_sigmas",
    ): "timesteps that don't descend in .* with use_karras_sigmas: True",
    ("FlowMatchEulerDiscreteScheduler", "invert_sigmas"): "timesteps that don't descend in .* with invert_sigmas: True",
    ("FlowMatchLCMScheduler", "invert_sigmas"): "timesteps that don't descend in .* with invert_sigmas: True",
    ("FlowMatchLCMScheduler", "scale_factors"): "scale_factors can't be followed: they change the latents' size",
    ("SASolverScheduler", "tau_func"): "tau_func can't be followed: it is a function",
    ("UniPCMultistepScheduler", "solver_p"): "solver_p can't be followed: it is a scheduler",
}
"""What both tiers refuse. What the class itself refuses, or makes NaN of, they refuse, too."""


def known_of(name):
    """The settings of a class and their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: each.default for key, each in parameters.items() if key not in ("self", "kwargs")}


def base(name):
    """What all cases of a class have."""
    known = known_of(name)
    settings = {key: value for key, value in SD.items() if key in known and name != "UnCLIPScheduler"}
    settings |= {"num_train_timesteps": 100} if name.startswith("KDPM2") else {}  # it takes a millisecond for each
    return settings | ({"clip_sample": False} if "clip_sample" in known else {})


def is_flow(name, settings):
    return name.startswith(("FlowM", "LTX")) or settings.get("use_flow_sigmas", False)


def folder_of(tmp_path, model, name, settings):
    """A tiny model with this scheduler. Its pipeline changes nothing of the config."""
    source = model("StableDiffusion3Pipeline" if is_flow(name, settings) else "StableDiffusionXLPipeline")
    folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for part in source.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            os.symlink(part, folder / part.name)
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    (folder / "scheduler").mkdir()
    config = json.dumps({"_class_name": name, **settings})
    (folder / "scheduler" / "scheduler_config.json").write_text(config)
    return str(folder)


NAMES = sorted({*traced.TRACED, "DPMSolverSDEScheduler"})
REMEMBERING = [name for name in NAMES if "step" in name or name.startswith(("LMS", "PNDM", "SASolver"))]
"""Those that remember what the network answered before."""


def cases(name):
    """``(setting, whole settings)``: each setting of a class, with each of its values above."""
    known = known_of(name)
    for key, default in known.items():
        for value in VALUES.get(key, ()):
            value = {name: each for name, each in value.items() if name in known}
            if name.startswith("KDPM2") and "use_karras_sigmas" in value:
                value["num_train_timesteps"] = 1000  # of 100 they are the same one several times
            if key == "solver_type" and (value[key] == "heun") == name.startswith("UniPC"):
                continue  # of names that it doesn't know a class makes its default
            if value[key] != default or key in base(name):
                yield key, {**base(name), **value}
