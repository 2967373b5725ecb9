"""Tests of the built kernel as users load it: through the kernels package, as operator and as layer."""

import json

import pytest
import torch

# Sums of at most 40 float32 products of order 1; location gradients multiply them by a level's size, at most 100.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def flat(shapes):
    return [side for shape in shapes for side in shape]


def on(device, case):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in case]


@pytest.fixture(params=["cpu", "cuda"])
def kernel(request, variant):
    """The loaded module and its device: the CPU build, and the CUDA build if there is a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here; test_device_code.py runs the kernels' arithmetic on the CPU")
    architecture = "".join(map(str, torch.cuda.get_device_capability())) if request.param == "cuda" else "90"
    return variant(request.param, (architecture,))[1], request.param


def test_build_toml_is_valid(cases):
    build = pytest.importorskip("kernels._rust").Build.open(cases.PROJECT)
    assert {str(backend).lower() for backend in build.general.backends} == {"cpu", "cuda"}


def test_build_toml_and_local_build_name_the_same_sources(cases):
    text = (cases.PROJECT / "build.toml").read_text()
    for path in cases.load_script("build_local").sources():
        name = path.relative_to(cases.PROJECT).as_posix()
        # build.toml lists Python files by folder.
        assert name.endswith(".py") or f'"{name}"' in text, name


@pytest.mark.slow
def test_cuda_library_loads_and_registers_without_a_gpu(variant):
    folder, module = variant("cuda")
    assert json.loads((folder / "metadata.json").read_text())["backend"] == {"type": "cuda", "archs": ["9.0"]}
    assert module._has_kernel("cuda")
    assert not module._has_kernel("cpu")
    with torch.device("meta"):
        inputs = torch.empty(2, 14, 3, 8), [3, 4, 2, 1], torch.empty(2, 5, 3, 2, 4, 2), torch.empty(2, 5, 3, 2, 4)
    assert module.ms_deform_attn(*inputs).shape == (2, 5, 24)


@pytest.mark.parametrize("seed", range(9))
def test_random_shapes_equal_float64(cases, kernel, seed):
    module, device = kernel
    dtypes = module._DTYPES[device]
    dtype = dtypes[seed % len(dtypes)]
    case = cases.make_case(seed, dtype=dtype)
    out, gradients = cases.expected(*case)
    value, shapes, locations, weights, grad = on(device, case)
    assert module.supports(value, locations)
    found = module.forward(value, flat(shapes), locations, weights)
    torch.testing.assert_close(found.double().cpu(), out, rtol=ROUNDING[dtype], atol=FORWARD_TOLERANCE)
    ours = module.backward(grad, value, flat(shapes), locations, weights)
    for name, a, b in zip(("value", "locations", "weights"), ours, gradients, strict=True):
        torch.testing.assert_close(
            a.double().cpu(),
            b,
            rtol=GRADIENT_TOLERANCE + ROUNDING[a.dtype],
            atol=GRADIENT_TOLERANCE,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )


def test_operator_passes_torch_checks(cases, kernel):
    module, device = kernel
    value, shapes, locations, weights, _ = on(device, cases.make_case(2, width=8))
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(module.ops.forward.default, (inputs[0], flat(shapes), *inputs[1:]))


def test_float64_and_mismatched_shapes_are_refused(cases, kernel):
    module, device = kernel
    value, shapes, locations, weights, _ = on(device, cases.make_case(2, width=8))
    assert not module.supports(value.double(), locations)
    with pytest.raises(RuntimeError, match="covers"):
        module.forward(value[:, :-1], flat(shapes), locations, weights)
    with pytest.raises(RuntimeError, match="differ in size"):
        module.forward(value, flat(shapes), locations, weights[:, :0])


def test_kernelize_replaces_transformers_layer(kernel, variant, monkeypatch):
    import kernels

    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    _, device = kernel
    folder, _ = variant(device)
    layer_class = type("Layer", (modeling.MultiScaleDeformableAttention,), {})
    kernels.replace_kernel_forward_from_hub(layer_class, "MultiScaleDeformableAttention")
    repository = kernels.LocalLayerRepository(repo_path=folder, layer_name="MultiScaleDeformableAttention")
    shapes = [(3, 4), (2, 1)]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 14, 2, 8, generator=generator).to(device).requires_grad_()
    locations = torch.rand(1, 5, 2, 2, 4, 2, generator=generator).to(device)
    weights = torch.rand(1, 5, 2, 2, 4, generator=generator).to(device)
    arguments = value, torch.tensor(shapes), shapes, torch.tensor([0, 12]), locations, weights, 64
    layer = layer_class()
    theirs = layer(*arguments)
    with kernels.use_kernel_mapping({"MultiScaleDeformableAttention": {device: repository}}):
        layer = kernels.kernelize(layer, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device=device)
    ours = layer(*arguments)
    assert "ms_deform_attn" in layer.forward.__func__.__globals__
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FORWARD_TOLERANCE)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), value) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


def test_compiles_to_one_graph(cases, kernel):
    module, device = kernel
    value, shapes, locations, weights, _ = on(device, cases.make_case(5, width=8))

    def double(v, p, w):
        return 2 * module.ms_deform_attn(v, flat(shapes), p, w)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, locations, weights), double(value, locations, weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_graph_replays_the_operator(cases, variant):
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    module = variant("cuda", (architecture,))[1]
    value, shapes, locations, weights, _ = on("cuda", cases.make_case(5, width=32))
    module.forward(value, flat(shapes), locations, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.forward(value, flat(shapes), locations, weights)
    value.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, module.forward(value, flat(shapes), locations, weights), rtol=0, atol=0)


@pytest.fixture
def hub(monkeypatch):
    """The Hub backend of gdino_hf, reset to the state of a new process."""
    from gdino_hf.model import msda_hub

    monkeypatch.setenv("GDINO_MSDA", "hub")
    msda_hub.load.cache_clear()
    yield msda_hub
    msda_hub.load.cache_clear()


@pytest.mark.parametrize("by", ["GDINO_MSDA_HUB", "LOCAL_KERNELS"])
def test_gdino_hf_runs_a_build_from_a_folder(cases, variant, hub, monkeypatch, by):
    from gdino_hf.model import msda_backends, msda_operator

    folder, module = variant("cpu")
    monkeypatch.setenv(by, f"{hub.REPOSITORY}={folder}" if by == "LOCAL_KERNELS" else str(folder.parent))
    assert hub.load() is module
    case = cases.make_case(4)
    out, gradients = cases.expected(*case)
    value, shapes, locations, weights, grad = case
    assert msda_backends.backend_for(value, locations) == "hub"
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    found = msda_operator.ms_deform_attn(leaves[0], flat(shapes), *leaves[1:])
    torch.testing.assert_close(found.double(), out, rtol=0, atol=FORWARD_TOLERANCE)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, grad), gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


def test_version_and_repository_equal_build_toml(cases, hub):
    text = (cases.PROJECT / "build.toml").read_text()
    assert f'repo-id = "{hub.REPOSITORY}"' in text
    assert f"\nversion = {hub.VERSION}\n" in text
    local = cases.load_script("build_local")
    assert hub.VERSION == local.VERSION
    abi = ".".join(map(str, local.STABLE_ABI))
    assert f'cuda = "{abi}"' in text
