"""``clipdistill report``: its arguments."""

import argparse

from clipdistill.io.arguments import not_negative, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``clipdistill report``."""
    parser.add_argument("folder", type=path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=path, metavar="FILE.html", help="default: RUN/report.html")
    parser.add_argument(
        "--data", nargs="+", default=(), metavar="SET", help="test sets (default: those of the run's config)"
    )
    parser.add_argument(
        "--results",
        type=path,
        nargs="+",
        default=(),
        metavar="DIR",
        help="folders of `clipdistill evaluate --output`: also show their results of the student under attack",
    )
    parser.add_argument("--no-teacher", action="store_true", help="do not evaluate the teacher")
    parser.add_argument(
        "--remote",
        action="store_true",
        help="also fetch the test sets and the teacher that the run's config names on other machines (default: the "
        "report leaves them out; a set of --data may be anywhere)",
    )
    parser.add_argument(
        "--examples", type=not_negative, default=24, help="test images shown for each set (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=0, help="decoding threads (default: one per core)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the report and print its path."""
    from clipdistill.distributed.collectives import available_device
    from clipdistill.report.page import write_report

    device = available_device(args.device)
    path = write_report(
        args.folder,
        output=args.output,
        data=args.data,
        results=args.results,
        with_teacher=not args.no_teacher,
        remote=args.remote,
        examples=args.examples,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        progress=lambda what: print(f"report: {what}", flush=True),
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
