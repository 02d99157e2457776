#!/usr/bin/env python3
"""Prints a section of docs/SPEED.md from the results.jsonl of proof.py: gpu_results.py FILE"""

import json
import sys


def load(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.strip()]


def table(head, rows):
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def milliseconds(result, stage):
    return result["found"]["stages_ms"][stage]["median"]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    results = load(sys.argv[1])
    by_part = {result["part"]: result for result in results}
    device = by_part.get("device", {})
    gpu = "; ".join(device.get("gpus") or ["no GPU"])
    versions = ", ".join(f"{name} {version}" for name, version in device.get("versions", {}).items() if version)
    print(f"## On a GPU\n\n{gpu}; {device.get('cores')} cores; {versions or 'no PyTorch'}; {device.get('date')}. "
          "`make gpu-proof`, then `python3 proof.py` there.\n")
    emulated = any("--kernels" in json.dumps(result) or result.get("where") == "emulated" for result in results)
    if device.get("outcome") != "ok" or emulated:
        print("**Nothing of this ran on a GPU.**\n")
    table(["part", "outcome", "remark"], [
        (result["part"], result["outcome"], result.get("why") or result.get("error", "")[:80].replace("\n", " "))
        for result in results if result["part"] != "end"])
    rows = []
    for result in results:
        for model in (result.get("found") or {}).get("models", []):
            rows.append((result["found"]["arithmetic"], model["model"], model["cases"], model["equal_ids"],
                         model["equal_json"], f"{model['equal_tokens']} of {model['tokens']}", model["same_in_batches"]))
    if rows:
        print("Against the reference's answers (`florence prove answers`):\n")
        table(["numbers", "model", "answers", "equal ids", "equal JSON", "equal tokens", "same in batches"], rows)
    rows = []
    for result in results:
        found = result.get("found") or {}
        if found.get("part") == "stages":
            by_stage = {stage["stage"]: stage for stage in found["stages"]}
            rows.append((result["part"].removeprefix("stages "), f"{found['equal_ids']} of {found['answers']}",
                         *(f"{by_stage[name]['largest']:.1e}, {by_stage[name]['cosine']:.6f}" if name in by_stage else ""
                           for name in ["projector", "encoder", "logits"])))
    if rows:
        print("Made-up weights beside this machine's processor in float32 (`florence prove stages`): the largest "
              "difference in deviations, and the cosine:\n")
        table(["model", "equal ids", "projector", "encoder", "logits"], rows)
    rows = []
    for result in results:
        if (result.get("found") or {}).get("stages_ms"):
            found, tokens = result["found"], result["found"]["tokens"]
            total, batch = milliseconds(result, "total"), found["batch"]
            other = by_part.get(result["part"] + ", transformers", {}).get("found", {})
            beside = f"{other['total_ms']:.0f} ({other['total_ms'] / total:.1f}x)" if "total_ms" in other else "not run"
            rows.append((found["arithmetic"], batch, found["beams"], tokens, f"{milliseconds(result, 'vision'):.1f}",
                         f"{milliseconds(result, 'encoder'):.1f}", f"{milliseconds(result, 'decoder_step'):.2f}",
                         f"{total:.0f}", beside, f"{1e3 * batch / total:.0f}"))
    if rows:
        print("Base shape, a fixed number of tokens, medians of 3 rounds, milliseconds (`florence bench --synthetic base`); "
              "transformers with random weights of the same shape, in turns:\n")
        table(["numbers", "batch", "beams", "tokens", "vision", "encoder", "step", "total", "transformers", "pictures/s"], rows)
    rows = [(found["arithmetic"], found["model"], found["batch"], found["decoders"], f"{found['pictures_a_second']:.1f}")
            for found in ((result.get("found") or {}) for result in results) if found.get("part") == "throughput"]
    if rows:
        print("From the bytes of a JPEG file to the answer (`florence prove throughput`):\n")
        table(["numbers", "model", "batch", "threads that decode", "pictures/s"], rows)
    module = by_part.get("module", {})
    if module.get("jobs"):
        print(f"{module['jobs']} jobs of models/tiny through redis-server, with saves meanwhile: {module['jobs_a_second']} "
              f"jobs/s, PING p99 {module['ping_p99_ms']} ms, states {module['states']}, "
              f"{module['texts_that_differ']} texts that differ from the reference's.\n")


if __name__ == "__main__":
    main()
