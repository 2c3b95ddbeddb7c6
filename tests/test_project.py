"""What surrounds the package says the same everywhere: version, licence, paper, commands, links."""

import ast
import json
import re
import shlex
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import hf_mcsmoe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# None in the archive of the sources, whose tests run as well.
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAPER = "arxiv.org/abs/2310.01334"


def test_the_version_stands_in_one_place_and_is_told_the_same_elsewhere() -> None:
    assert hf_mcsmoe.__version__ == version("hf_mcsmoe") == PROJECT["version"] == CITATION["version"]
    assert re.findall(r"^## \[(.*?)\] - (\S+)$", CHANGELOG, re.MULTILINE)[0][0] == PROJECT["version"]


def test_the_changelog_is_in_the_form_that_it_names() -> None:
    for name, date in re.findall(r"^## \[(.*?)\] - (\S+)$", CHANGELOG, re.MULTILINE):
        assert re.fullmatch(r"\d+\.\d+\.\d+", name)
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}|Unreleased", date)
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= known


def test_the_citation_is_the_readme_s_and_names_nobody_else() -> None:
    paper = CITATION["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    authors = re.search(r"author\s*= \{(.*?)\},\n\s*booktitle", readme, re.DOTALL)
    assert authors
    names = " ".join(authors[1].split()).split(" and ")
    assert [f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]] == names
    title = re.search(r"title\s*= \{(.*)\},", readme)
    assert title
    assert paper["title"] == title[1].replace("{", "").replace("}", "")
    assert PAPER in paper["url"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == [{"name": "The hf_mcsmoe contributors"}]
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()


def test_links_of_the_project_are_real_ones_and_its_python_is_declared() -> None:
    assert PROJECT["urls"]["Paper"].endswith(PAPER)
    assert all(link.startswith("https://") and "example" not in link for link in PROJECT["urls"].values())
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    least = PROJECT["requires-python"].removeprefix(">=")
    assert named[0] == least
    assert named == sorted(named, key=lambda name: int(name.partition(".")[2]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"\[(\w+\.md)\]\(\1\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_hooks_run_what_make_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"], "nothing is downloaded"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks["repos"][0]["hooks"]:
        program, *arguments = shlex.split(hook["entry"])
        assert program.startswith(".venv/bin/")
        words = [word for word in arguments if word != "--force-exclude"]
        assert " ".join(["$(BIN)/" + Path(program).name, *words]) in makefile


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.name
)
def test_forms_of_issues_ask_for_what_they_say(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.name == "config.yml":
        assert content == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= content.keys()
    identities = [field["id"] for field in content["body"]]
    assert len(set(identities)) == len(identities)
    for field in content["body"]:
        assert field["type"] in {"textarea", "input", "checkboxes", "dropdown"}
        assert field["attributes"]["label"]


def test_what_contributors_are_told_to_run_is_there() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(
        re.search(rf"^{name}:", makefile, re.MULTILINE) for name in re.findall(r"^make (\w+)", told, re.MULTILINE)
    )
    for path in re.findall(r"`(?:python )?((?:hf_mcsmoe|examples|tests)/[\w/.]+)", told):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_holds_no_output_and_its_code_parses(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))
    assert not re.search(r"/home/|/Users/|/tmp/", text)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])


def test_this_python_is_one_that_the_project_takes() -> None:
    assert sys.version_info[:2] >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
