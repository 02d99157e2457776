"""Writes the golden fixtures of fine-tunes as they lie on the hub: see engine/tests/fixtures/README.md.

    python tools/make_finetunes.py

`random-bare` leaves out what such checkpoints leave out: vision_config, tokenizer, preprocessor, all
but one field of the generation settings; its weights are bfloat16. Other forms are made by the test
from `random-native` and `random-original`; here are the answers of the reference for each.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import reference
import scenes
from make_fixtures import FIXTURES, PROMPTS, TINY, small_config

BARE = FIXTURES / "random-bare"
# What the files of the fine-tune say of the tokens that begin and end answers.
WRONG = {"decoder_start_token_id": 5, "forced_bos_token_id": 7, "eos_token_id": 259, "forced_eos_token_id": 11}


def answers(model, picture, beams=(1, 3)):
    image = Image.open(FIXTURES / picture)
    out = []
    for prompt in PROMPTS:
        for beam in beams:
            ids, _, parsed = model.answer(image, prompt, beam, 30)
            out.append({"prompt": prompt, "beams": beam, "token_ids": ids, "answer": parsed})
    return {"picture": picture, "answers": out}


def published_shape():
    """A small configuration in which heads have the size of the published ones."""
    config = small_config(1711, 1710)
    vision, text = config.vision_config, config.text_config
    vision.embed_dim, vision.num_heads, vision.num_groups = [32] * 4, [1] * 4, [1] * 4
    vision.depths, vision.window_size = [1] * 4, 12
    text.encoder_layers = text.decoder_layers = 1
    text.encoder_ffn_dim = text.decoder_ffn_dim = 32
    return config


def in_bfloat16(directory):
    path = directory / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, {"format": "pt"})


def bare(work):
    whole = work / "whole"
    reference.random_checkpoint(whole, published_shape(), 9, TINY, side=100, spread=4.0)
    in_bfloat16(whole)
    shutil.rmtree(BARE, ignore_errors=True)
    BARE.mkdir()
    shutil.copy(whole / "model.safetensors", BARE)
    config = json.loads((whole / "config.json").read_text())
    del config["vision_config"]
    config["auto_map"] = {"AutoModelForCausalLM": "somebody/else--modeling_florence2.Florence2ForConditionalGeneration"}
    (BARE / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (BARE / "generation_config.json").write_text('{"transformers_version": "4.49.0"}\n')
    return whole


def main():
    cases = {}
    picture = FIXTURES / "random-64.png"
    scenes.draw(scenes.make_scene(78, 64, 64)).save(picture, optimize=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        whole = bare(work)
        cases["bare"] = answers(reference.Reference(whole), "random.png")
        model = reference.Reference(whole)
        model.preprocessor["do_resize"] = False
        cases["bare, not resized"] = answers(model, picture.name)

        native = FIXTURES / "random-native"
        model = reference.Reference(native)
        model.preprocessor["do_resize"] = False
        cases["not resized"] = answers(model, picture.name)
        model = reference.Reference(native)
        model.generation = model.generation | WRONG
        cases["wrong ids"] = answers(model, "random.png")
        model = reference.Reference(native)
        model.generation = reference.GENERATION | {"num_beams": 2}
        cases["one field"] = answers(model, "random.png", beams=(None,))
        copy = work / "bfloat16"
        shutil.copytree(native, copy)
        in_bfloat16(copy)
        cases["bfloat16"] = answers(reference.Reference(copy), "random.png")

        head = torch.load(FIXTURES / "random-original/pytorch_model.bin")["language_model.lm_head.weight"]
        model = reference.Reference(native, head.float())
        model.generation = model.generation | WRONG
        cases["wrong ids, original"] = answers(model, "random.png")
    for name, case in cases.items():
        print(name, [answer["token_ids"][:8] for answer in case["answers"][:3]])
    (FIXTURES / "finetunes.json").write_text(json.dumps({"provenance": reference.versions(), "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
