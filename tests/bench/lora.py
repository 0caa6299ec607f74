#!/usr/bin/env python3
"""Trains a LoRA with Calotype and checks that diffusers and PEFT load the file and compute the same.

Never needed to build or test. In a throw-away environment:
    python3 -m venv lora-env
    lora-env/bin/pip install torch diffusers transformers peft safetensors
    lora-env/bin/python tests/bench/lora.py --calotype build/bin/calotype --model build/demo --data shapes

--model is the folder of a trained model: one of our runs, or Stable Diffusion. The LoRA is trained for a few
steps, with ranks and alpha that differ; diffusers then loads it into the model's U-Net (load_lora_adapter) and, if
the model has one, transformers' CLIP. Calotype merges it into a copy of the model; the outputs of the U-Nets on
random inputs are compared, as is the U-Net without LoRA. --lora FILE checks a file that is there instead.
"""
import argparse
import pathlib
import subprocess
import tempfile

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--lora", help="a file to check instead of training one")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--formats", default="peft,diffusers,kohya")
    parser.add_argument("--options", default="--rank 4 --alpha 6 --lr 1e-2 --batch-size 8 --sample-steps 0",
                        help="of train lora")
    parser.add_argument("--folder", help="for what is written [a temporary one]")
    args = parser.parse_args()
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="calotype-lora-"))
    folder.mkdir(parents=True, exist_ok=True)

    def calotype(*command):
        subprocess.run([args.calotype, *map(str, command)], check=True, stdout=subprocess.DEVNULL)

    if args.lora:
        lora = pathlib.Path(args.lora)
    else:
        calotype("--quiet", "train", "lora", "--model", args.model, "--data", args.data, "--out", folder / "run", "--steps",
                 args.steps, *args.options.split())
        lora = folder / "run" / "pytorch_lora_weights.safetensors"

    def unet(path):
        return UNet2DConditionModel.from_pretrained(path).eval()

    torch.manual_seed(0)
    config = unet(f"{args.model}/unet").config
    side = config.sample_size or 64
    inputs = {"sample": torch.randn(2, config.in_channels, side, side), "timestep": torch.tensor([10.0, 900.0]),
              "encoder_hidden_states": torch.randn(2, 8, config.cross_attention_dim)}
    save_file(inputs, folder / "inputs.safetensors")

    def theirs(model):
        with torch.no_grad():
            return model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample

    def ours(model):
        calotype("unet", "--model", model, "--inputs", folder / "inputs.safetensors", "--output", folder / "out.safetensors")
        return load_file(folder / "out.safetensors")["out"]

    base = theirs(unet(f"{args.model}/unet"))
    print(f"{lora}: {len(load_file(lora))} tensors")
    print(f"without LoRA: largest relative difference {relative(ours(f'{args.model}/unet'), base):.2g}")
    for form in args.formats.split(","):
        file = folder / f"{form}.safetensors"
        calotype("lora", "convert", lora, "--model", args.model, "--format", form, "--out", file)
        model = unet(f"{args.model}/unet")
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(file), unet_config=model.config, return_lora_metadata=True)
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, adapter_name="lora", metadata=metadata)
        expected = theirs(model)
        calotype("--quiet", "lora", "merge", "--model", args.model, "--lora", file, "--out", folder / f"merged-{form}")
        merged = ours(folder / f"merged-{form}" / "unet")
        print(f"{form}: PEFT layers {sum(hasattr(m, 'lora_A') for m in model.modules())}, changes the output by "
              f"{relative(expected, base):.2g}, largest relative difference {relative(merged, expected):.2g}")


if __name__ == "__main__":
    main()
