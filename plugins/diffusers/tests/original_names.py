"""Weights of tiny models in the names of those who trained them, as whole checkpoints and networks alone have them."""

import re

import torch
from safetensors.torch import load_file

# What diffusers calls a module, as a pattern, and what its authors do, one after the other as sed would. Modules that end up
# with one name are fused there, in the order of the rules. The UNets and VAEs have two blocks, and UNets one layer in each.
UNET = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.0"),
    (r"^down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.1"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
    (r"^(\w+\.\d+\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
)
VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid\.attn_1\.group_norm", "mid.attn_1.norm"),
    (r"mid\.attn_1\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid\.attn_1\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OPEN_CLIP = (
    (r"^(text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^(text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"^(text_model\.)?final_layer_norm", "ln_final"),
    (r"^(text_model\.)?encoder\.layers", "transformer.resblocks"),
    (r"^text_projection\.weight", "text_projection"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    *((rf"self_attn\.{each}_proj\.", "attn.in_proj_") for each in "qkv"),
)
CLIP = ((r"^(text_model\.)?(?!text_projection)", "text_model."),)
FLUX = (
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    *((rf"^double(.*)attn\.to_{each}\.", r"double\1img_attn.qkv.") for each in "qkv"),
    *((rf"attn\.add_{each}_proj\.", "txt_attn.qkv.") for each in "qkv"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff\.net\.(\d)(\.proj)?", r"img_mlp.\1"),
    (r"ff_context\.net\.(\d)(\.proj)?", r"txt_mlp.\1"),
    *((rf"^single(.*)attn\.to_{each}\.", r"single\1linear1.") for each in "qkv"),
    (r"^single(.*)proj_mlp", r"single\1linear1"),
    (r"^single(.*)proj_out", r"single\1linear2"),
    (r"^single(.*)norm\.linear", r"single\1modulation.lin"),
    (r"^single(.*)attn\.norm_q\.weight", r"single\1norm.query_norm.scale"),
    (r"^single(.*)attn\.norm_k\.weight", r"single\1norm.key_norm.scale"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
)
SD3 = (
    (r"time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d)", r"joint_blocks.\1"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    *((rf"(attn2?)\.to_{each}\.", r"x_block.\1.qkv.") for each in "qkv"),
    *((rf"attn\.add_{each}_proj\.", "context_block.attn.qkv.") for each in "qkv"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
    (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
)


def renamed(part, rules, prefix):
    """The weights of a part's folder under its authors' names."""
    found = {}
    for name, tensor in load_file(next(part.glob("*.safetensors"))).items():
        last = 0  # rule that matched
        for i, (pattern, there) in enumerate(rules):
            name, matched = re.subn(pattern, there, name)
            last = i if matched else last
        found.setdefault(prefix + name, []).append((last, tensor))
    fused = {name: [tensor for _, tensor in sorted(each, key=lambda e: e[0])] for name, each in found.items()}
    return {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in fused.items()}


def unet(folder):
    return renamed(folder / "unet", UNET, "model.diffusion_model.")


def vae(folder, prefix="first_stage_model."):
    """With attention as convolutions."""
    state = renamed(folder / "vae", VAE, prefix)
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in state.items()}


def swapped(state, name):
    """Shift and scale of a last normalisation, which diffusers has the other way round."""
    for each in ("weight", "bias"):
        state[f"{name}.{each}"] = torch.cat(state[f"{name}.{each}"].chunk(2)[::-1])


def open_clip(part, prefix):
    state = renamed(part, OPEN_CLIP, prefix)
    if f"{prefix}text_projection" in state:
        state[f"{prefix}text_projection"] = state[f"{prefix}text_projection"].T.contiguous()
    return state


def flux(folder):
    state = renamed(folder / "transformer", FLUX, "")
    swapped(state, "final_layer.adaLN_modulation.1")
    return state


def sd3(folder):
    state = renamed(folder / "transformer", SD3, "model.diffusion_model.")
    swapped(state, "model.diffusion_model.final_layer.adaLN_modulation.1")
    swapped(state, "model.diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1")
    return state


def stable_diffusion_1(folder):
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    text = renamed(folder / "text_encoder", CLIP, "cond_stage_model.transformer.")
    return {**unet(folder), **vae(folder), **text, **positions, "alphas_cumprod": torch.zeros(1000)}


def stable_diffusion_2(folder):
    return {**unet(folder), **vae(folder), **open_clip(folder / "text_encoder", "cond_stage_model.model.")}


def stable_diffusion_xl(folder):
    first = renamed(folder / "text_encoder", CLIP, "conditioner.embedders.0.transformer.")
    return {
        **unet(folder),
        **vae(folder),
        **first,
        **open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model."),
    }


def stable_diffusion_3(folder):
    return {
        **sd3(folder),
        **vae(folder),
        **renamed(folder / "text_encoder", CLIP, "text_encoders.clip_l.transformer."),
        **renamed(folder / "text_encoder_2", CLIP, "text_encoders.clip_g.transformer."),
        **renamed(folder / "text_encoder_3", (), "text_encoders.t5xxl.transformer."),
    }


def refiner(folder):
    return {**unet(folder), **vae(folder), **open_clip(folder / "text_encoder_2", "conditioner.embedders.0.model.")}


def flux_with_all(folder):
    return {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in flux(folder).items()},
        **vae(folder, "vae."),
        **renamed(folder / "text_encoder", CLIP, "text_encoders.clip_l.transformer."),
        **renamed(folder / "text_encoder_2", (), "text_encoders.t5xxl.transformer."),
    }


WHOLE = {
    "stable_diffusion_1": (stable_diffusion_1, "StableDiffusionPipeline"),
    "stable_diffusion_2": (stable_diffusion_2, "StableDiffusionPipeline"),
    "stable_diffusion_xl": (stable_diffusion_xl, "StableDiffusionXLPipeline"),
    "refiner": (refiner, "StableDiffusionXLImg2ImgPipeline"),
    "stable_diffusion_3": (stable_diffusion_3, "StableDiffusion3Pipeline"),
    "flux_with_all": (flux_with_all, "FluxPipeline"),
}
