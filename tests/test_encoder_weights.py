"""Weights of frozen networks: downloaded once, read strictly, and a helpful error for any other file."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from pixelgen.encoders import dinov2, weights
from pixelgen.encoders.dinov2 import DINOv2
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")

OFFICIAL = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "dino": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
}
OPTION = {"vgg": "loss.stages_weights", "dino": "loss.tokens_weights"}
WHAT = {"vgg": "VGG16", "dino": "dinov2_vits14"}


def build(network: str, source: str | Path) -> VGG16 | DINOv2:
    return VGG16(source) if network == "vgg" else DINOv2("dinov2_vits14", source)


@pytest.fixture(scope="module")
def networks() -> dict[str, VGG16 | DINOv2]:
    with pytest.warns(UserWarning):
        return {name: build(name, "random") for name in OFFICIAL}


def file_state(network: VGG16 | DINOv2) -> dict[str, Tensor]:
    """As the published files name it."""
    if isinstance(network, VGG16):
        state = {f"features.{key}": value for key, value in network.features.state_dict().items()}
        return {**state, "classifier.0.bias": torch.zeros(4096)}
    return {**network.vit.state_dict(), "mask_token": torch.zeros(1, 384)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch.hub keeps downloads; it does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "torch/hub/checkpoints"


# --- downloads ---


def publish(network: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's official address becomes ``url``."""
    monkeypatch.setattr(dinov2, "URL", url)
    monkeypatch.setattr(torchvision.models.VGG16_Weights.IMAGENET1K_V1.value, "url", url)


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


@pytest.mark.parametrize("network", OFFICIAL)
def test_offline_error_names_file_address_and_option(network, cache, monkeypatch):
    unplug(monkeypatch)
    with pytest.raises(UserError) as error:
        build(network, "pretrained")
    text = str(error.value)
    url = OFFICIAL[network]
    assert f"{OPTION[network]}: the weights of {WHAT[network]} could not be downloaded" in text
    assert "Network is unreachable" in text and f"Fetch {url} " in text and "\n" not in text
    assert f"copy it to {cache / Path(url).name}, or set {OPTION[network]} to the file" in text


def test_addresses_are_those_of_the_libraries():
    for name, model in dinov2.MODELS.items():
        config = timm.get_pretrained_cfg(model)
        assert config is not None and config.url == dinov2.URL.format(name=name)
    assert OFFICIAL["dino"] == dinov2.URL.format(name="dinov2_vits14")
    assert OFFICIAL["vgg"] == torchvision.models.VGG16_Weights.IMAGENET1K_V1.url


