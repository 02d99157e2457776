"""Writes the golden fixtures of adapters: PEFT makes them, and merges them itself.

    python tools/make_adapters.py
    python tools/make_adapters.py check target/release/florence     what `florence merge` writes

Adapters of random numbers for engine/tests/fixtures/random-native and models/tiny, and the answers
of the merged models. Before PEFT sees a model its tied weights are copied, so that each module has
weights of its own: merged into tied ones, a change of the head would change the embeddings too.
Each answer must be the one of the adapter that is not merged.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import reference
from make_fixtures import FIXTURES, PROMPTS, TINY

OUT = FIXTURES / "adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
# The recipe that most tutorials follow; some of these names match nothing in Florence-2.
USUAL = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]

RECIPES = {
    "usual": dict(r=8, lora_alpha=8, use_rslora=True, target_modules=USUAL, init_lora_weights="gaussian"),
    "patterns": dict(
        r=2, lora_alpha=4, target_modules=[*ATTENTION, "fc1", "fc2", "qkv", "proj", "conv", "image_projection"],
        rank_pattern={r"encoder.layers.0.fc2": 3, "fc2": 1}, alpha_pattern={r"decoder\..*q_proj": 9, "q_proj": 1}),
    "dora": dict(r=2, lora_alpha=6, use_dora=True, target_modules=["q_proj", "fc2", "qkv", "conv", "shared", "lm_head"]),
    "embeddings": dict(r=2, lora_alpha=8, target_modules=["shared", "embed_tokens", "row_embeddings", "v_proj"]),
    "saved": dict(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], bias="all", lora_bias=True,
                  modules_to_save=["image_proj_norm", "image_projection", "decoder.embed_tokens"]),
    "biases": dict(r=2, lora_alpha=4, target_modules=["v_proj", "fc2"], bias="lora_only"),
}
# What can be trained but not merged.
GROUPED = dict(r=8, lora_alpha=8, target_modules=["blocks.0.0.spatial_block.conv1"])


def untied(directory):
    model = reference.Reference(directory)
    core = model.model.model.language_model
    for module in (model.model.lm_head, core.encoder.embed_tokens, core.decoder.embed_tokens):
        module.weight = torch.nn.Parameter(core.shared.weight.detach().clone())
    for config in (model.model.config, model.model.config.text_config):
        config.tie_word_embeddings = False
    return model


def randomized(model, seed, spread):
    """Gives every trained parameter a value that its start does not have."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "lora_magnitude" in name:
            value.data *= 1 + 0.1 * noise
        elif "lora_" in name:
            value.data = noise * spread
        elif value.requires_grad:
            value.data += 0.1 * noise
        value.data = value.data.half().float() if value.requires_grad else value.data


def original_names(directory, target):
    """The same adapter as one that was trained on Microsoft's layout."""
    shutil.copytree(directory, target)
    tensors = {}
    for name, value in load_file(directory / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        layer, suffix = name.rsplit(".lora_", 1)
        tensors[f"base_model.model.{original_name(layer)}.lora_{suffix}"] = value
    (target / "adapter_model.safetensors").unlink()
    torch.save(tensors, target / "adapter_model.bin")


def original_name(name):
    if name == "lm_head":
        return "language_model.lm_head"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    for kind in ("window", "channel"):
        for part in ("qkv", "proj"):
            name = name.replace(f".{kind}_attn.{part}", f".{kind}_attn.fn.{part}")
    return name.replace(".conv1", ".conv1.fn.dw").replace(".ffn.fc", ".ffn.fn.net.fc")


def lighten(directory, target_modules):
    """float16 takes half the room, and loses nothing of values that were rounded to it; nothing of
    the model's card and of names of this machine is needed."""
    path = directory / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, {"format": "pt"})
    (directory / "README.md").unlink()
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": None, "target_modules": target_modules}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def made(directory, recipe, seed, spread, target=None):
    model = untied(directory)
    config = LoraConfig(**recipe)
    model.model = get_peft_model(model.model, config).eval()
    randomized(model.model, seed, spread)
    if target:
        model.model.save_pretrained(target, save_embedding_layers=False)
        lighten(target, recipe["target_modules"])
    return model


def answers(directory, recipe, seed, spread, target, picture, prompts):
    image = Image.open(picture)
    asked = [(prompt, beams) for prompt in prompts for beams in (1, 3)]
    plain = reference.Reference(directory)
    plain = [plain.answer(image, prompt, beams, 40)[0] for prompt, beams in asked]
    model = made(directory, recipe, seed, spread, target)
    unmerged = [model.answer(image, prompt, beams, 40)[0] for prompt, beams in asked]
    model.model = model.model.merge_and_unload()
    out = []
    for (prompt, beams), expected in zip(asked, unmerged):
        ids, _, parsed = model.answer(image, prompt, beams, 40)
        assert ids == expected, (target, prompt, beams)
        out.append({"prompt": prompt, "beams": beams, "token_ids": ids, "answer": parsed})
    changed = sum(answer["token_ids"] != ids for answer, ids in zip(out, plain))
    print(target.name, sum(f.stat().st_size for f in target.iterdir()), "bytes,", changed, "answers of", len(out), "changed")
    assert changed > len(out) // 2
    return out


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    native = FIXTURES / "random-native"
    cases = []
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        found = answers(native, recipe, seed, 0.3, OUT / name, FIXTURES / "random.png", PROMPTS)
        cases.append({"adapter": name, "checkpoint": "random-native", "picture": "random.png", "answers": found})
    original_names(OUT / "patterns", OUT / "patterns-original")
    cases.append(dict(cases[1], adapter="patterns-original"))
    made(native, GROUPED, 20, 0.3, OUT / "grouped")
    tiny = dict(r=2, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "v_proj", "lm_head"])
    prompts = ["<OD>", "<CAPTION>", "<OCR>"]
    found = answers(TINY, tiny, 30, 0.3, OUT / "tiny", FIXTURES / "pictures/00.png", prompts)
    cases.append({"adapter": "tiny", "checkpoint": "models/tiny", "picture": "pictures/00.png", "answers": found})
    provenance = reference.versions() | {"peft": peft.__version__}
    (FIXTURES / "adapters.json").write_text(json.dumps({"provenance": provenance, "cases": cases}) + "\n")


def check(florence):
    """The reference loads merged checkpoints, and they answer as PEFT's do."""
    for case in json.loads((FIXTURES / "adapters.json").read_text())["cases"]:
        base = TINY if case["checkpoint"] == "models/tiny" else FIXTURES / case["checkpoint"]
        with tempfile.TemporaryDirectory() as work:
            # float16 would round what the adapter adds.
            shutil.copytree(base, Path(work) / "base", ignore=shutil.ignore_patterns("samples", "florence-*"))
            path = Path(work) / "base/model.safetensors"
            save_file({k: v.float() for k, v in load_file(path).items()}, path, {"format": "pt"})
            out = Path(work) / "merged"
            subprocess.run([florence, "merge", path.parent, OUT / case["adapter"], out], check=True)
            model, image = reference.Reference(out), Image.open(FIXTURES / case["picture"])
            for answer in case["answers"]:
                ids, _, parsed = model.answer(image, answer["prompt"], answer["beams"], 40)
                assert (ids, parsed) == (answer["token_ids"], answer["answer"]), (case["adapter"], answer)
            print(case["adapter"], len(case["answers"]), "answers equal")


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["check"] else main()
