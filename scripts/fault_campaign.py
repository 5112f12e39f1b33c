"""Breaks the machine, the files, the numbers and the data at every stage of a job, and checks that nothing is lost.

    python scripts/fault_campaign.py --quick --json faults.json
    python scripts/fault_campaign.py --report faults.md --json faults.json   # the long form

Each case runs one stage with one fault on a tiny model. It has survived when the command ended with one clear line (or
well), everything that lay on the disk is as it was, nothing half-made has a final name, and the same command, run again
without the cause, gives what an undisturbed run gives. Exit code 1 when a case was lost.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars of libraries would break ours
if not os.access(os.path.expanduser("~"), os.W_OK):  # the libraries keep caches there
    home = tempfile.mkdtemp(prefix="faults_home_")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for variable in ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        os.environ.setdefault(variable, home)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from faults.processes import kill_all  # noqa: E402
from faults.registry import all_cases, left_out  # noqa: E402
from faults.report import check_writable, report, summary, write_results  # noqa: E402
from faults.runner import run_cases  # noqa: E402
from faults.stages import make_baselines  # noqa: E402

from lightning_moe.signals import Terminated, signals_raise  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; the exit code."""
    options = _parse(arguments)
    try:
        with signals_raise():
            return _campaign(options)
    except (KeyboardInterrupt, Terminated):
        print("Interrupted: nothing was counted.", file=sys.stderr)
        return 130


def _campaign(options: argparse.Namespace) -> int:
    cases = [case for case in all_cases() if case.quick or not options.quick]
    cases = [case for case in cases if any(fnmatch(case.title, f"*{only}*") for only in options.only)]
    missing = left_out()
    if options.list:
        print("\n".join(case.title for case in cases))
        return 0
    cases = [case for case in cases if case.fault not in missing]
    if not cases:
        print(f"No case that this machine can have matches '{options.only}'; --list names all.", file=sys.stderr)
        return 2
    try:
        check_writable(options.json, options.report)
        if options.work is not None:
            options.work.mkdir(parents=True, exist_ok=True)
        began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults_", dir=options.work)).resolve()
    except OSError as error:
        print(f"Nothing can be written there: {error}. Name another file or folder.", file=sys.stderr)
        return 2
    try:
        baselines = make_baselines(work, shipped=options.shipped, wanted={case.stage for case in cases})
        results = run_cases(cases, baselines=baselines, workers=options.workers, keep=options.keep)
    finally:
        kill_all()
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    content = summary(results, seconds=time.monotonic() - began, left_out=missing, quick=options.quick)
    print(report(content))
    write_results(content, json_file=options.json, report_file=options.report)
    return 1 if content["lost"] else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the short form: minutes on two cores")
    parser.add_argument("--json", type=Path, help="file for the counts and every case")
    parser.add_argument("--report", type=Path, help="file for the tables, as markdown")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PATTERN", help="cases whose STAGE/FAULT/NAME holds one of these"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--work", type=Path, help="folder for the runs; the system's temporary one if not given")
    parser.add_argument("--keep", action="store_true", help="leave the folders of lost cases there")
    parser.add_argument("--shipped", action="store_true", help="with the shipped small model, not a tiny random one")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"cases at a time; default: cores ({cores})")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be 1 or more, got {options.workers}")
    return options


if __name__ == "__main__":
    sys.exit(main())
