#!/usr/bin/env python3
"""Times U-Nets in PyTorch (eager, channels_last, torch.compile), ONNX Runtime, OpenVINO and Calotype, in turn
on one machine, on the same weights and inputs, and checks that all outputs agree.

Never needed to build or test. In a throw-away environment:
    python3 -m venv peers-env
    peers-env/bin/pip install torch diffusers onnx onnxscript onnxruntime openvino
    peers-env/bin/python tests/bench/peers.py --calotype build/bin/calotype --models A,B --json peers.json
"compile s" is that of the first start, "again" that of the last (with a compile cache, where there is one).
Each program is a process of its own that sleeps while another one is timed; the large model C is held by one
process at a time. Exported models stay in --folder, so that a second run starts sooner.
--train times a training step instead, --model RUN checks the U-Net of a Calotype run against diffusers.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SMALL = dict(sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, cross_attention_dim=64,
             attention_head_dim=4, norm_num_groups=8)
MODELS = {
    "A": dict(tokens=8, config=SMALL | dict(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))),
    "B": dict(tokens=16, config=SMALL | dict(
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))),
    "C": dict(tokens=77, config=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)),
}
# Largest difference from PyTorch that passes, relative to the largest output.
TOLERANCE = {"calotype": 5e-5, "calotype-direct": 1e-5, "calotype-eager": 1e-5}
PEERS = {  # name -> packages it needs
    "eager": ["torch"], "channels_last": ["torch"], "compile": ["torch"],
    "onnxruntime": ["onnxruntime", "onnxscript"], "openvino": ["openvino"],
    "calotype": [], "calotype-direct": [], "calotype-eager": []}
CALOTYPE_OPTIONS = {"calotype": [], "calotype-direct": ["--winograd", "off"],
                    "calotype-eager": ["--backend", "eager"]}


def load_unet(folder):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def load_inputs(path):
    from safetensors.torch import load_file
    tensors = load_file(path)
    return tensors["sample"], tensors["timestep"], tensors["encoder_hidden_states"]


def make_model(folder, spec):
    """The diffusers folder of a model with random weights."""
    import torch
    from diffusers import UNet2DConditionModel
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        UNet2DConditionModel(**spec["config"]).save_pretrained(folder)


def make_inputs(path, spec, batch):
    import torch
    from safetensors.torch import save_file
    torch.manual_seed(1)
    side, channels = spec["config"]["sample_size"], spec["config"].get("in_channels", 4)
    save_file({
        "sample": torch.randn(batch, channels, side, side),
        "timestep": torch.tensor([17, 803, 441, 999][:batch]) if batch <= 4 else torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, spec["tokens"], spec["config"]["cross_attention_dim"])}, path)


# ------------------------------------------------------------------------------------- workers


def export(kind, folder, inputs, target):
    """Writes the model for ONNX Runtime or OpenVINO, with the shapes of `inputs`."""
    import torch
    unet, example = load_unet(folder), load_inputs(inputs)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    plain = Plain().eval()
    with torch.inference_mode():
        if kind == "onnxruntime":
            torch.onnx.export(plain, example, target, dynamo=True, external_data=True,
                              input_names=["sample", "timestep", "encoder_hidden_states"], output_names=["out"])
        else:
            import openvino
            model = openvino.convert_model(plain, example_input=example, input=[list(x.shape) for x in example])
            openvino.save_model(model, target, compress_to_fp16=False)


def import_packages(kind):
    for package in PEERS[kind] + (["diffusers"] if "torch" in PEERS[kind] else []):
        if not package.startswith("onnxs"):  # needed for the export only
            importlib.import_module(package)


def make_call(kind, folder, inputs, exported, threads):
    """Two functions: one loads the model, one makes what it gave a call that returns a NumPy array."""
    if "torch" in PEERS[kind]:
        import torch
        torch.set_num_threads(threads)
        x, t, c = load_inputs(inputs)

        def prepare(unet):
            sample = x
            if kind == "channels_last":
                unet, sample = unet.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            if kind == "compile":
                unet = torch.compile(unet)

            def call():
                with torch.inference_mode():
                    return unet(sample, t, c, return_dict=False)[0].contiguous().numpy()
            return call
        return lambda: load_unet(folder), prepare
    from safetensors.numpy import load_file
    tensors = load_file(inputs)
    if kind == "onnxruntime":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", "1")  # spin within a call only

        def open_session(path):  # reads the file, too
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return lambda: session.run(None, tensors)[0]
        return lambda: exported, open_session
    import openvino
    core = openvino.Core()

    def compile_model(model):
        compiled = core.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
        request = compiled.create_infer_request()
        arguments = [tensors[name] for name in ("sample", "timestep", "encoder_hidden_states")]
        return lambda: request.infer(arguments)[0]
    return lambda: core.read_model(exported), compile_model


def peak_memory():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def say(document):
    print(json.dumps(document), flush=True)


def work(args):
    """A resident peer: after loading it obeys lines "run SECONDS", as `calotype unet --on-demand` does."""
    from safetensors.numpy import save_file
    import_packages(args.worker)
    load, prepare = make_call(args.worker, args.folder, args.inputs, args.exported, args.threads)
    loaded, load_seconds = timed(load)
    call, compile_seconds = timed(lambda: prepare(loaded))
    output, first = timed(call)
    second = timed(call)[1]
    save_file({"out": output.copy()}, args.output)
    # What is slower at the first call is compiling and packing, too.
    say({"load_seconds": load_seconds, "compile_seconds": compile_seconds + max(first - second, 0),
         "peak_memory_bytes": peak_memory()})
    for line in sys.stdin:
        seconds, ms, cpu = float(line.split()[1]), [], []
        while not ms or sum(ms) < 1e3 * seconds:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            call()
            ms.append(1e3 * (time.perf_counter() - begin))
            cpu.append(1e3 * (time.process_time() - begin_cpu))
        say({"ms": ms, "cpu_ms": cpu, "peak_memory_bytes": peak_memory()})


class Worker:
    """A running peer or Calotype, seen from the process that gives the turns."""

    def __init__(self, kind, args, folder, inputs, output, exported, cache):
        if kind.startswith("calotype"):
            command = [args.calotype, "unet", "--model", folder, "--inputs", inputs, "--output", output,
                       "--threads", str(args.threads), "--on-demand"] + CALOTYPE_OPTIONS[kind]
        else:
            command = [sys.executable, os.path.abspath(__file__), "--worker", kind, "--folder", folder,
                       "--inputs", inputs, "--output", output, "--exported", exported, "--threads", str(args.threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "XDG_CACHE_HOME": str(cache)}
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)
        self.start = self.answer()

    def answer(self):
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}")

    def run(self, seconds):
        self.process.stdin.write(f"run {seconds}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        if self.process.wait() != 0:
            raise RuntimeError(f"{self.process.args} ended with code {self.process.returncode}")


# --------------------------------------------------------------------------------------- turns


def self_call(*arguments):
    subprocess.run([sys.executable, os.path.abspath(__file__), *map(str, arguments)], check=True,
                   stdout=subprocess.DEVNULL, stderr=None)


def fma_peak(args):
    """GFLOP/s of the FMA units on the threads in use, and the processor's name."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([args.calotype, "bench", "--unet", "toy16", "--batch", "1", "--seconds", "0", "--threads",
                        str(args.threads), "--json", file.name], check=True, stdout=subprocess.DEVNULL)
        report = json.load(open(file.name))
    return report["peak_gflops"], report["processor"]


