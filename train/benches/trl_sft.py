#!/usr/bin/env python3
"""Fine-tuning on real rows, trainer beside TRL's SFTTrainer with its own defaults, in turns.

Usage: trl_sft.py --trainer target/release/trainer --python TRL_PYTHON --model DIR --data gsm8k/train.jsonl
                  [--steps 100] [--rows 8] [--rounds 1] [--f32]

TRL_PYTHON has torch, transformers, peft and trl. The data are rows {"question", "answer"}.

Both train LoRA r 16, alpha 32 on every linear layer of the decoder, on the answers alone, at a learning rate of
2e-4 that falls linearly, with AdamW and rows of at most 1,024 tokens. Everything else is what each does by itself:
TRL pads the rows of a step to the longest, computes activations again in the backward pass and computes in bf16,
which processors without fast bf16 are slow at: with --f32 it computes in f32, as trainer does, which has no padding.

A step is the same number of rows in both: trainer runs with data.packing = false, since a packed sequence holds as
many rows as fit and is thus another step. Each row is seen once. Prints seconds a step (median, and the mean of all
but the first), rows a second, the mean loss of the last tenth of the steps, and the peak memory of the process.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

LEARNING_RATE = 2e-4


def measured(command, log):
    """Runs a command; its peak memory in MiB."""
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n" + Path(log).read_text()[-3000:])
    return usage.ru_maxrss / 1024


def ours(args, rows, folder):
    run = folder / "run"
    settings = {
        "train.micro_batch_size": args.rows, "train.max_steps": args.steps, "train.learning_rate": LEARNING_RATE,
        "train.lr_schedule": '"linear"', "train.warmup_steps": 0, "data.packing": "false",
        "output.samples": 0,  # TRL does not ask the model anything either
    }
    command = [args.trainer, "--device", "cpu", "train", "--model", args.model, "--data", str(rows), "--no-tui",
               "--output", str(run)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    memory = measured(command, folder / "ours.log")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "train"]
    return [step["seconds"] for step in steps], [step["loss"] for step in steps], memory


def theirs(args, rows, folder):
    out = folder / "steps.json"
    command = [args.python, __file__, "--peer-run", str(out), "--model", args.model, "--data", str(rows),
               "--steps", str(args.steps), "--rows", str(args.rows), *(["--f32"] if args.f32 else [])]
    memory = measured(command, folder / "theirs.log")
    steps = json.loads(out.read_text())
    return steps["seconds"], steps["losses"], memory


def peer_run(args):
    """The side of TRL, in its own process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        seconds, losses = [], []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

        def on_log(self, _, __, ___, logs=None, **____):
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

    rows = [json.loads(line) for line in open(args.data)]
    turn = lambda role, text: [dict(role=role, content=text)]
    data = Dataset.from_list([
        dict(prompt=turn("user", row["question"]), completion=turn("assistant", row["answer"])) for row in rows
    ])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.rows,
            learning_rate=LEARNING_RATE, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no",
            **(dict(bf16=False) if args.f32 else {}),
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        SFTTrainer(model=args.model, args=config, train_dataset=data, peft_config=lora, callbacks=[clock]).train()
    Path(args.peer_run).write_text(json.dumps(dict(seconds=clock.seconds, losses=clock.losses)))


def compare(args):
    results = {"trainer": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        lines = open(args.data).read().splitlines()[:args.steps * args.rows]
        if len(lines) < args.steps * args.rows:
            sys.exit(f"{args.data} has {len(lines)} rows: too few for {args.steps} steps of {args.rows}")
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(lines) + "\n")
        for turn in range(args.rounds):
            for name, run in (("trainer", ours), ("TRL", theirs)):
                place = Path(folder) / f"{turn}-{name}"
                place.mkdir()
                results[name].append(run(args, rows, place))
    print(f"{args.steps} steps of {args.rows} rows, the best of {args.rounds} rounds")
    print(f"{'':8} {'s/step':>8} {'mean':>8} {'rows/s':>8} {'loss':>8} {'peak MiB':>9}")
    rate = {}
    for name, runs in results.items():
        seconds, losses, memory = min(runs, key=lambda run: mean(run[0][1:]))
        rate[name] = args.rows / mean(seconds[1:])
        last = mean(losses[-max(1, args.steps // 10):])
        print(f"{name:8} {median(seconds):8.3f} {mean(seconds[1:]):8.3f} {rate[name]:8.2f} {last:8.4f} {memory:9.0f}")
    print(f"rows/s, trainer ÷ TRL: {rate['trainer'] / rate['TRL']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--f32", action="store_true")
    parser.add_argument("--peer-run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_run:
        peer_run(arguments)
    elif arguments.trainer:
        compare(arguments)
    else:
        parser.error("--trainer is missing")
