"The repository itself: imports, the module graph, generated files, notebooks, sizes (style rules 23 and 24)."
import ast, hashlib, io, json, os, re, shutil, subprocess, sys, tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "diclip").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
name_of = lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts)


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300)


ALONE = """import importlib, os, sys, traceback
import torch     # slow, and imported by most of them anyway; a child of its own for each module
failed = 0
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try: importlib.import_module(name)
        except BaseException: print(name, traceback.format_exc(), file=sys.stderr, flush=True); os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)"""


def test_every_module_imports_alone():
    done = python(ALONE, *map(name_of, MODULES))
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    done = python("import time; t=time.time(); import diclip, sys; assert time.time()-t < 1, time.time()-t; "
                  "bad={'torch','open_clip','diffusers','transformers','sklearn','matplotlib'} & set(sys.modules); assert not bad, bad")
    assert done.returncode == 0, done.stderr


def imports(module):
    "Modules of the package that a module imports anywhere in its body."
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = name_of(module).split(".")[:-node.level] if node.level else []
            found = ".".join(base + ([node.module] if node.module else []))
            if found == "diclip": yield from (f"diclip.{a.name}" for a in node.names)
            elif found.startswith("diclip."): yield found
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("diclip."))


LAYERS = """config shapes world data plot metrics
engine.check engine.files engine.shell engine.shard engine.cachefile engine.checkpoint engine.log engine.store engine.clip_weights engine.sd_weights engine.unet_attention imagepool
datasets.index datasets.sbd datasets.coco datasets.singles datasets.own datasets.augment datasets.batches datasets.download
clip cam labels affinity
sd acr vce
keys cache retrieval
losses head supervision train infer crf
model rivals online app.output app.submit app.records app.experiment app.stages study app.paper app.tables app.cost app.results app.repro app.jobs app.sweep app.bench app.report app.commands
mini.pool mini.training mini.vocabulary mini.clip mini.vae mini.unet mini.card""".split()


def test_no_arrow_back():
    "Every module imports earlier ones of this list only; so there is no circle either."
    order = {f"diclip.{name}": i for i, name in enumerate(LAYERS)}
    assert set(order) == {name_of(m) for m in MODULES}, "a module is missing in LAYERS, or one too many"
    for m in MODULES:
        for other in imports(m):
            if other in order: assert order[other] < order[name_of(m)], f"{name_of(m)} imports {other}, which comes later in LAYERS"


def test_every_setting_is_read():
    from dataclasses import fields
    from diclip.config import Profile
    text = "\n".join(m.read_text() for m in MODULES if m.name != "config.py")
    assert not [f.name for f in fields(Profile) if not re.search(rf"\b\w*profile\.{f.name}\b|\bp\.{f.name}\b", text)]


def test_few_rooms_at_the_top():
    rooms = {p.relative_to(ROOT / "diclip").parts[0] for p in MODULES}
    assert len(rooms) <= 32, sorted(rooms)


ROUTE = """1_ground/12_world 1_ground/15_metrics 2_clip/21_clip 2_clip/22_cam 2_clip/23_labels 3_vce/32_sd 3_vce/33_acr 3_vce/34_vce
4_cache/41_keys 4_cache/42_cache 4_cache/43_retrieval 5_training/54_train""".split()


