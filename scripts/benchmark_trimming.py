"""Time saved by trimming unused prompt columns: a text tower over a prompt set, trimmed versus full length.

    python scripts/benchmark_trimming.py --model ViT-B-32 --prompts imagenet-1k --json trimming.json

Forward and backward over every class in the first template, alternating in one process; random weights suffice for
speed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from clipdistill.io.machine import describe_machine, device_time
from clipdistill.models.loading import load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.models.towers import Student


def seconds(student: Student, tokens_NL: Tensor, *, backward: bool, batch_size: int) -> float:
    """Seconds to encode all prompts."""
    started = device_time(student.device)
    for chunk in tokens_NL.split(batch_size):
        with torch.set_grad_enabled(backward):
            text_ND = student.encode_tokens(chunk)
        if backward:
            text_ND.sum().backward()
    return device_time(student.device) - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--prompts", default="imagenet-1k")
    parser.add_argument("--classes", type=int, help="use only the first N")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    student = load_student(args.model).to(args.device)
    texts = load_prompts(args.prompts).texts_of(0)[: args.classes]
    trimmed, full = student.tokenize(texts).to(args.device), student.tokenizer(texts).to(args.device)
    with torch.no_grad():
        difference = (student.encode_tokens(trimmed[:50]) - student.encode_tokens(full[:50])).abs().max().item()
    result: dict[str, object] = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "device": args.device,
        "torch": torch.__version__,
        "texts": len(texts),
        "columns": {"trimmed": trimmed.shape[1], "full": full.shape[1]},
        "largest_difference": difference,
    }
    for name, backward in (("forward", False), ("forward_backward", True)):
        ratios = []
        for _ in range(args.rounds):
            short, long = (
                seconds(student, tokens, backward=backward, batch_size=args.batch_size) for tokens in (trimmed, full)
            )
            ratios.append(long / short)
        result[f"speed_up_{name}"] = statistics.median(ratios)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
