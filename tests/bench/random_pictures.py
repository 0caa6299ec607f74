#!/usr/bin/env python3
"""Draws with random options here and with diffusers and compares the pictures.

Never needed to build or test. In a throw-away environment (pillow 13: the order of resizing changed there):
    python3 -m venv pictures-env
    pictures-env/bin/pip install torch diffusers transformers "pillow>=13"
    pictures-env/bin/python tests/bench/random_pictures.py --calotype build/bin/calotype --count 100

The tiny model of tests/fixtures/stable_diffusion; text to image, image to image and inpainting, with U-Nets of four and
nine channels; all samplers, one and two prompts, generators for each picture and shared ones. What diffusers refuses must
be refused here too. Exits with 1 if a picture differs by more than 1 of 255.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
import diffusers
import numpy as np
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler,
                       StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline,
                       UNet2DConditionModel)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

fixtures = pathlib.Path(__file__).parent.parent.resolve() / "fixtures/stable_diffusion"
sde = {"algorithm_type": "sde-dpmsolver++"}
karras = {"use_karras_sigmas": True}
samplers = {"ddim": (DDIMScheduler, {}), "ddpm": (DDPMScheduler, {}), "pndm": (PNDMScheduler, {}),
            "euler": (EulerDiscreteScheduler, {}), "euler-karras": (EulerDiscreteScheduler, karras),
            "euler-a": (EulerAncestralDiscreteScheduler, {}), "dpm++-2m": (DPMSolverMultistepScheduler, {}),
            "dpm++-2m-karras": (DPMSolverMultistepScheduler, karras),
            "dpm++-2m-sde": (DPMSolverMultistepScheduler, sde),
            "dpm++-2m-sde-karras": (DPMSolverMultistepScheduler, {**sde, **karras})}
prompts = [["the cat"], ["the red cat", "lower"], ["", "the cat"], ["The CAT, red!! 3"]]


def choose(pick):
    guidance = pick([1.0, 0.5, 1.5, 7.5, 12.0])
    case = {"mode": pick(["text", "image", "inpaint", "inpaint9"]), "sampler": pick(list(samplers)),
            "steps": pick([1, 2, 3, 5, 7, 12, 20]), "rng": pick(["torch", "torch", "torch-batch"]),
            "prompts": pick(prompts), "guidance": guidance, "negative": pick(["", "low, red"]) if guidance > 1 else "",
            "clip_skip": pick([0, 0, 0, 1, 2]), "seed": pick(range(1000)), "size": pick([(64, 64), (48, 72), (72, 40)]),
            "strength": pick([0.05, 0.2, 0.31, 0.5, 0.58, 0.75, 0.8, 0.99, 1.0])}
    case["eta"] = pick([0, 0.5, 1.0]) if case["sampler"] == "ddim" else 0
    case["rescale"] = pick([0, 0.7]) if guidance > 1 and case["mode"] == "text" else 0
    return case


def expected(case, parts, inpaint, schedule, picture, mask):
    kind, (scheduler, extra), count = case["mode"], samplers[case["sampler"]], len(case["prompts"])
    parts = {**parts, "scheduler": scheduler.from_config(schedule, **extra), "safety_checker": None,
             "feature_extractor": None, "requires_safety_checker": False}
    if kind == "inpaint9":
        parts["unet"] = inpaint
    pipe = {"text": StableDiffusionPipeline, "image": StableDiffusionImg2ImgPipeline}.get(
        kind, StableDiffusionInpaintPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    own = case["rng"] == "torch"  # a generator for each picture
    generators = [torch.Generator().manual_seed(case["seed"]) for _ in range(count if own else 1)]
    arguments = {"prompt": case["prompts"], "num_inference_steps": case["steps"], "guidance_scale": case["guidance"],
                 "eta": case["eta"], "clip_skip": case["clip_skip"] or None, "output_type": "np",
                 "generator": generators if len(generators) > 1 else generators[0]}
    if case["negative"]:
        arguments["negative_prompt"] = [case["negative"]] * count
    if kind == "text":
        arguments["guidance_rescale"] = case["rescale"]
    else:
        arguments.update(strength=case["strength"], image=[picture] * count if own else picture)
    if kind.startswith("inpaint"):
        arguments["mask_image"] = [mask] * count if own else mask
    if kind != "image":
        arguments["width"], arguments["height"] = case["size"]
    return pipe(**arguments).images


def command(case, program, model, out):
    kind = case["mode"]
    options = {"model": model, "backend": "eager", "rng": case["rng"], "seed": case["seed"], "steps": case["steps"],
               "guidance-scale": case["guidance"], "sampler": case["sampler"], "eta": case["eta"],
               "clip-skip": case["clip_skip"], "batch-size": 8, "out": out, "threads": 1}
    if case["negative"]:
        options["negative-prompt"] = case["negative"]
    if case["rescale"]:
        options["guidance-rescale"] = case["rescale"]
    if kind != "text":
        options.update({"init-image": fixtures / "init.png", "strength": case["strength"]})
    if kind.startswith("inpaint"):
        options["mask-image"] = fixtures / "mask.png"
    if kind != "image":
        options["width"], options["height"] = case["size"]
    words = [program, "sample", "-q"]
    for name, value in [*options.items(), *(("prompt", p) for p in case["prompts"])]:
        words += ["--" + name, str(value)]
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    # diffusers 0.42 looks for the layers of transformers 4 when it skips some.
    CLIPTextModel.text_model = property(lambda self: self)
    model = fixtures / "model"
    parts = {"unet": UNet2DConditionModel.from_pretrained(model / "unet"),
             "vae": AutoencoderKL.from_pretrained(model / "vae"),
             "text_encoder": CLIPTextModel.from_pretrained(model / "text_encoder"),
             "tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer")}
    inpaint = UNet2DConditionModel.from_pretrained(fixtures / "inpaint/unet")
    schedule = PNDMScheduler.from_pretrained(model / "scheduler").config
    picture, mask = Image.open(fixtures / "init.png").convert("RGB"), Image.open(fixtures / "mask.png")
    generator, worst, drawn, refused, failed = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="calotype-pictures-") as folder:
        nine = pathlib.Path(folder) / "inpaint"
        shutil.copytree(model, nine)
        shutil.copytree(fixtures / "inpaint", nine, dirs_exist_ok=True)
        for _ in range(args.count):
            case = choose(generator.choice)
            try:
                wanted = expected(case, parts, inpaint, schedule, picture, mask)
            except (ValueError, RuntimeError):  # none of the steps is left
                wanted = None
            ours = subprocess.run(command(case, args.calotype, nine if case["mode"] == "inpaint9" else model,
                                          pathlib.Path(folder) / "x.png"), capture_output=True, text=True)
            if wanted is None and ours.returncode == 2:
                refused += 1
                continue
            difference = 255
            if wanted is not None and ours.returncode == 0:
                pictures = [np.asarray(Image.open(f).convert("RGB")).astype(int) for f in ours.stdout.split()]
                difference = max(abs(a - (b * 255).round()).max() for a, b in zip(pictures, wanted, strict=True))
            drawn, worst = drawn + 1, max(worst, difference)
            if difference > 1:
                failed += 1
                print(f"{difference:.0f} of 255: {json.dumps(case)} {ours.stderr}")
    print(f"{drawn} drawn, {refused} refused by both; largest difference {worst:.0f} of 255")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
