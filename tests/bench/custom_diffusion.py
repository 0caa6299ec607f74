#!/usr/bin/env python3
"""Checks that diffusers loads what `calotype train custom-diffusion` writes and draws the same, and the reverse.

Never needed to build or test. In a throw-away environment:
    python3 -m venv custom-env
    custom-env/bin/pip install torch diffusers transformers safetensors pillow
    custom-env/bin/python tests/bench/custom_diffusion.py --calotype build/bin/calotype --model FOLDER

--model is a folder of Stable Diffusion; without one tests/fixtures/stable_diffusion/model is taken. Trains a word and the
cross-attention for a few steps on random pictures, loads both into diffusers (load_attn_procs, load_textual_inversion)
and compares the pictures of one seed; then diffusers writes weights of its own (save_attn_procs) and Calotype reads
them. Exits with 1 if pictures differ by more than 1 of 255, or if the files change too little to tell.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
NOTHING = "nothing loaded"
PROMPT = "a photo of a <new1> cat"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype")
    parser.add_argument("--model", default="tests/fixtures/stable_diffusion/model")
    parser.add_argument("--resolution", type=int, default=80, help="pictures that are trained on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--options", default="--lr 1e-2 --batch-size 2 --sample-steps 0 --freeze-model crossattn")
    parser.add_argument("--folder", help="for what is written [a temporary one]")
    args = parser.parse_args()
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="calotype-custom-"))
    folder.mkdir(parents=True, exist_ok=True)

    def calotype(*command):
        subprocess.run([args.calotype, "--quiet", *map(str, command)], check=True, stdout=subprocess.DEVNULL)

    def pipeline():
        pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, feature_extractor=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def theirs(pipe):
        generator = torch.Generator().manual_seed(7)
        return pipe(PROMPT, num_inference_steps=8, guidance_scale=3, generator=generator, output_type="np").images[0]

    def ours(*more):
        out = folder / "ours.png"
        calotype("sample", "--model", args.model, "--prompt", PROMPT, "--steps", 8, "--guidance-scale", 3, "--seed", 7, "--rng",
                 "torch", "--winograd", "off", "--out", out, *more)
        return numpy.asarray(Image.open(out)).astype(numpy.float32)

    failures = []

    def compare(what, picture, reference, base):
        reference = (reference * 255).round()
        difference = numpy.abs(picture - reference).max()
        without = numpy.abs((base * 255).round() - reference).max()
        print(f"{what}: largest difference {difference:.0f} of 255; without the files it would be {without:.0f}")
        if difference > 1 or (what != NOTHING and without < 10):
            failures.append(what)

    base = theirs(pipeline())
    compare(NOTHING, ours(), base, base)

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(0)
    for i in range(4):
        shape = (args.resolution, args.resolution, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)).save(data / f"{i}.png")
    run = folder / "run"
    calotype("train", "custom-diffusion", "--model", args.model, "--data", data, "--instance-prompt", "photo of a <new1> cat",
             "--modifier-token", "<new1>", "--initializer-token", "cat", "--resolution", args.resolution, "--steps",
             args.steps, "--out", run, *args.options.split())
    pipe = pipeline()
    # Without _pipeline, diffusers 0.42 reads the file and sets nothing.
    pipe.unet.load_attn_procs(run, weight_name=WEIGHTS, _pipeline=pipe)
    pipe.load_textual_inversion(run, weight_name="<new1>.safetensors")
    compare("Calotype's files in diffusers", ours("--custom-diffusion", run), theirs(pipe), base)

    torch.manual_seed(1)
    pipe = pipeline()
    processors = {}
    for name, old in pipe.unet.attn_processors.items():
        module = pipe.unet.get_submodule(name.removesuffix(".processor"))
        cross = name.endswith("attn2.processor")
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=cross, train_q_out=cross, hidden_size=module.to_k.out_features,
            cross_attention_dim=module.to_k.in_features)
    pipe.unet.set_attn_processor(processors)
    saved = folder / "diffusers"
    pipe.unet.save_attn_procs(saved, safe_serialization=True)
    save_file({"<new1>": torch.randn(pipe.text_encoder.config.hidden_size) * 0.1}, saved / "<new1>.safetensors")
    pipe.load_textual_inversion(saved, weight_name="<new1>.safetensors")
    print(f"diffusers wrote {len(load_file(saved / WEIGHTS))} tensors, Calotype {len(load_file(run / WEIGHTS))}")
    compare("diffusers' files in Calotype", ours("--custom-diffusion", saved), theirs(pipe), base)
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))


if __name__ == "__main__":
    main()
