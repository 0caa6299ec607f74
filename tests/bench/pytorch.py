#!/usr/bin/env python3
"""Times the toy16 U-Net and its training step in PyTorch eager and in Calotype, in turn on one machine.

Never needed to build or test. In a throw-away environment:
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch diffusers
    /tmp/peers/bin/python tests/bench/pytorch.py --calotype build/bin/calotype
With --model RUN it also loads the U-Net folder of a Calotype run in diffusers, calls it on random inputs
and compares with what `calotype unet` gives for the same inputs.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

TOY16 = dict(
    sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
    attention_head_dim=4, norm_num_groups=8)


def torch_times(seconds):
    """Fastest call in milliseconds, as `calotype bench` reports: unet at batch 1 and 64, and one training step at batch 64."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**TOY16)

    def fastest(call):
        call(), call()
        times, start = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return min(times)

    result = {}
    for batch in (1, 64):
        x, c = torch.randn(batch, 3, 16, 16), torch.randn(batch, 8, 64)
        t = torch.randint(0, 1000, (batch,))
        with torch.inference_mode():
            result[f"unet {batch}"] = fastest(lambda: model(x, t, c).sample)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    target = torch.randn_like(x)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x, t, c).sample, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    result["train 64"] = fastest(step)
    return result


def calotype_times(program, seconds):
    """{"unet 1": (eager ms, jit ms), ...} from `calotype bench`."""
    text = subprocess.run(
        [program, "bench", "--unet", "toy16", "--batch", "1,64", "--train", "--seconds", str(seconds)],
        check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"^\s*(unet|train)\s+(\d+)\s+([\d.]+)\s+([\d.]+)", text, re.M)
    return {f"{what} {batch}": (float(eager), float(jit)) for what, batch, eager, jit in rows}


def compare_model(program, run):
    """Largest difference of the U-Net folder `run`/unet between diffusers and Calotype."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    folder = pathlib.Path(run) / "unet"
    model = UNet2DConditionModel.from_pretrained(folder)
    torch.manual_seed(1)
    config = model.config
    inputs = {
        "sample": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.tensor([17, 803]),
        "encoder_hidden_states": torch.randn(2, 8, config.cross_attention_dim)}
    with torch.inference_mode():
        expected = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample
    result = {}
    with tempfile.TemporaryDirectory() as temp:
        save_file(inputs, f"{temp}/in.safetensors")
        for backend in ("eager", "jit"):
            subprocess.run([program, "unet", "--model", str(folder), "--inputs", f"{temp}/in.safetensors",
                            "--output", f"{temp}/out.safetensors", "--backend", backend], check=True,
                           stdout=subprocess.DEVNULL)
            out = load_file(f"{temp}/out.safetensors")["out"]
            result[backend] = ((out - expected).abs().max() / expected.abs().max()).item()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--model", help="run folder whose unet/ diffusers shall load")
    parser.add_argument("--torch-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_only:
        print(json.dumps(torch_times(args.seconds)))
        return
    if args.model:
        print("largest difference from diffusers, relative to the largest output:",
              compare_model(args.calotype, args.model))
        return
    torch_runs, calotype_runs = [], []
    for _ in range(args.rounds):  # processes of their own, in turn: no thread pools side by side
        text = subprocess.run([sys.executable, os.path.abspath(__file__), "--torch-only", "--seconds",
                               str(args.seconds)], check=True, capture_output=True, text=True).stdout
        torch_runs.append(json.loads(text.splitlines()[-1]))
        calotype_runs.append(calotype_times(args.calotype, args.seconds))
    print(f"{'':>10} {'PyTorch ms':>11} {'eager ms':>9} {'jit ms':>8} {'eager/PyTorch':>14} {'PyTorch/jit':>12} "
          f"{'eager/jit':>10}")
    for what in torch_runs[0]:
        peer = statistics.median(run[what] for run in torch_runs)
        eager = statistics.median(run[what][0] for run in calotype_runs if what in run)
        jit = statistics.median(run[what][1] for run in calotype_runs if what in run)
        print(f"{what:>10} {peer:>11.2f} {eager:>9.2f} {jit:>8.2f} {eager / peer:>14.2f} {peer / jit:>12.2f} "
              f"{eager / jit:>10.2f}")


if __name__ == "__main__":
    main()
