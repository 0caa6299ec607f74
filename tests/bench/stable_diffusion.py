#!/usr/bin/env python3
"""Stable Diffusion 1.5 at full size with random weights: U-Net, autoencoder, text encoder and a whole picture in
diffusers and in Calotype, on the same files; largest differences, times and peak memory of both.

Never needed to build or test. In a throw-away environment (12 GB of memory, 5 GB of disk):
    python3 -m venv sd-env
    sd-env/bin/pip install torch diffusers transformers pillow
    sd-env/bin/python tests/bench/stable_diffusion.py --calotype build/bin/calotype --folder sd15 --json sd.json
The folder is made in the first run. Each program is a process of its own and they take turns; memory is the largest
resident set. Times are the fastest of a part's calls and of the rounds; of pictures, those of the whole program without
loading for diffusers and with loading and compiling for Calotype. CPU seconds are those of all threads, which other
programs on the machine disturb less than wall time. About eight minutes on two idle cores.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

COUNTS = {"unet": (859_520_964, 686), "vae": (83_653_863, 248), "text_encoder": (123_060_480, 196)}
PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse on the moon", "blurry"
TOKENIZER = pathlib.Path(__file__).parent.parent / "fixtures/clip/tokenizer"
# Largest difference that passes: of a part's output relative to its largest value, and of a pixel.
TOLERANCE, PIXELS = 2e-5, 2


def make(folder):
    """The diffusers folder, with weights scaled so that the noise it predicts and its pictures have contrast."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                                        projection_dim=768, bos_token_id=0, eos_token_id=2)).eval()
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4).eval()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    with torch.inference_mode():
        x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
        unet.conv_out.weight *= 1 / unet(x, 500, context).sample.std()
        vae.decoder.conv_out.weight *= 0.5 / vae.decode(x / 0.18215).sample.std()
        text.get_input_embeddings().weight *= 10
    for name, model in {"text_encoder": text, "vae": vae, "unet": unet}.items():
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters), len(parameters)
        assert count == COUNTS[name], (name, count)
        model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder / "tokenizer" / name)
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None}) + "\n")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "feature_extractor": [None, None],
        "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]}, indent=2) + "\n")


def make_inputs(folder):
    import torch
    from safetensors.torch import save_file
    torch.manual_seed(1)
    save_file({"sample": torch.randn(1, 4, 64, 64), "timestep": torch.tensor([801]),
               "encoder_hidden_states": torch.randn(1, 77, 768)}, folder / "unet-in.safetensors")
    save_file({"latents": torch.randn(1, 4, 64, 64) * 5}, folder / "vae-in.safetensors")
    save_file({"input_ids": torch.randint(0, 49407, (1, 77))}, folder / "text_encoder-in.safetensors")


def torch_part(folder, part, calls):
    """Runs a part in diffusers or transformers; writes its output and returns the times of its calls."""
    import torch
    from safetensors.torch import load_file, save_file
    inputs = load_file(folder / f"{part}-in.safetensors")
    if part == "unet":
        from diffusers import UNet2DConditionModel
        model = UNet2DConditionModel.from_pretrained(folder / part).eval()
        call = lambda: model(*inputs.values(), return_dict=False)[0]
        inputs = {k: inputs[k] for k in ("sample", "timestep", "encoder_hidden_states")}
    elif part == "vae":
        from diffusers import AutoencoderKL
        model = AutoencoderKL.from_pretrained(folder / part).eval()
        call = lambda: model.decode(inputs["latents"], return_dict=False)[0]
    else:
        from transformers import CLIPTextModel
        model = CLIPTextModel.from_pretrained(folder / part).eval()
        call = lambda: model(inputs["input_ids"]).last_hidden_state
    times, cpu = [], []
    with torch.inference_mode():
        for _ in range(calls):
            start, cpu_start = time.perf_counter(), time.process_time()
            out = call()
            times.append(time.perf_counter() - start), cpu.append(time.process_time() - cpu_start)
    save_file({"out": out.contiguous()}, folder / f"{part}-torch.safetensors")
    return dict(seconds=min(times), cpu_seconds=min(cpu))


