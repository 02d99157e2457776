"""What a job takes through Redis beside `florence bench`: one at a time, in turns.

    python tools/through_redis.py base|DIR --work DIR [--precision auto]

The same checkpoint, picture, prompt, beams, threads and number of tokens; every round measures each
side once, and medians of the rounds are compared. Caches are off.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import cascade_speed
import fidelity

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "target/release"
PICTURE = ROOT / "models/tiny/samples/shapes.png"
PROMPT = "<OD>"


def job(connection, args, key):
    """Milliseconds from the submission to the answer."""
    start = time.perf_counter()
    connection.execute_command(
        "FLORENCE.SUBMIT", key, "DATA", PICTURE.read_bytes(), PROMPT, "BEAMS", args.beams, "MAXTOKENS", args.tokens)
    answer = connection.execute_command("FLORENCE.WAIT", key, 600_000)
    took = 1e3 * (time.perf_counter() - start)
    assert "done" in str(answer), answer
    return took


def bench(args, checkpoint):
    """Milliseconds of a job without Redis."""
    line = subprocess.run(
        [RELEASE / "florence", "bench", "--model", checkpoint, "--precision", args.precision, "--beams",
         str(args.beams), "--tokens", str(args.tokens), "--threads", str(args.threads), "--prompt", PROMPT, "--rounds",
         str(args.jobs), "--no-packed-file", "--json"], check=True, capture_output=True, text=True).stdout
    return json.loads(line)["stages_ms"]["total"]["median"]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint", help="base, of random weights, or a directory")
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--precision", default="auto")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--beams", type=int, default=3)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--jobs", type=int, default=5, help="measured in a round, after one to warm up")
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    if args.checkpoint in fidelity.SHAPES:
        checkpoint = fidelity.speed_checkpoint(args.work, args.checkpoint, ROOT / "models/tiny")
    else:
        checkpoint = Path(args.checkpoint).resolve()
    through, alone = [], []
    module, settings = RELEASE / "libflorence.so", ("precision", args.precision, "feature-cache-bytes", "0")
    with cascade_speed.server(module, checkpoint, args.threads, *settings) as connection:
        for turn in range(args.rounds):
            times = [job(connection, args, f"{turn}:{number}") for number in range(args.jobs + 1)]
            through.append(statistics.median(times[1:]))
            alone.append(bench(args, checkpoint))
            print(f"{through[-1]:.1f} ms through Redis, {alone[-1]:.1f} in florence bench", flush=True)
    more = [100 * (one / other - 1) for one, other in zip(through, alone)]
    print(f"through Redis {statistics.median(more):+.1f} % ({min(more):+.1f} to {max(more):+.1f})")


if __name__ == "__main__":
    main()