@pytest.mark.parametrize("network", OFFICIAL)
def test_a_download_is_checked_and_read_without_a_network(network, networks, cache, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(file_state(networks[network]), file)
    name = "dinov2_vits14_pretrain.pth"
    if network == "vgg":
        file.rename(tmp_path / "vgg16-00000000.pth")
        publish(network, (tmp_path / "vgg16-00000000.pth").as_uri(), monkeypatch)
        with pytest.raises(UserError, match=r"could not be downloaded \(invalid hash value .*00000000"):
            build(network, "pretrained")
        assert not list(cache.iterdir())  # nothing that the next run would take for the weights
        digest = hashlib.sha256((tmp_path / "vgg16-00000000.pth").read_bytes()).hexdigest()
        file, name = tmp_path / "vgg16-00000000.pth", f"vgg16-{digest[:8]}.pth"
    publish(network, file.rename(tmp_path / name).as_uri(), monkeypatch)
    before = torch.get_rng_state()
    first = build(network, "pretrained")
    assert torch.equal(before, torch.get_rng_state())
    assert [path.name for path in cache.iterdir()] == [name]
    unplug(monkeypatch)
    (tmp_path / name).unlink()
    second = build(network, "pretrained")
    for actual in (first, second):
        parameters = zip(actual.parameters(), networks[network].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in parameters)
        assert not any(p.requires_grad for p in actual.parameters()) and not actual.training


def download(url: str) -> dict[str, Tensor]:
    return weights.download_state_dict(url, what="VGG16", option="loss.stages_weights", names="a, b")


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """An HTTP server on this machine that announces ``length`` bytes, sends ``body`` and counts requests."""
    served = SimpleNamespace(body=b"", length=0, status=200, requests=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests += 1
            self.send_response(served.status)
            self.send_header("Content-Length", str(served.length))
            self.end_headers()
            self.wfile.write(served.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        served.url = f"http://127.0.0.1:{http.server_port}/weights.pth"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield served
        http.shutdown()
        thread.join()


def test_a_download_that_breaks_off_is_never_used(server, cache, tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    server.body, server.length = whole[: len(whole) // 2], len(whole)
    for _ in range(2):  # the second time, the half file is in the cache
        with pytest.raises(UserError) as error:
            download(server.url)
        text = str(error.value)
        assert f"loss.stages_weights: {cache / 'weights.pth'} cannot be read" in text
        assert f"is it truncated? It is kept from {server.url}; delete it" in text
    (cache / "weights.pth").unlink()
    server.body = whole
    assert torch.equal(download(server.url)["a"], torch.arange(1000.0))
    requests = server.requests
    assert torch.equal(download(server.url)["a"], torch.arange(1000.0))
    assert server.requests == requests
    assert [path.name for path in cache.iterdir()] == ["weights.pth"]


def test_what_a_server_answers_is_in_the_error(server, cache):
    server.status = 404
    with pytest.raises(UserError, match=r"could not be downloaded \(HTTP Error 404: Not Found\)"):
        download(server.url)
    assert not cache.exists()


@pytest.fixture
def socket_limit() -> Iterator[None]:
    """Ends a test that would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    yield
    socket.setdefaulttimeout(before)


@pytest.mark.usefixtures("socket_limit")
def test_a_host_that_does_not_answer_costs_seconds(cache, monkeypatch):
    assert weights._ANSWER_SECONDS <= 5
    monkeypatch.setattr(weights, "_ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        start = time.perf_counter()
        with pytest.raises(UserError, match=r"could not be downloaded \(timed out\)"):
            download(url)
        assert time.perf_counter() - start < 5


def test_a_cache_that_cannot_be_written_is_named(server, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"could not be downloaded \(.*hub"):
        download(server.url)


# --- files ---


@pytest.mark.parametrize("network", OFFICIAL)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_reads_published_names_from_both_kinds_of_file(network, suffix, networks, tmp_path):
    state = file_state(networks[network])
    path = tmp_path / f"weights.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    actual, expected = build(network, path).state_dict(), networks[network].state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_giant_model_is_read_from_the_hubs_names():
    with torch.device("meta"):
        vit = timm.create_model(dinov2.MODELS["dinov2_vitg14"], num_classes=0)
    for hub, ours in (("w12", "fc1"), ("w3", "fc2")):
        assert dinov2._timm_key(f"blocks.39.mlp.{hub}.weight") == f"blocks.39.mlp.{ours}.weight"
        assert f"blocks.39.mlp.{ours}.weight" in vit.state_dict()


def shapes_of(create: Callable[[], torch.nn.Module], path: Path) -> Path:
    """A file with the keys and shapes of a network, and one number per tensor."""
    with torch.device("meta"):
        state = create().state_dict()
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("network", "other", "problems"),
    [
        ("dino", "vit_base_patch14_dinov2", r"misshapen \(cls_token \(1, 1, 768\) instead of \(1, 1, 384"),
        ("dino", "vit_small_patch14_reg4_dinov2", r"1 unexpected \(reg_token\); 1 misshapen \(pos_embed"),
        (
            "dino",
            "vit_small_patch16_224",
            r"missing \(blocks.0.ls1.gamma, .*misshapen \(pos_embed \(1, 197, 384",
        ),
        ("dino", "vgg16", r"174 missing \(cls_token, .*32 unexpected \(features.0.weight, "),
        ("vgg", "vit_small_patch14_dinov2", r"26 missing \(0.weight, .*174 unexpected \(cls_token, "),
        ("vgg", "resnet50", r"26 missing \(0.weight, .*unexpected \(conv1.weight, bn1.weight"),
        ("vgg", "vgg16_bn", r"missing \(.*unexpected \(1.weight, .*misshapen \(.* instead of "),
        ("vgg", "vgg19", r"missing \(.*unexpected \(.*misshapen \("),
    ],
)
def test_weights_of_another_network_are_refused_with_a_list(network, other, problems, tmp_path):
    def create() -> torch.nn.Module:
        if other.startswith("vit"):
            return timm.create_model(other, num_classes=0)
        return getattr(torchvision.models, other)()

    path = shapes_of(create, tmp_path / "other.pth")
    expected = rf"^{OPTION[network]}: .*other.pth does not hold the weights of {WHAT[network]} .*{problems}"
    with pytest.raises(UserError, match=expected) as error:
        build(network, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert f"expected {'26' if network == 'vgg' else '174'} tensors such as" in str(error.value)


def test_missing_unexpected_and_misshapen_keys_are_listed(networks, tmp_path):
    state = file_state(networks["vgg"])
    state["features.0.weight"] = torch.zeros(32, 3, 3, 3)
    state["head.weight"] = state.pop("features.28.weight")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights of VGG16") as error:
        VGG16(tmp_path / "other.safetensors")
    text = str(error.value)
    assert "1 missing (28.weight)" in text and "1 unexpected (head.weight)" in text
    assert "0.weight (32, 3, 3, 3) instead of (64, 3, 3, 3)" in text


@pytest.mark.parametrize("network", OFFICIAL)
def test_a_checkpoint_around_the_weights_is_pointed_into(network, networks, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, path)
    expected = (
        rf"^{OPTION[network]}: {path} must hold a flat state dict of tensors \(the weights of "
        rf"{WHAT[network]}\), got 'epoch': int, 'state_dict': dict, 'ema': dict; "
        r"the weights may be in 'state_dict' or 'ema', save them as a file of their own: "
        rf"torch.save\(torch.load\('{path}', weights_only=True\)\['state_dict'\], NEW_FILE\)$"
    )
    with pytest.raises(UserError, match=expected):
        build(network, path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([1, 2], "list"),
        (torch.zeros(2), "Tensor"),
        ({"a": torch.zeros(1), "n": 1}, "'n': int"),
        ({1: torch.zeros(1)}, "1: Tensor"),
    ],
)
def test_other_contents_are_refused(content, got, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"must hold a flat state dict .* of VGG16\), got {got}$"):
        VGG16(tmp_path / "a.pth")


TRUNCATED = (
    r"^loss.stages_weights: .*a\.\w+ cannot be read \(.+\); "
    r"expected a complete .* of VGG16: is it truncated\?$"
)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused_wherever_they_end(kind, tmp_path):
    state = {"features.0.weight": torch.randn(4, 3), "features.0.bias": torch.zeros(4)}
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")  # VGG16's file is a legacy one
    whole = path.read_bytes()
    assert weights.read_state_dict(path, what="VGG16", option="loss.stages_weights").keys() == state.keys()
    for size in range(0, len(whole), 1 + len(whole) // 100):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=TRUNCATED):
            weights.read_state_dict(path, what="VGG16", option="loss.stages_weights")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>Sign in</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 58\n",
        b"a text file\n",
        b"hello\n",
        bytes(4096),
        bytes(range(256)),
    ],
    ids=["html", "lfs", "text", "hello", "zeros", "bytes"],
)
def test_files_of_another_kind_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=TRUNCATED) as error:
        VGG16(path)
    assert "set to `False`" not in str(error.value) and "weights_only` set" not in str(error.value)


@pytest.mark.parametrize("network", OFFICIAL)
def test_folders_and_missing_files_are_named(network, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.pth"):
        expected = rf"^{OPTION[network]}: {path} is not a file; it must hold the weights of {WHAT[network]}$"
        with pytest.raises(UserError, match=expected):
            build(network, path)


class Command:
    """A pickle of it runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_file_is_not_run(tmp_path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"features.0.weight": torch.zeros(1), "extra": Command(f"touch {trace}")}, path)
    expected = (
        r"a.pth cannot be read \(it holds \w+.system, and only tensors are read, as others could run code\)"
    )
    with pytest.raises(UserError, match=expected) as error:
        VGG16(path)
    assert not trace.exists() and "set to `False`" not in str(error.value)
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have
