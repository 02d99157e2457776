"""Pictures a second of `florence label` beside a loop around transformers, in turns.

    python tools/label_speed.py models/tiny|base --florence target/release/florence --work DIR

The same checkpoint, pictures, prompt, beams and threads; both read files and write JSON Lines. The
loop is what people write: open, preprocess, generate, post-process, batch 1 and larger batches, of
which the best counts. Loading the model is not counted. Prints a table for docs/LABEL.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import torch
from PIL import Image

import fidelity
import reference
import scenes

ROOT = Path(__file__).parent.parent
PROMPT = "<OD>"
FIRST_SEED = 910_000


def pictures(work, count):
    """Generated pictures, drawn once."""
    folder = work / f"label-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:05}.jpg"
        if not path.exists():
            scenes.draw(scenes.make_scene(FIRST_SEED + i)).save(path, quality=90)
    return folder


def loop(model, folder, batch, args, out):
    """Seconds that the loop takes."""
    config = model.config(args.beams, args.tokens)
    files, start = sorted(folder.iterdir()), time.perf_counter()
    with open(out, "w") as lines:
        for first in range(0, len(files), batch):
            images = [Image.open(path) for path in files[first:first + batch]]
            inputs = [model.inputs(image, PROMPT) for image in images]
            together = {name: torch.cat([it[name] for it in inputs]) for name in inputs[0]}
            with torch.no_grad():
                generated = model.model.generate(**together, generation_config=config)
            for path, image, ids in zip(files[first:], images, generated):
                _, answer = model.parsed(ids.tolist(), PROMPT, image.size)
                print(json.dumps({"file": str(path), "answer": answer}), file=lines)
    return time.perf_counter() - start


def label(args, checkpoint, folder, precision, out):
    """Seconds of `florence label`, and how much of the threads it used."""
    model = [] if checkpoint == ROOT / "models/tiny" else ["--model", checkpoint]
    before, start = os.times(), time.perf_counter()
    told = subprocess.run(
        [args.florence, "label", folder, "--task", PROMPT, *model, "--precision", precision, "--threads",
         str(args.threads), "--beams", str(args.beams), "--max-new-tokens", str(args.tokens), "--overwrite",
         "--out", out], check=True, capture_output=True, text=True).stdout
    whole, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    rate = float(told.strip().splitlines()[-1].split(";")[1].split()[0])
    return args.pictures / rate, used / whole / args.threads


def main():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint", help="models/tiny, a directory, or base")
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--pictures", type=int, default=200)
    args.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16], help="of the loop; 1 is compared with")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--beams", type=int, default=3)
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    if args.checkpoint in fidelity.SHAPES:
        checkpoint = fidelity.speed_checkpoint(args.work, args.checkpoint, ROOT / "models/tiny")
    else:
        checkpoint = Path(args.checkpoint).resolve()
    folder, out = pictures(args.work, args.pictures), args.work / "labels.jsonl"
    torch.set_num_threads(args.threads)
    model = reference.Reference(checkpoint, attention="sdpa")
    times, used = {}, []
    for _ in range(args.rounds):
        for batch in args.batches:
            times.setdefault(f"transformers, batch {batch}", []).append(loop(model, folder, batch, args, out))
        for precision in ("f32", "auto"):
            seconds, share = label(args, checkpoint, folder, precision, out)
            times.setdefault(f"florence label, {precision}", []).append(seconds)
            used.append(share)
    first = statistics.median(times["transformers, batch 1"])
    print(f"\n{args.checkpoint}, {args.pictures} pictures, {args.threads} threads, {args.beams} beams, medians of "
          f"{args.rounds} rounds\n\n| | pictures/s | |\n|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {args.pictures / median:.2f} | {first / median:.1f}x |")
    print(f"\nThe threads were used to {100 * min(used):.0f} to {100 * max(used):.0f} %.")


if __name__ == "__main__":
    main()
