"""What others load an export with, each in a process of its own that cannot import sslcells."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hub_standin import Hub
from trained import make_run

import sslcells
from sslcells.delivery.export import export

ALONE = """
import sys
sys.modules["sslcells"] = None  # importing it fails
import torch
pixels = torch.load("pixels.pt")  # (N, C, S, S) uint8
mean, std = torch.load("normalisation.pt")
normalised = (pixels.float() / 255 - mean) / std
"""

LOADERS = {
    "timm": """
import timm
from huggingface_hub import HfApi
made = timm.create_model("local-dir:.", pretrained=True).eval()
found = {"local-dir": made(normalised)}
api = HfApi()
api.create_repo("lab/cells")
api.upload_folder(repo_id="lab/cells", folder_path=".", ignore_patterns=["*.pt", "*.onnx", "*.pt2"])
found["the export, pushed"] = timm.create_model("hf-hub:lab/cells", pretrained=True).eval()(normalised)
timm.models.push_to_hf_hub(made, "lab/again", safe_serialization=True)
found["timm's own layout, pushed"] = timm.create_model("hf-hub:lab/again", pretrained=True).eval()(normalised)
""",
    "programs": """
found = {"torch.export": torch.export.load("encoder.pt2").module()(pixels)}
try:
    import onnxruntime
    session = onnxruntime.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
    found["ONNX Runtime"] = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
except ImportError:
    pass
assert "timm" not in sys.modules
""",
    "transformers": """
from transformers import AutoModel
found = {"TimmWrapperModel": AutoModel.from_pretrained(".").eval()(normalised).pooler_output}
""",
}
NETWORKS = {
    "resnet": ("model.backbone=test_resnet", "model.args={}"),
    "vit": ("model.backbone=test_vit", "model.args={img_size: 32, class_token: false, global_pool: avg}"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """An export of an encoder of 5 channels, some pixels in it, and their features."""
    folder = tmp_path_factory.mktemp("loaders")
    run = make_run(folder / "run", *NETWORKS[request.param], channels=5)
    onnx = importlib.util.find_spec("onnxscript") is not None
    out = export(str(run), str(folder / "out"), onnx=onnx, say=lambda line: None)
    encoder = sslcells.load_encoder(run)
    pixels = torch.randint(256, (3, 5, 32, 32), dtype=torch.uint8)
    torch.save(pixels, out / "pixels.pt")
    torch.save((encoder.mean, encoder.std), out / "normalisation.pt")
    return out, sslcells.embed(pixels, encoder)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_others_load_an_export_and_find_the_same_features(loader, exported):
    if loader == "transformers" and importlib.util.find_spec(loader) is None:
        pytest.skip("transformers is not installed")
    out, features = exported
    hub = Hub()
    no_network = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out.parent / "hf")}
    code = f"{ALONE}{LOADERS[loader]}torch.save({{name: x.detach() for name, x in found.items()}}, 'found.pt')"
    with hub:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=out,
            env={**os.environ, **no_network},
            capture_output=True,
            text=True,
            check=False,
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    for name, found in torch.load(out / "found.pt").items():
        torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    if loader == "timm":
        pushed = hub.repositories["lab/cells"].keys()
        assert {"config.json", "model.safetensors", "encoder.json", "README.md"} <= pushed
        assert {"config.json", "model.safetensors"} <= hub.repositories["lab/again"].keys()
