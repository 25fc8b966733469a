"""GFLOP/s of the matrix products of a training step in torch (MKL), to put beside `--bench parts`.

For each linear layer of SmolLM2-135M and its lm_head, with 1,024 tokens: the product with the weight
and that of the input's gradient. Medians of rounds in which all take turns.

    python train/benches/products.py [--threads 2]
"""

import argparse
import statistics
import time

import torch

TOKENS = 1024
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)]
ROUNDS = 15


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    operands = {}
    for into, out in SHAPES:
        operands[into, out] = torch.randn(TOKENS, into), torch.randn(out, into), torch.randn(TOKENS, out)
    rates = {shape: [] for shape in SHAPES}
    for _ in range(ROUNDS):
        for (into, out), (x, weight, dy) in operands.items():
            start = time.perf_counter()
            x @ weight.T
            dy @ weight
            seconds = time.perf_counter() - start
            rates[into, out].append(4e-9 * TOKENS * into * out / seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for (into, out), found in rates.items():
        print(f"{into:>5} to {out:<6} {statistics.median(found):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
