"""Compares `florence run` with the reference on random checkpoints of base and large shape.

    python tools/fidelity.py base|large --florence target/release/florence --work DIR

Both layouts, greedy and 3 beams; ids and JSON must be equal. Prints what was compared.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

from PIL import Image
from transformers import Florence2Config

import reference
import scenes

# Weights wider than the usual init give livelier answers, but at large's depth they amplify
# rounding until float32 decides too little.
SHAPES = {
    "base": {"embed": [128, 256, 512, 1024], "heads": [4, 8, 16, 32], "d_model": 768, "layers": 6, "attention": 12,
             "spread": 2.0},
    "large": {"embed": [256, 512, 1024, 2048], "heads": [8, 16, 32, 64], "d_model": 1024, "layers": 12, "attention": 16,
              "spread": 1.0},
}
PROMPTS = ("<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a green car", "<OCR_WITH_REGION>")


def config(shape):
    s = SHAPES[shape]
    vision = {
        "embed_dim": s["embed"], "num_heads": s["heads"], "num_groups": s["heads"], "depths": [1, 1, 9, 1],
        "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True], "window_size": 12, "projection_dim": s["d_model"],
        "max_position_embeddings": 50, "max_temporal_embeddings": 100, "drop_path_rate": 0.0,
    }
    text = {
        "model_type": "bart", "vocab_size": 51328, "d_model": s["d_model"], "encoder_layers": s["layers"],
        "decoder_layers": s["layers"], "encoder_attention_heads": s["attention"],
        "decoder_attention_heads": s["attention"], "encoder_ffn_dim": 4 * s["d_model"],
        "decoder_ffn_dim": 4 * s["d_model"], "max_position_embeddings": 1024, "scale_embedding": False,
        "activation_function": "gelu", "init_std": 0.02, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2,
    }
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=51289, bos_token_id=0,
                           pad_token_id=1, eos_token_id=2, is_encoder_decoder=True, tie_word_embeddings=True)


def speed_checkpoint(work, shape, tokenizer):
    """A random checkpoint to time, made once."""
    directory = work / f"{shape}-speed"
    if not (directory / "config.json").exists():
        reference.random_checkpoint(directory, config(shape), 11, tokenizer, 768, spread=1.0, half=True)
    return directory


def main():
    args = argparse.ArgumentParser()
    args.add_argument("shape", choices=SHAPES)
    args.add_argument("--florence", required=True)
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "models/tiny")
    args.add_argument("--tokens", type=int, default=24)
    args.add_argument("--prompts", type=int, default=len(PROMPTS))
    args.add_argument("--device", help="the device that `florence` runs on")
    args.add_argument("--picture", type=Path, help="instead of a drawn one")
    args.add_argument("--spread", type=float, default=None, help="width of the random weights, 1 is the usual init")
    args = args.parse_args()
    native, original = args.work / f"{args.shape}-native", args.work / f"{args.shape}-original"
    args.work.mkdir(parents=True, exist_ok=True)
    spread = args.spread or SHAPES[args.shape]["spread"]
    tensors = reference.random_checkpoint(native, config(args.shape), 11, args.tokenizer, 768, spread=spread, half=True)
    reference.original_layout(native, original, tensors)
    del tensors
    picture = args.picture or args.work / "picture.png"
    if not args.picture:
        scenes.draw(scenes.make_scene(4242, 641, 479)).save(picture)
    device = ["--device", args.device, "--no-packed-file"] if args.device else []
    image = Image.open(picture)
    model = reference.Reference(native)
    compared = wrong = 0
    for prompt in PROMPTS[: args.prompts]:
        for beams in (1, 3):
            start = time.time()
            expected, _, parsed = model.answer(image, prompt, beams, args.tokens)
            print(f"reference {prompt} {beams} beams: {time.time() - start:.1f} s", flush=True)
            for directory in (native, original):
                line = subprocess.run(
                    [args.florence, "run", "--model", directory, "--prompt", prompt, "--beams", str(beams), "--json",
                     "--max-new-tokens", str(args.tokens), "--coordinates", "int", *device, picture],
                    check=True, capture_output=True, text=True).stdout
                found = json.loads(line)
                same = found["token_ids"] == expected and found["answer"] == parsed
                compared, wrong = compared + 1, wrong + (not same)
                print("equal" if same else "DIFFERENT", directory.name, prompt, f"{beams} beams",
                      found["token_ids"][:8], {k: round(v) for k, v in found["timings_ms"].items()}, flush=True)
                if not same:
                    print("  expected", expected, "\n  found   ", found["token_ids"])
    for directory in (native, original):
        shutil.rmtree(directory)
    print(f"{compared} compared, {wrong} different")
    raise SystemExit(wrong != 0)


if __name__ == "__main__":
    main()
