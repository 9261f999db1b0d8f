"""The registry's rules P1 to P11, with real packages and fresh interpreters; then building by name."""

import importlib.metadata
import itertools
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import plugin_packages
import pytest
from plugin_packages import run

from pyroflows import plugins

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def sites(tmp_path_factory):
    return plugin_packages.install(tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def acme(sites):
    return sites["acme-waves"]


@pytest.fixture
def everything(sites):
    return list(sites.values())


def test_registered_names_are_the_installed_ones():
    """`pyproject.toml` and the metadata of the installed package register the same names."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    found = importlib.metadata.distribution("pyroflows").entry_points
    for group, entries in written.items():
        installed = {point.name: point.value for point in found if point.group == group}
        assert installed == entries, f"{group} differs from pyproject.toml: run make install"


# --- P1, P2: lazily --------------------------------------------------------------------------------------


def test_P1_import_reads_no_metadata_and_loads_no_plugin(acme):
    code = """
import importlib.metadata, json, sys
reads = []
importlib.metadata.MetadataPathFinder.find_distributions = lambda *a, **k: reads.append(a) or iter(())
import pyroflows
import pyroflows.plugins
print(json.dumps([reads, [m for m in ("torch", "pyro", "numpy", "acme_waves") if m in sys.modules]]))
"""
    assert run(code, acme, prelude="") == [[], []]


def test_P2_listing_imports_nothing(everything):
    code = """
names = {group: plugins.available(group) for group in ("transforms", "pyroflows.distributions", "guides")}
infos = plugins.report()
loaded = [m for m in ("torch", "acme_waves", "broken_import", "wrong", "usurper") if m in sys.modules]
show([names, loaded, len(infos)])
"""
    names, loaded, count = run(code, *everything)
    assert loaded == []
    assert count > 20
    assert {"affine", "spline_coupling", "acme_gain", "no_import", "number"} <= set(names["transforms"])
    assert {"nsf", "maf", "tide"} <= set(names["pyroflows.distributions"])
    assert "drift" in names["guides"]
    assert all(listed == sorted(listed) for listed in names.values())


def test_P2_metadata_is_read_once(acme):
    code = """
from importlib import metadata
whole, calls = metadata.distributions, []
metadata.distributions = lambda: calls.append(1) or whole()
plugins.available("transforms"), plugins.report(), plugins.get("transforms", "wave"), plugins.report("guides")
first = len(calls)
plugins.refresh()
plugins.available("guides")
show([first, len(calls)])
"""
    assert run(code, acme) == [1, 2]


def test_P2_unreadable_metadata_of_others_is_skipped(acme, tmp_path):
    for name, files in {
        "nameless-1.0.dist-info": {
            "METADATA": "Version: 1\n",
            "entry_points.txt": "[pyroflows.guides]\na = b:c\n",
        },
        "empty-1.0.dist-info": {},
        "garbled-1.0.dist-info": {
            "METADATA": "Name: garbled\n",
            "entry_points.txt": "[pyroflows.guides]\nnonsense\n",
        },
        "binary-1.0.dist-info": {
            "METADATA": "Name: binary\n",
            "entry_points.txt": b"[pyroflows.guides]\n\xff = a:b\n",
        },
        "versionless-1.0.dist-info": {
            "METADATA": "Name: v\n",
            "entry_points.txt": "[pyroflows.guides]\nv = v:v\n",
        },
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    code = """
show([(i.name, i.distribution, i.version) for i in plugins.report("guides") if i.status != "BUILT-IN"])
"""
    assert run(code, tmp_path, acme) == [["drift", "acme-waves", "1.0"], ["v", "v", "?"]]


# --- P3, P4: what is broken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_import", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("exits", "SystemExit: 3"),
        ("no_attribute", "AttributeError: module 'broken_attribute' has no attribute 'Nap'"),
        ("repaired", "ZeroDivisionError: division by zero"),
    ],
)
def test_P3_broken_plugin_never_breaks_a_good_one(sites, name, reason):
    code = f"""
try:
    plugins.get("transforms", "{name}")
except errors.PluginLoadError as error:
    cause = type(error.__cause__).__name__
    told = [str(error), error.plugin, error.distribution, error.version, cause]
show([told, plugins.get("transforms", "wave").__name__, plugins.available("transforms")])
"""
    told, good, names = run(code, sites["broken"], sites["acme-waves"])
    message = f'transform "{name}" of broken 0.9 cannot be imported: {reason}.'
    assert told == [message, name, "broken", "0.9", reason.partition(":")[0]]
    assert good == "Map"
    assert name in names


def test_P3_success_and_failure_are_remembered(sites, tmp_path):
    code = """
import traceback
def fail():
    try:
        plugins.get("transforms", "slow_broken")
    except errors.PluginLoadError as error:
        return error
failures = [fail() for _ in range(5)]
same = plugins.get("transforms", "slow") is plugins.get("transforms", "counted:slow")
lengths = {len("".join(traceback.format_exception(failure))) for failure in failures}
show([same, len(set(map(id, failures))), len(lengths), len({id(f.__cause__) for f in failures})])
"""
    log = tmp_path / "log"
    assert run(code, sites["counted"], COUNT_FILE=str(log)) == [True, 5, 1, 1]
    assert log.read_text().split() == ["counted_broken", "counted_good"]


def test_P3_interrupt_passes_through_and_is_not_remembered(sites):
    code = """
caught = 0
for _ in range(2):
    try:
        plugins.get("transforms", "interrupted")
    except KeyboardInterrupt:
        caught += 1
show([caught, [i.status for i in plugins.report() if i.name == "interrupted"]])
"""
    assert run(code, sites["broken"]) == [2, ["OK"]]


def test_P3_refresh_retries_and_finds_new_packages(sites):
    code = f"""
import os
def look():
    found = attempt(plugins.get, "transforms", "repaired")
    return found[0] if isinstance(found, list) else found.__name__, "wave" in plugins.available("transforms")
before = look()
os.environ["REPAIRED"] = "1"
sys.path.append({str(sites["acme-waves"])!r})
still = look()
plugins.refresh()
show([before, still, look()])
"""
    failed = ["PluginLoadError", False]
    assert run(code, sites["broken"]) == [failed, failed, ["Map", True]]


def test_P4_report_shows_what_is_broken_and_why(everything):
    code = """
def third_party(**options):
    infos = plugins.report("transforms", **options)
    return {i.name: [i.status, i.reason] for i in infos if i.distribution in shown}
shown = ("broken", "wrong", "acme-waves", "api")
sys.modules["broken_interrupt"] = sys  # this one would stop the listing, as it should
sys.Map = dict
before = third_party()
attempt(plugins.get, "transforms", "exits")
show([before, third_party(), third_party(load=True)])
"""
    sites = [site for site in everything if site.name != "zeta-waves"]
    before, one, all_ = run(code, *sites)
    assert {status for status, _ in before.values()} == {"OK"}
    assert [name for name in one if one[name][0] == "BROKEN"] == ["exits"]
    assert one["exits"][1] == "SystemExit: 3"
    broken = {name for name in all_ if all_[name][0] == "BROKEN"}
    assert broken == {
        *("no_import", "exits", "no_attribute", "repaired", "number"),
        *("of_tomorrow", "of_yesterday", "garbled"),
    }
    assert all_["wave"] == ["OK", ""]
    assert all_["no_import"][1] == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"


def test_P4_no_warning_unless_asked_for(everything):
    # `run` turns warnings into errors and refuses any output on stderr.
    code = """
plugins.available("transforms"), plugins.report()
show(plugins.build("transforms", "of_both", 2).config.distribution)
"""
    assert run(code, *everything) == "api"


# --- P5, P6, P7: one name, several packages ---------------------------------------------------------------


def test_P5_builtin_names_are_reserved(sites):
    code = """
infos = {i.name: [i.distribution, i.status, i.reason] for g in plugins.GROUPS for i in plugins.report(g)}
names = plugins.available("transforms"), plugins.available("distributions")
show([infos, names, plugins.transform("Usurper:affine", input_dim=2).config.__dict__])
"""
    infos, (transforms, flows), config = run(code, sites["usurper"])
    assert infos["affine"] == ["pyroflows", "BUILT-IN", ""]
    assert infos["usurper:affine"] == ["usurper", "CONFLICT", "the bare name is the built-in's"]
    assert infos["nsf"][1] == "BUILT-IN"
    assert {"affine", "usurper:affine"} <= set(transforms)
    assert {"nsf", "usurper:nsf"} <= set(flows)
    assert (config["name"], config["distribution"]) == ("usurper:affine", "usurper")


def test_P5_bare_name_is_the_builtin(sites):
    code = """
found = [plugins.get("transforms", name) for name in ("affine", "pyroflows:affine", "usurper:affine")]
show([found[0] is found[1], found[0].__module__.split(".")[0], found[2].__module__])
"""
    assert run(code, sites["usurper"]) == [True, "pyroflows", "usurper"]


def test_P5_a_name_cannot_look_like_an_address(sites):
    code = """
evil = "odd:pyroflows:affine"
show([plugins.available("transforms"), attempt(plugins.get, "transforms", evil), "odd" in sys.modules,
      [i.distribution for i in plugins.report("transforms") if i.name == evil]])
"""
    names, (error, message), loaded, owner = run(code, sites["odd"])
    assert not [name for name in names if name.startswith("odd:")]
    assert error == "PluginContractError"
    assert "a name is made of letters" in message
    assert owner == ["odd"]
    assert not loaded


def test_P6_two_packages_one_name(sites):
    code = """
show([attempt(plugins.get, "transforms", "wave"),
      *(plugins.get("transforms", f"{p}:wave").__module__ for p in ("acme_waves", "zeta-waves")),
      [n for n in plugins.available("transforms") if "wave" in n],
      {i.name: [i.status, i.reason, i.address] for i in plugins.report("transforms") if "wave" in i.name}])
"""
    error, first, second, names, infos = run(code, sites["acme-waves"], sites["zeta-waves"])
    assert error == [
        "AmbiguousPlugin",
        '2 packages register the transform "wave": ask for "acme-waves:wave" or "zeta-waves:wave", '
        "or list in PYROFLOWS_BLOCK those that you do not want.",
    ]
    assert (first, second) == ("acme_waves", "zeta_waves")
    assert names == ["acme-waves:wave", "zeta-waves:wave"]
    assert infos == {
        "acme-waves:wave": ["CONFLICT", "also registered by zeta-waves", "acme-waves:wave"],
        "zeta-waves:wave": ["CONFLICT", "also registered by acme-waves", "zeta-waves:wave"],
    }


def test_P6_blocking_one_settles_it(sites):
    code = """
show([plugins.get("transforms", "wave").__module__,
      {i.name: i.status for i in plugins.report("transforms") if "wave" in i.name}])
"""
    both = sites["acme-waves"], sites["zeta-waves"]
    assert run(code, *both, PYROFLOWS_BLOCK="acme-waves:wave") == [
        "zeta_waves",
        {"acme-waves:wave": "BLOCKED", "wave": "OK"},
    ]


def test_P6_the_same_under_any_hash_seed_and_path_order(sites):
    code = """
from dataclasses import astuple
asked = [attempt(plugins.get, "transforms", n) for n in ("wave", "wav", "nowhere")]
show([plugins.available("transforms"), asked, [astuple(info) for info in plugins.report()]])
"""
    three = sites["acme-waves"], sites["zeta-waves"], sites["usurper"]
    orders = [three, three[::-1], (three[1], three[2], three[0])]
    answers = [run(code, *order, PYTHONHASHSEED=seed) for order, seed in zip(orders, "019", strict=True)]
    assert answers[0] == answers[1] == answers[2]


def test_P6_one_package_one_name_two_values(sites):
    code = """
show([attempt(plugins.get, "transforms", "twice"), plugins.get("transforms", "same").__name__,
      [[i.name, i.status] for i in plugins.report("transforms") if i.distribution == "odd"]])
"""
    error, same, infos = run(code, sites["odd"])
    assert error == [
        "PluginContractError",
        'transform "twice" of odd 1.0 breaks the contract: registered 2 times: odd:Flow, odd:Map.',
    ]
    assert same == "Map"
    assert infos == [["odd:pyroflows:affine", "BROKEN"], ["same", "OK"], ["odd:twice", "BROKEN"]]


def test_P7_the_same_package_twice_counts_once(acme, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(acme, copy)
    (copy / "Acme_Waves-1.0.dist-info").rename(copy / "acme_waves-1.0.dist-info")
    metadata = copy / "acme_waves-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Acme_Waves", "acme.waves"))
    code = """
show([plugins.get("transforms", "wave").__name__, plugins.get("transforms", "acme.waves:wave").__name__,
      [[i.name, i.distribution, i.status] for i in plugins.report("transforms") if "wave" in i.name]])
"""
    for order in itertools.permutations([acme, copy]):
        assert run(code, *order, acme) == ["Map", "Map", [["wave", "acme-waves", "OK"]]]


# --- P8: the environment ---------------------------------------------------------------------------------

NAMES = """
show([[i.address, i.status, i.reason] for i in plugins.report() if i.distribution != "pyroflows"])
"""


def test_P8_disable_leaves_only_the_builtins(everything):
    for value in ("1", "true", "Yes", "ON"):
        infos = run(NAMES, *everything, PYROFLOWS_DISABLE_PLUGINS=value)
        assert {tuple(info[1:]) for info in infos} == {("BLOCKED", "PYROFLOWS_DISABLE_PLUGINS is set")}
    code = """
show([plugins.available("transforms"), attempt(plugins.get, "transforms", "number")])
"""
    names, error = run(code, *everything, PYROFLOWS_DISABLE_PLUGINS="1")
    assert {"affine", "spline"} <= set(names)
    assert not {"number", "wave", "acme_gain"} & set(names)
    assert error == [
        "PluginBlocked",
        'transform "number" of wrong 0.1 is switched off: PYROFLOWS_DISABLE_PLUGINS is set.',
    ]


@pytest.mark.parametrize("value", ["", "0", "false", "No", "off"])
def test_P8_disable_can_be_off(acme, value):
    assert {info[1] for info in run(NAMES, acme, PYROFLOWS_DISABLE_PLUGINS=value)} == {"OK"}


@pytest.mark.parametrize(
    ("block", "gone"),
    [
        ("drift", {"acme-waves:drift"}),
        ("Acme.Waves:tide, drift,", {"acme-waves:tide", "acme-waves:drift"}),
        ("ACME-waves", {"acme-waves:drift", "acme-waves:tide", "acme-waves:wave"}),
        ("affine", {"usurper:affine"}),
        ("", set()),
    ],
)
def test_P8_block_by_name_address_or_package(sites, block, gone):
    infos = run(NAMES, sites["acme-waves"], sites["usurper"], PYROFLOWS_BLOCK=block)
    assert {address for address, status, _ in infos if status == "BLOCKED"} == gone
    assert {reason for _, status, reason in infos if status == "BLOCKED"} <= {"PYROFLOWS_BLOCK names it"}


@pytest.mark.parametrize(
    ("allow", "left"),
    [
        ("drift", {"acme-waves:drift"}),
        ("acme_waves,usurper:nsf", {"acme-waves:drift", "acme-waves:tide", "acme-waves:wave", "usurper:nsf"}),
        ("spline", set()),
    ],
)
def test_P8_allow_leaves_only_these(sites, allow, left):
    infos = run(NAMES, sites["acme-waves"], sites["usurper"], PYROFLOWS_ALLOW=allow)
    assert {address for address, status, _ in infos if status != "BLOCKED"} == left


def test_P8_blocking_wins_over_allowing(acme):
    infos = run(NAMES, acme, PYROFLOWS_ALLOW="acme-waves", PYROFLOWS_BLOCK="drift")
    assert {address for address, status, _ in infos if status == "BLOCKED"} == {"acme-waves:drift"}


def test_P8_shown_names_are_the_names_to_block(everything):
    """Each name that the list shows, put into the variable, blocks just that entry."""
    code = """
import os
owners = ("acme-waves", "zeta-waves", "usurper", "api")
shown = [i for i in plugins.report("transforms") if i.distribution in owners]
wrong = []
for info in shown:
    os.environ["PYROFLOWS_BLOCK"] = info.name
    plugins.refresh()
    blocked = [i.address for i in plugins.report() if i.status == "BLOCKED"]
    wrong += [] if blocked == [info.address] else [[info.name, blocked]]
show([len(shown), wrong])
"""
    assert run(code, *everything) == [7, []]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "PYROFLOWS_BLOCK",
            "drift,tidee",
            'PYROFLOWS_BLOCK names "tidee", which is not installed; did you mean "tide"?',
        ),
        ("PYROFLOWS_ALLOW", "acmewaves", 'which is not installed; did you mean "acme-waves"?'),
        ("PYROFLOWS_ALLOW", "qqqq", 'PYROFLOWS_ALLOW names "qqqq", which is not installed.'),
        (
            "PYROFLOWS_BLOCK",
            "spline",
            'PYROFLOWS_BLOCK names "spline", which is built in and cannot be blocked.',
        ),
        ("PYROFLOWS_DISABLE_PLUGINS", "maybe", "0, false, no, off; got 'maybe'."),
    ],
)
def test_P8_what_cannot_be_meant_is_an_error_at_every_use(acme, variable, value, message):
    code = """
uses = [(plugins.available, "guides"), (plugins.get, "transforms", "wave"), (plugins.report,)]
show([attempt(*use) for use in uses])
"""
    answers = run(code, acme, **{variable: value})
    assert [error for error, _ in answers] == ["PluginConfigError"] * 3
    assert all(text.endswith(message) for _, text in answers)


# --- P9: the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "number",
            'transform "number" of wrong 0.1 breaks the contract: wrong:number is of type int; '
            "expected factory(input_dim, *, context_dim=0, **options).",
        ),
        (
            "of_tomorrow",
            'transform "of_tomorrow" of api 9.0 breaks the contract: written for API 2, this is API 1: '
            "upgrade pyroflows or install an older api.",
        ),
        (
            "of_yesterday",
            'transform "of_yesterday" of api 9.0 breaks the contract: written for API 0, this is API 1: '
            "upgrade api or install an older pyroflows.",
        ),
        (
            "garbled",
            'transform "garbled" of api 9.0 breaks the contract: __pyroflows_api__ is an int or a pair '
            "(low, high) of ints; got '1'.",
        ),
    ],
)
def test_P9_entry_is_checked_when_it_is_loaded(sites, name, message):
    code = f"""
show([attempt(plugins.get, "transforms", "{name}"), attempt(plugins.build, "transforms", "{name}", 2),
      plugins.get("transforms", "of_both").__name__])
"""
    error = ["PluginContractError", message]
    assert run(code, sites["wrong"], sites["api"]) == [error, error, "Both"]


def test_P9_what_is_built_is_checked(sites):
    code = """
show([attempt(plugins.transform, "hollow", input_dim=2), attempt(plugins.flow, "hollow_flow", input_dim=2),
      attempt(plugins.guide, "mute", print), attempt(plugins.transform, "no_context", input_dim=2)])
"""
    transform, flow, guide, no_context = run(code, sites["wrong"])
    assert {answer[0] for answer in (transform, flow, guide, no_context)} == {"PluginContractError"}
    assert transform[1] == (
        'transform "hollow" of wrong 0.1 breaks the contract: it built Hollow without forward_and_log_det, '
        "inverse_and_log_det, codomain, condition, context_dim, parameters; a transform has "
        "forward_and_log_det, inverse_and_log_det, domain, codomain, condition, context_dim, parameters. "
        'See pyroflows.testing.check_transform("hollow").'
    )
    assert "without transform, base, forward, state_dict, context_dim; a flow has" in flow[1]
    assert 'pyroflows.testing.check_distribution("hollow_flow")' in flow[1]
    assert "without __call__, setup; a guide has" in guide[1]
    assert 'pyroflows.testing.check_guide("mute")' in guide[1]
    assert no_context[1].endswith("it takes no context_dim; expected factory(input_dim, *, context_dim=0, **options).")


# --- P10: threads ----------------------------------------------------------------------------------------

RACE = """
import threading
def race(*calls):
    barrier, answers = threading.Barrier(len(calls)), []
    def enter(call):
        barrier.wait()
        answers.append(call())
    threads = [threading.Thread(target=enter, args=(call,), daemon=True) for call in calls]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return answers
"""


def test_P10_eight_threads_import_a_plugin_once(sites, tmp_path):
    code = """
good = race(*[lambda: id(plugins.get("transforms", "slow"))] * 8)
bad = race(*[lambda: attempt(plugins.get, "transforms", "slow_broken")[0]] * 8)
show([len(good), len(set(good)), bad])
"""
    log = tmp_path / "log"
    good, distinct, bad = run(RACE + code, sites["counted"], COUNT_FILE=str(log))
    assert (good, distinct, bad) == (8, 1, ["PluginLoadError"] * 8)
    assert Counter(log.read_text().split()) == {"counted_good": 1, "counted_broken": 1}


def test_P10_a_plugin_may_use_the_registry_while_it_is_imported(sites, tmp_path):
    """One lock for all imports would wait here for Python's import lock, which waits for that lock."""
    code = """
def plain():
    import counted_nested
    return "plain"
show(race(lambda: plugins.get("transforms", "nested").__name__, plain, lambda: bool(plugins.report())))
"""
    answers = run(RACE + code, sites["counted"], COUNT_FILE=str(tmp_path / "log"))
    assert sorted(map(str, answers)) == ["Map", "True", "plain"]


# --- P11: trust ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["os:system", "broken_import:Map", "acme-flows:acme_gain", "../wave", "os.system"])
def test_P11_a_name_is_never_an_import_path(acme, name):
    """Neither a module that is there nor a package that is not: a name only looks entries up."""
    code = f"""
plugins.available("transforms")
events = []
sys.addaudithook(lambda event, args: events.append([event, str(args[0])]))
answer = attempt(plugins.get, "transforms", {name!r})[0]
watched = ("import", "subprocess", "socket", "os.system", "os.exec", "os.posix_spawn", "exec")
seen = [event for event in events if event[0].startswith(watched)]
show([answer, seen])
"""
    assert run(code, acme) == ["UnknownPlugin", []]


def test_P11_trust_is_documented():
    text = (ROOT / "docs" / "plugins.md").read_text()
    assert "a plugin is code from a package that you installed" in text.lower()
    assert "a name is not an import path" in text.lower()


# --- asking and building ---------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_what_there_is(acme):
    code = """
show([attempt(plugins.get, *asked)[1] for asked in [
    ("transforms", "waev"), ("transforms", "qqqq"), ("transforms", "tide"), ("distributions", "drift"),
    ("transforms", "acme-wave:wave"), ("layers", "wave")]])
"""
    near, far, flow, guide, package, group = run(code, acme)
    assert near.startswith('no transform "waev"; did you mean "wave"? Installed transforms: ')
    assert "affine, " in near
    assert near.endswith(".")
    assert far.startswith('no transform "qqqq". Installed transforms: ')
    assert flow == 'no transform "tide", but there is a flow "tide": pyroflows.flow("tide", ...).'
    assert guide == 'no flow "drift", but there is a guide "drift": pyroflows.guide("drift", ...).'
    assert package.startswith('no transform "acme-wave:wave"; did you mean "acme-waves:wave"?')
    assert group == 'no plugin group "layers"; the groups are transforms, distributions, guides.'


def test_missing_builtins_are_noticed(acme):
    code = """
from importlib import metadata
whole = metadata.distributions
metadata.distributions = lambda: (d for d in whole() if d.metadata["Name"] != "pyroflows")
show(attempt(plugins.get, "transforms", "affine")[1])
"""
    message = run(code, acme)
    assert message == (
        'no transform "affine". Installed transforms: wave. The built-in ones are missing: install pyroflows again.'
    )


def test_what_is_built_knows_how_to_be_built_again(acme):
    code = """
from dataclasses import asdict
import pyroflows as pf
layer = pf.transform("wave", input_dim=3, context_dim=2, knots=5)
flow = pf.flow("tide", input_dim=[1, 8, 8], depth=2)
config = layer.config
again = plugins.build(
    config.group, config.address, config.input_dim, context_dim=config.context_dim, **config.options
)
show([asdict(config), layer.knots, asdict(flow.config), flow.options, again.config == config, config.address])
"""
    layer, knots, flow, options, again, address = run(code, acme)
    package = {"distribution": "acme-waves", "version": "1.0"}
    group = "pyroflows.transforms"
    asked = {"name": "wave", "input_dim": 3, "context_dim": 2, "options": {"knots": 5}}
    assert layer == {"group": group, **asked, **package}
    asked = {"name": "tide", "input_dim": [1, 8, 8], "context_dim": 0, "options": {"depth": 2}}
    assert flow == {"group": "pyroflows.distributions", **asked, **package}
    assert (knots, options, again, address) == (5, {"depth": 2}, True, "acme-waves:wave")


def test_guides_are_built_with_their_model(acme):
    code = """
import pyroflows as pf
guide = pf.guide("drift", print, name="mine", scale=0.5)
show([guide.model is print, guide.name, guide.scale])
"""
    assert run(code, acme) == [True, "mine", 0.5]


def test_options_are_checked_before_the_call(sites):
    code = """
def T(**options): return attempt(plugins.transform, "wave", **{"input_dim": 2, **options})
try:
    plugins.transform("raises", input_dim=2)
except TypeError as error:
    own = str(error)
show([T(knts=4), T(q=1), attempt(plugins.guide, "drift", print, scle=1),
      plugins.flow("tide", input_dim=2, anything=1).options, own])
"""
    near, far, guide, anything, own = run(code, sites["acme-waves"], sites["wrong"])
    start = 'transform "wave" of acme-waves 1.0 has no option'
    assert near == ["OptionError", f'{start} "knts"; did you mean "knots"? It has knots, tail.']
    assert far == ["OptionError", f'{start} "q". It has knots, tail.']
    assert guide[1].endswith('has no option "scle"; did you mean "scale"? It has name, scale.')
    assert anything == {"anything": 1}
    assert own == "the author's own"


def test_dimensions_are_whole_numbers(acme):
    code = """
class Whole:
    def __index__(self): return 4
def T(**options): return attempt(plugins.transform, "wave", **options)
bad = [T(input_dim=d) for d in (0, -1, 2.0, "2", True, None, (), (3, 0), (3, 2.5))]
bad += [T(input_dim=2, context_dim=c) for c in (-1, 1.0, None, False, (1,))]
show([[error for error, _ in bad], bad[0][1], bad[8][1], bad[9][1], T(input_dim=Whole()).config.input_dim])
"""
    kinds, zero, nested, context, whole = run(code, acme)
    assert kinds == ["OptionError"] * 14
    assert zero == "input_dim is a whole number, 1 or more; got 0."
    assert nested == "input_dim is a whole number, 1 or more; got 2.5."
    assert context == "context_dim is a whole number, 0 or more; got -1."
    assert whole == 4


def test_groups_have_short_and_full_names():
    for group in plugins.GROUPS:
        short = group.removeprefix("pyroflows.")
        assert plugins.available(group) == plugins.available(short)
        assert plugins.report(group) == plugins.report(short)
    assert [info.group for info in plugins.report()] == sorted(
        (info.group for info in plugins.report()), key=plugins.GROUPS.index
    )


def test_documented_example_is_a_real_plugin(sites):
    """The layer of ``docs/plugins.md`` is found, trains, takes a context and keeps the laws."""
    code = """
import torch
import pyroflows as pf
layer = pf.transform("acme_gain", input_dim=3)
given = pf.transform("acme_gain", input_dim=3, context_dim=2)
x = torch.randn(5, 3)
with torch.no_grad():
    layer.a.add_(0.3), layer.b.sub_(0.2)
y, forward = layer.forward_and_log_det(x)
back, inverse = layer.inverse_and_log_det(y)
pf.testing.check_transform("acme_gain")
close = torch.allclose(back, x, atol=1e-5), torch.allclose(forward, -inverse, atol=1e-5)
conditioned = given.condition(torch.ones(4, 2))
show([close, isinstance(layer, pf.FlowTransform), layer.config.distribution, conditioned(x[:4]).shape])
"""
    assert run(code, sites["acme-flows"]) == [[True, True], True, "acme-flows", [4, 3]]
