"""medusa-doctor: look, print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.artifacts.output_file import require_output_file, write_output
from medusa_export.core.flags import flag
from medusa_export.exporter.cli.console import command_app, main, progress_bars, stdout
from medusa_export.exporter.cli.flags.commands import command

doctor_app = command_app()


@dataclass(frozen=True)
class DoctorFlags:
    """What medusa-doctor takes."""

    quick: bool = flag(
        False, help="Only look whether packages are installed, instead of importing them.", panel="Check"
    )
    json_file: Path | None = flag(
        None, help="Write what was found to this file as JSON.", panel="Output", name="--json"
    )


@command(doctor_app)
def doctor_command(own: DoctorFlags) -> None:
    """Say what is on this machine, what works with it, and what to install for the rest.

    Packages are imported, each in a process of its own, which takes some seconds; nothing else is run. "yes": everything
    it needs is installed.

    Example: medusa-doctor
    """
    from medusa_export.exporter.doctor.machine import look
    from medusa_export.exporter.doctor.packages import find_packages
    from medusa_export.exporter.doctor.report import page, print_page

    require_output_file(own.json_file)
    with progress_bars() as progress:
        found = find_packages(imports=not own.quick, progress=lambda *at: progress("packages", *at))
    body = page(look(), found)
    print_page(body, stdout)
    if own.json_file is not None:
        write_output(own.json_file, json.dumps(body, indent=1) + "\n")


def doctor_main() -> None:
    """Entry point of medusa-doctor."""
    main(doctor_app)
