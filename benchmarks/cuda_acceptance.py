"""Shows on a GPU that the library is right and fast there, in three commands of less than 10 minutes each.

    python benchmarks/cuda_acceptance.py correctness --out correctness.json
    python benchmarks/cuda_acceptance.py processes --out processes.json
    python benchmarks/cuda_acceptance.py speed --out speed.json

A table of all checks comes last, and the exit status is 1 if one has failed. Each check is reported as it ends, so that
nothing is lost if the command is killed. `--dry` tries a command out on the CPU, in less than a minute. It takes torch
(a build for CUDA), and what `--wheels FOLDER` brings: `python benchmarks/cuda_acceptance.py wheels FOLDER` makes that
folder. `count` needs no GPU: it counts what a decoding step does, and prints how long it should take.
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from on_cuda.report import Report, run_checks, supervise
from on_cuda.wheels import install_wheels, make_wheels

SECONDS = 570.0  # of a command, so that it also ends in time where 10 minutes are the limit
COMMANDS = ("correctness", "processes", "speed")


def main() -> int:
    """Run a command, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--dry", action="store_true", help="try it out on the CPU, with tiny models")
        command.add_argument("--out", type=Path, metavar="FILE", help="write all values there, as JSON")
        command.add_argument("--wheels", type=Path, metavar="FOLDER", help="import packages from these wheels")
        command.add_argument("--only", nargs="*", metavar="TEXT", help="only checks with one of these in their names")
        command.add_argument("--child", nargs=2, metavar=("FIRST", "DEADLINE"), help=argparse.SUPPRESS)
    commands.add_parser("count")
    command = commands.add_parser("wheels")
    command.add_argument("folder", type=Path)
    command.add_argument("--python-version", default=f"{sys.version_info[0]}.{sys.version_info[1]}", metavar="3.12")
    options = parser.parse_args()
    if options.command == "wheels":
        make_wheels(options.folder, options.python_version)
        return 0
    # The library and the checks are imported from their folders, by this process and those that it starts.
    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder.parent))
    if options.command == "count":
        from on_cuda.count import print_counts

        print_counts()
        return 0
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, even if there is a GPU
    if options.child:
        first, deadline = options.child
        checks = importlib.import_module(f"on_cuda.{options.command}").CHECKS
        wanted = [""] if options.only is None else options.only
        chosen = [check for check in checks if any(text in check.name for text in wanted)]
        run_checks(chosen, int(first), options.dry, float(deadline))
        return 0
    report = Report(options.command, options.dry, options.out)
    with tempfile.TemporaryDirectory(prefix="cuda-acceptance-") as target:
        if options.wheels is not None:
            install_wheels(options.wheels, Path(target))
        paths = (str(folder.parent), str(folder), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # The same command again, by a second process.
        supervise(report, [sys.executable, *sys.argv, "--child"], SECONDS)
    print(f"\n{report.table()}", flush=True)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
