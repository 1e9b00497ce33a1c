"""README and docs: their links lead somewhere, and the files and options of their commands exist."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT

from audio_dendrites.recipes import parse_recipe

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    """Each code block of a language, with the name of its page."""
    pattern = rf"^```{language}\n(.*?)^```"
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(re.findall(pattern, page.read_text(encoding="utf-8"), re.S | re.M))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_name_files_and_fields_that_exist(block):
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for word in words:
            if word.startswith(("configs/", "slurm/", "docs/")) or re.fullmatch(r"\w+\.py", word):
                assert (ROOT / word).is_file(), word
        if "train.py" in words:
            recipe, *fields = words[words.index("train.py") + 1 :]
            parse_recipe([str(ROOT / recipe), *fields])


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_a_recipe(block, tmp_path):
    recipe = {key: value for key, value in yaml.safe_load(block).items() if key not in ("inherits", "match_parameters")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))  # without the files that the reader has
    parse_recipe([str(tmp_path / "recipe.yaml")])
