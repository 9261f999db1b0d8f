"""The command line: ``pyroflows plugins list``, ``pyroflows plugins check`` and ``pyroflows demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pyroflows import errors, plugins

__all__ = ["app"]


class _Commands(TyperGroup):
    """Prints this package's own errors as one line; any other is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except errors.PyroflowsError as error:
            typer.echo(f"error: {_line(error)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Normalizing flows for Pyro.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
plugins_app = typer.Typer(help="What is installed, and whether it keeps the laws.", no_args_is_help=True)
app.add_typer(plugins_app, name="plugins")

Group = Annotated[str | None, typer.Option(help="transforms, distributions or guides; all three by default.")]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_version(wanted: bool) -> None:
    if wanted:
        from pyroflows import __version__

        typer.echo(f"pyroflows {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@plugins_app.command("list")
def _list(group: Group = None) -> None:
    """List every registered name, importing each one to find those that are broken."""
    rows = [("GROUP", "NAME", "PACKAGE", "VERSION", "STATUS", "REASON")]
    for info in plugins.report(group, load=True):
        short = info.group.removeprefix("pyroflows.")
        rows.append((short, info.name, info.distribution, info.version, info.status, info.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@plugins_app.command("check")
def _check(
    names: Annotated[list[str] | None, typer.Argument(help="Names; every third-party one by default.")] = None,
    group: Group = None,
    everything: Annotated[bool, typer.Option("--all", help="Check the built-in ones too.")] = False,
) -> None:
    """Run the laws of pyroflows.testing, and exit with 1 if one is broken."""
    if names:
        groups = (group,) if group else plugins.GROUPS
        chosen = [(place, name) for name in names for place in _groups_of(name, groups)]
    else:
        skipped = ("BLOCKED",) if everything else ("BLOCKED", "BUILT-IN")
        chosen = [(info.group, info.name) for info in plugins.report(group) if info.status not in skipped]
    if not chosen:
        typer.echo("no third-party plugin is installed; --all checks the built-in ones")
        return
    failed = sum(not _keeps_the_laws(place, name) for place, name in chosen)
    typer.echo(f"{len(chosen) - failed} of {len(chosen)} keep the laws")
    if failed:
        raise typer.Exit(1)


def _groups_of(name: str, groups: tuple[str, ...]) -> list[str]:
    """Those of the groups in which a name, bare or ``package:name``, is registered."""
    found, unknown = [], None
    for group in groups:
        try:
            plugins.get(group, name)
        except errors.UnknownPlugin as error:
            unknown = unknown or error
            continue
        except errors.PluginError:
            pass  # it is registered, and its check will say what is wrong with it
        found.append(group)
    if unknown and not found:
        raise unknown
    return found


def _keeps_the_laws(group: str, name: str) -> bool:
    from pyroflows import testing

    group = group.removeprefix("pyroflows.")
    check: Any = {
        "transforms": testing.check_transform,
        "distributions": testing.check_distribution,
        "guides": testing.check_guide,
    }[group]
    label = f"{group}  {name}"
    try:
        check(name)
    except errors.PyroflowsError as error:
        typer.echo(f"FAIL  {label}: {_line(error)}")
        return False
    except Exception as error:  # a plugin's own bug must not hide the verdict on the others
        typer.echo(f"FAIL  {label}: {type(error).__name__}: {_line(error)}")
        return False
    typer.echo(f"pass  {label}")
    return True


@app.command("demo")
def _demo(
    output: Annotated[Path, typer.Option(help="The folder that the figures go to.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: a look, not a result.")] = False,
) -> None:
    """Fit flows to small data sets and draw what they learn."""
    from pyroflows import demo

    demo.run(output=output, quick=quick)
