"""transformers knows the model type `gdino` after `import gdino_hf`, in whatever order modules are imported."""

import subprocess
import sys

import pytest


@pytest.fixture
def run(fresh_python):
    """A function that runs code in a process that has torch, but not transformers, and returns what it printed."""

    def run(code: str) -> str:
        done = fresh_python.run(code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "code",
    [
        "from gdino_hf import NANO, __version__",
        "import gdino_hf",
        "from gdino_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from gdino_hf.cli import main\ntry: main(['detect', '--help'])\nexcept SystemExit: pass",
        "from gdino_hf.model.text_prompt import split_labels",
    ],
)
def test_what_needs_no_torch_imports_none(code):
    code += "\nimport sys\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False False\n"), done.stderr


LOAD = """
config = AutoConfig.from_pretrained(gdino_hf.NANO)
assert type(config).__name__ == "GDinoConfig"
"""


@pytest.mark.parametrize(
    "code",
    [
        "import gdino_hf\nfrom transformers import AutoConfig" + LOAD,
        "from transformers import AutoConfig\nimport gdino_hf" + LOAD,
        "import transformers, gdino_hf\nAutoConfig = transformers.AutoConfig" + LOAD,
        # The trainer and the modules it needs load the auto classes while they are half loaded themselves.
        "import gdino_hf, transformers.modeling_utils, transformers.trainer\nfrom transformers import AutoConfig"
        + LOAD,
        # Backbones of gdino_hf load the auto classes while they are half loaded themselves.
        "import gdino_hf.model.backbone, gdino_hf\nfrom transformers import AutoConfig" + LOAD,
        "import gdino_hf\nfrom transformers import AutoConfig\nassert AutoConfig.for_model('gdino').num_queries",
    ],
)
def test_auto_config_knows_gdino_in_every_order(run, code):
    run(code)


@pytest.mark.parametrize("first", ["import gdino_hf", "from transformers import AutoImageProcessor, AutoModel"])
def test_every_auto_class_knows_gdino_at_its_first_use(run, first):
    for use, kind in (
        ("AutoImageProcessor.from_pretrained(gdino_hf.NANO)", "GDinoImageProcessor"),
        ("AutoProcessor.from_pretrained(gdino_hf.NANO)", "GDinoProcessor"),
        ("AutoModel.from_pretrained(gdino_hf.NANO)", "GDinoModel"),
    ):
        name = use.partition(".")[0]
        printed = run(f"{first}\nimport gdino_hf\nfrom transformers import {name}\nprint(type({use}).__name__)")
        assert printed == f"{kind}\n"


@pytest.mark.parametrize("imports", ["gdino_hf, transformers.pipelines", "transformers.pipelines, gdino_hf"])
def test_pipeline_knows_gdino_in_every_order(run, imports):
    code = f"""
import {imports}
from transformers import pipeline
print(type(pipeline("zero-shot-object-detection", model=gdino_hf.NANO)).__name__)
"""
    assert run(code) == "GDinoZeroShotObjectDetectionPipeline\n"


def test_model_imported_from_its_own_file_can_be_optimized_and_piped(run):
    code = """
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf import NANO
model, processor = GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)
model.optimize_for_inference()
assert model._optimized
from transformers import pipeline
print(type(pipeline("zero-shot-object-detection", model=model, processor=processor)).__name__)
"""
    assert run(code) == "GDinoZeroShotObjectDetectionPipeline\n"


def test_threads_that_come_first_together_all_find_gdino(run):
    code = """
import gdino_hf
from concurrent.futures import ThreadPoolExecutor
# Threads must not race in the import itself: transformers' lazy imports fail then, with or without gdino_hf.
from transformers import AutoConfig
def load(_):
    return type(AutoConfig.from_pretrained(gdino_hf.NANO)).__name__
with ThreadPoolExecutor(4) as pool:
    print(set(pool.map(load, range(8))))
"""
    assert run(code) == "{'GDinoConfig'}\n"


def test_threads_may_use_a_class_for_the_first_time_together(run):
    code = """
import gdino_hf
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(set(pool.map(lambda _: gdino_hf.GDinoConfig.__name__, range(8))))
"""
    assert run(code) == "{'GDinoConfig'}\n"


def test_after_the_first_use_transformers_is_as_it_was(run):
    """Also after a reload; kept references work on, and loaders and pickles see transformers' own objects."""
    code = """
import importlib, pickle, gdino_hf
importlib.reload(gdino_hf)
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.pipelines import PIPELINE_REGISTRY
kept = AutoConfig.from_pretrained
config = kept(gdino_hf.NANO)
assert kept(gdino_hf.NANO).to_dict() == AutoConfig.from_pretrained(gdino_hf.NANO).to_dict() == config.to_dict()
assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
for method in (AutoConfig.from_pretrained, AutoConfig.for_model, modeling_auto.AutoModel.from_pretrained):
    assert "registration" not in method.__func__.__code__.co_filename
assert "check_task" not in vars(PIPELINE_REGISTRY)
assert type(configuration_auto.__spec__.loader).__name__ == "SourceFileLoader"
assert type(configuration_auto.__loader__).__name__ == "SourceFileLoader"
"""
    run(code)


def test_a_package_that_is_imported_anew_registers_its_new_classes(run):
    """Tools that reload a program remove its modules from sys.modules first."""
    code = """
import sys, gdino_hf
for name in [name for name in sys.modules if name.partition(".")[0] == "gdino_hf"]:
    del sys.modules[name]
import gdino_hf
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(gdino_hf.NANO)) is gdino_hf.GDinoConfig)
"""
    assert run(code) == "True\n"


def test_other_model_types_load_as_before(run):
    code = """
import gdino_hf
from transformers import AutoConfig, AutoModel, BertConfig
config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
model = AutoModel.from_config(config)
print(type(model).__name__, type(AutoConfig.for_model("bert")).__name__)
"""
    assert run(code) == "BertModel BertConfig\n"