def compare(name, batch, args, peers):
    """Rows of one model at one batch size: all programs in turn, `args.rounds` times."""
    import numpy
    from safetensors.numpy import load_file
    root = pathlib.Path(args.folder) / name
    root.mkdir(parents=True, exist_ok=True)
    spec, folder, inputs = MODELS[name], root / "unet", root / f"inputs-{batch}.safetensors"
    if not folder.exists() or not inputs.exists():
        self_call("--make", name, "--folder", root, "--batch", batch)  # elsewhere: this process stays small
    one_at_a_time = (folder / "diffusion_pytorch_model.safetensors").stat().st_size > 1 << 30

    def launch(kind):
        exported = root / {"onnxruntime": f"{batch}.onnx", "openvino": f"{batch}.xml"}.get(kind, "none")
        if kind in ("onnxruntime", "openvino") and not exported.exists():
            self_call("--export", kind, "--folder", folder, "--inputs", inputs, "--exported", exported)
        worker = Worker(kind, args, folder, inputs, root / f"out-{kind}-{batch}.safetensors", exported,
                        root / f"cache-{kind}-{batch}")
        row = rows[kind]
        row["flop"] = worker.start.get("flop")
        row["load_seconds"].append(worker.start["load_seconds"])
        row["compile_seconds"].append(worker.start["compile_seconds"])
        row["peak_memory_bytes"] = max(row["peak_memory_bytes"], worker.start["peak_memory_bytes"])
        return worker

    rows = {kind: dict(peer=kind, ms=[], cpu_ms=[], load_seconds=[], compile_seconds=[], peak_memory_bytes=0)
            for kind in peers}

    def turn(kind, worker):
        time.sleep(0.1)  # until the threads of the one before sleep
        result = worker.run(args.seconds)
        rows[kind]["ms"] += result["ms"]
        rows[kind]["cpu_ms"] += result["cpu_ms"]
        rows[kind]["peak_memory_bytes"] = max(rows[kind]["peak_memory_bytes"], result["peak_memory_bytes"])

    for kind in peers:  # the first launch compiles without a cache
        shutil.rmtree(root / f"cache-{kind}-{batch}", ignore_errors=True)
    workers = {}
    try:
        if not one_at_a_time:
            for kind in peers:
                workers[kind] = launch(kind)
                if kind in ("calotype", "calotype-direct"):  # the second with one
                    workers[kind].close()
                    workers[kind] = launch(kind)
        for _ in range(args.rounds):
            for kind in peers:
                if one_at_a_time:
                    workers = {kind: launch(kind)}
                turn(kind, workers[kind])
                if one_at_a_time:
                    workers.pop(kind).close()
        for worker in workers.values():
            worker.close()
        workers = {}
    finally:
        for worker in workers.values():
            worker.process.kill()

    reference = load_file(root / f"out-eager-{batch}.safetensors")["out"]
    flop = next((row["flop"] for row in rows.values() if row["flop"]), None)
    result = []
    for kind, row in rows.items():
        out = load_file(root / f"out-{kind}-{batch}.safetensors")["out"]
        result.append(dict(
            model=name, batch=batch, peer=kind, median_ms=statistics.median(row["ms"]), fastest_ms=min(row["ms"]),
            median_cpu_ms=statistics.median(row["cpu_ms"]), calls=len(row["ms"]),
            load_seconds=statistics.median(row["load_seconds"]),
            compile_seconds=row["compile_seconds"][0], compile_again_seconds=row["compile_seconds"][-1],
            peak_memory_bytes=row["peak_memory_bytes"],
            flop=flop, difference=float(numpy.abs(out - reference).max() / numpy.abs(reference).max()),
            tolerance=TOLERANCE.get(kind, 1e-4)))
    return result


