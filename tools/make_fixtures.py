"""Writes the engine's golden fixtures with the reference: see engine/tests/fixtures/README.md.

    python tools/make_fixtures.py random      tiny random checkpoints, every stage, ids
    python tools/make_fixtures.py tiny        models/tiny: pictures, prompts, ids, JSON
    python tools/make_fixtures.py chains      models/tiny: cascades, as their users write them
    python tools/make_fixtures.py nbest       both: the best beams and their scores
"""

import json
import random
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import Florence2Config

import reference
import scenes

FIXTURES = Path(__file__).parent.parent / "engine/tests/fixtures"
TINY = Path(__file__).parent.parent / "models/tiny"
PROMPTS = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a red circle and the word STOP",
           "<REGION_TO_SEGMENTATION><loc_100><loc_200><loc_700><loc_800>"]


def small_config(vocab, image_id):
    vision = {
        "embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 4], "num_groups": [1, 2, 2, 4], "depths": [1, 1, 2, 1],
        "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True], "window_size": 5, "projection_dim": 32,
        "max_position_embeddings": 50, "max_temporal_embeddings": 100, "drop_path_rate": 0.0,
    }
    text = {
        "model_type": "bart", "vocab_size": vocab, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        "scale_embedding": False, "activation_function": "gelu", "init_std": 0.02, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    }
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=image_id, bos_token_id=0,
                           pad_token_id=1, eos_token_id=2, is_encoder_decoder=True, tie_word_embeddings=True)


def sample(tensor):
    """A strided sample of a tensor, with its shape, mean and deviation."""
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // 97)
    return {"shape": list(tensor.shape), "mean": flat.mean().item(), "std": flat.std().item(), "step": step,
            "values": flat[::step].tolist()}


def random_fixtures():
    native, original = FIXTURES / "random-native", FIXTURES / "random-original"
    tokenizer = reference.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    config = small_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>"))
    tensors = reference.random_checkpoint(native, config, 7, TINY, side=100, spread=4.0, half=True)
    torch.manual_seed(8)
    head = (torch.randn(config.text_config.vocab_size, config.text_config.d_model) * 0.1).half()
    reference.original_layout(native, original, tensors, head=head)
    picture = FIXTURES / "random.png"
    scenes.draw(scenes.make_scene(77, 120, 90)).save(picture, optimize=True)
    image = Image.open(picture)
    out = {"provenance": reference.versions(), "picture": "random.png", "cases": []}
    for layout, head in (("random-native", None), ("random-original", head.float())):
        model = reference.Reference(native, head)
        stages = {k: sample(v) for k, v in model.stages(image, PROMPTS[0]).items()}
        answers = []
        for prompt in PROMPTS:
            for beams, ngram in ((1, 3), (3, 3), (3, 0), (4, 2)):
                ids, _, parsed = model.answer(image, prompt, beams, 40, no_repeat_ngram_size=ngram)
                answers.append({"prompt": prompt, "beams": beams, "no_repeat_ngram": ngram, "max_new_tokens": 40,
                                "prompt_ids": model.prompt_ids(prompt), "token_ids": ids, "answer": parsed})
        out["cases"].append({"checkpoint": layout, "stages": stages, "answers": answers})
    (FIXTURES / "random.json").write_text(json.dumps(out) + "\n")
    for case in out["cases"]:
        print(case["checkpoint"], [len(a["token_ids"]) for a in case["answers"]], case["answers"][1]["token_ids"][:20])


def tiny_fixtures():
    model = reference.Reference(TINY)
    pictures = FIXTURES / "pictures"
    pictures.mkdir(exist_ok=True)
    out = {"provenance": reference.versions() | {"model_sha256": reference.sha256(TINY / "model.safetensors")}, "cases": []}
    tokens = list(scenes.PROMPTS)
    for i in range(60):
        scene = scenes.make_scene(50_000 + i, *random.Random(i).choice(((240, 200), (200, 260), (300, 220), (210, 210))))
        if scene.background == "noisy" and i % 5:
            scene.background = "plain"
        name = f"{i:02}.png"
        scenes.draw(scene).save(pictures / name, optimize=True)
        image = Image.open(pictures / name)
        asked = {task: text for task, text, _ in scenes.tasks(scene, random.Random(i))}
        for task in (tokens[i % 15], tokens[(i * 7 + 3) % 15]):
            if task not in asked:
                continue
            prompt = task + asked[task]
            beams, overrides = ((3, {}), (1, {}), (3, {"no_repeat_ngram_size": 3}))[i % 3]
            ids, text, parsed = model.answer(image, prompt, beams, 256, **overrides)
            out["cases"].append({"picture": name, "prompt": prompt, "beams": beams, "token_ids": ids, "text": text,
                                 "no_repeat_ngram": overrides.get("no_repeat_ngram_size"), "answer": parsed})
    (FIXTURES / "tiny.json").write_text(json.dumps(out) + "\n")
    print(len(out["cases"]), "cases,", len({c["prompt"].split(">")[0] for c in out["cases"]}), "tasks")


