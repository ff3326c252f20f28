"Package metadata is read from settings.ini, the one place where nbdev keeps it."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


class WithExperiments(build_py):
    "An installed package has the notebooks of the experiments, too: `diclip_repro` runs them without a clone."

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diclip/experiments"
            target.mkdir(parents=True, exist_ok=True)
            for f in Path("nbs/experiments").iterdir():
                if f.suffix in (".ipynb", ".yaml"): shutil.copy(f, target)


setup(
    cmdclass={"build_py": WithExperiments},
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Image Recognition"],
    packages=find_packages(include=["diclip", "diclip.*"]),
    package_data={"diclip": ["weights/**/*", "pool/**/*", "results/*.csv"]},
    include_package_data=True, python_requires=f">={cfg['min_python']}", zip_safe=False,
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split(), "slurm": cfg["slurm_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
)
