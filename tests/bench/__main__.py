"""`python -m tests.bench`: run benches, keep their rows, and renew the README's table."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.bench import BENCHES, load_bench, table
from tests.bench.harness import Result, machine, today

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"


def main() -> None:
    """Read the command line and do as it says."""
    summaries = "\n".join(f"  {name:10}{summary}" for name, summary in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the main jobs beside their peers.",
        epilog=f"benches:\n{summaries}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}; all if none is named")
    parser.add_argument(
        "--scale",
        choices=("small", "full"),
        default="full",
        help="full: the sizes that the README shows; small: a try that only prints its table",
    )
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHES.keys():
        parser.error(f"a bench is one of {', '.join(BENCHES)}; got {', '.join(sorted(unknown))}")
    for name in options.names or BENCHES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
            rows = load_bench(name).run(options.scale, Path(folder))
        if not rows:
            print(f"{name}: this machine lacks what it measures", file=sys.stderr, flush=True)
            continue
        result = Result(bench=name, machine=machine(), date=today(), rows=tuple(rows))
        print(table.render([result]), flush=True)
        if options.scale == "full":
            RESULTS.mkdir(exist_ok=True)
            result.write(RESULTS)
            table.write_into(README, RESULTS)


if __name__ == "__main__":
    main()
