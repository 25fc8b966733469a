#!/usr/bin/env python3
"""A model folder with the shapes of Llama-2-7B and random weights, and rows to train on: what the step of a real size
costs can be measured without the weights, which are not free to download.

Usage: llama_2_7b.py DIR     (13.5 GB; needs nothing but Python)

DIR/model          config.json, three shards of bf16 and their index
DIR/rows.jsonl     rows of 512 token ids

    trainer train --quant nf4 --model DIR/model --data DIR/rows.jsonl --output DIR/run --no-tui --rank 64 --max-steps 2 \\
        --set adapter.target_modules='["q_proj","v_proj"]' --set train.micro_batch_size=1 --set data.max_length=512
"""
import json
import random
import struct
import sys
from pathlib import Path

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=4096,
    intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
    tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
)
SHARD_BYTES = 5_000_000_000
POOL = 1 << 20  # random numbers that the weights are cut from


def tensors():
    """Name and shape of every tensor."""
    d, i, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    yield "model.embed_tokens.weight", [v, d]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{at}.self_attn.{name}.weight", [d, d]
        for name, shape in (("gate_proj", [i, d]), ("up_proj", [i, d]), ("down_proj", [d, i])):
            yield f"{at}.mlp.{name}.weight", shape
        yield f"{at}.input_layernorm.weight", [d]
        yield f"{at}.post_attention_layernorm.weight", [d]
    yield "model.norm.weight", [d]
    yield "lm_head.weight", [v, d]


def count(shape):
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def shards():
    """Lists of tensors that fit into a shard."""
    shard, size = [], 0
    for name, shape in tensors():
        if size + 2 * count(shape) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += 2 * count(shape)
    yield shard


def bf16(x):
    return struct.pack("<f", x)[2:]


def main(folder):
    rng = random.Random(7)
    pool = b"".join(bf16(rng.gauss(0.0, 0.02)) for _ in range(POOL))
    pool += pool  # a piece may begin anywhere
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    files, weight_map = list(shards()), {}
    for number, shard in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard:
            start, end = end, end + 2 * count(shape)
            header[name] = dict(dtype="BF16", shape=shape, data_offsets=[start, end])
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(model / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard:
                left = 2 * count(shape)
                if "norm" in name:
                    out.write(bf16(1.0) * count(shape))
                    left = 0
                while left:
                    start = 2 * rng.randrange(POOL)
                    piece = pool[start:start + min(left, 2 * POOL)]
                    out.write(piece)
                    left -= len(piece)
        print(model / file)
    total = sum(2 * count(shape) for _, shape in tensors())
    index = dict(metadata=dict(total_size=total), weight_map=weight_map)
    (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (model / "config.json").write_text(json.dumps(CONFIG, indent=1))
    rows = [dict(input_ids=[rng.randrange(3, 32000) for _ in range(512)]) for _ in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
