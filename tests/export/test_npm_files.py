"""npm packages of the page: accepted by content only, and one sentence where they cannot be had."""

import os
import re
import shutil
import stat
import sys

import pytest

from gdino_hf.export import npm_files as module
from gdino_hf.export.npm_files import cache_folder, npm_files, pinned_packages


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_folder_of_npm_install_is_taken_and_every_file_is_compared(npm_packages, no_cache):
    for package in pinned_packages():
        for path, source in npm_packages[package.name].items():
            target = no_cache / "node_modules" / package.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for folder in (no_cache, no_cache / "node_modules"):
        found = npm_files(folder)
        assert all(path.is_relative_to(no_cache) for files in found.values() for path in files.values())
    script = found["onnxruntime-web"]["dist/ort.wasm.min.mjs"]
    script.write_bytes(script.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"ort\.wasm\.min\.mjs is not the file of onnxruntime-web \d.*npm install"):
        npm_files(no_cache)
    script.unlink()
    with pytest.raises(ValueError, match=r"ort\.wasm\.min\.mjs is missing"):
        npm_files(no_cache)


def test_without_npm_and_cache_one_sentence_says_what_to_do(no_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(no_cache))
    monkeypatch.setattr(sys, "executable", str(no_cache / "python"))
    with pytest.raises(ValueError, match=r"there is no npm to fetch it; .* or give a folder .* --npm-folder\.$"):
        npm_files()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_an_npm_that_fails_or_brings_something_else_is_told_of(no_cache, monkeypatch):
    npm = no_cache / "npm"
    monkeypatch.setenv("PATH", f"{no_cache}{os.pathsep}{os.environ['PATH']}")
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ValueError, match=r"npm could not fetch onnxruntime-web@[\d.]+ \(npm error network\); connect"):
        npm_files()
    npm.write_text(
        "#!/bin/sh\nmkdir -p package/dist && echo forged > package/dist/ort.wasm.min.mjs\n"
        'for name in "$@"; do last="$name"; done\ntar -czf "$last/forged.tgz" package\n'
    )
    with pytest.raises(ValueError, match="has no dist/ort-wasm-simd-threaded"):
        npm_files()
    assert not any(cache_folder().rglob("*.mjs"))


def test_the_pins_name_one_version_and_no_registry():
    text = module.PINS.read_text(encoding="utf-8")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", package.version) for package in pinned_packages())
    assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for package in pinned_packages() for file in package.files)
    assert {address.split("/")[2] for address in re.findall(r"https?://[^\"]*", text)} == {"github.com"}
