"""What a job takes through Redis beside `florence bench`: one at a time, in turns.

    python3 tools/through_redis.py DIR|models/tiny [--precision auto] [--rounds 5]

The same checkpoint, picture, prompt, beams and number of tokens; every round measures each side
once, and medians of the rounds are compared. Needs redis-server and redis-cli.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "target/release"
PICTURE = ROOT / "models/tiny/samples/shapes.png"
PROMPT = "<OD>"


class Server:
    """A redis-server with the module, without caches."""

    def __init__(self, args):
        self.socket = Path(args.work) / "redis.sock"
        settings = {"model": args.checkpoint, "precision": args.precision, "threads": args.threads, "result-cache-bytes": 0,
                    "feature-cache-bytes": 0, "file-roots": PICTURE.parent}
        module = [str(word) for pair in settings.items() for word in pair]
        self.process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", args.work,
             "--loadmodule", RELEASE / "libflorence.so", *module], stdout=subprocess.DEVNULL)

    def close(self):
        self.process.terminate()
        self.process.wait()

    def ask(self, *words):
        return subprocess.run(["redis-cli", "-s", self.socket, *map(str, words)], capture_output=True, text=True).stdout

    def wait(self):
        while "PONG" not in self.ask("PING"):
            if self.process.poll() is not None:
                raise SystemExit("the server does not start")
            time.sleep(0.1)

    def job(self, args, number):
        """Milliseconds from the submission to the answer."""
        start = time.perf_counter()
        self.ask("FLORENCE.SUBMIT", f"job:{number}", PICTURE, PROMPT, "BEAMS", args.beams, "MAXTOKENS", args.tokens)
        answer = self.ask("FLORENCE.WAIT", f"job:{number}", 600_000)
        took = 1e3 * (time.perf_counter() - start)
        if "done" not in answer:
            raise SystemExit(f"the job has no answer: {answer}")
        return took


def bench(args):
    """Milliseconds of a job without Redis."""
    line = subprocess.run(
        [RELEASE / "florence", "bench", "--model", args.checkpoint, "--precision", args.precision, "--beams",
         str(args.beams), "--tokens", str(args.tokens), "--threads", str(args.threads), "--prompt", PROMPT, "--rounds",
         str(args.jobs), "--json"], check=True, capture_output=True, text=True).stdout
    return json.loads(line)["stages_ms"]["total"]["median"]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint", type=lambda path: Path(path).resolve())
    args.add_argument("--precision", default="auto")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--beams", type=int, default=3)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--jobs", type=int, default=5, help="measured in a round, after one to warm up")
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    ours, alone = [], []
    with tempfile.TemporaryDirectory() as args.work, contextlib.closing(Server(args)) as server:
        server.wait()
        for turn in range(args.rounds):
            times = [server.job(args, f"{turn}:{job}") for job in range(args.jobs + 1)][1:]
            ours.append(statistics.median(times))
            alone.append(bench(args))
            print(f"{ours[-1]:.1f} ms through Redis, {alone[-1]:.1f} in florence bench", flush=True)
    shares = [100 * (one / other - 1) for one, other in zip(ours, alone)]
    print(f"Through Redis {statistics.median(shares):+.1f} % ({min(shares):+.1f} to {max(shares):+.1f})")


if __name__ == "__main__":
    main()
