"""Scores models/tiny on 500 held-out generated pictures and writes the table into its model card.

    python tools/evaluate.py --florence target/release/florence --work DIR

The answers come from `florence run`, so this scores what users get; the scorer is below, complete.
With `--against bf16` the same questions are also answered in that precision, and what differs is
told instead, and goes into docs/SPEED.md if it has a place there.
"""

import argparse
import json
import random
import re
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import scenes

ROOT = Path(__file__).parent.parent
CARD = ROOT / "models/tiny/README.md"
SPEED = ROOT / "docs/SPEED.md"
FIRST_SEED = 900_000  # training starts at 10,000,000
REGION = ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>", "<REGION_TO_OCR>")
BARS = {
    "<CAPTION> exactly right": 0.95, "<DETAILED_CAPTION> exactly right": None,
    "<MORE_DETAILED_CAPTION> exactly right": None, "<OD> F1 at IoU 0.5": 0.95,
    "<DENSE_REGION_CAPTION> F1 at IoU 0.5": None, "<REGION_PROPOSAL> F1 at IoU 0.5": None,
    "<OCR> exactly right": 0.90, "<OCR_WITH_REGION> words read and mean IoU": 0.70,
    "<CAPTION_TO_PHRASE_GROUNDING> F1 at IoU 0.5": 0.90, "<OPEN_VOCABULARY_DETECTION> F1 at IoU 0.5": 0.90,
    "<REFERRING_EXPRESSION_SEGMENTATION> mean IoU": 0.70, "<REGION_TO_SEGMENTATION> mean IoU": 0.70,
    "<REGION_TO_CATEGORY> exactly right": 0.95, "<REGION_TO_DESCRIPTION> exactly right": 0.95,
    "<REGION_TO_OCR> exactly right": 0.95,
}


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, w) * max(0, h)
    area = (lambda r: max(0, r[2] - r[0]) * max(0, r[3] - r[1]))
    return shared / (area(a) + area(b) - shared) if shared else 0.0


def mask(polygons, size):
    image = Image.new("1", size)
    for polygon in polygons:
        if len(polygon) >= 6:
            ImageDraw.Draw(image).polygon([tuple(p) for p in zip(polygon[::2], polygon[1::2])], fill=1)
    return np.asarray(image)


def matches(found, truth):
    """Greedy matching of (label, box) pairs at IoU 0.5 with equal labels."""
    left, hits = list(truth), 0
    for label, box in found:
        best = max((t for t in left if t[0] == label), key=lambda t: iou(t[1], box), default=None)
        if best and iou(best[1], box) >= 0.5:
            left.remove(best)
            hits += 1
    return hits


def boxes_of(text, size):
    """The (label, box) pairs of a true answer's text."""
    out, w, h = [], size[0] / 1000, size[1] / 1000
    for label, run in re.findall(r"([^<]*)((?:<loc_\d+>)+)", text):
        bins = [int(n) + 0.5 for n in re.findall(r"\d+", run)]
        out += [(label, [bins[i] * w, bins[i + 1] * h, bins[i + 2] * w, bins[i + 3] * h])
                for i in range(0, len(bins) - 3, 4)]
    return out


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--pictures", type=int, default=500)
    args.add_argument("--against", choices=("int16", "int8", "bf16", "auto"))
    args = args.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    questions = defaultdict(list)
    for i in range(args.pictures):
        scene = scenes.make_scene(FIRST_SEED + i, large=True)
        path = args.work / f"{i}.{'jpg' if i % 2 else 'png'}"
        scenes.draw(scene).save(path, quality=90)
        for task, text, answer in scenes.tasks(scene, random.Random(i)):
            questions[task + text].append((path, task, answer, (scene.width, scene.height)))

    def run(prompt, precision):
        paths = [str(path) for path, *_ in questions[prompt]]
        command = [args.florence, "run", "--json", "--threads", "1", "--prompt", prompt, "--max-new-tokens", "256",
                   "--precision", precision]
        return subprocess.run([*command, *paths], check=True, capture_output=True, text=True).stdout.splitlines()

    def answers(precision):
        counts, ids = defaultdict(lambda: [0, 0, 0]), []  # hits, found, true: or sum, -, n
        with ThreadPoolExecutor(2) as pool:
            for prompt, lines in zip(questions, pool.map(lambda prompt: run(prompt, precision), questions)):
                for (_, task, truth, size), line in zip(questions[prompt], lines, strict=True):
                    answer = json.loads(line)
                    ids.append(answer["token_ids"])
                    score(counts, task, truth, size, answer["answer"][task])
        return {name: value(name, *counts[name]) for name in BARS}, ids

    scores, ids = answers("f32")
    if args.against:
        compare(args, scores, ids, *answers(args.against))
    else:
        report(scores, args.pictures)


