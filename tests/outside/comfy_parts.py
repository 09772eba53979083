"""Workflows in ComfyUI's API format, of our own writing, for tests."""

import copy
import json

import yaml


def node(type, title=None, /, **inputs):
    """A node; a link is ``[id, output]``."""
    return {"class_type": type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


TEXT_TO_IMAGE = {
    "1": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
    "2": node("CLIPTextEncode", "Positive prompt", text="a lighthouse", clip=["1", 1]),
    "3": node("CLIPTextEncode", "Negative prompt", text="fog", clip=["1", 1]),
    "4": node("EmptyLatentImage", width=64, height=32, batch_size=1),
    "5": node(
        "KSampler",
        seed=7,
        steps=12,
        cfg=6.5,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1,
        model=["1", 0],
        positive=["2", 0],
        negative=["3", 0],
        latent_image=["4", 0],
    ),
    "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
    "7": node("SaveImage", filename_prefix="light", images=["6", 0]),
}


def with_changes(workflow, **nodes):
    """The workflow with other nodes; of one that is there, with other inputs. ``_5=...`` is node 5; None takes one away."""
    found = copy.deepcopy(workflow)
    for name, changed in nodes.items():
        id = name.removeprefix("_")
        if changed is None:
            del found[id]
        elif "class_type" in changed:
            found[id] = changed
        else:
            found[id]["inputs"] |= changed
    return found


def without(workflow, id, input):
    """The workflow without an input of a node."""
    found = copy.deepcopy(workflow)
    del found[id]["inputs"][input]
    return found


def written(folder, workflow, name="light.json"):
    """The path of the workflow in a file."""
    path = folder / name
    path.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow))
    return path


def job_of(latentmill, folder, workflow, *overrides):
    """The config of the job that the workflow becomes, whole; or the line that refuses it."""
    words = ["run", written(folder, workflow), "--cfg", "job", "comfy.models=/comfy/models", *overrides]
    return yaml.safe_load(latentmill.out) if latentmill(*words) == 0 else latentmill.err