def show(rows, peak):
    own = next((row for row in rows if row["peer"] == "calotype"), None)
    peers = [row for row in rows if not row["peer"].startswith("calotype")]
    print(f"{rows[0]['model']}, batch {rows[0]['batch']}"
          + (f", {1e-9 * own['flop']:.3f} GFLOP" if own else ""))
    print(f"  {'':16} {'median ms':>10} {'fastest':>9} {'CPU ms':>9} {'/ calotype':>10} {'GFLOP/s':>8} {'% peak':>6} "
          f"{'load s':>7} {'compile s':>9} {'again':>6} {'peak MB':>8} {'difference':>10}")
    for row in rows:
        ratio = f"{row['median_ms'] / own['median_ms']:.2f}" if own else ""
        rate = 1e-6 * row["flop"] / row["median_ms"] if row["flop"] else 0
        print(f"  {row['peer']:16} {row['median_ms']:10.3f} {row['fastest_ms']:9.3f} {row['median_cpu_ms']:9.3f} "
              f"{ratio:>10} {rate:8.1f} {100 * rate / peak:6.1f} {row['load_seconds']:7.2f} "
              f"{row['compile_seconds']:9.2f} {row['compile_again_seconds']:6.2f} "
              f"{1e-6 * row['peak_memory_bytes']:8.0f} {row['difference']:10.1e}"
              + ("" if row["difference"] <= row["tolerance"] else "  DIFFERS"))
    if own and peers:
        best = min(peers, key=lambda row: row["median_ms"])
        print(f"  calotype is {best['median_ms'] / own['median_ms']:.2f} times as fast as {best['peer']}, the fastest "
              f"peer (by fastest calls {best['fastest_ms'] / own['fastest_ms']:.2f})", flush=True)


# ------------------------------------------------------------------------- training and files


