"""Times the same checkpoint and picture through PyTorch and through `florence`, in turns.

    python tools/stages.py base|large --florence target/release/florence --work DIR

PyTorch runs float32 with scaled-dot-product attention, its fastest exact setting, with as many
threads as `florence`; both generate the same number of tokens. Every round measures each side
once; medians of the rounds are compared. Prints a table for docs/SPEED.md.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from PIL import Image

import fidelity
import reference


def pytorch(model, image, prompt, beams, tokens):
    """One whole answer, as a caller would ask for it; hooks see the two big stages pass."""
    marks, core = {}, model.model.model
    stages = {"vision": (core.vision_tower, core.multi_modal_projector), "encoder": 2 * (core.language_model.encoder,)}
    hooks = []
    for name, (first, last) in stages.items():
        def begin(*_args, name=name):
            marks[name] = -time.perf_counter()

        def end(*_args, name=name):
            marks[name] += time.perf_counter()
        hooks += [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    start = time.perf_counter()
    model.model.generate(
        **model.inputs(image, prompt), generation_config=model.config(beams, tokens, min_new_tokens=tokens))
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    marks["decoder_step"] = (total - marks["vision"] - marks["encoder"]) / tokens
    return {name: 1e3 * seconds for name, seconds in (marks | {"total": total}).items()}


def available(florence):
    """The precisions that the CPU has instructions for."""
    doctor = subprocess.run([florence, "doctor"], check=True, capture_output=True, text=True).stdout
    needs = {"f32": "", "int16": "avx2", "int8": "avx2", "bf16": "avx512bf16"}
    return [precision for precision, feature in needs.items() if feature in doctor]


def ours(args, directory, precision, beams):
    line = subprocess.run(
        [args.florence, "bench", "--model", directory, "--precision", precision, "--beams", str(beams), "--tokens",
         str(args.tokens), "--threads", str(args.threads), "--rounds", "1", "--json"],  # and one more to warm up
        check=True, capture_output=True, text=True).stdout
    stages = {name: figures["median"] for name, figures in json.loads(line)["stages_ms"].items()}
    # As for PyTorch: with the keys and values of the encoded picture, which are computed once.
    return stages | {"decoder_step": stages["decoder"] / args.tokens}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("shape", choices=fidelity.SHAPES)
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "models/tiny")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    precisions = available(args.florence)
    directory = fidelity.speed_checkpoint(args.work, args.shape, args.tokenizer)
    torch.set_num_threads(args.threads)
    model = reference.Reference(directory, attention="sdpa")
    image = Image.open(Path(__file__).parent.parent / "models/tiny/samples/shapes.png")
    names = ("vision", "encoder", "decoder_step", "total")
    for beams in (1, 3):
        rounds = {"PyTorch f32": []} | {precision: [] for precision in precisions}
        pytorch(model, image, "<OD>", beams, args.tokens)
        for _ in range(args.rounds):
            rounds["PyTorch f32"].append(pytorch(model, image, "<OD>", beams, args.tokens))
            for precision in precisions:
                rounds[precision].append(ours(args, directory, precision, beams))
        print(f"\n{args.shape} shape, {beams} beams, {args.tokens} tokens, {args.threads} threads, "
              f"medians of {args.rounds} rounds\n")
        print("| ms | " + " | ".join(rounds) + " |\n" + "|---" * (1 + len(rounds)) + "|")
        for name in names:
            medians = [statistics.median(times[name] for times in all_times) for all_times in rounds.values()]
            cells = [f"{medians[0]:.0f}"] + [f"{ms:.0f} ({medians[0] / ms:.1f}x)" for ms in medians[1:]]
            print(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
