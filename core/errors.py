"""The project's errors: one line that says what was got, what was expected and what to do. Commands exit with 2 on them."""

from __future__ import annotations

import importlib.util


class MedusaExportError(Exception):
    """Bad input or an environment that cannot do what was asked.

    Args:
        where: the file, tensor, flag or value at fault.
        got: what was found there.
        expected: what a correct input would have.
        action: what the user can do about it.
    """

    def __init__(self, where: str, got: str, expected: str, action: str) -> None:
        self.where, self.got, self.expected, self.action = where, got, expected, action
        super().__init__(f"{where}: got {got}; expected {expected}; {action}")

    def __str__(self) -> str:
        line = f"{self.where}: got {self.got}; expected {self.expected}; {self.action}"
        line = " ".join(line.split())  # messages of other libraries may span lines; a user gets one
        return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in line)  # names come from files


class CheckpointError(MedusaExportError):
    """A model or heads directory that cannot be read or does not fit together."""


class ConfigError(MedusaExportError):
    """A config.json or an argument that this project cannot honour."""


class TreeError(MedusaExportError):
    """A Medusa tree that TensorRT-LLM or the heads at hand would not accept."""


class OutputError(MedusaExportError):
    """An output directory that cannot be written, or one that is not what it claims to be."""


REPORT = "report this, with the command and its log (--verbose)"


class InternalError(MedusaExportError):
    """A fault of this project: no input explains it. The only error that asks for a report; a test lists where it is raised."""

    def __init__(self, where: str, got: str, expected: str) -> None:
        super().__init__(where, got, expected, REPORT)


class MissingPackageError(MedusaExportError):
    """An optional package that the request needs is not installed."""


def require_packages(*modules: str, extra: str) -> None:
    """Raise MissingPackageError for the first top-level module that is not installed; none of them is imported.

    Args:
        extra: the optional dependencies that bring them.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_package(module, extra)


def missing_package(package: str, extra: str) -> MissingPackageError:
    """The error for an absent optional dependency, naming the extra that brings it."""
    return MissingPackageError(
        package, "not installed", "an importable package", f"run: pip install 'medusa-export[{extra}]'"
    )
