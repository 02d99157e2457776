"""Trains models/tiny from scratch on generated scenes, with transformers' own Florence-2 network.

    python tools/train_tiny.py --run DIR --steps N     (resumes from DIR if it holds a checkpoint)

One picture is encoded once and asked several tasks. The learning rate is a cosine over all the
steps; the exponential moving average of the weights is what is exported.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import Florence2Config, Florence2ForConditionalGeneration

import scenes
import tokenizer as tiny_tokenizer

SIDE, GRID = 192, 6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# How often a task is asked, relative to the others: the ones that need a text to be found in the
# picture are learnt last.
WEIGHTS = {
    "<OPEN_VOCABULARY_DETECTION>": 3.0, "<REFERRING_EXPRESSION_SEGMENTATION>": 3.0,
    "<CAPTION_TO_PHRASE_GROUNDING>": 2.0, "<REGION_TO_OCR>": 3.0, "<REGION_TO_SEGMENTATION>": 1.3,
}


def config(vocab, image_id):
    """The tiny network: Florence-2's, only narrower."""
    vision = {
        "embed_dim": [32, 64, 128, 256], "num_heads": [2, 4, 8, 16], "num_groups": [2, 4, 8, 16],
        "depths": [1, 1, 2, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1], "patch_prenorm": [False, True, True, True], "window_size": 12,
        "projection_dim": 128, "max_position_embeddings": 50, "max_temporal_embeddings": 100,
        "drop_path_rate": 0.0,
    }
    text = {
        "model_type": "bart", "vocab_size": vocab, "d_model": 128, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
        "max_position_embeddings": 1024, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        "scale_embedding": False, "activation_function": "gelu", "init_std": 0.02,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_bos_token_id": 0, "forced_eos_token_id": 2,
    }
    return Florence2Config(
        vision_config=vision, text_config=text, image_token_id=image_id,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, is_encoder_decoder=True, tie_word_embeddings=True,
    )


class Scenes(torch.utils.data.IterableDataset):
    """Batches without end: pixels, and per picture `asks` (prompt ids, answer ids)."""

    def __init__(self, start, batch, asks):
        self.start, self.batch, self.asks = start, batch, asks

    def __iter__(self):
        words = tiny_tokenizer.Tokenizer.from_file("../models/tiny/tokenizer.json")
        seed = self.start
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        while True:
            pixels, rows, seen = [], [], []
            for i in range(self.batch):
                seed += 1
                rng = random.Random(seed)
                scene = scenes.make_scene(seed, large=rng.random() < 0.06)
                image = scenes.draw(scene)
                if rng.random() < 0.35:
                    image = scenes.as_jpeg(image, rng.randint(55, 95))
                image = image.resize((SIDE, SIDE), Image.BICUBIC)
                pixels.append((torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                               .view(SIDE, SIDE, 3).permute(2, 0, 1) / 255 - mean) / std)
                seen += [centre_target(i, thing) for thing in scene.things]
                every = scenes.tasks(scene, rng)
                order = sorted(every, key=lambda t: rng.random() ** (1 / WEIGHTS.get(t[0], 1)), reverse=True)
                for task, text, answer in order[: self.asks]:
                    rows.append((i, words.encode(scenes.prompt_text(task, text)).ids,
                                 [2, *words.encode(answer).ids]))
            # Two halves by length of the answer, so that little of the work is padding.
            rows.sort(key=lambda r: len(r[2]))
            half = len(rows) * 2 // 3
            yield torch.stack(pixels), [pack(rows[:half]), pack(rows[half:])], torch.tensor(seen)


def centre_target(picture, thing):
    """Where a thing's centre falls in the last grid, and what stands there; -1 where not asked."""
    x, y = thing.centre
    cell = int(y * GRID) * GRID + int(x * GRID)
    index = (lambda names, name: list(names).index(name) if name else -1)
    return [picture, cell, index(scenes.SHAPES, thing.shape), index(scenes.COLOURS, thing.colour),
            index(scenes.SIZES, thing.size), index(scenes.WORDS, thing.word), *thing.box]


class CentreHead(torch.nn.Module):
    """Training only: asks every cell of the last grid what has its centre there. It teaches the
    vision tower to see long before the decoder has learnt to look."""

    PARTS = (1, len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES), len(scenes.WORDS), 4)

    def __init__(self, channels):
        super().__init__()
        self.norm = torch.nn.LayerNorm(channels)
        self.out = torch.nn.Linear(channels, sum(self.PARTS))

    def loss(self, stage, targets):
        parts = self.out(self.norm(stage)).split(self.PARTS, -1)
        at = targets[:, 0].long(), targets[:, 1].long()
        there = torch.zeros(stage.shape[:2])
        there[at] = 1
        total = 4 * functional.binary_cross_entropy_with_logits(parts[0][..., 0], there)
        for part, column in zip(parts[1:5], range(2, 6)):
            total = total + functional.cross_entropy(part[at], targets[:, column].long(), ignore_index=-1)
        return total + 4 * functional.l1_loss(parts[5][at].sigmoid(), targets[:, 6:])


def pack(rows):
    def pad(lists):
        width = max(map(len, lists))
        return torch.tensor([ids + [1] * (width - len(ids)) for ids in lists])
    return torch.tensor([r[0] for r in rows]), pad([r[1] for r in rows]), pad([r[2] for r in rows])


