"""``llava-edge doctor``: is everything right on this machine, and what to do if not."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from llava_edge.cli import debug_option, terminal

_SIGNS = {"good": "ok  ", "note": "note", "bad": "BAD "}


@click.command(short_help="Check this installation, its models and this machine.")
@click.option("--quick", is_flag=True, help="Leave out what reads whole files: checksums and the self-check.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, for a bug report; nothing private is in it."
)
@debug_option
def doctor(quick: bool, as_json: bool) -> int:
    """Check versions, processor, memory, models, caches and the vision backends, and say what to do about findings.

    The exit code is 1 if something is bad.
    """
    from llava_edge.doctor import examine

    findings = []
    for finding in examine(quick=quick):
        findings.append(finding)
        if not as_json:
            terminal.data(f"{_SIGNS[finding.level]} {finding.topic}: {finding.text}\n")
            if finding.advice:
                terminal.data(f"     -> {finding.advice}\n")
    bad = sum(finding.level == "bad" for finding in findings)
    if as_json:
        report = {"bad": bad, "findings": [asdict(finding) for finding in findings]}
        terminal.data(json.dumps(report, ensure_ascii=False) + "\n")
    return 1 if bad else 0