def score(counts, task, truth, size, answer):
    if task in REGION or task.endswith("CAPTION>") and task != "<DENSE_REGION_CAPTION>" or task == "<OCR>":
        row = counts[f"{task} exactly right"]
        row[0] += answer == truth
        row[2] += 1
    elif task == "<OCR_WITH_REGION>":
        row = counts[f"{task} words read and mean IoU"]
        found = list(zip(answer["labels"], answer["quad_boxes"]))
        for label, quad in quads_of(truth, size):
            overlap = [iou(bounds(q), bounds(quad)) for found_label, q in found if found_label == label]
            row[0] += max(overlap, default=0)
            row[2] += 1
    elif "SEGMENTATION" in task:
        row = counts[f"{task} mean IoU"]
        bins = [int(n) + 0.5 for n in re.findall(r"\d+", truth)]
        true = mask([[v * size[i % 2] / 1000 for i, v in enumerate(bins)]], size)
        found = mask([p for instance in answer["polygons"] for p in instance], size)
        row[0] += (true & found).sum() / max(1, (true | found).sum())
        row[2] += 1
    else:
        row = counts[f"{task} F1 at IoU 0.5"]
        labels = answer.get("labels", answer.get("bboxes_labels"))
        found, true = list(zip(labels, answer["bboxes"])), boxes_of(truth, size)
        if task == "<OPEN_VOCABULARY_DETECTION>" and true:
            true = [(true[0][0], box) for _, box in true]
        row[0] += matches(found, true)
        row[1] += len(found)
        row[2] += len(true)


def quads_of(text, size):
    for label, run in re.findall(r"([^<]+)((?:<loc_\d+>){8})", text):
        yield label, [(int(n) + 0.5) * size[i % 2] / 1000 for i, n in enumerate(re.findall(r"\d+", run))]


def bounds(quad):
    return [min(quad[::2]), min(quad[1::2]), max(quad[::2]), max(quad[1::2])]


def value(name, hits, found, true):
    return 2 * hits / max(1, found + true) if "F1" in name else hits / max(1, true)


def compare(args, scores, ids, other_scores, other_ids):
    """Tokens that are equal at the same place, and how far the scores move."""
    pairs = list(zip(ids, other_ids, strict=True))
    equal = sum(sum(a == b for a, b in zip(*pair)) for pair in pairs)
    same = sum(a == b for a, b in pairs)
    lines = [f"{len(pairs)} answers over {args.pictures} held-out pictures and all tasks, 3 beams: "
             f"{equal / sum(max(len(a), len(b)) for a, b in pairs):.2%} of the tokens are equal to float32's, "
             f"{same / len(pairs):.2%} of the answers are equal as a whole.", "",
             f"| task and measure | f32 | {args.against} | difference |", "|---|---|---|---|"]
    for name in BARS:
        one, other = scores[name], other_scores[name]
        lines.append(f"| `{name.replace('> ', '>` ', 1)} | {one:.3f} | {other:.3f} | {other - one:+.3f} |")
    write(SPEED, f"agreement of {args.against}", lines)


def write(path, place, lines):
    """Replaces what stands between the comments of a place, if there is one."""
    print("\n".join(lines))
    if f"<!-- {place} -->" not in path.read_text():
        return
    before, rest = path.read_text().split(f"<!-- {place} -->\n", 1)
    after = rest.split(f"<!-- end of {place} -->\n", 1)[1]
    path.write_text(f"{before}<!-- {place} -->\n" + "\n".join(lines) + f"\n<!-- end of {place} -->\n{after}")


def report(scores, pictures):
    lines = [f"On {pictures} held-out pictures, 3 beams (`make evaluate`):", "", "| task and measure | score | aim |",
             "|---|---|---|"]
    for name, bar in BARS.items():
        aim = "" if bar is None else f"{bar:.2f}"
        lines.append(f"| `{name.replace('> ', '>` ', 1)} | {scores[name]:.3f} | {aim} |")
    write(CARD, "scores", lines)


if __name__ == "__main__":
    main()
