"""Claims about models whose classes were loaded as remote code from the Hub, where inference/ does not travel."""

import copy
import json

import pytest

from gdino_hf import GDinoConfig, GDinoForObjectDetection

# Loads a folder's own code where gdino_hf cannot be imported, then imports gdino_hf, and prints what each step gives.
SCRIPT = """
import json
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gdino_hf":
            raise ModuleNotFoundError("No module named " + name)

refuse = Refuse()
sys.meta_path.insert(0, refuse)
folder = sys.argv[1]
from transformers import AutoModelForZeroShotObjectDetection

report = {}

def message(function, *arguments):
    try:
        function(*arguments)
    except (ImportError, TypeError) as error:
        return type(error).__name__ + ": " + str(error)

model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)
report["class"] = type(model).__module__
report["method"] = message(model.optimize_for_inference)

sys.meta_path.remove(refuse)
import gdino_hf
from gdino_hf.inference.optimize import optimize_for_inference

report["function"] = message(optimize_for_inference, model)
for trust in (True, False):
    again = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=trust)
    report[f"reloaded, trust {trust}"] = type(again).__module__
    report[f"optimized, trust {trust}"] = again.optimize_for_inference()._optimized
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tiny_config, tmp_path_factory, fresh_python):
    """Results of the script above, run once in its own process."""
    folder = tmp_path_factory.mktemp("pushed")
    marks = {GDinoConfig: "AutoConfig", GDinoForObjectDetection: "AutoModelForZeroShotObjectDetection"}
    before = {cls: cls._auto_class for cls in marks}
    try:
        for cls, name in marks.items():
            cls.register_for_auto_class(name)
        GDinoForObjectDetection(copy.deepcopy(tiny_config)).save_pretrained(folder)
    finally:
        for cls, name in before.items():
            cls._auto_class = name
    modules = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    run = fresh_python.run(SCRIPT, folder, environment=modules)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_method_without_the_package_names_the_remedy(report):
    assert report["class"].startswith("transformers_modules.")
    assert report["method"].startswith("ImportError: transformers_modules.")
    assert 'pip install "gdino-hf[torch]"' in report["method"]
    assert "import gdino_hf" in report["method"]


def test_model_loaded_before_the_import_is_refused_by_name(report):
    assert report["function"].startswith(f"TypeError: {report['class']}.GDinoForObjectDetection was loaded as remote")
    assert "import gdino_hf, then load the model again without trust_remote_code" in report["function"]


@pytest.mark.parametrize("trust", [True, False])
def test_model_loaded_after_the_import_has_the_package_class_even_with_trust_remote_code(report, trust):
    assert report[f"reloaded, trust {trust}"] == "gdino_hf.model.modeling_gdino"
    assert report[f"optimized, trust {trust}"] is True
