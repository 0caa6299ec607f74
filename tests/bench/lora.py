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

--speed SIDE instead trains on a few random pictures of that size, with and without gradient checkpointing, here and in
a loop of PyTorch with PEFT as diffusers' train_text_to_image_lora.py has it (float32, AdamW, batch 1, rank 4, cached
latents and embeddings), each in a process of its own: seconds of the fastest step and the largest resident set.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def peft_steps(args):
    """The steps of PyTorch with PEFT; prints the seconds of each."""
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    unet = UNet2DConditionModel.from_pretrained(f"{args.model}/unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian",
                                target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    scheduler = DDPMScheduler.from_pretrained(f"{args.model}/scheduler")
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    times = []
    for _ in range(args.steps):
        latents, context = torch.randn(1, 4, args.speed // 8, args.speed // 8), torch.randn(1, 77, 768)
        start = time.perf_counter()
        noise, timestep = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        loss = F.mse_loss(unet(scheduler.add_noise(latents, noise, timestep), timestep, context).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps(times))


def speed(args, folder):
    import numpy
    from PIL import Image
    data = folder / "data"
    data.mkdir(exist_ok=True)
    lines = []
    for i in range(4):
        pixels = numpy.random.default_rng(i).integers(0, 256, (args.speed, args.speed, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a picture {i}"}))
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    def run(command):
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        return text, usage.ru_maxrss * 1024

    for checkpointing in (False, True):
        option = ["--checkpointing"] if checkpointing else []
        text, memory = run([sys.executable, __file__, "--model", args.model, "--speed", args.speed, "--steps", args.steps,
                            "--torch-steps", *option])
        rows = [("PyTorch, PEFT", json.loads(text.splitlines()[-1]), memory)]
        for backend in ("eager", "jit"):
            out = folder / f"speed{int(checkpointing)}-{backend}"
            _, memory = run([args.calotype, "--quiet", "train", "lora", "--model", args.model, "--data", data,
                             "--out", out, "--resolution", args.speed, "--rank", 4, "--batch-size", 1,
                             "--steps", args.steps, "--cache-latents", "--sample-steps", 0, "--backend", backend,
                             *(["--gradient-checkpointing"] if checkpointing else [])])
            steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            since_start = [0, *(step["seconds"] for step in steps if "loss" in step)]
            times = [b - a for a, b in zip(since_start, since_start[1:])]
            rows.append((f"Calotype, {backend}", times, memory))
        for who, times, memory in rows:
            print(f"{args.speed} pixels, checkpointing {'on ' if checkpointing else 'off'}: {who:15} "
                  f"{min(times):6.2f} s a step (first {times[0]:.2f}), {1e-9 * memory:.2f} GB", flush=True)


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
    parser.add_argument("--speed", type=int, metavar="SIDE", help="time training at this size instead; use --steps 3")
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch-steps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_steps:
        return peft_steps(args)
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="calotype-lora-"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.speed:
        return speed(args, folder)

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