def torch_training_step(seconds, threads):
    """Fastest AdamW step of the U-Net A at batch 64, in milliseconds."""
    import torch
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = UNet2DConditionModel(**MODELS["A"]["config"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    x, c, t = torch.randn(64, 3, 16, 16), torch.randn(64, 8, 64), torch.randint(0, 1000, (64,))
    target = torch.randn_like(x)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x, t, c).sample, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step(), step()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def compare_training(args):
    """One training step of toy16 with AdamW, batch 64, the fastest call of each; processes in turn."""
    torch_ms, rows = [], []
    for _ in range(args.rounds):
        text = subprocess.run([sys.executable, os.path.abspath(__file__), "--torch-training", "--seconds",
                               str(args.seconds), "--threads", str(args.threads)], check=True, capture_output=True,
                              text=True).stdout
        torch_ms.append(json.loads(text.splitlines()[-1])["ms"])
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run([args.calotype, "bench", "--unet", "toy16", "--batch", "64", "--train", "--only", "train",
                            "--seconds", str(args.seconds), "--threads", str(args.threads), "--json", file.name],
                           check=True, stdout=subprocess.DEVNULL)
            rows.append(json.load(open(file.name))["rows"][0])
    result = dict(model="toy16", batch=64, what="training step", torch_ms=statistics.median(torch_ms),
                  eager_ms=statistics.median(row["eager_ms"] for row in rows),
                  jit_ms=statistics.median(row["jit_ms"] for row in rows))
    print(f"training step of toy16, AdamW, batch 64: PyTorch {result['torch_ms']:.1f} ms, Calotype eager "
          f"{result['eager_ms']:.1f} ms, compiled {result['jit_ms']:.1f} ms "
          f"(PyTorch / compiled {result['torch_ms'] / result['jit_ms']:.2f})")
    return [result]


def check_model(args):
    """Largest difference of the U-Net folder of a run between diffusers and Calotype."""
    import torch
    from safetensors.torch import load_file, save_file
    folder = pathlib.Path(args.model) / "unet"
    unet = load_unet(folder)
    torch.manual_seed(1)
    config, rows = unet.config, []
    inputs = {"sample": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
              "timestep": torch.tensor([17, 803]),
              "encoder_hidden_states": torch.randn(2, 8, config.cross_attention_dim)}
    with torch.inference_mode():
        expected = unet(*inputs.values(), return_dict=False)[0]
    with tempfile.TemporaryDirectory() as temp:
        save_file(inputs, f"{temp}/in.safetensors")
        for kind, options in CALOTYPE_OPTIONS.items():
            subprocess.run([args.calotype, "unet", "--model", str(folder), "--inputs", f"{temp}/in.safetensors",
                            "--output", f"{temp}/out.safetensors", *options], check=True, stdout=subprocess.DEVNULL)
            out = load_file(f"{temp}/out.safetensors")["out"]
            rows.append(dict(model=str(folder), peer=kind, tolerance=TOLERANCE[kind],
                             difference=((out - expected).abs().max() / expected.abs().max()).item()))
            print(f"{kind:16} differs from diffusers by {rows[-1]['difference']:.1e} of the largest output")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calotype", default="build/bin/calotype", help="the program")
    parser.add_argument("--models", default="A,B", help="of A, B, C [A,B]; C takes 10 GB and many minutes")
    parser.add_argument("--batch", default="1,2", help="[1,2]")
    parser.add_argument("--peers", default=",".join(p for p in PEERS if p != "compile"),
                        help=f"of {', '.join(PEERS)} [all but compile, which takes minutes]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program [3]")
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls in each turn [2]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all processors]")
    parser.add_argument("--folder", help="for models and exports [a temporary folder]")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--train", action="store_true", help="time a training step of PyTorch and Calotype instead")
    parser.add_argument("--model", help="run folder whose unet/ diffusers shall load instead")
    for hidden in ("--worker", "--export", "--make", "--inputs", "--output", "--exported"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--torch-training", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.export:
        return export(args.export, args.folder, args.inputs, args.exported)
    if args.make:
        root = pathlib.Path(args.folder)
        make_model(root / "unet", MODELS[args.make])
        return make_inputs(root / f"inputs-{args.batch}.safetensors", MODELS[args.make], int(args.batch))
    if args.torch_training:
        return say({"ms": torch_training_step(args.seconds, args.threads)})

    peers = args.peers.split(",")
    if unknown := [p for p in peers if p not in PEERS] + [m for m in args.models.split(",") if m not in MODELS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if "eager" not in peers:
        parser.error("--peers must have eager: its output is what the others must agree with")
    document = dict(date=time.strftime("%Y-%m-%d"), threads=args.threads, command=sys.argv)
    if args.model:
        rows = check_model(args)
    elif args.train:
        rows = compare_training(args)
    else:
        missing = {p: [m for m in PEERS[p] if not importlib.util.find_spec(m)] for p in peers}
        for peer in [p for p in peers if missing[p]]:
            print(f"{peer} is left out: {', '.join(missing[peer])} not installed")
        peers = [p for p in peers if not missing[p]]
        versions = {}
        for package in sorted({m for p in peers for m in PEERS[p]}):
            versions[package] = importlib.metadata.version(package)
        peak, processor = fma_peak(args)
        document |= dict(processor=processor, peak_gflops=peak, versions=versions)
        print(f"{processor}, {args.threads} threads, FMA peak {peak:.1f} GFLOP/s; "
              + ", ".join(f"{package} {version}" for package, version in versions.items()), flush=True)
        rows = []
        with tempfile.TemporaryDirectory() as temp:
            args.folder = args.folder or temp
            for name in args.models.split(","):
                for batch in map(int, args.batch.split(",")):
                    part = compare(name, batch, args, peers)
                    show(part, peak)
                    rows += part
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(document | dict(rows=rows), indent=1) + "\n")
    wrong = [row for row in rows if not row.get("difference", 0) <= row.get("tolerance", 0)]
    return f"{len(wrong)} outputs differ by more than they may" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
