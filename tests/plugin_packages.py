"""Small real plugin packages, good and bad: built as wheels, installed by pip, used in fresh interpreters."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "plugins.md"


@dataclass(frozen=True)
class Package:
    """What goes into one wheel: ``entries`` is the text of ``entry_points.txt``."""

    name: str
    version: str
    entries: str
    modules: dict[str, str]

    @property
    def stem(self) -> str:
        return f"{re.sub('[-.]', '_', self.name)}-{self.version}"

    def wheel(self, folder: Path) -> Path:
        info = f"{self.stem}.dist-info"
        files = {f"{module}.py": source for module, source in self.modules.items()}
        files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n"
        files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files[f"{info}/entry_points.txt"] = self.entries
        record = ""
        for name, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(text.encode())}\n"
        files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
        path = folder / f"{self.stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path


# Objects that have what the registry looks for, and need no torch.
DUCKS = """
class Map:
    domain = codomain = None
    def __init__(self, input_dim, *, context_dim=0, knots=8, tail="linear"):
        self.input_dim, self.context_dim, self.knots = input_dim, context_dim, knots
    def forward_and_log_det(self, x, context=None): return x, 0.0
    def inverse_and_log_det(self, y, context=None): return y, 0.0
    def condition(self, context): return self
    def parameters(self): return []

class Flow:
    transform = base = None
    def __init__(self, input_dim, *, context_dim=0, **options):
        self.input_dim, self.context_dim, self.options = input_dim, context_dim, options
    def forward(self, context=None): return self
    def state_dict(self): return {}

class Guide:
    def __init__(self, model, *, name="", scale=1.0):
        self.model, self.name, self.scale = model, name, scale
    def __call__(self): return {}
    def setup(self, *args): return self
"""

BROKEN = "import a_module_that_nobody_has\n"
COUNTED = """
import os, time
with open(os.environ["COUNT_FILE"], "a") as file:
    file.write(f"{__name__}\\n")
time.sleep(0.05)
"""

PACKAGES = [
    Package(
        "Acme_Waves",
        "1.0",
        """
[pyroflows.transforms]
wave = acme_waves:Map
[pyroflows.distributions]
tide = acme_waves:Flow
[pyroflows.guides]
drift = acme_waves:Guide
[pyroflows.unheard_of]
wave = acme_waves:Map
""",
        {"acme_waves": DUCKS},
    ),
    Package("zeta-waves", "2.0", "[pyroflows.transforms]\nwave = zeta_waves:Map\n", {"zeta_waves": DUCKS}),
    Package(
        "usurper",
        "3.0",
        "[pyroflows.transforms]\naffine = usurper:Map\n[pyroflows.distributions]\nnsf = usurper:Flow\n",
        {"usurper": DUCKS},
    ),
    Package(
        "broken",
        "0.9",
        """
[pyroflows.transforms]
no_import = broken_import:Map
exits = broken_exit:Map
no_attribute = broken_attribute:Nap
interrupted = broken_interrupt:Map
repaired = broken_until_repaired:Map
[pyroflows.guides]
no_import = broken_import:Guide
""",
        {
            "broken_import": BROKEN,
            "broken_exit": "raise SystemExit(3)\n",
            "broken_attribute": DUCKS,
            "broken_interrupt": "raise KeyboardInterrupt\n",
            "broken_until_repaired": "import os\nif 'REPAIRED' not in os.environ:\n    1 / 0\n" + DUCKS,
        },
    ),
    Package(
        "wrong",
        "0.1",
        """
[pyroflows.transforms]
number = wrong:number
hollow = wrong:Hollow
no_context = wrong:no_context
raises = wrong:raises
[pyroflows.distributions]
hollow_flow = wrong:Hollow
[pyroflows.guides]
mute = wrong:Hollow
""",
        {
            "wrong": """
number = 42
class Hollow:
    domain = None
    def __init__(self, subject, *, context_dim=0): pass
def no_context(input_dim): raise AssertionError("called")
def raises(input_dim, *, context_dim=0): raise TypeError("the author's own")
"""
        },
    ),
    Package(
        "api",
        "9.0",
        """
[pyroflows.transforms]
of_tomorrow = api_module:Map
of_yesterday = api:Old
of_both = api:Both
garbled = api:Garbled
""",
        {
            "api_module": "__pyroflows_api__ = 2\n" + DUCKS,
            "api": DUCKS
            + """
class Old(Map): __pyroflows_api__ = (0, 0)
class Both(Map): __pyroflows_api__ = (1, 2)
class Garbled(Map): __pyroflows_api__ = "1"
""",
        },
    ),
    Package(
        "counted",
        "1.0",
        """
[pyroflows.transforms]
slow = counted_good:Map
slow_broken = counted_broken:Map
nested = counted_nested:Map
""",
        {
            "counted_good": COUNTED + DUCKS,
            "counted_broken": COUNTED + BROKEN,
            "counted_nested": COUNTED + "from pyroflows import plugins\nplugins.get('transforms', 'slow')\n" + DUCKS,
        },
    ),
    Package(
        "odd",
        "1.0",
        """
[pyroflows.transforms]
pyroflows:affine = odd:Map
twice = odd:Map
twice = odd:Flow
same = odd:Map
same = odd:Map
""",
        {"odd": DUCKS},
    ),
]


def documented() -> Package:
    """The example of ``docs/plugins.md``, exactly as it is printed there."""
    module, *_ = re.findall(r"```python\n# acme_flows.py\n(.*?)```", DOCS.read_text(), re.S)
    project, *_ = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.S)
    project = tomllib.loads(project)["project"]
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    return Package(project["name"], project["version"], "\n".join(lines) + "\n", {"acme_flows": module})


def install(folder: Path) -> dict[str, Path]:
    """Installs all packages with one pip run, then gives each a site folder of its own, by distribution."""
    packages = [*PACKAGES, documented()]
    wheels, together = folder / "wheels", folder / "together"
    wheels.mkdir()
    files = [str(package.wheel(wheels)) for package in packages]
    pip = [sys.executable, "-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", "--target", str(together), *files], check=True)
    sites = {}
    for package in packages:
        site = sites[package.name.lower().replace("_", "-")] = folder / package.name
        site.mkdir()
        shutil.copytree(together / f"{package.stem}.dist-info", site / f"{package.stem}.dist-info")
        for module in package.modules:
            shutil.copy(together / f"{module}.py", site)
    return sites


PRELUDE = """
import json, sys
from pyroflows import errors, plugins

def attempt(function, *args, **options):
    try:
        return function(*args, **options)
    except errors.PyroflowsError as error:
        return [type(error).__name__, str(error)]

def show(answer):
    print(json.dumps(answer))
"""


def run(code: str, *sites: Path, prelude: str = PRELUDE, **environment: str):
    """Runs code in a fresh interpreter with these sites installed; hands back the JSON that it prints."""
    paths = [*map(str, sites), os.environ.get("PYTHONPATH", "")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYROFLOWS_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        env={**clean, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout or "null")
