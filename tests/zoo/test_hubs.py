"""Models of timm and transformers come by name, prepared for as the package says; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from torchlens_viz import capture, layers
from torchlens_viz.errors import MissingDependencyError, ModelLoadError
from torchlens_viz.zoo.load import load_model, load_structure

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
NAME = "test_resnet"  # of a few thousand weights
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def refusal(match: str, spec: str, kind: type[Exception] = ModelLoadError, **options) -> str:
    with pytest.raises(kind, match=match) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# timm


@pytest.fixture
def timm(monkeypatch, tmp_path):
    """timm with an empty cache and no network."""
    package = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return package


def cached(folder: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    """Put weights where huggingface_hub keeps what it has downloaded."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, place / "snapshots" / ("0" * 40) / "model.safetensors")


def test_a_timm_model_is_prepared_for_by_its_own_data_configuration(timm):
    loaded = load_model(f"timm/{NAME}", weights="none")
    config = timm.data.resolve_model_data_config(loaded.model)
    expected = timm.data.create_transform(**config, is_training=False)(PHOTO)
    assert torch.equal(loaded.preprocess(PHOTO), expected[None])
    assert loaded.preprocess(PHOTO.convert("L")).shape == (1, 3, *config["input_size"][1:])
    assert loaded.name == f"timm/{NAME}"
    assert loaded.weights_note == f"random weights (seed 0), preprocessing of timm for {NAME}"
    assert not loaded.model.training
    assert torch.equal(load_structure(f"timm/{NAME}").preprocess(PHOTO), expected[None])
    assert len(loaded.names) == 1000
    assert loaded.names[207] == "golden retriever"


def test_timm_s_weights_come_from_the_cache_of_the_hub(timm, tmp_path):
    twin = load_model(f"timm/{NAME}", weights="none").model
    state = {key: torch.full_like(value, 0.25) for key, value in twin.state_dict().items()}
    config = timm.get_pretrained_cfg(NAME)
    cached(tmp_path / "hub", config.hf_hub_id, state)
    loaded = load_model(f"timm/{NAME}")
    assert all((parameter == 0.25).all() for parameter in loaded.model.parameters())
    assert loaded.weights_note.startswith(f"weights {NAME}.{config.tag} of timm, preprocessing")


def test_a_file_is_loaded_into_a_timm_model_and_its_prefix_is_told(timm, tmp_path):
    model = load_model(f"timm/{NAME}", weights="none").model
    state = {f"module.{key}": torch.ones_like(value) for key, value in model.state_dict().items()}
    torch.save({"state_dict_ema": state, "state_dict": {}, "epoch": 3}, tmp_path / "w.pth")
    loaded = load_model(f"timm/{NAME}", weights=tmp_path / "w.pth")
    assert all((parameter == 1).all() for parameter in loaded.model.parameters())
    assert "(from its `state_dict_ema`, without the prefix `module.`), " in loaded.weights_note


def test_a_timm_name_that_is_none_and_weights_that_cannot_be_had_say_so(timm):
    assert "did you mean timm/resnet50" in refusal("no timm model is named 'resnet5O'", "timm/resnet5O")
    message = refusal(rf"cannot load timm/{NAME} \(", f"timm/{NAME}")
    assert "`--weights none`" in message
    assert "`--weights FILE`" in message


@pytest.mark.parametrize(("package", "extra"), [("timm", "timm"), ("transformers", "hf")])
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    spec = f"{extra}/some_model"
    message = refusal(f"{spec} is a model of {package}, which is not installed", spec, MissingDependencyError)
    assert f'"torchlens_viz[{extra}]"' in message


# transformers


@pytest.fixture
def transformers(monkeypatch):
    package = pytest.importorskip("transformers")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    return package


@pytest.fixture
def resnet(transformers, tmp_path):
    """A folder as `save_pretrained` writes it."""
    torch.manual_seed(3)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "net")
    transformers.ViTImageProcessor(size={"height": 40, "width": 48}).save_pretrained(tmp_path / "net")
    return tmp_path / "net", model


def test_a_folder_of_transformers_is_loaded_with_its_processor_and_names(resnet):
    folder, model = resnet
    loaded = load_model(f"hf/{folder}")
    assert type(loaded.model) is type(model)
    for one, other in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    prepared = loaded.preprocess(PHOTO)
    assert prepared.shape == (1, 3, 40, 48)
    assert prepared.min() >= -1
    assert prepared.max() <= 1  # mean and deviation of 0.5, that processor's own
    assert loaded.names == ("cat", "dog")
    assert loaded.weights_note == f"weights of {folder}, preprocessing of ViTImageProcessor"


def test_what_a_model_of_transformers_puts_out_is_understood(resnet):
    loaded = load_model(f"hf/{resnet[0]}")
    batch = loaded.preprocess(PHOTO)
    with torch.no_grad(), capture(loaded.model, ["", "resnet.embedder"]) as acts:
        output = loaded.on_images(batch)
    assert torch.equal(acts[""].logits, output.logits)
    assert acts["resnet.embedder"].shape == (1, 4, 10, 12)
    table = layers(load_structure(f"hf/{resnet[0]}").model)
    assert table["resnet.embedder.embedder.convolution"].marks == ("first convolution",)
    assert table["classifier"].output_shape == (1, 2)


def test_random_weights_and_a_model_without_a_processor(resnet):
    folder, model = resnet
    (folder / "preprocessor_config.json").unlink()
    (folder / "model.safetensors").unlink()
    loaded = load_model(f"hf/{folder}", weights="none")
    weight = "resnet.embedder.embedder.convolution.weight"
    assert not torch.equal(loaded.model.get_parameter(weight), model.get_parameter(weight))
    assert loaded.preprocess(PHOTO).shape == (1, 3, 224, 224)
    assert loaded.weights_note.startswith("random weights (seed 0), no processor: shorter side to 256")


def test_of_a_model_of_text_and_images_the_images_part_is_taken(transformers, tmp_path):
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**part, "image_size": 32, "patch_size": 8}, text_config={**part, "vocab_size": 10}
    )
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path / "clip")
    loaded = load_model(f"hf/{tmp_path / 'clip'}", weights="none")
    assert type(loaded.model).__name__.startswith("CLIPVision")
    assert layers(loaded.model).input_shapes == ((1, 3, 32, 32),)


def test_what_is_no_image_model_of_transformers_says_so(transformers, resnet, tmp_path):
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path / "bert")
    refusal("must be a model of images, got BertModel", f"hf/{tmp_path / 'bert'}", weights="none")
    (resnet[0] / "model.safetensors").write_bytes(b"half")
    refusal("cannot load hf/.* from the folder .*--weights none", f"hf/{resnet[0]}")
    refusal("cannot load hf/no/such-model .*check the name", "hf/no/such-model")
    refusal("write `hf/", str(resnet[0]))
