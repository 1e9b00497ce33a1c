"""pyproject.toml describes the package. This file adds the programs, recipes and templates of the root to its wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPrograms(build_py):
    """Copies them into audio_dendrites/programs, because modules named `train` or `compare` would hide a user's."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        programs = Path(self.build_lib, "audio_dendrites", "programs")
        for folder in ("configs", "model_cards"):
            shutil.copytree(folder, programs / folder, dirs_exist_ok=True)
        for path in set(Path().glob("*.py")) - {Path("setup.py")}:
            shutil.copy(path, programs)


setup(cmdclass={"build_py": BuildWithPrograms})