def provenance():
    return {"made_by": "tools/make_fixtures.py", "float": "float32, eager attention"} | reference.versions()


def located(text, size):
    """Labels, and boxes around the points that follow them, in pixels and as location tokens."""
    for label, places in re.findall(r"([^<>]+)((?:<loc_\d+>){4,8})", text):
        bins = [int(place) for place in re.findall(r"\d+", places)]
        x, y = bins[0::2], bins[1::2]
        box = [min(x), min(y), max(x), max(y)]
        pixels = [(place + 0.5) * side / 1000 for place, side in zip(box, size + size)]
        yield label, pixels, "".join(f"<loc_{place}>" for place in box)


def chain_fixtures():
    model = reference.Reference(TINY)
    out = {"provenance": provenance() | {"model_sha256": reference.sha256(TINY / "model.safetensors")}, "cases": []}
    cascades = [("<DETAILED_CAPTION>", "THEN", "<CAPTION_TO_PHRASE_GROUNDING> {}"),
                ("<OD>", "EACH", "<REGION_TO_SEGMENTATION>"),
                ("<OD>", "EACH", "<REFERRING_EXPRESSION_SEGMENTATION> a {}"),
                ("<OCR_WITH_REGION>", "EACH", "<REGION_TO_OCR>"),
                ("<OCR_WITH_REGION>", "CROP", "<OCR>"),
                ("<OD>", "CROP", "<OD>")]
    for i in range(24):
        name = f"{i:02}.png"
        image = Image.open(FIXTURES / "pictures" / name).convert("RGB")
        first, link, step = cascades[i % len(cascades)]
        _, text, parsed = model.answer(image, first, 3, 256)
        if link == "THEN":
            asked = [(image, step.replace("{}", parsed[first]))]
        elif link == "CROP":
            asked = [(image.crop(box), step) for _, box, _ in located(text, image.size)]
        elif "REGION_TO" in step:
            asked = [(image, step + place) for _, _, place in located(text, image.size)]
        else:
            asked = [(image, step.replace("{}", label)) for label, _, _ in located(text, image.size)]
        texts = [model.answer(picture, prompt, 3, 256)[1] for picture, prompt in asked]
        out["cases"].append({"picture": name, "prompt": first, "step": f"{link} {step}", "text": text, "texts": texts})
    (FIXTURES / "chains.json").write_text(json.dumps(out) + "\n")
    print(len(out["cases"]), "chains,", sum(len(case["texts"]) for case in out["cases"]), "answers")


def nbest_fixtures():
    out = {"provenance": provenance() | {"model_sha256": reference.sha256(TINY / "model.safetensors")}, "cases": []}
    asked = [("random-native", "random.png", prompt, {"length_penalty": penalty})
             for prompt in PROMPTS for penalty in (1.0, 0.5)]
    asked += [("tiny", f"pictures/{i:02}.png", prompt, {})
              for i, prompt in enumerate(("<DETAILED_CAPTION>", "<OD>", "<OCR>", "<DENSE_REGION_CAPTION>"))]
    models = {"random-native": reference.Reference(FIXTURES / "random-native"), "tiny": reference.Reference(TINY)}
    for checkpoint, picture, prompt, overrides in asked:
        image = Image.open(FIXTURES / picture)
        for n in (1, 2, 3):
            ids, scores = models[checkpoint].best(image, prompt, 3, n, 40, **overrides)
            out["cases"].append({"checkpoint": checkpoint, "picture": picture, "prompt": prompt, "n": n,
                                 "token_ids": ids, "scores": scores} | overrides)
    (FIXTURES / "nbest.json").write_text(json.dumps(out) + "\n")
    print(len(out["cases"]), "cases,", sum(len(case["scores"]) for case in out["cases"]), "beams")


if __name__ == "__main__":
    {"random": random_fixtures, "tiny": tiny_fixtures, "chains": chain_fixtures, "nbest": nbest_fixtures}[sys.argv[1]]()
