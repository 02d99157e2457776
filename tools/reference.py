"""The reference implementation as the fixtures use it: transformers' Florence-2, float32, eager."""

import hashlib
import json
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Florence2Config, Florence2ForConditionalGeneration, GenerationConfig
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor, Florence2Processor

import scenes

ANSWER_TYPES = {
    "<OCR>": "pure_text", "<OCR_WITH_REGION>": "ocr", "<CAPTION>": "pure_text", "<DETAILED_CAPTION>": "pure_text",
    "<MORE_DETAILED_CAPTION>": "pure_text", "<OD>": "description_with_bboxes",
    "<DENSE_REGION_CAPTION>": "description_with_bboxes", "<CAPTION_TO_PHRASE_GROUNDING>": "phrase_grounding",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "polygons", "<REGION_TO_SEGMENTATION>": "polygons",
    "<OPEN_VOCABULARY_DETECTION>": "description_with_bboxes_or_polygons", "<REGION_TO_CATEGORY>": "pure_text",
    "<REGION_TO_DESCRIPTION>": "pure_text", "<REGION_TO_OCR>": "pure_text", "<REGION_PROPOSAL>": "bboxes",
}
GENERATION = {
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 0,
    "forced_eos_token_id": 2, "num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3,
}


def versions():
    import PIL
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Reference:
    """A checkpoint in the native layout, ready to answer."""

    def __init__(self, directory, head=None, attention="eager"):
        directory = Path(directory)
        self.model = Florence2ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention).eval()
        if head is not None:
            # An untied head, as some fine-tuned checkpoints of the original layout have.
            self.model.lm_head.weight = torch.nn.Parameter(head)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.preprocessor = json.loads((directory / "preprocessor_config.json").read_text())
        self.generation = GENERATION
        if (directory / "generation_config.json").exists():
            self.generation = GENERATION | json.loads((directory / "generation_config.json").read_text())
        self.generation.pop("transformers_version", None)
        self.post = Florence2PostProcessor(
            {kind: {} for kind in ANSWER_TYPES.values()} | {"description_with_polygons": {}},
            AutoTokenizer.from_pretrained(directory))

    def pixels(self, image):
        """The slow processor's arithmetic: Pillow's resize, NumPy's rescale and normalise."""
        side = self.preprocessor["size"]["width"]
        image = image.convert("RGB")
        if self.preprocessor["do_resize"]:
            image = image.resize((side, side), Image.BICUBIC)
        values = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
        mean = np.array(self.preprocessor["image_mean"], np.float32)
        std = np.array(self.preprocessor["image_std"], np.float32)
        return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1).copy())[None]

    def prompt_ids(self, prompt):
        task = next(t for t in scenes.PROMPTS if prompt.startswith(t))
        return self.tokenizer.encode(scenes.prompt_text(task, prompt.replace(task, "").strip())).ids

    @torch.no_grad()
    def stages(self, image, prompt):
        """Every intermediate value: pixel values, DaViT stages, projector, encoder, first logits."""
        out, core = {}, self.model.model
        pixels = out["pixel_values"] = self.pixels(image)
        hooks = []
        for i, stage in enumerate(core.vision_tower.blocks):
            def keep(_module, _args, result, name=f"stage_{i}"):
                value = result[0] if isinstance(result, tuple) else result
                out[name] = value.flatten(2).transpose(1, 2)
            hooks.append(stage[-1].register_forward_hook(keep))
        visual = out["projector"] = self.model.get_image_features(pixels).pooler_output
        for hook in hooks:
            hook.remove()
        ids = torch.tensor([self.prompt_ids(prompt)])
        inputs = torch.cat([visual, self.model.get_input_embeddings()(ids)], 1)
        encoded = out["encoder"] = core.language_model.encoder(inputs_embeds=inputs).last_hidden_state
        decoded = core.language_model.decoder(
            input_ids=torch.tensor([[2, 0]]), encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        out["logits"] = self.model.lm_head(decoded[:, -1])
        return out

    def inputs(self, image, prompt):
        """What `generate` takes of a picture and a prompt."""
        pixels = self.pixels(image)
        side = -(-pixels.shape[-1] // 32)
        ids = torch.tensor([[self.model.config.image_token_id] * (1 + side * side) + self.prompt_ids(prompt)])
        return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}

    def config(self, beams, max_new_tokens, **overrides):
        """The generation settings of a search; without beams, the checkpoint's."""
        beams = beams or self.generation["num_beams"]
        config = self.generation | {"num_beams": beams, "max_new_tokens": max_new_tokens, "do_sample": False} | overrides
        if beams == 1:
            config["early_stopping"] = False
        return GenerationConfig(**config)

    @torch.no_grad()
    def answer(self, image, prompt, beams, max_new_tokens, **overrides):
        """Ids and parsed JSON of one picture and prompt."""
        config = self.config(beams, max_new_tokens, **overrides)
        sequence = self.model.generate(**self.inputs(image, prompt), generation_config=config)[0].tolist()
        return sequence, *self.parsed(sequence, prompt, image.size)

    @torch.no_grad()
    def best(self, image, prompt, beams, n, max_new_tokens, **overrides):
        """Ids and scores of the `n` best beams."""
        config = self.config(beams, max_new_tokens, num_return_sequences=n, return_dict_in_generate=True,
                             output_scores=True, **overrides)
        found = self.model.generate(**self.inputs(image, prompt), generation_config=config)
        # Shorter ones are padded.
        rows = [row[:row.index(2, 1) + 1] for row in found.sequences.tolist()]
        return rows, found.sequences_scores.tolist()

    def parsed(self, sequence, prompt, size):
        """Text and JSON of generated ids."""
        text = self.tokenizer.decode(sequence, skip_special_tokens=False)
        task = next(t for t in scenes.PROMPTS if prompt.startswith(t))
        stand_in = types.SimpleNamespace(tasks_answer_post_processing_type=ANSWER_TYPES, post_processor=self.post)
        return text, Florence2Processor.post_process_generation(stand_in, text=text, task=task, image_size=size)


def random_checkpoint(directory, config: Florence2Config, seed, tokenizer_directory, side, spread=1.0, half=False):
    """A seeded random checkpoint in the native layout, `spread` times as wide as the usual init."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.mul_(spread)
            elif "norm" not in name:
                value.normal_(0, 0.05)
    tensors = {k: (v.half() if half else v).contiguous() for k, v in model.state_dict().items()
               if k != "lm_head.weight" and "embed_tokens" not in k and "pos_idx_to_embed" not in k}
    save_file(tensors, str(directory / "model.safetensors"), {"format": "pt"})
    config.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION, indent=1) + "\n")
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(side), indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((Path(tokenizer_directory) / name).read_bytes())
    return tensors


def preprocessor_config(side):
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_center_crop": False, "do_convert_rgb": None, "resample": 3, "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }


def original_layout(source, directory, tensors, head=None):
    """Writes the tensors of a native checkpoint as Microsoft's layout has them: other names, a
    transposed projection, a bias buffer, `pytorch_model.bin`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, value in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.convs."):
            name = name.replace(".conv.", ".proj.")
        elif name.startswith("vision_tower."):
            for i in ("1", "2"):
                name = name.replace(f".conv{i}.", f".conv{i}.fn.dw.")
            for kind in ("window", "channel"):
                block = "spatial" if kind == "window" else "channel"
                name = name.replace(f".{block}_block.norm1.", f".{block}_block.{kind}_attn.norm.")
                name = name.replace(f".{kind}_attn.qkv.", f".{kind}_attn.fn.qkv.")
                name = name.replace(f".{kind}_attn.proj.", f".{kind}_attn.fn.proj.")
            name = name.replace(".norm2.", ".ffn.norm.").replace(".ffn.fc", ".ffn.fn.net.fc")
        elif name == "multi_modal_projector.image_projection.weight":
            name, value = "image_projection", value.t().contiguous()
        elif name.startswith("multi_modal_projector."):
            name = name.removeprefix("multi_modal_projector.").replace("image_position_embed", "image_pos_embed")
        elif name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        out[name] = value
    vocabulary = out["language_model.model.shared.weight"].shape[0]
    out["language_model.final_logits_bias"] = torch.zeros(1, vocabulary)
    out["vision_tower.unused.buffer"] = torch.zeros(3)
    if head is not None:
        out["language_model.lm_head.weight"] = head
    torch.save(out, directory / "pytorch_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (directory / name).write_bytes((Path(source) / name).read_bytes())
    native = json.loads((Path(source) / "config.json").read_text())
    vision, text = native["vision_config"], native["text_config"]
    vision["dim_embed"] = vision.pop("embed_dim")
    vision["model_type"] = "davit"
    vision["image_pos_embed"] = {"type": "learned_abs_2d", "max_pos_embeddings": vision.pop("max_position_embeddings")}
    text |= {k: v for k, v in GENERATION.items()}
    config = {"model_type": "florence2", "vision_config": vision, "text_config": text, "is_encoder_decoder": True,
              "vocab_size": vocabulary, "projection_dim": text["d_model"]}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # What the published checkpoints have here, and what the reference does not use.
    (directory / "generation_config.json").write_text('{"num_beams": 3, "early_stopping": false}\n')
