#!/usr/bin/env python3
"""Makes the golden LoRA files of this folder with diffusers, PEFT and transformers (see README.md):

    python3 -m venv venv && venv/bin/pip install torch diffusers transformers peft safetensors
    venv/bin/python tests/lora/make.py

A tiny U-Net and a tiny CLIP text encoder get random low-rank terms through PEFT; the files are what
save_lora_weights and convert_state_dict_to_kohya write, the expected results what the two modules
then give. diffusers no longer writes the oldest spelling (processor); its keys are renamed here and
checked by loading the file with diffusers.
"""
import os
import re
import tempfile

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHT = 0.7


def make_models():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2).eval()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=48, eos_token_id=49, pad_token_id=49, projection_dim=16)).eval()
    # Large enough that terms of every layer show in the result.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (unet, text):
            for p in module.parameters():
                if p.ndim > 1:
                    p.mul_(1.5)
                else:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return unet, text


def attach(module, seed, **config):
    module.add_adapter(LoraConfig(init_lora_weights="gaussian", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def run(unet, text, inputs):
    with torch.no_grad():
        context = text(inputs["ids"]).last_hidden_state
        return {"context": context, "out": unet(inputs["sample"], inputs["timestep"], context).sample}


def weigh(module, weight):
    for layer in module.modules():
        if hasattr(layer, "set_scale") and hasattr(layer, "lora_A"):
            layer.set_scale("default", weight)


def save(folder, name, unet_terms, text_terms, **metadata):
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=unet_terms, text_encoder_lora_layers=text_terms, weight_name=name, **metadata)


def expected_by_diffusers(path, inputs):
    """What diffusers gives that loads the file, with weight WEIGHT."""
    unet, text = make_models()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="a", metadata=metadata)
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, text, adapter_name="a", metadata=metadata)
    unet.set_adapters(["a"], [WEIGHT])
    from diffusers.utils import set_weights_and_activate_adapters
    set_weights_and_activate_adapters(text, ["a"], [WEIGHT])
    return run(unet, text, inputs)


def custom_diffusion(golden, inputs):
    """A Custom Diffusion file and its effect; attn1 has processors without parameters."""
    unet, text = make_models()
    generator = torch.Generator().manual_seed(7)
    processors = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            cross = name.endswith("attn2")
            processors[name + ".processor"] = CustomDiffusionAttnProcessor2_0(
                train_kv=cross, train_q_out=cross, hidden_size=module.to_q.weight.shape[0],
                cross_attention_dim=module.to_k.weight.shape[1])
    unet.set_attn_processor(processors)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "custom_diffusion" in name:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    unet.save_attn_procs(HERE, weight_name="custom-diffusion.safetensors", safe_serialization=True)
    golden["custom_diffusion.out"] = run(unet, text, inputs)["out"]


def main():
    unet, text = make_models()
    unet.save_pretrained(os.path.join(HERE, "unet"))
    text.save_pretrained(os.path.join(HERE, "text_encoder"))
    generator = torch.Generator().manual_seed(2)
    inputs = {"sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([3.0, 700.0]),
              "ids": torch.tensor([[48, 3, 17, 5, 49, 49], [48, 30, 31, 2, 9, 49]])}
    golden = dict(inputs)
    golden.update({f"base.{k}": v for k, v in run(unet, text, inputs).items()})

    custom_diffusion(golden, inputs)
    models = {}
    # Attention only and alpha = rank: what all four spellings can say.
    attach(unet, 3, r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    attach(text, 4, r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    terms, text_terms = get_peft_model_state_dict(unet), get_peft_model_state_dict(text)
    # As older transformers named the layers, and as files have them.
    prefix = "" if next(iter(text_terms)).startswith("text_model.") else "text_model."
    text_terms = {prefix + k: v for k, v in text_terms.items()}
    save(HERE, "attention-peft.safetensors", terms, text_terms)
    save(HERE, "attention-diffusers.safetensors", convert_state_dict_to_diffusers(terms),
         convert_state_dict_to_diffusers(text_terms))
    both = {**{f"unet.{k}": v for k, v in terms.items()}, **{f"text_encoder.{k}": v for k, v in text_terms.items()}}
    save_file({k: v.contiguous() for k, v in convert_state_dict_to_kohya(both).items()},
              os.path.join(HERE, "attention-kohya.safetensors"))
    old = {}
    for key, value in both.items():
        key = key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.").replace("to_out.0_lora", "to_out_lora")
        if key.startswith("unet."):
            key = re.sub(r"(attn\d)\.", r"\1.processor.", key)
        else:
            key = re.sub(r"self_attn\.(q|k|v|out)_proj_lora", r"self_attn.to_\1_lora", key)
        old[key] = value.contiguous()
    save_file(old, os.path.join(HERE, "attention-processor.safetensors"))

    models["attention"] = unet, text

    # Linear layers and convolutions, several ranks and alphas.
    unet, text = make_models()
    attach(unet, 5, r=3, lora_alpha=5,
           target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
                           "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "linear_1"],
           rank_pattern={"to_q": 2, "conv1": 4}, alpha_pattern={"to_k": 1.5, "conv2": 8})
    attach(text, 6, r=2, lora_alpha=1, target_modules=["q_proj", "v_proj", "fc1", "fc2"], alpha_pattern={"fc1": 3})
    terms, text_terms = get_peft_model_state_dict(unet), get_peft_model_state_dict(text)
    text_terms = {prefix + k: v for k, v in text_terms.items()}
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict(),
                "text_encoder_lora_adapter_metadata": text.peft_config["default"].to_dict()}
    save(HERE, "full-peft.safetensors", terms, text_terms, **metadata)
    save(HERE, "full-diffusers.safetensors", convert_state_dict_to_diffusers(terms),
         convert_state_dict_to_diffusers(text_terms), **metadata)
    both = {**{f"unet.{k}": v for k, v in terms.items()}, **{f"text_encoder.{k}": v for k, v in text_terms.items()}}
    kohya = convert_state_dict_to_kohya(both)
    for module, part, component in [(unet, terms, "lora_unet_"), (text, text_terms, "lora_te1_")]:
        layers = dict(module.named_modules())
        for key in part:
            if key.endswith(".lora_A.weight"):
                path = key[:-len(".lora_A.weight")]
                layer = layers[path if path in layers else path.removeprefix("text_model.")]
                kohya[component + path.replace(".", "_") + ".alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
    save_file({k: v.contiguous() for k, v in kohya.items()}, os.path.join(HERE, "full-kohya.safetensors"))

    models["full"] = unet, text
    for kind, dialects in [("attention", ["peft", "diffusers", "kohya", "processor"]), ("full", ["peft", "kohya", "diffusers"])]:
        for module in models[kind]:
            weigh(module, WEIGHT)
        first = run(*models[kind], inputs)
        golden.update({f"{kind}.{k}": v for k, v in first.items()})
        for dialect in dialects:
            try:
                result = expected_by_diffusers(os.path.join(HERE, f"{kind}-{dialect}.safetensors"), inputs)
            except Exception as e:  # what diffusers cannot read
                print(f"{kind}-{dialect}: diffusers fails: {type(e).__name__}: {str(e)[:200]}")
                continue
            for k, v in result.items():
                print(f"{kind}-{dialect}: {k} differs from PEFT's by {(v - first[k]).abs().max() / first[k].abs().max():.2g},"
                      f" from the base by {(v - golden['base.' + k]).abs().max() / first[k].abs().max():.2g}")
    save_file({k: v.contiguous() for k, v in golden.items()}, os.path.join(HERE, "golden.safetensors"))


if __name__ == "__main__":
    main()
