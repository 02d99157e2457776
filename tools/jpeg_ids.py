"""Counts the answers on JPEG files whose tokens are those that Pillow's pixels of the same files give.

    python tools/jpeg_ids.py --florence target/release/florence --work DIR

120 generated scenes are saved as JPEG, in all qualities and samplings that cameras and websites
write, and Pillow's pixels of each file as PNG; five prompts are asked about both.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image

import scenes

FIRST_SEED = 800_000
SCENES = 120
PROMPTS = ("<OD>", "<DENSE_REGION_CAPTION>", "<OCR_WITH_REGION>", "<OCR>", "<MORE_DETAILED_CAPTION>")


def write(folder):
    rng = random.Random(FIRST_SEED)
    pairs = []
    for seed in range(FIRST_SEED, FIRST_SEED + SCENES):
        jpeg, png = folder / f"{seed}.jpg", folder / f"{seed}.png"
        picture = scenes.draw(scenes.make_scene(seed)).convert("RGB")
        picture.save(jpeg, quality=rng.choice((50, 75, 85, 95)), subsampling=rng.choice((0, 1, 2)),
                     progressive=rng.random() < 0.3)
        Image.open(jpeg).convert("RGB").save(png)
        pairs.append((jpeg, png))
    return pairs


def tokens(florence, prompt, files):
    run = subprocess.run([florence, "run", "--json", "--prompt", prompt, *map(str, files)],
                         stdout=subprocess.PIPE, check=True, text=True)
    return [json.loads(line)["token_ids"] for line in run.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--florence", required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = write(args.work)
    equal = 0
    for prompt in PROMPTS:
        found, expected = (tokens(args.florence, prompt, files) for files in zip(*pairs))
        assert len(found) == len(expected) == SCENES
        same = sum(a == b for a, b in zip(found, expected))
        print(f"{prompt}: {same} of {SCENES}")
        equal += same
    print(f"{equal} of {SCENES * len(PROMPTS)} answers have the tokens that Pillow's pixels give")
    sys.exit(equal != SCENES * len(PROMPTS))


if __name__ == "__main__":
    main()
