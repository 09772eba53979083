"""What a call of the network costs a GPU, counted on a device that is pretended: who shares it, and that nobody waits for it."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from latentmill.stages.guidance import Guidance, ModelField
from latentmill.testing.pretend import DEVICE, pretended
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.text_encoder import DiffusersTextEncoder
from latentmill_diffusers.vae import DiffusersVAE

CPU = torch.device("cpu")
PROMPTS = [
    "a red fox",
    "a blue cat",
    "a very small and very green frog",
    "a red fox",
    "an owl, a very small one",
    "a hen",
]


@pytest.fixture
def evaluate(model):
    """``evaluate(NAME, device)``: the clean estimates of rows at several times, and what a second evaluation of them cost."""

    @cache
    def loaded(part, name, device):
        made = part(str(model(name)))
        made.load(device)
        return made

    def evaluate(name, device, fixed=False, prompts=PROMPTS):
        encoder = loaded(DiffusersTextEncoder, name, CPU)
        with torch.inference_mode(), pretended() as counted:
            denoiser, calls = loaded(DiffusersDenoiser, name, device), []
            hook = denoiser._network.model.register_forward_pre_hook(
                lambda model, args, told: calls.append(len(args[0] if args else told["hidden_states"])),
                with_kwargs=True,
            )
            count, embedded = len(prompts), denoiser.guidance_embedded
            prompt, negative = (
                {name: value if name in denoiser.parted_by else value.to(device) for name, value in each.items()}
                for each in (encoder.encode(prompts), encoder.encode_negative([""] * count))
            )
            if embedded:
                prompt["guidance_scale"] = torch.full((count,), 3.0).to(device)
            channels = denoiser.config["in_channels"] // denoiser.family.packed**2
            x = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
            guidance = [Guidance(3.0, on=not embedded)] * count
            field = ModelField(denoiser, prompt, negative, guidance, [0] * count, x.shape[1:], device, fixed)
            t = torch.linspace(0.9, 0.4, count, dtype=torch.float64)
            for _ in range(1 if fixed or device is CPU else 2):
                field.begin(t, t / 2)
                counted.clear()
                calls.clear()
                found = field.clean(x, t)
            hook.remove()
            waits, copies = list(counted.waits), list(counted.copies)
            return SimpleNamespace(clean=found.cpu(), calls=calls, waits=waits, copies=copies)

    return evaluate


@pytest.mark.parametrize("name", ["QwenImagePipeline", "ZImagePipeline", "CogView4Pipeline"])
def test_rows_whose_prompts_have_one_length_share_a_call(name, evaluate):
    """With the negative prompts, which all have one; on the CPU and in a deterministic job, each row alone."""
    alone, shared = evaluate(name, CPU), evaluate(name, DEVICE)
    fixed, others = (evaluate(name, DEVICE, fixed=True, prompts=[PROMPTS[0], other]) for other in PROMPTS[1:3])
    assert (alone.calls, fixed.calls) == ([1] * 12, [1] * 4)
    assert torch.equal(fixed.clean[0], others.clean[0])
    # CogView's tokens are filled up to 16; elsewhere the two of three words have as many, the others of their own.
    assert shared.calls == ([10, 1, 1] if name == "CogView4Pipeline" else [2, 1, 1, 1, 1, 6])
    torch.testing.assert_close(shared.clean, alone.clean, rtol=0, atol=1e-5)
    samples = evaluate(name, DEVICE, prompts=["a red fox"] * 3)
    assert samples.calls == ([6] if name == "CogView4Pipeline" else [3, 3])
    if name != "CogView4Pipeline":  # whose network itself brings its places from the CPU, block by block
        assert shared.waits == samples.waits == [] and len(samples.copies) == 2


def test_in_a_deterministic_job_the_longest_prompt_of_a_call_does_not_show(evaluate):
    """Lumina 2 pads its rows itself."""
    fixed, others = (
        evaluate("Lumina2Pipeline", CPU, fixed=True, prompts=[PROMPTS[0], other]) for other in (PROMPTS[1], "a " * 40)
    )
    assert fixed.calls == others.calls == [1] * 4 and torch.equal(fixed.clean[0], others.clean[0])


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "LatentConsistencyModelPipeline", "FluxPipeline", "Flux2Pipeline"]
)
def test_a_network_is_called_once_and_nobody_waits(name, evaluate):
    """Two copies: the timesteps, and what the step is made of."""
    found = evaluate(name, DEVICE)
    rows = 12 if name == "StableDiffusionXLPipeline" else 6
    assert (found.calls, found.waits, len(found.copies)) == ([rows], [], 2)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline"])
def test_prompts_and_pictures_are_encoded_there_as_on_the_cpu(name, model):
    """A GPU's attention rounds otherwise, and so does the pretended one's."""
    found = []
    for device in (CPU, DEVICE):
        encoder, vae = DiffusersTextEncoder(str(model(name))), DiffusersVAE(str(model(name)))
        pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.inference_mode(), pretended():
            encoder.load(device)
            vae.load(device)
            prompt, negative = encoder.encode(PROMPTS[:2]), encoder.encode_negative([None, PROMPTS[2]])
            mean, std = vae.posterior(pictures.to(device))
            each = [*prompt.values(), *negative.values(), mean, std, vae.decode(mean)]
            found.append([value.cpu() for value in each])
    for wanted, value in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
