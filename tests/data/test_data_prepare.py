"""Preparing data: every way it can fail is one line, said within seconds; nothing here uses the network."""

import importlib.machinery
import importlib.util
import socket
import threading
import time

import pytest

from hardjax.data import catalog, prepare


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def with_tensorflow(monkeypatch):
    """As if TensorFlow were there; whatever imports it would still fail."""
    find = importlib.util.find_spec
    present = importlib.machinery.ModuleSpec("tensorflow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: present if name == "tensorflow" else find(name))


@pytest.fixture
def connections(monkeypatch):
    """The addresses that were tried; every one answers."""
    tried = []

    class Answer:
        def close(self):
            pass

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: tried.append(address) or Answer())
    return tried


def refused(name, folder, message):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        prepare.prepare(name, folder)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


def test_without_tensorflow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("cifar10", tmp_path, r"needs TensorFlow: `pip install tensorflow-cpu` \(the extra hardjax\[prepare\]\)")


def test_digits_and_unknown_names(tmp_path):
    refused("digits", tmp_path, "comes with scikit-learn and needs no preparation")
    refused("cifar11", tmp_path, "did you mean 'cifar10'")


def test_a_refused_connection(tmp_path, with_tensorflow, monkeypatch):
    def no_network(address, timeout):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    refused("cifar10", tmp_path, r"No way to www.cs.toronto.edu \(.*Name or service not known\)")


def test_a_name_server_that_never_answers(tmp_path, with_tensorflow, monkeypatch):
    given_up = threading.Event()

    def wait(address, timeout):
        given_up.wait(30)
        raise TimeoutError

    monkeypatch.setattr(prepare, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", wait)
    refused("cifar10", tmp_path, r"No way to www.cs.toronto.edu \(no answer\)")
    given_up.set()


def test_a_folder_that_cannot_be_written(tmp_path, with_tensorflow, connections, monkeypatch):
    (tmp_path / "file").write_text("")
    refused("cifar10", tmp_path / "file", "Expected a folder to write prepared data in, got .*file: ")
    monkeypatch.setattr(prepare.os, "access", lambda path, mode: False)
    refused("cifar10", tmp_path, "Expected a folder to write prepared data in, got .*: read-only")
    assert not connections


@pytest.mark.parametrize("name", [name for name, entry in catalog.CATALOG.items() if entry.url])
def test_the_host_is_asked_at_the_port_that_the_download_uses(name, connections):
    import tensorflow_datasets

    entry = catalog.find(name)
    downloads = tensorflow_datasets.builder_cls(entry.tfds_name).url_infos
    assert all(url.startswith(f"{entry.url}/") for url in downloads) and downloads
    prepare._check_reachable(name, entry.url)
    assert connections == [(entry.url.split("//")[1], 443 if entry.url.startswith("https") else 80)]


def test_archives_that_must_be_asked_for(tmp_path, connections):
    refused("imagenet2012", tmp_path, "imagenet2012 is made of archives that its authors give on request: prepare them")
    assert not connections


@pytest.mark.parametrize("proxy", ["http://proxy.example:3128", "proxy.example:3128"])
def test_behind_a_proxy_the_proxy_is_asked(proxy, connections, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy)
    prepare._check_reachable("cifar10", "https://www.cs.toronto.edu")
    assert connections == [("proxy.example", 3128)]


def test_a_failed_download_is_one_line(tmp_path, with_tensorflow, connections, monkeypatch):
    import tensorflow_datasets

    def builder(name, data_dir, file_format):
        assert (name, data_dir, file_format) == ("svhn_cropped", str(tmp_path), "array_record")
        raise OSError("HTTPConnectionPool: Read timed out.\nA page of advice.")

    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    refused("svhn_cropped_extra", tmp_path, "Preparing svhn_cropped in .* failed: HTTPConnectionPool: Read timed out.")


def test_what_is_prepared_is_not_prepared_again(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare.tfds, "prepared_folder", lambda name, data_dir: tmp_path / name)
    assert prepare.prepare("mnist", tmp_path) == tmp_path / "mnist"
