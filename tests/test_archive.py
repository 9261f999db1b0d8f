"""Save and load: rules S1 to S6 of saving safely, then what a file keeps."""

import ast
import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ExpTransform

import pyroflows as pf
from pyroflows import archive, errors, plugins
from pyroflows.manifest import Manifest

PACKAGE = Path(pf.__file__).parent
FLOWS = [line.name for line in plugins.report("distributions") if line.status == "BUILT-IN"]
LAYERS = [line.name for line in plugins.report("transforms") if line.status == "BUILT-IN"]


# --- files, honest and forged ----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


@pytest.fixture
def small(path):
    """The file of a small flow, and what it holds."""
    pf.save(pf.flow("realnvp", input_dim=2, transforms=1, hidden_dims=[4]), path)
    return path


def opened(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pyroflows"]), load_file(path)


def sealed(path, manifest, tensors):
    """Writes a file with a checksum that fits, as a forger would; the rules are from the docs, not the code."""
    digest = hashlib.sha256(json.dumps({**manifest, "sha256": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    save_file(tensors, path, {"pyroflows": json.dumps({**manifest, "sha256": digest.hexdigest()})})
    return path


def forged(path, tensors=None, **changes):
    manifest, held = opened(path)
    return sealed(path, {**manifest, **changes}, held if tensors is None else tensors)


def scrambled(flow):
    """Sets parameters, standardiser and context scale to what training might leave there."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        for name, buffer in flow.named_buffers():
            if name.split(".")[-1] in ("loc", "scale", "context_loc", "context_scale") and "base" not in name:
                buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer))
    return flow


def behaviour(obj):
    """Samples and log-densities, or both directions of a layer, from fixed seeds: a dict of tensors."""
    dtype = next((t.dtype for t in obj.state_dict().values() if t.is_floating_point()), torch.float32)
    context = torch.linspace(-1, 1, 2 * obj.context_dim, dtype=dtype).unflatten(0, (2, -1))
    torch.manual_seed(3)
    with torch.no_grad():
        if obj.config.group == "pyroflows.distributions":
            density = obj(context) if obj.context_dim else obj()
            x = density.sample((4,))
            return {"x": x, "log_prob": density.log_prob(x.clone())}
        layer = obj.condition(context) if obj.context_dim else obj
        shape = obj.config.input_dim if isinstance(obj.config.input_dim, tuple) else (obj.config.input_dim,)
        x = torch.rand(4, 1, *shape, dtype=dtype)
        y = x.reshape(4, 1, *obj.forward_shape(shape))
        directions = {"forward": layer.forward_and_log_det(x), "inverse": layer.inverse_and_log_det(y)}
        return {f"{key}{i}": t.contiguous() for key, pair in directions.items() for i, t in enumerate(pair)}


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name].nan_to_num(7e7), second[name].nan_to_num(7e7)), name


# --- what a file keeps, seen from a new process ----------------------------------------------------------

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SUPPORTS = {"real": None, "columns": ["positive", constraints.interval(-1.0, 2.5), "real"]}
CASES = [
    *((n, d, c, s) for n in FLOWS for d in DTYPES for c in (0, 2) for s in SUPPORTS),
    *((n, d, c, "") for n in LAYERS for d in DTYPES for c in (0, 2)),
]


def build(name, dtype, context_dim, support):
    kind = pf.flow if name in FLOWS and support else pf.transform
    for input_dim in (3, (3, 4, 4)):  # a vector, or else an image
        try:
            obj = kind(name, input_dim=input_dim, context_dim=context_dim)
            break
        except errors.ContextError:
            return None
        except errors.PyroflowsError:
            if input_dim != 3:
                return None
    if SUPPORTS.get(support):
        if input_dim != 3 or not obj.standardizes:
            return None
        obj.constrain(SUPPORTS[support])
    return scrambled(obj.to(DTYPES[dtype])).eval()


def reply(folder):
    """What the new process runs."""
    torch.set_num_threads(1)
    for file in sorted(Path(folder).glob("*.flow")):
        obj = pf.load(file)
        assert not obj.training
        save_file(behaviour(obj), file.with_suffix(".reply"))


@pytest.fixture(scope="module")
def replies(tmp_path_factory):
    folder, expected = tmp_path_factory.mktemp("archives"), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums are taken in the same order, however busy the machine is
    for case in CASES:
        if obj := build(*case):
            pf.save(obj, folder / f"{'-'.join(map(str, case))}.flow")
            expected[case] = behaviour(obj)
    torch.set_num_threads(threads)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_archive; test_archive.reply(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(folder)], check=True, timeout=900)
    return {case: (expected[case], folder / f"{'-'.join(map(str, case))}.reply") for case in expected}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_S4_a_new_process_gets_the_same_bits(replies, case):
    if case not in replies:
        pytest.skip("the factory takes no such context, dimension or support")
    expected, file = replies[case]
    same(load_file(file), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_file(path, dtype):
    pf.save(pf.flow("nsf", input_dim=2, context_dim=1, linear=True).to(dtype), path)
    again = pf.load(path)
    assert {t.dtype for t in again.state_dict().values() if t.is_floating_point()} == {dtype}
    assert {t.dtype for t in again.state_dict().values()} <= {dtype, torch.bool, torch.int64}


def test_dtypes_may_be_mixed(path):
    flow = pf.flow("nsf", input_dim=2)
    flow.standardize.double()
    pf.save(flow, path)
    again = pf.load(path)
    assert again.standardize.loc.dtype == torch.float64
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    same(again.state_dict(), flow.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_frozen_parameters_are_kept(path, training):
    flow = pf.flow("maf", input_dim=2, transforms=2).train(training)
    flow.learned[0].requires_grad_(False)
    pf.save(flow, path)
    again = pf.load(path)
    assert {m.training for m in again.modules()} == {training}
    before = {name: p.requires_grad for name, p in flow.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == before
    assert set(before.values()) == {True, False}


def test_a_loaded_flow_trains_and_is_saved_again(path, tmp_path):
    pf.save(pf.flow("nsf", input_dim=2), path)
    again = pf.load(path)
    optimizer = torch.optim.Adam(again.parameters())
    (-again().log_prob(torch.randn(8, 2)).mean()).backward()
    optimizer.step()
    pf.save(again, tmp_path / "second")
    same(behaviour(pf.load(tmp_path / "second")), behaviour(again))
    assert pf.load(path).config == again.config == pf.load(tmp_path / "second").config


@pytest.mark.parametrize(
    "support",
    [
        None,
        "positive",
        "unit_interval",
        constraints.greater_than(0.1),
        constraints.less_than(torch.tensor([1.0, 2.0, 3.0])),
        constraints.interval(torch.tensor([0.0, 1.0, 2.0]), 5.0),
        [constraints.positive, "real", constraints.interval(0.0, 0.3)],
        "simplex",
    ],
)
@pytest.mark.parametrize("by_option", [True, False])
def test_the_support_is_kept_however_it_was_declared(path, support, by_option):
    flow = pf.flow("realnvp", input_dim=3, **({"support": support} if by_option else {}))
    if not by_option:
        flow.constrain(support)
    pf.save(flow, path)
    again = pf.load(path)
    assert again.support_description == flow.support_description
    same(behaviour(again), behaviour(flow))


def test_a_support_that_was_taken_back_stays_away(path):
    flow = pf.flow("realnvp", input_dim=3, support="positive")
    flow.constrain(None)
    pf.save(flow, path)
    assert pf.load(path).support_description is None


def test_options_come_back_tuples_for_lists(path):
    pf.save(pf.transform("affine_coupling", input_dim=[4, 2], dim=-2, hidden_dims=[3, 5]), path)
    again = pf.load(path)
    assert again.config.input_dim == (4, 2)
    assert again.config.options["hidden_dims"] == (3, 5)


def test_inspect_tells_what_is_in_it(small):
    manifest = archive.inspect(small)
    assert manifest.address == "pyroflows:realnvp"
    assert (manifest.input_dim, manifest.context_dim, manifest.support) == (2, 0, None)
    assert manifest.options["hidden_dims"] == (4,)
    assert manifest.options["activation"] == "relu", "a default is written down too"
    assert (manifest.version, manifest.pyroflows, manifest.torch) == (pf.__version__,) * 2 + (torch.__version__,)
    assert archive.inspect(str(small)) == manifest


def test_the_same_flow_gives_the_same_bytes(path, tmp_path):
    flow = pf.flow("nsf", input_dim=2)
    pf.save(flow, path)
    pf.save(flow, tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


# --- the caller's world stays as it is -------------------------------------------------------------------


def test_random_state_and_global_settings_are_untouched(path):
    flow = pf.flow("realnvp", input_dim=3)
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()
    store = dict(pyro.get_param_store().items())
    pf.save(flow, path)
    again = pf.load(path)
    layer = pf.transform("permute", input_dim=5)
    after_permute = torch.get_rng_state()
    pf.save(layer, path)
    assert torch.equal(pf.load(path).permutation, layer.permutation)
    assert torch.equal(torch.get_rng_state(), after_permute)
    assert not torch.equal(before[0], after_permute)
    assert (random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]
    assert dict(pyro.get_param_store().items()) == store
    assert again is not flow


def test_random_state_survives_a_failed_load(small):
    forged(small, input_dim=3)
    before = torch.get_rng_state()
    with pytest.raises(errors.ArchiveMismatch):
        pf.load(small)
    assert torch.equal(torch.get_rng_state(), before)
    assert pf.transform("permute", input_dim=3)(torch.ones(3)).sum() == 3  # no mode is left behind


def test_the_callers_default_dtype_and_device_do_not_matter(path):
    flow = pf.flow("nsf", input_dim=2)
    pf.save(flow, path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            again = pf.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.requires_grad for p in again.parameters())
    assert {t.device.type for t in again.state_dict().values()} == {"cpu"}
    same(behaviour(again), behaviour(flow))


def test_device_is_where_it_goes(small):
    assert {t.device.type for t in pf.load(small, device="meta").state_dict().values()} == {"meta"}
    assert {t.device.type for t in pf.load(small, device=torch.device("cpu")).state_dict().values()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_from_gpu_to_gpu(path):
    flow = pf.flow("nsf", input_dim=2).cuda()
    pf.save(flow, path)
    assert {t.device.type for t in pf.load(path).state_dict().values()} == {"cpu"}
    again, x = pf.load(path, device="cuda"), torch.randn(4, 2, device="cuda")
    assert torch.equal(again().log_prob(x), flow().log_prob(x))


# --- the file appears whole or not at all ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_text_or_pathlike(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (kind(tmp_path / "a"), kind("b"), kind("./ä b")):
        pf.save(pf.transform("affine", input_dim=1), path)
        assert pf.load(path).config.name == "affine"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(small, monkeypatch, step):
    before = small.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(*{"fsync": (os, "fsync", fail), "replace": (Path, "replace", fail)}[step])
    with pytest.raises(OSError, match="disk full"):
        pf.save(pf.flow("nsf", input_dim=2), small)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_what_cannot_be_saved_touches_nothing(small):
    before = small.read_bytes()
    with pytest.raises(errors.NotRebuildable):
        pf.save(nn.Linear(1, 1), small)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_overwrite_and_missing_folders(small, tmp_path):
    layer = pf.transform("affine", input_dim=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pf.save(layer, small, overwrite=False)
    assert archive.inspect(small).name == "realnvp"
    pf.save(layer, small)
    assert archive.inspect(small).name == "affine"
    pf.save(layer, tmp_path / "new", overwrite=False)
    with pytest.raises(FileNotFoundError, match="create it first"):
        pf.save(layer, tmp_path / "no" / "where")
    with pytest.raises(OSError, match=r"folder|directory"):
        pf.save(layer, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {small.name, "new"}
    for wrong in (tmp_path / "absent", tmp_path):
        for read in (pf.load, archive.inspect):
            with pytest.raises(OSError, match=str(wrong)):
                read(wrong)


def test_a_link_stays_a_link_and_permissions_are_the_usual(small, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(small)
    pf.save(pf.transform("affine", input_dim=1), link)
    assert link.is_symlink()
    assert archive.inspect(small).name == "affine"
    (tmp_path / "usual").touch()
    assert small.stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- S1, S2, S3: nothing that could run --------------------------------------------------------------------


def outside(tree, function):
    """All nodes of a module but those of one function."""
    skipped = {id(n) for f in ast.walk(tree) if getattr(f, "name", "") == function for n in ast.walk(f)}
    return [node for node in ast.walk(tree) if id(node) not in skipped]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_S2_no_unsafe_call_in_the_whole_package(file):
    nodes = outside(ast.parse(file.read_text()), "import_param_store" if file.name == "archive.py" else "")
    for node in nodes:
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", "") or ""}
            assert not names & {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "load_state"), where
            assert not (called.endswith("get_param_store().load")), where
            allowed = file in (PACKAGE / "__init__.py", PACKAGE / "plugins.py")
            assert allowed or "import_module" not in called, where
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert ast.unparse(node.value) == "True", where
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("pickle", "allow_pickle"), where


def test_S1_S3_loading_runs_imports_and_writes_nothing(small, tmp_path):
    """An audit hook sees it all: every import, compilation, subprocess, socket, unpickling and written file."""
    evil = tmp_path / "evil"
    evil.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    torch.save(Canary(tmp_path / "ran"), tmp_path / "evil2", _use_new_zipfile_serialization=True)
    code = """
import sys
import pyroflows as pf
small, *others = sys.argv[1:]
pf.load(small)  # from here on nothing is imported any more
seen, watching = [], [1]
modules = ("import", "exec", "compile", "pickle.", "marshal.", "code.")
system = ("open", "os.", "subprocess.", "socket.", "ctypes.dlopen", "shutil.", "tempfile.", "urllib.", "http.")
def watch(event, args):
    if not watching or not event.startswith(modules + system):
        return
    if event == "open" and isinstance(args[1], str) and not set(args[1]) & set("wax+"):
        return
    seen.append((event, str(args)[:200]))
sys.addaudithook(watch)
pf.load(small)
pf.archive.inspect(small)
for other in others:
    for read in (pf.load, pf.archive.inspect, pf.archive.import_param_store):
        try:
            read(other)
        except pf.errors.ArchiveError:
            continue
        raise AssertionError
watching.clear()
assert not seen, seen
"""
    arguments = [sys.executable, "-c", code, str(small), str(evil), str(tmp_path / "evil2")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_S3_torch_is_new_enough_and_files_are_safetensors(small):
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
    assert load_file(small)  # any reader of the format reads the tensors


# --- S4: by name ------------------------------------------------------------------------------------------

ACME = """
import torch
from torch import nn
from pyroflows.transforms import FlowTransform, Compose, Affine, Elementwise

class Layer(FlowTransform):
    def __init__(self, input_dim, *, context_dim=0, tail=1.0, size=1, mode="plain"):
        super().__init__()
        self.tail = tail
        self.shift = nn.Parameter(torch.zeros(input_dim))
        self.register_buffer("grid", torch.linspace(0, 1, input_dim) / 3, persistent=False)
        self.attribute = torch.full((input_dim,), 2.0)
        if mode == "greedy":
            self.peak = torch.ones(size, size).sum().item()
        if mode == "outer":
            self.peak = (torch.ones(size)[:, None] * torch.ones(size)).sum().item()
        if mode == "random":
            self.peak = torch.randn(size, size, generator=torch.Generator()).sum().item()
        if mode == "python":
            for _ in range(size): torch.ones(1)
        if mode == "tied":
            self.twin = nn.Linear(2, 2); self.other = nn.Linear(2, 2); self.other.weight = self.twin.weight
        if mode == "extra":
            self.register_module("stateful", Stateful())
        if mode == "values":
            assert torch.ones(2).sum().item() == 2.0 and torch.tensor([1.0]).tolist() == [1.0]
        if mode == "broken":
            raise RuntimeError("the author's own")

    def forward_and_log_det(self, x, context=None):
        return x * self.tail + self.shift + self.grid + self.attribute.to(x), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        return (y - self.shift - self.grid - self.attribute.to(y)) / self.tail, y.new_zeros(y.shape[:-1])

class Stateful(nn.Module):
    def get_extra_state(self): return {"a": 1}
    def set_extra_state(self, state): pass
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a plugin package on the path, and takes it away again."""
    home = {}

    def put(package="acme", version="1.0", name="acme_layer", module="acme_for_archives", source=ACME):
        site = home[package] = tmp_path / f"site_{package}"
        info = site / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[pyroflows.transforms]\n{name} = {module}:Layer\n")
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        plugins.refresh()

    def take(package="acme"):
        sys.path.remove(str(home[package]))
        plugins.refresh()

    yield put, take
    monkeypatch.undo()
    for module in ("acme_for_archives", "other_for_archives"):
        sys.modules.pop(module, None)
    plugins.refresh()


@pytest.mark.parametrize("mode", ["plain", "values", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_S4_a_plugin_is_built_for_real(install, path, mode, dtype):
    """Constants outside of the state_dict, values read while building and tied parameters all work."""
    install[0]()
    layer = scrambled(pf.transform("acme_layer", input_dim=3, mode=mode).to(dtype))
    pf.save(layer, path)
    again = pf.load(path)
    same(behaviour(again), behaviour(layer))
    if mode == "tied":
        assert again.other.weight is again.twin.weight
        assert len(load_file(path)) == len(again.state_dict()) - 1, "it is written once"
        assert again.twin.weight.dtype == dtype


def test_S4_a_default_that_changed_since_does_not_change_the_density(install, path):
    put, take = install
    put()
    layer = pf.transform("acme_layer", input_dim=3)
    pf.save(layer, path)
    take()
    sys.modules.pop("acme_for_archives")
    put(package="acme2", source=ACME.replace("tail=1.0", "tail=5.0"))
    assert pf.transform("acme_layer", input_dim=3).tail == 5.0
    forged(path, distribution="acme2")
    same(behaviour(pf.load(path)), behaviour(layer))


def test_S4_a_missing_plugin_is_named(install, path):
    put, take = install
    put()
    pf.save(pf.transform("acme_layer", input_dim=3), path)
    take()
    with pytest.raises(errors.UnknownPlugin, match=r'"acme_layer" of acme 1.0.*not installed.*install it') as caught:
        pf.load(path)
    assert isinstance(caught.value.__cause__, errors.UnknownPlugin)
    assert archive.inspect(path).address == "acme:acme_layer"


def test_S4_a_shadowed_plugin_is_refused(install, path):
    put, take = install
    put()
    pf.save(pf.transform("acme_layer", input_dim=3), path)
    take()
    put(package="other", module="other_for_archives")
    assert pf.transform("acme_layer", input_dim=3).config.distribution == "other"
    with pytest.raises(errors.UnknownPlugin, match=r"of acme 1.0.* of other is another"):
        pf.load(path)


def test_S4_of_two_plugins_with_one_name_the_recorded_one_is_built(install, path):
    put, _ = install
    put()
    put(package="other", module="other_for_archives", source=ACME.replace("tail=1.0", "tail=9.0"))
    with pytest.raises(errors.AmbiguousPlugin):
        pf.transform("acme_layer", input_dim=3)
    for package, tail in (("acme", 1.0), ("other", 9.0)):
        pf.save(pf.transform(f"{package}:acme_layer", input_dim=3), path)
        assert archive.inspect(path).name == "acme_layer"
        again = pf.load(path)
        assert (again.tail, again.config.distribution) == (tail, package)


def test_S4_a_blocked_plugin_stays_blocked(install, path, monkeypatch):
    install[0]()
    pf.save(pf.transform("acme_layer", input_dim=3), path)
    monkeypatch.setenv("PYROFLOWS_BLOCK", "acme")
    plugins.refresh()
    with pytest.raises(errors.PluginBlocked):
        pf.load(path)
    monkeypatch.delenv("PYROFLOWS_BLOCK")


# --- what cannot be saved says why -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("activation", nn.SiLU, 'activation="silu"'),
        ("activation", nn.Tanh(), 'activation="silu"'),
        ("hidden_dims", torch.tensor([4, 4]).numpy(), "tolist"),
        ("bound", float("inf"), "finite"),
    ],
)
def test_an_option_that_json_cannot_hold_is_named(path, option, value, remedy):
    accepted = {"hidden_dims": [4, 4], "bound": 5.0}  # what the flow itself takes in place of the value
    flow = pf.flow("nsf", input_dim=2, **{option: accepted.get(option, value)})
    flow.config.options[option] = value
    with pytest.raises(errors.NotRebuildable, match=option) as caught:
        pf.save(flow, path)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_tensor_as_an_option_names_the_list_to_pass(path):
    with pytest.raises(errors.NotRebuildable, match=r"permutation.*\.tolist\(\)"):
        pf.save(pf.transform("permute", input_dim=2, permutation=torch.tensor([1, 0])), path)
    pf.save(pf.transform("permute", input_dim=2, permutation=[1, 0]), path)
    assert pf.load(path).permutation.tolist() == [1, 0]


def test_a_compiled_flow_is_saved_as_what_it_is(path):
    flow = pf.flow("realnvp", input_dim=2)
    pf.save(torch.compile(flow, backend="eager"), path)
    same(behaviour(pf.load(path)), behaviour(flow))


def test_the_page_about_saving_is_right(tmp_path):
    page = (PACKAGE.parent / "docs" / "saving.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 3
    start = "import pyro, torch\nimport pyroflows as pf\npyro.param('scale', torch.ones(2))\n"
    start += "pyro.get_param_store().save('old_model.pt')\n"
    subprocess.run([sys.executable, "-c", start + "\n".join(blocks)], check=True, cwd=tmp_path, timeout=300)
    for field in dataclasses.fields(Manifest):
        assert f"`{field.name}`" in page


def test_a_support_that_no_file_can_name(path):
    class Odd(constraints.Constraint):
        event_dim = 0

        def check(self, value):
            return value > 0

    biject_to.register(Odd, lambda constraint: ExpTransform())
    flow = pf.flow("nsf", input_dim=2, support=constraints.independent(Odd(), 1))
    del biject_to._registry[Odd]
    with pytest.raises(errors.NotRebuildable, match="support"):
        pf.save(flow, path)


def not_by_name():
    flow = pf.flow("nsf", input_dim=2)
    return [
        pf.distributions.nsf(2),
        flow.learned,
        flow.transform,
        flow(),
        flow.state_dict(),
        pf.transform("affine", input_dim=2).inv,
        pf.transform("affine", input_dim=2, context_dim=1).condition(torch.zeros(1)),
        nn.Linear(2, 2),
        None,
    ]


@pytest.mark.parametrize("number", range(9))
def test_what_was_not_built_by_name_says_so(path, number):
    with pytest.raises(errors.NotRebuildable, match=r"pf\.flow\(name, \.\.\.\)"):
        pf.save(not_by_name()[number], path)
    assert not path.exists()


def narrower(flow):
    flow.learned[0].net.layers[0] = nn.Linear(2, 5)


def replaced(flow):
    flow.learned[0].net.activation = nn.Tanh()


def added(flow):
    flow.extra = nn.Parameter(torch.zeros(1))


def removed(flow):
    del flow.learned.transforms[-1]


def integers(flow):
    flow.standardize.loc = flow.standardize.loc.long()


def tied(flow):
    flow.learned[0].net.layers[1].bias = flow.learned[2].net.layers[1].bias


@pytest.mark.parametrize("alter", [narrower, replaced, added, removed, integers, tied])
def test_an_altered_flow_is_refused_when_it_is_saved(path, alter):
    flow = pf.flow("realnvp", input_dim=2)
    alter(flow)
    with pytest.raises(errors.NotRebuildable, match=r"not what its name and options build.*state_dict"):
        pf.save(flow, path)
    assert not path.exists()


@pytest.mark.parametrize("mode", ["greedy", "outer", "random", "python", "extra"])
def test_a_plugin_that_no_file_could_rebuild_is_refused_when_it_is_saved(install, path, mode):
    install[0]()
    layer = pf.transform("acme_layer", input_dim=2, mode=mode, size=5000)
    with pytest.raises(errors.NotRebuildable):
        pf.save(layer, path)


def test_a_flow_without_values_cannot_be_saved(path):
    with pytest.raises(errors.NotRebuildable):
        pf.save(pf.flow("realnvp", input_dim=2).to("meta"), path)


# --- S5: hostile and damaged files -----------------------------------------------------------------------


class Canary:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def malicious_pickle(path, canary):
    path.write_bytes(pickle.dumps(Canary(canary)))


def malicious_torch_zip(path, canary):
    torch.save({"params": Canary(canary)}, path)


def malicious_torch_legacy(path, canary):
    torch.save({"params": Canary(canary)}, path, _use_new_zipfile_serialization=False)


def zip_slip(path, canary):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"../{canary.name}", "slipped")
        file.writestr(str(canary), "slipped")


def pyro_store(path, canary):
    pyro.get_param_store().save(path)


def empty(path, canary):
    path.write_bytes(b"")


def noise(path, canary):
    path.write_bytes(random.Random(0).randbytes(4096))


def zeros(path, canary):
    path.write_bytes(bytes(4096))


def endless_header(path, canary):
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")


def header_of_nonsense(path, canary):
    path.write_bytes((6).to_bytes(8, "little") + b"[1, 2]")


def offsets_beyond_the_end(path, canary):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def overlapping_tensors(path, canary):
    spot = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": spot, "b": spot}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def without_metadata(path, canary):
    save_file({"a": torch.zeros(2)}, path)


def others_metadata(path, canary):
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})


NOT_OURS = [
    malicious_pickle,
    malicious_torch_zip,
    malicious_torch_legacy,
    zip_slip,
    pyro_store,
    empty,
    noise,
    zeros,
    endless_header,
    header_of_nonsense,
    offsets_beyond_the_end,
    overlapping_tensors,
    without_metadata,
    others_metadata,
]


@pytest.mark.parametrize("make", NOT_OURS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("read", [pf.load, archive.inspect], ids=["load", "inspect"])
def test_S5_a_file_that_is_not_ours_is_refused_and_runs_nothing(tmp_path, make, read):
    canary = tmp_path / "canary"
    make(tmp_path / "file", canary)
    with pytest.raises(errors.ArchiveCorrupt, match="file"):
        read(tmp_path / "file")
    assert not canary.exists()
    assert not (tmp_path.parent / canary.name).exists()


def manifest_text(path, text):
    save_file(opened(path)[1], path, {"pyroflows": text})


DEEP = 50_000
TEXTS = {
    "no json": "import os",
    "nothing": "",
    "a list": "[1, 2]",
    "a number": "1",
    "null": "null",
    "no fields": "{}",
    "format only": '{"format": 1}',
    "format of text": '{"format": "1"}',
    "format null": '{"format": null}',
    "NaN": '{"format": NaN}',
    "endless number": '{"format": ' + "9" * 100_000 + "}",
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep dict": '{"a":' * DEEP + "1" + "}" * DEEP,
    "too long": json.dumps({"format": 1, "name": "x" * 2**21}),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("read", [pf.load, archive.inspect], ids=["load", "inspect"])
def test_S5_a_damaged_manifest_is_refused(small, text, read):
    manifest_text(small, text)
    with pytest.raises(errors.ArchiveCorrupt, match="manifest"):
        read(small)


def test_S5_a_key_that_is_there_twice_is_refused(small):
    text = json.dumps(opened(small)[0])
    manifest_text(small, text[:-1] + ', "name": "maf"}')
    with pytest.raises(errors.ArchiveCorrupt, match="twice"):
        pf.load(small)
    manifest_text(small, text.replace('"options": {', '"options": {"transforms": 1, ', 1))
    with pytest.raises(errors.ArchiveCorrupt, match="twice"):
        pf.load(small)


def deep(levels):
    return [deep(levels - 1)] if levels else 1


WRONG_TYPES = [
    *({key: value} for key in ("group", "name", "distribution", "version", "torch") for value in (1, None, [], {})),
    *({"input_dim": value} for value in (1.0, True, "2", None, {}, -1, [2, "2"], [[2]], [True])),
    *({"context_dim": value} for value in (1.0, False, "2", None, -1, [1])),
    *({"options": value} for value in (1, None, [], "x")),
    *({"training": value} for value in (1, None, "True")),
    *({"frozen": value} for value in (1, None, "x", {})),
    {"support": {"interval": {"lower_bound": float("nan"), "upper_bound": 1.0}}},
    {"support": {"interval": {"lower_bound": 0.0, "upper_bound": float("inf")}}},
    {"support": {"greater_than": {"lower_bound": [float("nan"), 0.0]}}},
    {"options": {"bound": float("nan")}, "name": "nsf"},
    {"frozen": [1]},
    {"frozen": [[]]},
    {"unheard_of": 1},
    {"\x1b[2J": 1},
    {"options": {"a": deep(20)}},
    {"options": {"a": deep(300)}},
    {"support": deep(900)},
    {"format": 0},
    {"format": -1},
    {"format": True},
    {"group": "pyroflows.guides", "name": "autoflow"},
    {"group": "console_scripts"},
    {"name": "os.system/x"},
    {"name": "pyroflows:realnvp"},
    {"distribution": "pyroflows:realnvp"},
    {"distribution": "\x1b[2J"},
    {"version": "1.0\nrun this"},
]


@pytest.mark.parametrize("changes", WRONG_TYPES, ids=lambda changes: ascii(changes)[:60])
def test_S5_a_field_of_the_wrong_type_is_refused(small, changes):
    forged(small, **changes)
    with pytest.raises(errors.ArchiveCorrupt, match="manifest") as caught:
        pf.load(small)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_S5_a_missing_field_is_refused(small, key):
    manifest, tensors = opened(small)
    del manifest[key]
    save_file(tensors, small, {"pyroflows": json.dumps(manifest)})
    with pytest.raises(errors.ArchiveCorrupt, match="manifest"):
        pf.load(small)


def test_S5_a_wrong_checksum_is_refused(small):
    manifest, tensors = opened(small)
    for changed in (
        {"sha256": "0" * 64},
        {"sha256": ""},
        {"sha256": 1},
        {"options": {**manifest["options"], "linear": True}},
    ):
        save_file(tensors, small, {"pyroflows": json.dumps({**manifest, **changed})})
        with pytest.raises(errors.ArchiveCorrupt, match=r"checksum|manifest"):
            pf.load(small)
    first = next(name for name, t in tensors.items() if t.is_floating_point())
    for changed in (
        {**tensors, first: tensors[first] + 1e-3},
        {**tensors, first: tensors[first].view(torch.int32)},
        {**tensors, first: tensors[first].unsqueeze(0)},
        {**tensors, "more": torch.zeros(1)},
        {name: t for name, t in tensors.items() if name != first},
        {f"{name}_": t for name, t in tensors.items()},
    ):
        save_file(changed, small, {"pyroflows": json.dumps(manifest)})
        with pytest.raises(errors.ArchiveCorrupt, match="checksum"):
            pf.load(small)


def test_S5_the_checksum_does_not_depend_on_order(small):
    manifest, tensors = opened(small)
    backwards = json.dumps(dict(reversed(manifest.items())))
    save_file(dict(reversed(tensors.items())), small, {"pyroflows": backwards})
    assert pf.load(small).config.name == "realnvp"


@pytest.mark.parametrize("version", [2, 3, 10**6])
def test_S5_a_newer_format_says_upgrade(small, version):
    manifest_text(small, json.dumps({"format": version, "whatever": ["it", "holds"], "support": None}))
    for read in (pf.load, archive.inspect):
        with pytest.raises(errors.ArchiveTooNew, match=f"format {version}.*upgrade pyroflows"):
            read(small)


def test_S5_a_truncated_file_is_refused(small):
    whole = small.read_bytes()
    for end in {*range(64), *range(64, len(whole), 97), len(whole) - 1}:
        small.write_bytes(whole[:end])
        with pytest.raises(errors.ArchiveCorrupt):
            pf.load(small)


def test_S5_a_flipped_bit_never_goes_unnoticed(small):
    whole, dice = small.read_bytes(), random.Random(0)
    for _ in range(300):
        spoiled = bytearray(whole)
        spoiled[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        small.write_bytes(spoiled)
        with pytest.raises((errors.ArchiveCorrupt, errors.ArchiveTooNew)):
            pf.load(small)


HUGE = [
    {"options": {"hidden_dims": [10**9]}},
    {"options": {"hidden_dims": [10**5, 10**5]}},
    {"options": {"hidden_dims": [2**20]}},
    {"options": {"hidden_dims": [1] * 10**5}},
    {"options": {"transforms": 10**9}},
    {"options": {"transforms": 10**6}},
    {"options": {"transforms": 10**18}},
    {"input_dim": 10**9},
    {"input_dim": 2**20},
    {"input_dim": 2**16},
    {"input_dim": [2**16, 2**16]},
    {"context_dim": 10**9},
    {"context_dim": 2**20},
    {"name": "maf", "input_dim": 2**20},
    {"name": "maf", "options": {"hidden_dims": [10**4, 10**4]}},
    {"name": "nsf", "options": {"bins": 10**9}},
    {"name": "nsf", "options": {"structure": "autoregressive", "transforms": 10**6}},
    {"group": "pyroflows.transforms", "name": "permute", "input_dim": 2**20, "options": {}},
    {"group": "pyroflows.transforms", "name": "lu_linear", "input_dim": 10**5, "options": {}},
    {"group": "pyroflows.transforms", "name": "affine_coupling", "input_dim": [2**10] * 2, "options": {"dim": -2}},
    {"group": "pyroflows.transforms", "name": "affine_coupling", "input_dim": [2**10] * 9, "options": {"dim": -9}},
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What a new process says to each of these files, in how many seconds and with how many more megabytes."""
    honest = tmp_path_factory.mktemp("huge") / "honest"
    pf.save(pf.flow("realnvp", input_dim=2, transforms=1, hidden_dims=[4]), honest)
    files = [honest.with_name(str(number)) for number in range(len(HUGE))]
    for file, changes in zip(files, HUGE, strict=True):
        file.write_bytes(honest.read_bytes())
        forged(file, **changes)
    code = """
import json, resource, sys, time
import pyroflows as pf
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
honest, *files = sys.argv[1:]
pf.load(honest)
for file in files:
    peak, start = megabytes(), time.process_time()
    try:
        pf.load(file)
    except Exception as error:
        print(json.dumps([type(error).__name__, time.process_time() - start, megabytes() - peak]))
    else:
        print(json.dumps(["loaded", 0, 0]))
"""
    done = subprocess.run([sys.executable, "-c", code, honest, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("number", range(len(HUGE)), ids=lambda number: str(HUGE[number])[:80])
def test_S5_a_huge_declared_size_is_refused_at_once_without_memory(refusals, number):
    error, seconds, megabytes = refusals[number]
    assert error == "ArchiveMismatch"
    assert seconds < 3
    assert megabytes < 200


REFUSED = [
    {"options": {"transforms": "1"}},
    {"options": {"transforms": 0}},
    {"options": {"transforms": -1}},
    {"options": {"transforms": None}},
    {"options": {"hidden_dims": 4}},
    {"options": {"hidden_dims": ["4"]}},
    {"options": {"hidden_dims": [-4]}},
    {"options": {"hidden_dims": [4.5]}},
    {"options": {"activation": "os.system"}},
    {"options": {"activation": 7}},
    {"options": {"activation": ["relu"]}},
    {"options": {"unheard_of": 1}},
    {"options": {"input_dim": 3}},
    {"options": {"name": "maf", "group": "x", "self": 1}},
    {"options": {"support": "positive", "linear": True}},
    {"input_dim": 0},
    {"input_dim": []},
    {"input_dim": 3},
    {"context_dim": 1},
    {"name": "maf"},
    {"frozen": ["no.such"]},
    {"support": "os.system"},
    {"support": 1},
    {"support": {"interval": {"lower_bound": "x", "upper_bound": 1.0}}},
    {"support": {"interval": {"lower_bound": 0.0, "upper_bound": None}}},
    {"support": {"interval": {"lower_bound": [[0.0], ["x"]], "upper_bound": 1.0}}},
    {"support": {"interval": {"lower_bound": 0.0}}},
    {"support": {"__class__": {}}},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_S5_a_manifest_that_its_tensors_contradict_is_refused(small, changes):
    forged(small, **changes)
    with pytest.raises(errors.ArchiveMismatch, match=r"flow.safetensors"):
        pf.load(small)


def altered_tensors(tensors):
    coupling = "transform.transforms.0.transforms.0"
    name = f"{coupling}.net.layers.0.weight"
    weight = tensors[name]
    rest = {key: t for key, t in tensors.items() if key != name}
    yield "is missing", rest
    yield "is unknown", {**tensors, "more": torch.zeros(1)}
    yield "is unknown", {**tensors, "learned.transforms.0.net.layers.0.weight": weight.clone()}
    yield r"float32 \[5, 1\] instead of float32 \[4, 1\]", {**rest, name: torch.zeros(5, 1)}
    yield "instead of", {**rest, name: weight[None]}
    yield "instead of", {**rest, name: weight.flatten()}
    yield "int32", {**rest, name: weight.int()}
    yield "bool", {**rest, name: weight.bool()}
    yield "complex64", {**rest, name: weight.to(torch.complex64)}
    yield "int32", {**tensors, f"{coupling}.kept": tensors[f"{coupling}.kept"].int()}
    yield "float32", {**tensors, f"{coupling}.kept": tensors[f"{coupling}.kept"].float()}
    yield "is missing.*; and", {"a": torch.zeros(1)}
    yield "is missing", {}


@pytest.mark.parametrize("number", range(13))
def test_S5_tensors_that_do_not_fit_are_named(small, number):
    message, tensors = list(altered_tensors(opened(small)[1]))[number]
    forged(small, tensors)
    with pytest.raises(errors.ArchiveMismatch, match=message):
        pf.load(small)


def test_S5_an_index_out_of_range_is_an_error_and_no_crash(small):
    tensors = opened(small)[1]
    forged(small, {**tensors, "transform.transforms.0.transforms.0.kept": torch.tensor([10**12])})
    with pytest.raises((IndexError, RuntimeError)):
        pf.load(small)().log_prob(torch.zeros(1, 2))


def test_S5_an_error_prints_nothing_that_a_terminal_obeys(small):
    forged(small, {**opened(small)[1], "\x1b[2J\n": torch.zeros(1)})
    with pytest.raises(errors.ArchiveMismatch) as caught:
        pf.load(small)
    assert str(caught.value).isprintable()


def test_S5_another_version_of_the_package_is_named(small):
    forged(small, version="0.0.7", options={"unheard_of": 1})
    with pytest.raises(errors.ArchiveMismatch, match=rf"pyroflows 0\.0\.7 .*Installed is {pf.__version__}"):
        pf.load(small)


def test_S5_a_plugins_own_failure_is_chained(install, path):
    install[0]()
    pf.save(pf.transform("acme_layer", input_dim=3), path)
    forged(path, options={"mode": "broken"})
    with pytest.raises(errors.ArchiveMismatch, match="the author's own") as caught:
        pf.load(path)
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- S6: Pyro's own files --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    pyro.clear_param_store()
    pyro.param("free", torch.tensor([-1.0, 2.0]))
    pyro.param("rate", torch.tensor([0.5, 3.0]), constraint=constraints.positive)
    pyro.param("weights", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
    pyro.param("between", torch.tensor(0.25), constraint=constraints.interval(0.0, 2.0))
    pyro.param("soft", torch.tensor(1.5), constraint=dist.constraints.softplus_positive)
    pyro.module("net", nn.Linear(2, 1))
    pyro.get_param_store().save(tmp_path / "store.pt")
    yield tmp_path / "store.pt"
    pyro.clear_param_store()


def test_S6_a_param_store_is_read_if_trusted(store):
    expected = {name: value.detach() for name, value in pyro.get_param_store().items()}
    found = archive.import_param_store(store, trust=True)
    same(found, expected)
    assert {"free", "rate", "soft", "net$$$weight"} <= found.keys()
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("trust", [{}, {"trust": False}, {"trust": 1}, {"trust": "yes"}])
def test_S6_without_trust_the_file_is_not_even_opened(tmp_path, trust):
    with pytest.raises(errors.UntrustedFile, match="trust=True"):
        archive.import_param_store(tmp_path / "absent", **trust)
    malicious_torch_zip(tmp_path / "evil", tmp_path / "canary")
    with pytest.raises(errors.UntrustedFile):
        archive.import_param_store(tmp_path / "evil", **trust)
    assert not (tmp_path / "canary").exists()


def test_S6_what_is_no_param_store_says_so(tmp_path, small):
    with pytest.raises(FileNotFoundError):
        archive.import_param_store(tmp_path / "absent", trust=True)
    for content in (
        [1],
        {"params": {}},
        {"params": {"a": 1}, "constraints": {"a": constraints.real}},
        {"params": {"a": torch.ones(1)}, "constraints": {}},
    ):
        torch.save(content, tmp_path / "odd")
        with pytest.raises(errors.ArchiveCorrupt, match="no param store"):
            archive.import_param_store(tmp_path / "odd", trust=True)
    with pytest.raises(errors.ArchiveCorrupt, match="no param store"):
        archive.import_param_store(small, trust=True)


def test_S6_load_points_to_it(store):
    with pytest.raises(errors.ArchiveCorrupt, match="import_param_store"):
        pf.load(store)
