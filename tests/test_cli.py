"""The command line: listing and checking plugins, typed errors as one line, and what it does not import."""

import sys
from pathlib import Path
from types import SimpleNamespace

import plugin_packages
import pytest
from plugin_packages import run
from typer.testing import CliRunner

import pyroflows
from pyroflows import cli, errors, plugins

# What a test runs in a fresh interpreter, with packages installed: the command line and fake laws.
PRELUDE = """
import json, sys, types
from typer.testing import CliRunner
import pyroflows
from pyroflows import errors
from pyroflows.cli import app

def law(name):
    checked.append(name)
    if name == "tide":
        raise errors.LawViolation("round trip:\\n  off by 0.5")
    if name == "drift":
        raise ZeroDivisionError("division by zero")
checked = []
names = ("check_transform", "check_distribution", "check_guide")
pyroflows.testing = types.SimpleNamespace(**dict.fromkeys(names, law))

def show(*arguments):
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()]))
"""


@pytest.fixture(scope="session")
def sites(tmp_path_factory):
    return plugin_packages.install(tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def invoke():
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def command(*arguments, sites=(), **environment):
    return run(f"show(*{arguments!r})", *sites, prelude=PRELUDE, **environment)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("plugins", "--help"), ("demo", "--help")])
def test_help_and_version_import_no_torch(arguments):
    code = f"""
show(*{arguments!r})
assert not [module for module in ("torch", "pyro", "numpy") if module in sys.modules]
"""
    status, _, _ = run(code, prelude=PRELUDE)
    assert status == 0


def test_version(invoke):
    assert invoke("--version").stdout == f"pyroflows {pyroflows.__version__}\n"


# --- plugins list ----------------------------------------------------------------------------------------


def test_P4_list_shows_every_status_and_its_reason(sites):
    installed = [sites[name] for name in ("acme-waves", "zeta-waves", "usurper", "wrong")]
    status, lines, stderr = command(
        "plugins", "list", "--group", "transforms", sites=installed, PYROFLOWS_BLOCK="raises"
    )
    assert (status, stderr) == (0, [])
    assert lines[0].split() == ["GROUP", "NAME", "PACKAGE", "VERSION", "STATUS", "REASON"]
    rows = {line.split()[1]: line for line in lines[1:]}
    start = lines[0].index("PACKAGE")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert rows["affine"].split()[2:] == ["pyroflows", pyroflows.__version__, "BUILT-IN"]
    assert rows["usurper:affine"].endswith("CONFLICT  the bare name is the built-in's")
    assert rows["acme-waves:wave"].endswith("CONFLICT  also registered by zeta-waves")
    assert "BROKEN    wrong:number is of type int; expected factory(" in rows["number"]
    assert rows["raises"].endswith("BLOCKED   PYROFLOWS_BLOCK names it")
    assert rows["hollow"].endswith("OK")


def test_list_refuses_an_unknown_group(invoke):
    result = invoke("plugins", "list", "--group", "layers")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == 'error: no plugin group "layers"; the groups are transforms, distributions, guides.\n'


def test_typed_errors_are_one_line_without_a_traceback(sites):
    answer = command("plugins", "list", sites=[sites["acme-waves"]], PYROFLOWS_BLOCK="wavee")
    message = 'error: PYROFLOWS_BLOCK names "wavee", which is not installed; did you mean "wave"?'
    assert answer == [1, [], [message]]


def test_other_errors_keep_their_traceback(monkeypatch, invoke):
    monkeypatch.setattr(plugins, "report", lambda *args, **options: 1 / 0)
    assert isinstance(invoke("plugins", "list").exception, ZeroDivisionError)


# --- plugins check ---------------------------------------------------------------------------------------


def test_check_runs_the_laws_of_each_third_party_name(sites):
    status, lines, _ = command("plugins", "check", sites=[sites["acme-waves"]])
    assert status == 1
    assert lines == [
        "pass  transforms  wave",
        "FAIL  distributions  tide: round trip: off by 0.5",
        "FAIL  guides  drift: ZeroDivisionError: division by zero",
        "1 of 3 keep the laws",
    ]


def test_check_names_and_groups(sites):
    two = [sites["acme-waves"], sites["zeta-waves"]]
    answer = command("plugins", "check", "Acme_Waves:wave", "affine", "nsf", sites=two)
    lines = ["transforms  Acme_Waves:wave", "transforms  affine", "distributions  nsf"]
    assert answer == [0, [*(f"pass  {line}" for line in lines), "3 of 3 keep the laws"], []]
    status, lines, _ = command("plugins", "check", "--group", "transforms", sites=two)
    assert (status, lines[-1]) == (0, "2 of 2 keep the laws")


def test_check_all_includes_the_builtins_but_not_the_blocked(sites):
    acme = [sites["acme-waves"]]
    status, lines, _ = command("plugins", "check", "--all", sites=acme, PYROFLOWS_BLOCK="tide,drift")
    count = len(plugins.report())
    assert status == 0
    assert {"pass  transforms  affine", "pass  distributions  nsf", "pass  transforms  wave"} <= set(lines)
    assert int(lines[-1].split()[0]) >= count


def test_check_of_an_unknown_name_is_an_error(sites):
    status, lines, stderr = command("plugins", "check", "waev", sites=[sites["acme-waves"]])
    assert (status, lines, len(stderr)) == (1, [], 1)
    assert stderr[0].startswith('error: no transform "waev"; did you mean "wave"?')


def test_check_of_a_name_that_cannot_be_loaded_fails_on_its_laws(sites):
    """It is registered, so it is handed to the laws, which say what is wrong."""
    status, lines, _ = command("plugins", "check", "exits", sites=[sites["broken"]])
    assert (status, lines) == (0, ["pass  transforms  exits", "1 of 1 keep the laws"])


def test_check_with_nothing_installed_says_so():
    status, lines, _ = command("plugins", "check", PYROFLOWS_DISABLE_PLUGINS="1")
    assert (status, lines) == (0, ["no third-party plugin is installed; --all checks the built-in ones"])


# --- demo ------------------------------------------------------------------------------------------------


def test_demo_passes_its_options_on(monkeypatch, invoke):
    calls = []
    fake = SimpleNamespace(run=lambda **options: calls.append(options))
    monkeypatch.setitem(vars(pyroflows), "demo", fake)
    monkeypatch.setitem(sys.modules, "pyroflows.demo", fake)
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--quick", "--output", "there").exit_code == 0
    assert calls == [
        {"output": Path("demo-output"), "quick": False},
        {"output": Path("there"), "quick": True},
    ]


def test_demo_errors_are_one_line(monkeypatch, invoke):
    def fail(**options):
        raise errors.OptionError("no room\nleft")

    monkeypatch.setitem(vars(pyroflows), "demo", SimpleNamespace(run=fail))
    result = invoke("demo")
    assert (result.exit_code, result.stderr) == (1, "error: no room left\n")
