"""The counts of a campaign as JSON and as tables."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.runner import Result
from faults.space import how_a_disk_is_full


def summary(results: Sequence[Result], *, seconds: float, left_out: Mapping[str, str], quick: bool) -> dict[str, Any]:
    """What the JSON file holds."""
    lost = [result for result in results if not result.survived]
    return {
        "cases": len(results),
        "survived": len(results) - len(lost),
        "lost": len(lost),
        "findings": [{"case": one.case.title, "what": "; ".join(one.outcome.problems)} for one in lost],
        "ended_well": sum(result.outcome.ended_well for result in results),
        "left_out": dict(left_out),
        "full_disk": how_a_disk_is_full(),
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "results": [result.to_dict() for result in results],
    }


def report(content: Mapping[str, Any]) -> str:
    """Cases survived, by stage and fault, and every finding, as markdown."""
    rows = content["results"]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    faults = list(dict.fromkeys(row["fault"] for row in rows))
    lines = ["| Fault | " + " | ".join(stages) + " |", "| --- |" + " --: |" * len(stages)]
    for fault in faults:
        cells = [_cell([row for row in rows if row["fault"] == fault and row["stage"] == stage]) for stage in stages]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    lines += ["", "{cases} cases, {survived} survived, {lost} lost, {seconds:.0f} s.".format(**content)]
    lines += ["In {ended_well} of them the disturbed command ended well: it bore the fault.".format(**content)]
    lines += [f"A full disk is {content['full_disk']}."]
    lines += [f"Left out: {fault} ({why})." for fault, why in content["left_out"].items()]
    lines += [f"- LOST {finding['case']}: {finding['what']}" for finding in content["findings"]]
    return "\n".join(lines)


def check_writable(*files: Path | None) -> None:
    """Before minutes of work: the folders of the files that were asked for are there, or made.

    Raises:
        OSError: a file cannot be written.
    """
    for file in files:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()


def write_results(content: Mapping[str, Any], *, json_file: Path | None, report_file: Path | None) -> None:
    """Writes the files that were asked for."""
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if report_file is not None:
        report_file.write_text(report(content) + "\n" + _examples(content), encoding="utf-8")


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['survived'] for row in rows)} of {len(rows)}" if rows else ""


def _examples(content: Mapping[str, Any]) -> str:
    """What the user sees, once for each fault and stage."""
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in content["results"]:
        first.setdefault((row["fault"], row["stage"]), row)
    lines = ["", "| Case | What the user sees (exit code: last line) | Left on the disk |", "| --- | --- | --- |"]
    for row in first.values():
        cells = [str(row[key]).replace("|", "\\|") for key in ("case", "saw", "left")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
