"""Times base shape through `florence` and through the other runtimes of a CPU, in turns.

    python tools/peers.py --florence target/release/florence --work DIR

The same random checkpoint, picture, prompt and threads; every round measures each side once, each
after a call that is not counted, and medians of the rounds are compared. OpenVINO and ONNX Runtime
run the two big stages, exported through transformers and for the shapes of this picture; PyTorch
(scaled-dot-product attention) and `florence` also answer, with 3 beams. int8 of OpenVINO is NNCF's
post-training quantisation for transformers on a few of tools/scenes.py's pictures; int8 of ONNX
Runtime is its dynamic quantisation of the matrix products, which was no slower than static
quantisation in the encoder, faster in the vision tower, and closer to float32.

`florence` in int8 is there with its built-in plan, which names a part of the products, and with all of
them.

The second table compares outputs with PyTorch's in float32; the encoder reads what the side's own
vision tower saw. `florence` tells its encoder's cosine alone, against its own float32. Weights are
random, so they say what the numbers' width costs and nothing about answers.

What is exported and quantised stays in DIR/peers. Prints the tables for docs/SPEED.md.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fidelity
import reference
import scenes
import stages

ROOT = Path(__file__).parent.parent
PROMPT, BEAMS = "<OD>", 3
STAGES = ("vision", "encoder")
ROWS = {"vision": "vision tower and projector", "encoder": "encoder", "decoder_step": f"decoder step, {BEAMS} beams",
        "total": f"whole picture, {BEAMS} beams"}
FIRST_SEED, CALIBRATION = 920_000, 8
PACKAGES = ("torch", "transformers", "openvino", "nncf", "onnxruntime", "onnx")
PAUSE = 1.0


class Vision(torch.nn.Module):
    """Pixels to visual tokens."""

    def __init__(self, core):
        super().__init__()
        self.tower, self.projector = core.vision_tower, core.multi_modal_projector

    def forward(self, pixels):
        return self.projector(self.tower(pixels).last_hidden_state)


class Encoder(torch.nn.Module):
    """Visual tokens and the prompt's to what the decoder attends to."""

    def __init__(self, core):
        super().__init__()
        self.encoder = core.language_model.encoder

    def forward(self, embeddings):
        return self.encoder(inputs_embeds=embeddings).last_hidden_state


class Network:
    """The two big stages of a checkpoint in PyTorch, as functions of arrays."""

    def __init__(self, model):
        core = model.model.model
        self.model, self.dtype = model, model.model.dtype
        self.modules = {"vision": Vision(core).eval(), "encoder": Encoder(core).eval()}

    @torch.no_grad()
    def run(self, stage, array):
        return self.modules[stage](torch.from_numpy(array).to(self.dtype)).float().numpy()

    @torch.no_grad()
    def prompt(self):
        """The prompt's embeddings."""
        ids = torch.tensor([self.model.prompt_ids(PROMPT)])
        return self.model.model.get_input_embeddings()(ids).float().numpy()

    def inputs(self, image):
        """What the stages take of a picture."""
        pixels = self.model.pixels(image).numpy()
        return {"vision": pixels, "encoder": joined(self.run("vision", pixels), self.prompt())}


def joined(visual, prompt):
    return np.ascontiguousarray(np.concatenate([visual, prompt], 1))


class Models:
    """The files that the other runtimes run, made where they are missing."""

    def __init__(self, folder, network, inputs):
        self.folder, self.network, self.inputs = folder, network, inputs

    def kept(self, name, make):
        """The directory that `make` fills; one that was interrupted is made anew."""
        directory = self.folder / name
        if not directory.exists():
            unfinished = self.folder / f"{name}.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            print(f"making {directory}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):  # where progress belongs
                make(unfinished)
            unfinished.rename(directory)
        return directory

    def exported(self, stage):
        example = torch.from_numpy(self.inputs[stage])
        with torch.no_grad():
            return torch.export.export(self.network.modules[stage], (example,))

    @functools.cached_property
    def calibration(self):
        """The stages' inputs for pictures other than the one that is timed."""
        return [self.network.inputs(scenes.draw(scenes.make_scene(FIRST_SEED + i))) for i in range(CALIBRATION)]

    def openvino(self, stage):
        def make(directory):
            import openvino

            model = openvino.convert_model(self.exported(stage))
            model.reshape(list(self.inputs[stage].shape))
            openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
        return self.kept(f"openvino-{stage}", make) / "model.xml"

    def openvino_int8(self, stage):
        def make(directory):
            import nncf
            import openvino

            model = nncf.quantize(
                openvino.Core().read_model(self.openvino(stage)),
                nncf.Dataset([inputs[stage] for inputs in self.calibration]),
                model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
            openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
        return self.kept(f"openvino-{stage}-int8", make) / "model.xml"

    def onnx(self, stage):
        def make(directory):
            # Operations since 23 have attention as one.
            torch.onnx.export(
                self.exported(stage), (), directory / "model.onnx", dynamo=True, opset_version=23,
                input_names=["input"], output_names=["output"], verbose=False)
        return self.kept(f"onnx-{stage}", make) / "model.onnx"

    def onnx_int8(self, stage):
        def make(directory):
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                self.onnx(stage), directory / "model.onnx", op_types_to_quantize=["MatMul"], per_channel=True,
                weight_type=QuantType.QInt8)
        return self.kept(f"onnx-{stage}-int8", make) / "model.onnx"


