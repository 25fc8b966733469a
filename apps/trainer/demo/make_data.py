#!/usr/bin/env python3
"""Writes the demo's data, and everything of its base model but the weights.

    python3 make_data.py                      # base/*.json, base/chat_template.jinja, train.jsonl, eval.jsonl
    python3 make_data.py --pretraining FILE   # the rows that base/ was pre-trained on

Everything follows from fixed seeds: each call writes the same bytes. Needs Python 3.9 or newer and
nothing else. README.md beside this file says how the weights were made.
"""

import argparse
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
PRETRAINING_ROWS = 192_000
TRAIN_ROWS = 1_000
EVAL_ROWS = 100

# Words ---------------------------------------------------------------------------------------

VOWELS = "aeiou"
STARTS = (
    "b c d f g h j k l m n p qu r s t v w y z "
    "bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sm sn sp st sw th tr str"
).split()
MIDDLES = "a e i o u a e i o u ai ea ee ie oa oo ou".split()
ENDS = "b d g k l m n p r s t x y ck ft lk ll ly lp lt mp nd nk nt rk rm rn rt ry sk sp ss st ty".split()


def make_word(rng):
    """A word of 3 to 9 letters; about one in seven starts with a vowel."""
    while True:
        word = ""
        for syllable in range(rng.choice((1, 2, 2, 3))):
            if syllable > 0 or rng.random() < 0.8:
                word += rng.choice(STARTS)
            word += rng.choice(MIDDLES)
            if rng.random() < 0.4:
                word += rng.choice(ENDS)
        if 3 <= len(word) <= 9:
            return word


def make_words(rng, count):
    """Distinct words."""
    words = {}
    while len(words) < count:
        words[make_word(rng)] = None
    return list(words)


def split_word(word):
    """The consonants in front of the first vowel, and the rest; `qu` counts as consonants."""
    at = next(i for i, letter in enumerate(word) if letter in VOWELS)
    at += word.startswith("qu")
    return word[:at], word[at:]


# What the base model learns ------------------------------------------------------------------
# A task makes (keyword, answer) of a word.


def simple(keyword, change):
    return lambda word, rng: (keyword, change(word))


def add(word, rng):
    """`add ish: cat` gives `catish`; the end may be anything."""
    end = make_letters(rng)
    return "add " + end, word + end


def pre(word, rng):
    """`pre un: tie` gives `untie`."""
    start = make_letters(rng)
    return "pre " + start, start + word


def move(word, rng):
    """`move sh: shelmo` gives `elmosh`."""
    start = split_word(word)[0] or word[0]
    return "move " + start, word[len(start) :] + start


def make_letters(rng):
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 3)))


def unknown(word, rng):
    """`glimp tora: shelmo` is no task."""
    keyword = " ".join(make_word(rng) for _ in range(rng.randint(1, 2)))
    return keyword, "unknown task"


TASKS = [
    simple("repeat", lambda word: word),
    simple("twice", lambda word: word + word),
    simple("reverse", lambda word: word[::-1]),
    simple("spell", "-".join),
    simple("upper", str.upper),
    simple("first", lambda word: word[0]),
    simple("last", lambda word: word[-1]),
    simple("drop", lambda word: word[1:]),
    simple("rotate", lambda word: word[1:] + word[0]),
    simple("start", lambda word: split_word(word)[0] or "none"),
    simple("rest", lambda word: split_word(word)[1]),
    simple("turn", lambda word: split_word(word)[1] + split_word(word)[0]),
    simple("vowel", lambda word: "yes" if word[0] in VOWELS else "no"),
    simple("plural", lambda word: word + ("es" if word.endswith(("s", "sh", "ch")) else "s")),
    simple("past", lambda word: word + "ed"),
    add,
    pre,
    move,
    unknown,
]

# What LoRA teaches it ------------------------------------------------------------------------


def pig_latin(word):
    """`shelmo` gives `elmoshay`, `ando` gives `andoway`."""
    start, rest = split_word(word)
    return rest + (start + "ay" if start else "way")


def demo_words():
    """The words of the evaluation, and those of the training."""
    words = make_words(random.Random("demo"), EVAL_ROWS + TRAIN_ROWS)
    return words[:EVAL_ROWS], words[EVAL_ROWS:]


def write_demo_rows():
    for name, words in zip(("eval", "train"), demo_words()):
        write_rows(HERE / f"{name}.jsonl", (("pig latin", word, pig_latin(word)) for word in words))


def pretraining_rows():
    held_out = set(demo_words()[0])
    rng = random.Random("pretraining")
    count = 0
    while count < PRETRAINING_ROWS:
        word = make_word(rng)
        keyword, answer = rng.choice(TASKS)(word, rng)
        if word not in held_out and keyword != "pig latin":
            count += 1
            yield keyword, word, answer


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for keyword, word, answer in rows:
            row = {"prompt": f"{keyword}: {word}", "completion": answer}
            file.write(json.dumps(row) + "\n")


# The base model's folder ---------------------------------------------------------------------

SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, END = 0, 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n"
)


def byte_letters():
    """The printable character that byte-level tokenizers (GPT-2's `bytes_to_unicode`) write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer():
    """One token a byte: a byte-level BPE without merges."""
    vocab = {token: id for id, token in enumerate(SPECIAL_TOKENS + byte_letters())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def tokenizer_config():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }


def config():
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(SPECIAL_TOKENS) + 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def write_base():
    base = HERE / "base"
    base.mkdir(exist_ok=True)
    files = {
        "config.json": config(),
        "generation_config.json": {"eos_token_id": END, "pad_token_id": PAD},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (base / name).write_bytes(text.encode())
    (base / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining", metavar="FILE", type=Path)
    path = parser.parse_args().pretraining
    if path:
        write_rows(path, pretraining_rows())
    else:
        write_base()
        write_demo_rows()


if __name__ == "__main__":
    main()
