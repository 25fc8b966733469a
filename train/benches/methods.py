#!/usr/bin/env python3
"""All methods on one recipe, side by side: what is trained, the adapter's file, the time of a step and the loss.

Usage: methods.py --model MODEL --data FOLDER [--trainer target/release/trainer] [--steps 30] [--method NAME]…

MODEL is a Llama folder, FOLDER has train.jsonl and test.jsonl (GSM8K). Prints a table in Markdown; with 30 steps on
SmolLM2-135M-Instruct it takes some 15 minutes on two cores. Needs nothing but Python.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

LINEAR = {"train.learning_rate": 5e-4, "adapter.rank": 8, "adapter.alpha": 16}
IN_FRONT = {"train.learning_rate": 1e-2, "adapter.num_virtual_tokens": 20}
# name: the method, and its settings: each with the learning rate that its paper or PEFT's examples come near
METHODS = {
    "lora": ("lora", LINEAR),
    "rslora": ("lora", LINEAR | {"adapter.use_rslora": "true"}),
    "dora": ("lora", LINEAR | {"adapter.use_dora": "true"}),
    "adalora": ("adalora", {"train.learning_rate": 2e-3, "adapter.init_r": 12, "adapter.target_r": 8, "adapter.alpha": 32}),
    "loha": ("loha", LINEAR | {"train.learning_rate": 2e-3}),
    "lokr": ("lokr", LINEAR | {"train.learning_rate": 2e-3}),
    "ia3": ("ia3", {"train.learning_rate": 8e-3}),
    "vera": ("vera", {"train.learning_rate": 8e-3, "adapter.rank": 256}),
    "prefix": ("prefix", IN_FRONT),
    "prompt": ("prompt", IN_FRONT | {"adapter.prompt_tuning_init": "SAMPLE_VOCAB"}),
    "ptuning": ("ptuning", IN_FRONT | {"train.learning_rate": 1e-3, "adapter.encoder_hidden_size": 128}),
    "mpt": ("mpt", IN_FRONT | {"adapter.num_tasks": 1}),
}
# short rows, packed, so that every step has some 500 tokens
SHARED = {
    "data.max_length": 256, "data.packing": "true", "train.micro_batch_size": 2, "train.warmup_ratio": 0.1,
    "train.lr_schedule": "constant", "train.save_every": 100000, "train.eval_every": 100000, "train.recompute": "none",
}


def rows(source, into, count, task):
    """The first rows of a file, for MPT with the number of their task."""
    with open(source) as lines, open(into, "w") as out:
        for _, line in zip(range(count), lines):
            row = json.loads(line)
            out.write(json.dumps(row | {"task_id": 0} if task else row) + "\n")


def measure(name, args, folder):
    method, settings = METHODS[name]
    for part, source, count in (("train", "train.jsonl", 40 * args.steps), ("eval", "test.jsonl", args.eval_rows)):
        rows(args.data / source, folder / f"{part}.jsonl", count, method == "mpt")
    settings = SHARED | settings | {
        "model.path": args.model, "data.train": folder / "train.jsonl", "data.eval": folder / "eval.jsonl",
        "adapter.method": method, "train.max_steps": args.steps,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    def run(command, *rest):
        call = [args.trainer, "--json", "--device", "cpu", command, *sets, *rest]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stderr}")
        return json.loads(done.stdout)

    plan = run("plan")
    out = folder / "run"
    run("train", "--output", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "train"]
    loss = [line["loss"] for line in lines if line["kind"] == "eval"][-1]
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    step = statistics.median(seconds[1:] or seconds)
    return plan["trainable_params"], size, step, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--trainer", default="target/release/trainer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval-rows", type=int, default=24)
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME")
    args = parser.parse_args()
    print("| method | trained parameters | adapter | step | eval loss |\n|---|---:|---:|---:|---:|", flush=True)
    for name in args.method or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            count, size, step, loss = measure(name, args, Path(folder))
        print(f"| `{name}` | {count:,} | {size / 1e6:.2f} MB | {step:.2f} s | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