def torch_picture(folder, args):
    import torch
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    start, cpu = time.perf_counter(), time.process_time()
    image = pipe(PROMPT, negative_prompt=NEGATIVE if args.guidance > 1 else None, num_inference_steps=args.steps,
                 guidance_scale=args.guidance, width=args.side, height=args.side,
                 generator=torch.Generator().manual_seed(args.seed)).images[0]
    row = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    image.save(folder / "torch.png")
    return row


def run(command, cwd=None):
    """Runs a program and returns its output, wall and CPU seconds and its largest resident set."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    return text, dict(seconds=time.perf_counter() - start, cpu_seconds=usage.ru_utime + usage.ru_stime,
                      peak_memory_bytes=usage.ru_maxrss * 1024)


def compare_counts(folder, args):
    """Parameters and tensors of the files, and what Calotype says of the folder."""
    info, _ = run([args.calotype, "info", folder])
    rows = []
    for part, name in (("unet", "U-Net"), ("vae", "autoencoder"), ("text_encoder", "text encoder")):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        with open(folder / part / f"{stem}.safetensors", "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [tensor["shape"] for key, tensor in header.items() if key != "__metadata__"]
        count = sum(math.prod(shape) for shape in shapes), len(shapes)
        line = next(line for line in info.splitlines() if line.strip().startswith(name + ":"))
        same = count == COUNTS[part] and f"{count[0]} parameters in {count[1]} tensors" in line
        print(f"{name}: {count[0]:,} parameters in {count[1]} tensors{'' if same else ', WRONG: ' + line}")
        rows.append(dict(what="counts", who=part, parameters=count[0], tensors=count[1], difference=int(not same),
                         tolerance=0))
    return rows


def compare_part(folder, part, args):
    from safetensors.numpy import load_file
    text, whole = run([sys.executable, __file__, "--part", part, "--folder", folder, "--calls", str(args.calls),
                       "--threads", str(args.threads)])
    rows = [dict(what=part, who="diffusers" if part != "text_encoder" else "transformers",
                 **json.loads(text.splitlines()[-1]), peak_memory_bytes=whole["peak_memory_bytes"])]
    expected = load_file(folder / f"{part}-torch.safetensors")["out"]
    for who, options in (("calotype", []), ("calotype, no Winograd", ["--winograd", "off"]),
                         ("calotype, eager", ["--backend", "eager"])):
        if (part == "text_encoder" and "Winograd" in who) or who not in args.who:
            continue
        _, whole = run([args.calotype, "unet", "--model", folder / part, "--inputs", folder / f"{part}-in.safetensors",
                        "--output", folder / "out.safetensors", "--json", folder / "out.json", "--repeat",
                        str(args.calls), "--threads", str(args.threads), *options])
        summary = json.loads((folder / "out.json").read_text())
        out = load_file(folder / "out.safetensors")["out"]
        assert out.shape == expected.shape, (part, out.shape, expected.shape)
        rows.append(dict(what=part, who=who, seconds=1e-3 * summary["fastest_ms"],
                         cpu_seconds=1e-3 * summary["median_cpu_ms"], compile_seconds=summary["compile_seconds"],
                         peak_memory_bytes=whole["peak_memory_bytes"], tolerance=TOLERANCE,
                         difference=float(abs(out - expected).max() / abs(expected).max())))
    return rows


def compare_picture(folder, args):
    import numpy
    from PIL import Image
    text, whole = run([sys.executable, __file__, "--part", "picture", "--folder", folder, "--steps", str(args.steps),
                       "--guidance", str(args.guidance), "--side", str(args.side), "--seed", str(args.seed),
                       "--threads", str(args.threads)])
    rows = [dict(what="picture", who="diffusers", **json.loads(text.splitlines()[-1]),
                 peak_memory_bytes=whole["peak_memory_bytes"])]
    expected = numpy.asarray(Image.open(folder / "torch.png")).astype(int)
    print(f"picture of diffusers: mean {expected.mean():.1f}, deviation {expected.std():.1f}, "
          f"{((expected == 0) | (expected == 255)).mean():.1%} of the values at the ends")
    for who, options in (("calotype", []), ("calotype, no Winograd", ["--winograd", "off"])):
        if who not in args.who:
            continue
        command = [args.calotype, "sample", "--model", folder, "--prompt", PROMPT, "--steps", str(args.steps),
                   "--guidance-scale", str(args.guidance), "--side", str(args.side), "--seed", str(args.seed), "--rng",
                   "torch", "--out", folder / f"calotype{len(rows)}.png", "--quiet", "--threads", str(args.threads)]
        if args.guidance > 1:
            command += ["--negative-prompt", NEGATIVE]
        _, row = run(command + options)
        out = numpy.asarray(Image.open(folder / f"calotype{len(rows)}.png")).astype(int)
        difference = abs(out - expected)
        rows.append(dict(what="picture", who=who, **row, difference=int(difference.max()),
                         differing_values=float((difference > 0).mean()),
                         tolerance=PIXELS))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype", help="the program")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for the model, 4.3 GB, and results")
    parser.add_argument("--what", default="text_encoder,vae,unet,picture", help="[all]")
    parser.add_argument("--who", default="calotype; calotype, no Winograd; calotype, eager", help="[all]")
    parser.add_argument("--calls", type=int, default=2, help="of a part, the fastest counts [2]")
    parser.add_argument("--rounds", type=int, default=1, help="of everything [1]")
    parser.add_argument("--steps", type=int, default=10, help="of the picture [10]")
    parser.add_argument("--guidance", type=float, default=7.5, help="[7.5]")
    parser.add_argument("--side", type=int, default=512, help="[512]")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all processors]")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.who = [who.strip() for who in args.who.split(";")]
    if args.part == "make":
        make(args.folder)
        return make_inputs(args.folder)
    if args.part:
        import torch
        torch.set_num_threads(args.threads)
        row = (torch_picture(args.folder, args) if args.part == "picture"
               else torch_part(args.folder, args.part, args.calls))
        row["peak_memory_bytes_self"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return print(json.dumps(row))
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model_index.json").exists():
        run([sys.executable, __file__, "--part", "make", "--folder", args.folder])
    rows = compare_counts(args.folder, args)
    fastest = {}  # (what, who) -> row
    for _ in range(args.rounds):
        for what in args.what.split(","):
            compare = compare_picture if what == "picture" else compare_part
            part = compare(args.folder, *([] if what == "picture" else [what]), args)
            print(f"{what:12} {'':22} {'seconds':>8} {'CPU s':>7} {'peak MB':>8} {'compile s':>9} {'difference':>10}")
            for row in part:
                difference, compiling = row.get("difference", ""), row.get("compile_seconds")
                print(f"{'':12} {row['who']:22} {row['seconds']:8.2f} {row['cpu_seconds']:7.1f} "
                      f"{1e-6 * row['peak_memory_bytes']:8.0f} {f'{compiling:.1f}' if compiling else '':>9} "
                      + (f"{difference:10.1e}" if isinstance(difference, float) else f"{difference:>10}"), flush=True)
                before = fastest.setdefault((what, row["who"]), row)
                for key in ("seconds", "cpu_seconds"):
                    before[key] = min(before[key], row[key])
                for key in ("peak_memory_bytes", "difference"):
                    if key in row:
                        before[key] = max(before[key], row[key])
            if args.json:
                args.json.write_text(json.dumps(dict(date=time.strftime("%Y-%m-%d"), command=sys.argv,
                                                     rows=rows + list(fastest.values())), indent=1) + "\n")
    rows += fastest.values()
    wrong = [row for row in rows if row.get("difference", 0) > row.get("tolerance", 0)]
    return f"{len(wrong)} results differ by more than they may" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
