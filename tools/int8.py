"""What 8 bits cost in answers: models/tiny here, in OpenVINO and in ONNX Runtime, on the same pictures.

    python tools/int8.py --florence target/release/florence --work DIR

OpenVINO (NNCF's post-training quantisation) and ONNX Runtime (dynamic quantisation) run the vision
tower, the projector and the encoder, as tools/peers.py makes them; PyTorch decodes in float32 what
they say. `florence` answers with the built-in plan and with one that `florence tune` makes of other
pictures. All are compared with PyTorch in float32, token by token. Prints a table for docs/SPEED.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput

import peers
import reference
import scenes

TINY = Path(__file__).parent.parent / "models/tiny"
FIRST_SEED, TUNED_SEED = 930_000, 940_000
TOKENS = 256


def drawn(folder, first_seed, count):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04}.png" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            scenes.draw(scenes.make_scene(first_seed + i, large=True)).save(path)
    return paths


def decoded(model, network, runs, paths):
    """The tokens of PyTorch's decoder after the stages of a runtime."""
    config, answers = model.config(peers.BEAMS, TOKENS), []
    for path in paths:
        visual = runs["vision"](model.pixels(Image.open(path)).numpy()).copy()
        encoded = torch.from_numpy(runs["encoder"](peers.joined(visual, network.prompt())).copy())
        with torch.no_grad():
            found = model.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long), generation_config=config)
        answers.append(found[0].tolist())
    return answers


def ours(args, checkpoint, precision, paths):
    lines = subprocess.run(
        [args.florence, "run", "--json", "--model", checkpoint, "--precision", precision, "--prompt", peers.PROMPT,
         "--beams", str(peers.BEAMS), "--max-new-tokens", str(TOKENS), *paths], check=True, capture_output=True, text=True)
    return [json.loads(line)["token_ids"] for line in lines.stdout.splitlines()]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--pictures", type=int, default=200)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--agreement", type=float, nargs="+", default=[0.99, 0.98])
    args = args.parse_args()
    sys.modules["openvino_telemetry"] = None
    torch.set_num_threads(args.threads)
    paths = drawn(args.work / "int8-asked", FIRST_SEED, args.pictures)
    tuned_on = drawn(args.work / "int8-tuned", TUNED_SEED, args.pictures)
    checkpoint = args.work / "int8-tiny"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(TINY, checkpoint, ignore=shutil.ignore_patterns("florence-*", "samples"))

    model = reference.Reference(TINY, attention="sdpa")
    network = peers.Network(model)
    inputs = network.inputs(Image.open(paths[0]))
    exact = [model.answer(Image.open(path), peers.PROMPT, peers.BEAMS, TOKENS)[0] for path in paths]
    answers = {}
    for precision in ("f32", "int16"):
        answers[f"florence {precision}"] = ours(args, checkpoint, precision, paths)
    answers["florence int8, built-in plan"] = ours(args, checkpoint, "int8", paths)
    for share in args.agreement:
        told = subprocess.run(
            [args.florence, "tune", "--model", checkpoint, "--task", peers.PROMPT, "--beams", str(peers.BEAMS),
             "--limit", str(args.pictures), "--agreement", str(share), tuned_on[0].parent], check=True,
            stdout=subprocess.PIPE, text=True).stdout
        kept = next(line for line in told.splitlines() if "in int8 keep" in line)
        print(kept, file=sys.stderr, flush=True)
        answers[f"florence int8, tuned to {share:.1%}: {kept.split()[0]} products"] = ours(args, checkpoint, "int8", paths)
    models, failed = peers.Models(args.work / "peers-tiny", network, inputs), set()
    for name, load in peers.runtimes(models, args.threads).items():
        if "int8" in name and (runs := peers.loaded(name, load, inputs, failed)).keys() == set(peers.STAGES):
            answers[name] = decoded(model, network, runs, paths)
    print(f"\n{peers.machine()['cpu']}; {len(paths)} pictures, `{peers.PROMPT}`\n\n| | tokens | whole answers |\n|---|---|---|")
    for name, found in answers.items():
        pairs = list(zip(exact, found, strict=True))
        equal = sum(sum(a == b for a, b in zip(*pair)) for pair in pairs)
        tokens = equal / sum(max(map(len, pair)) for pair in pairs)
        print(f"| {name} | {tokens:.2%} | {sum(a == b for a, b in pairs) / len(pairs):.1%} |")


if __name__ == "__main__":
    main()
