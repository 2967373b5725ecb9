"""Every bash and Python block of the README and the site runs; links lead somewhere; the README stays a welcome."""

from __future__ import annotations

import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import gdino_hf
from gdino_hf.cli import main
from runtime.tiny_exports import write_export

ROOT = Path(__file__).resolve().parents[2]
# Where sub-processes find the package that is tested, installed or not.
PACKAGE = str(Path(gdino_hf.__file__).resolve().parents[1])
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
REASONS = ("needs a network", "needs a GPU", "needs several processes")
"""What may stand behind `test: skip`."""

_BLOCK = re.compile(r"((?:^<!-- test: .*? -->\n)*)^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- test: (skip|replace) (.*?) -->")
README_LINES = 130
# Commands that set up an environment: the tests run in one that has everything.
INSTALLATION = re.compile(r"pip install [^&|;]+$")
DEVELOPMENT = ("pytest -n auto", "make test lint docs", "make docs")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: "bash" or "python".
        text: What a reader sees.
        line: Line number of its first line, from 1.
        skip: Why it is not run, or None.
        replacements: (what a reader sees, what the test runs instead), in order.
    """

    language: str
    text: str
    line: int
    skip: str | None
    replacements: tuple[tuple[str, str], ...]

    def shortened(self) -> str:
        """Return the text to run.

        Raises:
            ValueError: A replacement does not occur in the text.
        """
        text = self.text
        for old, new in self.replacements:
            if old not in text:
                raise ValueError(f"The marker before line {self.line} replaces {old!r}, which the block does not hold.")
            text = text.replace(old, new)
        return text


def blocks(page: Path) -> list[Block]:
    """Return the bash and Python blocks of a page in order.

    Args:
        page: A Markdown file.

    Raises:
        ValueError: A marker is neither a known reason to skip nor a replacement.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        skip, replacements = None, []
        for kind, rest in _MARKER.findall(match[1]):
            if kind == "skip":
                if rest not in REASONS:
                    raise ValueError(f"{page.name}: a block may be skipped because it {REASONS}, not {rest!r}.")
                skip = rest
            else:
                old, separator, new = rest.partition(" with ")
                if not separator:
                    raise ValueError(f"{page.name}: write 'test: replace OLD with NEW', got {rest!r}.")
                replacements.append((old, new))
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[2], match[3], line, skip, tuple(replacements)))
    return found


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what a reader's clone holds, to write to."""
    for name in ("demo", "examples", "conversion", "kernels", "src", "docs", "README.md", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # transformers' registry keeps what register_for_auto_class says; other tests save models without their code.
    from gdino_hf import GDinoConfig, GDinoForObjectDetection, GDinoImageProcessor, GDinoProcessor

    for kind in (GDinoConfig, GDinoForObjectDetection, GDinoImageProcessor, GDinoProcessor):
        monkeypatch.setattr(kind, "_auto_class", kind._auto_class)
    return tmp_path


def run_command(command: str) -> None:
    """Run one line of a bash block; `gdino` and `python` in this process, which has torch loaded already."""
    command = re.sub(r"\s+#.*", "", command).strip()
    if not command or command in DEVELOPMENT or INSTALLATION.fullmatch(command):
        return
    install, chained, rest = command.partition(" && ")
    if chained and INSTALLATION.fullmatch(install):
        run_command(rest)
        return
    words = shlex.split(command)
    if words[0] == "gdino" and not any(mark in command for mark in "|><;&"):
        try:
            status = main(words[1:])
        except SystemExit as stopped:  # --help
            status = stopped.code
        assert status in (0, None), command
        return
    if words[:2] == ["python", "-m"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[2:])
            # Other tests may have imported the module, of which runpy would warn.
            patch.delitem(sys.modules, f"{words[2]}.__main__", raising=False)
            status = None
            try:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            except SystemExit as stopped:
                status = stopped.code
        assert status in (0, None), command
        return
    if words[:2] == ["python", "-c"]:
        exec(words[2], {"__name__": "__main__"})
        return
    path = os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-euc", command], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_of_a_page_run_one_after_the_other(page, clone):
    if page.stem == "runtime":
        pytest.importorskip("onnxruntime")
        write_export(clone / "exported")
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.skip is not None:
            continue
        text = block.shortened()
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), names)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                run_command(line)


def test_blocks_that_are_not_run_are_few():
    every = [block for page in PAGES for block in blocks(page)]
    assert len(every) > 30
    assert sum(block.skip is not None for block in every) <= 13


def test_readme_is_a_welcome():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert lines[2].startswith("![")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*NAMES, "CHANGELOG.md"])
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:|#", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        assert file.is_relative_to(ROOT), f"{target} leaves the repository"
        assert file.exists(), f"{target} is not there"
        if anchor and file.suffix == ".md" and file.name != "contributing.md":
            assert anchor in anchors(file), f"{target} is no heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_page_names_a_path_outside_the_repository(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\.\./shared|(?<![\w.])/(?:work|opt|root|home|tmp)/", text)
    for link in re.findall(r"(?<![\w/])\.\./[\w./-]*", text):
        assert (page.parent / link).resolve().is_relative_to(ROOT), link


def test_files_that_pages_name_exist():
    """`src/...` and the like in backticks: a reader who opens them must find them."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:src|tests|kernels|conversion|demo|examples)/[\w./-]*)`", page.read_text(encoding="utf-8")
        ):
            if "NAME" in name:
                continue
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_names_that_pages_refer_to_exist():
    """What the API pages list and what links lead to; `mkdocs build --strict` needs the extra docs."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = re.findall(r"^::: (gdino_hf[\w.]*)", text, re.MULTILINE) + re.findall(r"`\]\[(gdino_hf[\w.]*)\]", text)
    assert len(names) > 40
    for name in set(names):
        assert pkgutil.resolve_name(name) is not None


def anchors(page: Path) -> set[str]:
    """Anchors that the headings of a page get."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