def in_openvino(path, precision, threads):
    """A function of arrays that runs the model."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision})
    request = compiled.create_infer_request()
    return lambda array: request.infer([array], share_inputs=True, share_outputs=True)[0]


def in_onnxruntime(path, threads):
    """A function of arrays that runs the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda array: session.run(None, {"input": array})[0]


def runtimes(models, threads):
    """How each runtime loads a stage."""
    return {
        "OpenVINO f32": lambda stage: in_openvino(models.openvino(stage), "f32", threads),
        "OpenVINO bf16": lambda stage: in_openvino(models.openvino(stage), "bf16", threads),
        "OpenVINO int8": lambda stage: in_openvino(models.openvino_int8(stage), "f32", threads),
        "OpenVINO int8 and bf16": lambda stage: in_openvino(models.openvino_int8(stage), "bf16", threads),
        "ONNX Runtime f32": lambda stage: in_onnxruntime(models.onnx(stage), threads),
        "ONNX Runtime int8": lambda stage: in_onnxruntime(models.onnx_int8(stage), threads),
    }


def loaded(name, load, inputs, failed):
    """The stages that a runtime can run; what it cannot is told and marked."""
    runs = {}
    for stage in STAGES:
        try:
            run = load(stage)
            run(inputs[stage])
            runs[stage] = run
        except Exception as error:  # whatever a package raises, the table must name it
            failed.add((name, stage))
            print(f"{name}, {stage}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return runs


def timed(runs, inputs):
    """Milliseconds of each stage, after one call that is not counted."""
    times = {}
    for stage, run in runs.items():
        run(inputs[stage])
        start = time.perf_counter()
        run(inputs[stage])
        times[stage] = 1e3 * (time.perf_counter() - start)
    return times


def answered(model, image, tokens):
    """PyTorch's stages of one answer, after one that is not counted."""
    for _ in range(2):
        times = stages.pytorch(model, image, PROMPT, BEAMS, tokens)
    return times


def cosine(found, expected):
    found, expected = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return float(found @ expected / np.sqrt((found @ found) * (expected @ expected)))


def agreement(runs, network, inputs):
    """Cosines of a side's outputs to those of `network`."""
    outputs = {}
    if "vision" in runs:
        outputs["vision"] = runs["vision"](inputs["vision"]).copy()
    if len(runs) == len(STAGES):
        outputs["encoder"] = runs["encoder"](joined(outputs["vision"], network.prompt()))
    return {stage: cosine(output, network.run(stage, inputs[stage])) for stage, output in outputs.items()}


def our_agreement(args, directory, precision):
    line = subprocess.run(
        [args.florence, "bench", "--model", directory, "--precision", precision, "--threads", str(args.threads),
         "--cosine"], check=True, capture_output=True, text=True).stdout
    return {"encoder": float(re.search(r"to float32's ([0-9.]+)", line)[1])}


def everything_in_int8(directory, planned):
    """The same checkpoint with a plan that names every matrix; its packed weights tell their names."""
    planned.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        link = planned / file.name
        if not file.name.startswith("florence-") and not link.exists():
            link.symlink_to(file.resolve())
    with open(directory / "florence-packed-int8.safetensors", "rb") as packed:
        names = json.loads(packed.read(int.from_bytes(packed.read(8), "little")))
    weights = {file.name: file.stat().st_size for file in directory.glob("model*.safetensors")}
    int8 = sorted(name for name in names if name.endswith(".weight"))
    plan = {"format": "florence int8 plan 1", "weights": weights, "int8": int8, "measured": None}
    (planned / "florence-int8-plan.json").write_text(json.dumps(plan))
    return planned


def machine():
    """The CPU and the versions of the packages."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {"cpu": names[0] if names else platform.machine(), "versions": versions}


def table(corner, columns, rows, failed):
    """Prints rows of cells by column; what is not there failed or was not asked for."""
    print(f"\n| {corner} | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for name, cells in rows.items():
        filled = [cells.get(side, "failed" if (side, name) in failed else "-") for side in columns]
        print(f"| {ROWS[name]} | " + " | ".join(filled) + " |", flush=True)


def compared(name, rounds, peers):
    """The cells of a row: medians, and their ratio to the fastest peer's."""
    medians = {side: statistics.median(times[name] for times in all_times)
               for side, all_times in rounds.items() if all_times and name in all_times[0]}
    best = min(ms for side, ms in medians.items() if side in peers)
    return {side: f"{ms:.0f} ({ms / best:.2f}x)" for side, ms in medians.items()}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--tokenizer", type=Path, default=ROOT / "models/tiny")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--json", type=Path, help="a file for every round's figures, a line each as it comes")
    args = args.parse_args()
    sys.modules["openvino_telemetry"] = None  # through which OpenVINO and NNCF report their use
    directory = fidelity.speed_checkpoint(args.work, "base", args.tokenizer)
    torch.set_num_threads(args.threads)
    image = Image.open(ROOT / "models/tiny/samples/shapes.png")
    precisions = stages.available(args.florence)
    # Without instructions for it, bfloat16 is emulated and takes minutes.
    has_bf16 = "bf16" in precisions
    models = {"PyTorch f32": reference.Reference(directory, attention="sdpa")}
    network = Network(models["PyTorch f32"])
    inputs = network.inputs(image)
    if has_bf16:
        models["PyTorch bf16"] = reference.Reference(directory, attention="sdpa")
        models["PyTorch bf16"].model.bfloat16()

    failed, sides, cosines = set(), {}, {}
    for name, model in models.items():
        sides[name] = functools.partial(answered, model, image, args.tokens)
        own = Network(model)
        cosines[name] = agreement({stage: functools.partial(own.run, stage) for stage in STAGES}, network, inputs)
    for name, load in runtimes(Models(args.work / "peers", network, inputs), args.threads).items():
        if "bf16" in name and not has_bf16:
            continue
        runs = loaded(name, load, inputs, failed)
        sides[name] = functools.partial(timed, runs, inputs)
        cosines[name] = agreement(runs, network, inputs)
    peers = list(sides)

    def add_ours(name, checkpoint, precision):
        sides[name] = functools.partial(stages.ours, args, checkpoint, precision, BEAMS)
        cosines[name] = {} if precision == "f32" else our_agreement(args, checkpoint, precision)

    for precision in precisions:
        add_ours(f"florence {precision}", directory, precision)
    if "int8" in precisions:
        planned = everything_in_int8(directory, args.work / "peers/int8-everything")
        add_ours("florence int8 everywhere", planned, "int8")

    facts = machine()
    log = open(args.json or os.devnull, "w")
    print(json.dumps(facts | {"threads": args.threads, "tokens": args.tokens, "cosines": cosines,
                              "failed": sorted(failed)}), file=log, flush=True)
    rounds = {name: [] for name in sides}
    for i in range(args.rounds):
        for name, measure in sides.items():
            time.sleep(PAUSE)  # threads of the side before may still spin
            rounds[name].append(measure())
            print(json.dumps({"round": i, "side": name, "ms": rounds[name][-1]}), file=log, flush=True)

    print(f"\n{facts['cpu']}; " + ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
          + f"\nbase shape, {inputs['encoder'].shape[1]} tokens in the encoder, {args.tokens} tokens generated, "
          f"{args.threads} threads, medians of {args.rounds} rounds; in parentheses its share of the best peer's time")
    table("ms", sides, {name: compared(name, rounds, peers) for name in ROWS}, failed)
    print("\nCosine to PyTorch f32; florence's to its own f32")
    table("", sides, {stage: {name: f"{found[stage]:.6f}" for name, found in cosines.items() if stage in found}
                      for stage in STAGES}, failed)


if __name__ == "__main__":
    main()
