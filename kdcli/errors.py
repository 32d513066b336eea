"""What can go wrong, and the exit code that says so (0 done, 130 / 143 interrupted after saving)."""


class KDError(Exception):
    """A run or a check failed; the message says what, where and what to do. Exit code 1."""

    exit_code = 1


class ConfigError(KDError):
    """The user's input is wrong: a key, a path, a row, a checkpoint. Exit code 2.

    `problems` holds one sentence each, so that all errors of a config are shown at once.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(KDError):
    """The data were refused: more bad rows than the user allows. Exit code 3."""

    exit_code = 3


class NumericsError(KDError):
    """The numbers broke down (NaN or infinity); the last checkpoint is untouched. Exit code 4."""

    exit_code = 4


class Interrupted(KDError):
    """The run was asked to stop and has saved itself. Exit code 128 + signal (130 SIGINT, 143 SIGTERM)."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