def test_no_page_of_the_students_route_needs_a_page_behind_it():
    page = {}     # module -> the page that makes it
    for m in MODULES: page[name_of(m)] = re.search(r"File to edit: (?:\.\./)+nbs/(.+)\.ipynb", m.read_text()).group(1)
    for here in ROUTE:
        code = [c for c in json.loads((ROOT / f"nbs/{here}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        for needed in re.findall(r"^\s*from (diclip\.[\w.]+) import", "\n".join("".join(c["source"]) for c in code), re.M):
            there = page[needed]
            if needed != "diclip.plot" and there[0].isdigit(): assert there < here, f"{here} needs {there}"


def test_every_page_is_linked_and_knows_its_neighbors():
    index = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"])
    for p in NOTEBOOKS:
        name = p.relative_to(ROOT / "nbs").as_posix()
        assert name == "index.ipynb" or f"]({name})" in index, f"{name} is linked from nowhere in the index"
    done = subprocess.run([sys.executable, str(ROOT / ".ci/pages"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|#", target): continue
        assert (path.parent / target.split("#")[0]).exists(), f"{target} leads nowhere"


def test_the_route_of_the_index_is_the_route_of_this_test():
    index = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"])
    route = index.split("### Student")[1].split("###")[0]
    assert [l for l in re.findall(r"\]\(([\w/]+)\.ipynb\)", route) if l in ROUTE] == ROUTE


def test_only_notebooks_plot():
    assert not [name_of(m) for m in MODULES if "diclip.plot" in set(imports(m))]


@pytest.mark.parametrize("name", ["acr", "retrieval", "labels", "metrics", "cam"])
def test_tensor_modules_know_no_model_library(name):
    text = (ROOT / "diclip" / f"{name}.py").read_text()
    assert not re.search(r"^\s*(import|from) (open_clip|diffusers|transformers)", text, re.M)


def test_export_leaves_no_difference(tmp_path):
    for f in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / f, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copytree(ROOT / "diclip", tmp_path / "diclip", ignore=shutil.ignore_patterns("weights", "pool", "__pycache__"))
    done = subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for m in [*MODULES, ROOT / "diclip/_modidx.py"]:
        assert m.read_text() == (tmp_path / m.relative_to(ROOT)).read_text(), f"{m.name} differs from its notebook: run nbdev_export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_is_fit_to_read(path):
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    first = "".join(cells[0]["source"])
    code = [c for c in cells if c["cell_type"] == "code"]
    assert first.startswith("# ") and "\n> " in first, "opens with a title and a one-line claim"
    assert path.stat().st_size <= 1_000_000, f"{path.stat().st_size // 1000} KB"
    assert not re.search(r"(?<![\w.])/(root|home|work|tmp|opt|Users)/", text), "holds a path of somebody's machine"
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"]), "holds a saved error"
    for c in code:
        source = "".join(c["source"])
        assert lines_of_code(source) <= 30, f"a cell of {lines_of_code(source)} lines: {source[:80]}"
        for line in source.splitlines():
            short = line if "http" not in line else ""
            assert len(short) <= 110 or len(short.split("  # ")[0]) <= 110, f"a line of {len(line)} columns: {line}"
        assert not [t for t in operators(source) if t == ";"], f"two statements a line: {source[:80]}"


def operators(source):
    "The operators of a cell; none where it holds a magic."
    if re.search(r"^\s*[!%]", source, re.M): return []
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.OP]


def lines_of_code(source):
    "Lines without blank ones, comments, imports, docstrings and documented parameters, which are a table rather than code."
    documented = re.compile(r"^    +[\w*]+(: [^#]+|\s*=[^#]+|),? +# ")
    skip = set()
    if not re.search(r"^\s*[!%]", source, re.M):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)): skip |= set(range(node.lineno, node.end_lineno + 1))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                skip |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [l for i, l in enumerate(source.splitlines(), 1) if i not in skip]
    return len([l for l in lines if l.strip() and not l.strip().startswith("#") and not documented.match(l)])


def test_notebooks_are_formatted():
    done = subprocess.run([sys.executable, str(ROOT / ".ci/format"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_comes_from_the_index():
    done = subprocess.run([sys.executable, str(ROOT / ".ci/readme"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["components", "training"])
def test_readme_shows_the_committed_records(name):
    lines = json.loads((ROOT / f"nbs/results/{name}.json").read_text())["table"].splitlines()
    readme = {l.rstrip() for l in (ROOT / "README.md").read_text().splitlines()}
    assert not [l for l in lines if l.rstrip() not in readme], "run .ci/execute nbs/index.ipynb, then .ci/readme"


def test_ci_runs_the_readme_command():
    command = [l for l in (ROOT / ".ci/run").read_text().splitlines() if "pytest" in l and not l.startswith("#")]
    assert len(command) == 1 and command[0] in (ROOT / "README.md").read_text()


def test_shipped_weights_are_small_safetensors_with_known_hashes():
    from safetensors import safe_open
    from diclip.engine.cachefile import digest
    files = [p for folder in ("weights", "pool") for p in (ROOT / "diclip" / folder).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 45e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    card = json.loads((ROOT / "nbs/results/model_card.json").read_text())["sha256"]
    for p in files:
        if p.suffix == ".safetensors" and "pooled" in p.parts:
            with safe_open(str(p), "np") as f: assert f.metadata()["digest"] == digest(f.get_tensor("foreground"), f.get_tensor("background")), p.name
        elif p.suffix == ".safetensors":
            key = p.relative_to(ROOT / "diclip/weights").as_posix()
            assert card[key] == hashlib.sha256(p.read_bytes()).hexdigest(), f"{key} is not the file of the model card"


def test_an_installed_package_has_the_experiments(tmp_path):
    made = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    code = "import diclip; from diclip.app.repro import experiment_notebook as e, notebook_parameters as p; print(diclip.__file__, e('components'), len(p('components')))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(tmp_path / "lib")))
    assert ran.stdout.count(str(tmp_path / "lib/diclip")) == 2, ran.stderr
