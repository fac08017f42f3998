"""Range of the numbers that options and arguments take, for every command of a program.

The minimum and maximum of an option do not suffice: NaN passes both, and most options have no
maximum.
"""

from typing import Any

import typer

from serving.util.finite import INT32_MAX, is_float32


def restrict_numbers(command: Any) -> None:
    """Make a command and its subcommands reject numbers that do not fit float32 or int32.

    Args:
        command: the result of `typer.main.get_command`.
    """
    for below in getattr(command, "commands", {}).values():
        restrict_numbers(below)
    for parameter in command.params:
        parameter.callback = _Checked(parameter.callback)


class _Checked:
    """Callback of a parameter that checks its value before the parameter's own callback."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def __call__(self, context: Any, parameter: Any, value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not is_float32(number):
                raise typer.BadParameter(
                    f"{number:g} is not a finite number in float32, which ends at 3.4e38",
                    ctx=context,
                    param=parameter,
                )
            if isinstance(number, int) and abs(number) > INT32_MAX:
                raise typer.BadParameter(
                    f"{number} is too large; expected at most {INT32_MAX:,}",
                    ctx=context,
                    param=parameter,
                )
        return value if self._callback is None else self._callback(context, parameter, value)
