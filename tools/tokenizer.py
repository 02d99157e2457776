"""Trains the byte-level BPE tokenizer of models/tiny on its own texts, laid out like Florence-2's."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import scenes

# The 1024 tokens that Florence-2 adds to BART's vocabulary, in its order.
FLORENCE_TOKENS = (
    ["<od>", "</od>", "<ocr>", "</ocr>"]
    + [f"<loc_{n}>" for n in range(1000)]
    + ["<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>", "<seg>", "</seg>",
       "<sep>", "<region_cap>", "</region_cap>", "<region_to_desciption>", "</region_to_desciption>", "<proposal>",
       "</proposal>", "<poly>", "</poly>", "<and>"]
)


def texts(n):
    rng = random.Random(0)
    for seed in range(n):
        for task, text, answer in scenes.tasks(scenes.make_scene(seed), rng):
            for piece in (scenes.prompt_text(task, text), answer):
                yield " ".join(part for part in piece.replace(">", "<").split("<") if not part.startswith("loc_"))
    for word in scenes.WORDS * 40:
        yield word


def train(directory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )
    tokenizer.train_from_iterator(texts(1500), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in [*FLORENCE_TOKENS, "<image>"]])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>", "model_max_length": 1024, "clean_up_tokenization_spaces": False,
    }, indent=1) + "\n")
    return tokenizer


if __name__ == "__main__":
    trained = train("../models/tiny")
    print(trained.get_vocab_size(), trained.encode("What is the text in the image? <loc_5>").tokens)
    print([trained.encode(w).tokens[1:-1] for w in scenes.WORDS])