class Loss:
    """Cross-entropy whose target for a location token is shared with its neighbours, since
    a bin beside the right one is nearly right."""

    REACH = 6

    def __init__(self, first_loc):
        self.first = first_loc
        self.offsets = torch.arange(-self.REACH, self.REACH + 1)
        weight = torch.exp(-0.5 * (self.offsets / 2.0) ** 2)
        self.weight = weight / weight.sum()

    def __call__(self, logits, target):
        logp = functional.log_softmax(logits.float(), -1)
        loc = (target >= self.first) & (target < self.first + 1000)
        plain = -logp[~loc].gather(1, target[~loc, None])[:, 0]
        near = (target[loc, None] + self.offsets).clamp(self.first, self.first + 999)
        soft = -(logp[loc].gather(1, near) * self.weight).sum(1)
        return (plain.sum() + soft.sum()) / len(target)


def initialise(model, first_loc):
    """A start for a narrow network: PyTorch's own init instead of BERT's 0.02, positions that are
    not drowned by the features, and location embeddings that are smooth functions of the bin."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module is not model.lm_head:
            module.reset_parameters()
    table = model.get_input_embeddings().weight
    text, place = model.model.language_model, model.model.multi_modal_projector.image_position_embed
    torch.nn.init.normal_(table, 0, 0.08)
    torch.nn.init.normal_(text.decoder.embed_positions.weight, 0, 0.05)
    torch.nn.init.normal_(text.encoder.embed_positions.weight, 0, 0.05)
    torch.nn.init.normal_(text.encoder.embed_positions.weight[: 2 + 1 + GRID * GRID], 0, 0.4)
    for axis in (place.row_embeddings, place.column_embeddings):
        torch.nn.init.normal_(axis.weight, 0, 1.0)
    x = torch.arange(1000)[:, None] / 1000
    freq = torch.exp(torch.linspace(math.log(1.0), math.log(160.0), table.shape[1] // 2))[None]
    with torch.no_grad():
        table[first_loc : first_loc + 1000] = 0.1 * torch.cat([torch.sin(math.pi * x * freq),
                                                               torch.cos(math.pi * x * freq)], 1)


def step_loss(model, pixels, packs, loss, stage):
    """The mean loss of all answers' tokens; `stage` is given the last stage's output."""
    tower = model.model.vision_tower(pixels).last_hidden_state
    stage.append(tower.flatten(2).transpose(1, 2))
    features = model.model.multi_modal_projector(tower)
    total, tokens = 0.0, 0
    embed = model.get_input_embeddings()
    for image, prompt, answer in packs:
        inputs = torch.cat([features[image], embed(prompt)], 1)
        mask = torch.cat([torch.ones(len(image), features.shape[1], dtype=torch.long), (prompt != 1).long()], 1)
        hidden = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=answer[:, :-1], use_cache=False,
        ).last_hidden_state
        keep = answer[:, 1:] != 1
        n = int(keep.sum())
        total = total + loss(model.lm_head(hidden[keep]), answer[:, 1:][keep]) * n
        tokens += n
    return total / tokens


def export(ema, model, directory):
    """The moving average as a native-layout float16 checkpoint."""
    model.config.save_pretrained(directory)
    tensors = {k: v.half().contiguous() for k, v in ema.items() if k != "lm_head.weight" and "embed_tokens" not in k}
    save_file(tensors, str(Path(directory) / "model.safetensors"), {"format": "pt"})


def save(directory, model, head, optimizer, ema, step):
    """What a later run resumes from (replaced in one step), and the export of now."""
    state = {"model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "ema": ema, "step": step}, directory / "new.pt")
    (directory / "new.pt").rename(directory / "last.pt")
    export(ema, model, directory)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--run", type=Path, required=True)
    args.add_argument("--steps", type=int, required=True)
    args.add_argument("--batch", type=int, default=16)
    args.add_argument("--asks", type=int, default=6)
    args.add_argument("--lr", type=float, default=1.1e-3)
    args = args.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = tiny_tokenizer.Tokenizer.from_file("../models/tiny/tokenizer.json")
    first_loc = words.token_to_id("<loc_0>")
    model = Florence2ForConditionalGeneration(config(words.get_vocab_size(), words.token_to_id("<image>"))).train()
    with torch.no_grad():
        initialise(model, first_loc)
    head = CentreHead(model.config.vision_config.embed_dim[-1])
    parameters = [*model.parameters(), *head.parameters()]
    decay = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.03}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98))
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step = 0
    last = args.run / "last.pt"
    if last.exists():
        saved = torch.load(last)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step = saved["ema"], saved["step"]
    loss = Loss(first_loc)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)
    loader = iter(torch.utils.data.DataLoader(Scenes(10_000_000 + step * args.batch, args.batch, args.asks),
                                              batch_size=None, num_workers=1, prefetch_factor=4))
    mean, mean_centre, since = 0.0, 0.0, time.time()
    while step < args.steps:
        share = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        lr = args.lr * max(share, 0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr
        pixels, packs, seen = next(loader)
        stage = []
        value = step_loss(model, pixels, packs, loss, stage)
        centre = head.loss(stage[0], seen)
        (value + 0.5 * centre).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                if v.is_floating_point():
                    ema[k].lerp_(v, 1 - keep)
        mean = value.item() if step == 1 else 0.98 * mean + 0.02 * value.item()
        mean_centre = centre.item() if step == 1 else 0.98 * mean_centre + 0.02 * centre.item()
        if step % 50 == 0:
            print(f"step {step} loss {mean:.4f} centre {mean_centre:.3f} lr {lr:.2e} {(time.time() - since) / 50:.2f} s/step", flush=True)
            since = time.time()
        if step % 250 == 0 or step == args.steps:
            save(args.run, model, head, optimizer, ema, step)


if __name__ == "__main__":
    main()
