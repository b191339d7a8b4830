# Copyright 2026 The miras-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the documents say is so: their code runs, their commands, paths and names exist, their numbers are the reports'.

- Python blocks of a document run as they stand, in order, in one namespace, in an empty folder, without the Hub. One
  that cannot carries a comment before its fence that says why: `<!-- not run: a reason -->`. It is compiled, and what
  it imports from our packages must exist, with the keywords it passes.
- Commands are not run, `make test` in a test would not end. Checked are: targets of make, extras and constraint files
  of pip, scripts, and every flag against the script's own `--help`.
- Examples of docstrings run, and print what they say where they say it, in a namespace that has a small model, its tokenizer and texts.
- Tables of measurements stand between `<!-- rows of PATH -->` and an empty line; each of their rows is one of PATH's.
"""

import ast
import contextlib
import doctest
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig, DynamicCache, Trainer, TrainingArguments

import miras_hf
from miras_hf.modeling_miras import MirasMixer


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/*.md", "kernels/*.md", "model_cards/*.md")
    for path in ROOT.glob(pattern)
)
PACKAGES = ("miras_hf", "miras_kernels")

_FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    language: str
    text: str
    line: int
    why_not_run: str | None


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> list[Block]:
    text = read(document)
    found = [
        Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["why"])
        for m in _FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def inline_code(document: str) -> list[str]:
    return [" ".join(span.split()) for span in _INLINE.findall(_FENCE.sub("", read(document)))]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


# Python blocks


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(not b.why_not_run for b in blocks(d, "python"))])
def test_python_blocks_run(document, offline):
    # the cards' models have up to a billion parameters: there they are built, and not filled
    device = "meta" if document.startswith("model_cards/") else "cpu"
    namespace = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in blocks(document, "python"):
        if block.why_not_run is None:
            # so that tracebacks give the document's lines
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / document), "exec")
            with torch.device(device):
                exec(code, namespace)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(b.why_not_run for b in blocks(d, "python"))])
def test_python_blocks_that_do_not_run_name_what_exists(document):
    for block in blocks(document, "python"):
        if block.why_not_run is not None:
            check_names(ast.parse(block.text, document), f"{document}:{block.line}")


def check_names(tree: ast.Module, where: str) -> None:
    """Names imported from our packages exist, and calls of them pass keywords that they take."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            taken = inspect.signature(known[node.func.id]).parameters
            unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - set(taken)
            assert not unknown, f"{where}: {node.func.id} takes no {sorted(unknown)}"


def test_name_check_sees_what_is_wrong():
    with pytest.raises(AssertionError, match="has no chunk_mires"):
        check_names(ast.parse("from miras_hf.memory import chunk_mires"), "here")
    with pytest.raises(AssertionError, match=r"takes no \['chunksize'\]"):
        check_names(ast.parse("from miras_hf.memory import MirasRule\nMirasRule(chunksize=2)"), "here")


# Commands, paths and names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    commands = [(b.line, line) for b in blocks(document, "bash", "sh") for line in logical_lines(b.text)]
    starts = ("make ", "pip install ", "python ", "torchrun ", "accelerate launch ", "transformers ")
    commands += [("text", span) for span in inline_code(document) if span.startswith(starts)]
    for line, command in commands:
        complaint = wrong_with(command)
        assert complaint is None, f"{document}, {line}: `{command}`: {complaint}"


@pytest.mark.parametrize(
    "command, complaint",
    [
        ("make dmo", "no target dmo"),
        ("pip install -e '.[train,vis]'", "no extra vis"),
        ("pip install -e . -c constraints-gpu.txt", "no file constraints-gpu.txt"),
        ("python examples/pretrian.py", "no file examples/pretrian.py"),
        ("python benchmarks/layer_cpu.py --lenghts 8", "no flag --lenghts"),
        (".venv/bin/python benchmarks/layer_cpu.py --lenghts 8", "no flag --lenghts"),
        ("python3 -c 'import torhc'", "no module torhc"),
        ("frobnicate --all", "not a command that this test knows"),
    ],
)
def test_command_check_sees_what_is_wrong(command, complaint):
    assert wrong_with(command) == complaint


def logical_lines(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def wrong_with(command: str) -> str | None:
    """Why a command of a document cannot work, `None` if nothing speaks against it."""
    words = shlex.split(command, comments=True)
    for separator in ("&&", ";"):
        if separator in words:
            at = words.index(separator)
            return wrong_with(shlex.join(words[:at])) or wrong_with(shlex.join(words[at + 1 :]))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program in ("git", "cd"):
        return None
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.M)
        named = [a for a in arguments if "=" not in a]
        return next((f"no target {a}" for a in named if a not in targets), None)
    if program == "pip":
        return wrong_with_pip(arguments)
    if program == "transformers":
        scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
        return None if "transformers" in scripts and arguments[0] in ("serve", "chat") else "no such command"
    if program in ("python", "python3", "torchrun", "accelerate") or program.endswith("/bin/python"):
        if arguments[0] == "-c":
            modules = {
                name.name for n in ast.walk(ast.parse(arguments[1])) if isinstance(n, ast.Import) for name in n.names
            }
            return next((f"no module {m}" for m in sorted(modules) if importlib.util.find_spec(m) is None), None)
        files = [a for a in arguments if re.search(r"\.(py|yaml|yml)$", a) and "<" not in a]
        missing = [f for f in files if not list(ROOT.glob(f))]
        if missing:
            return f"no file {missing[0]}"
        script = next((f for f in files if f.endswith(".py")), None)
        if script is None:
            return None if arguments[:2] == ["-m", "pytest"] else "no script"
        flags = [a.split("=")[0] for a in arguments[arguments.index(script) + 1 :] if a.startswith("--")]
        text = helps().get(script, "") if flags else ""
        return next((f"no flag {f}" for f in flags if not re.search(rf"(?<![\w-]){f}(?![\w-])", text)), None)
    return "not a command that this test knows"


def wrong_with_pip(arguments: list[str]) -> str | None:
    if arguments[0] != "install":
        return "not pip install"
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "-c" and not (ROOT / argument).exists():
            return f"no file {argument}"
        if match := re.fullmatch(r"(?:\.|miras-hf)\[([\w,]+)\]", argument):
            missing = [extra for extra in match[1].split(",") if extra not in extras]
            if missing and missing != ["extra"]:  # "extra" stands for any
                return f"no extra {missing[0]}"
    return None


_HELPS = """
import contextlib, io, json, os, runpy, sys, traceback
texts = {}
for script in sys.argv[1:]:
    sys.argv, sys.path[0], out = [script, "--help"], os.path.dirname(script), io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            texts[script] = None if end.code else out.getvalue()
        except Exception:
            traceback.print_exc()
print("HELPS" + json.dumps(texts))
"""


@functools.cache
def helps() -> dict[str, str]:
    """What `--help` says, of every script in the documents: in one process, because imports are what takes time."""
    folders = r"(?<![\w/])(?:examples|benchmarks|kernels)/(?:\w+/)?\w+\.py"
    named = {script for document in DOCUMENTS for script in re.findall(folders, read(document))}
    scripts = sorted(s for s in named if (ROOT / s).exists() and "ArgumentParser(" in read(s))
    command = [sys.executable, "-c", _HELPS, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    texts = json.loads(done.stdout.split("HELPS")[-1]) if "HELPS" in done.stdout else {}
    missing = [script for script in scripts if not texts.get(script)]
    assert not missing, f"--help of {missing}: {done.stderr[-2000:]}"
    return texts


def test_flags_that_the_benchmarks_text_names_exist():
    spans = [span for span in inline_code("benchmarks/README.md") if span.startswith("--")]
    texts = " ".join(helps()[f"benchmarks/{name}.py"] for name in ("layer_cpu", "decode", "prefill"))
    flags = {word for span in spans for word in span.split() if word.startswith("--")}
    assert flags and not {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", texts)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_names_exist(document):
    folders = (ROOT, (ROOT / document).parent)
    for span in inline_code(document):
        if match := re.fullmatch(
            r"((?:src|kernels|examples|benchmarks|modeling_tests|model_cards|docs)/[\w./-]+)", span
        ):
            assert any((folder / match[1]).exists() for folder in folders), f"{document}: no {span}"
        if match := re.match(r"((?:miras_hf|miras_kernels)(?:\.\w+)+)(?:\(|$)", span):
            assert resolves(match[1]), f"{document}: no {match[1]}"
        if match := re.fullmatch(r"(test_\w+)\.py", span):
            assert list(ROOT.glob(f"*/{span}")) + list(ROOT.glob(f"*/*/{span}")), f"{document}: no {span}"


def resolves(name: str) -> bool:
    head, *rest = name.split(".")
    value = importlib.import_module(head)
    for part in rest:
        if not hasattr(value, part):
            if importlib.util.find_spec(f"{value.__name__}.{part}") is None:
                return False
            importlib.import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = [link for link in _LINK.findall(_FENCE.sub("", read(document))) if not re.match(r"https?://|#", link)]
    if document == "README.md":  # a package index shows it alone
        assert not links, f"relative links break outside the repository: {links}"
    for link in links:
        assert ((ROOT / document).parent / link.split("#")[0]).exists(), f"{document}: {link}"


# Numbers


def test_table_rows_are_the_reports():
    rows_of = re.compile(r"<!-- rows of (\S+) -->\n\n?(\|.*?\|)\n(?!\|)", re.S)
    tables = [(d, path, table) for d in DOCUMENTS for path, table in rows_of.findall(read(d))]
    assert {path.rsplit("/")[-1] for _, path, _ in tables} >= {"results.md", "decode.md"}
    for document, path, table in tables:
        report = set(read(path).splitlines())
        for row in table.splitlines():
            assert row in report, f"{document}: not a row of {path}: {row}"


def test_reports_are_made_of_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    for path in (ROOT / "benchmarks" / "results").glob("*/results.json"):
        assert report.markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text(), path


def test_losses_are_the_runs():
    rows = re.findall(r"^\| `(moneta|yaad|memora)` \| (\d\.\d\d) \| (\d\.\d\d) \|$", read("README.md"), re.M)
    assert [name for name, *_ in rows] == ["moneta", "yaad", "memora"]
    for name, before, after in rows:
        run = json.loads(read(f"examples/results/{name}.json"))
        losses = run["validation"]
        assert (before, after) == tuple(f"{losses[when]['loss']:.2f}" for when in ("before", "after")), name


def report_of_demo(name: str) -> dict:
    """The report of a training with the learning rate that is the demo's today."""
    run = json.loads(read(f"examples/results/{name}.json"))
    (rate,) = re.findall(r"^    learning_rate: float = field\(default=([\de.-]+),", read("examples/pretrain.py"), re.M)
    assert run["training"]["learning_rate"] == float(rate)
    return run


DEMOS = ("moneta", "yaad", "yaad_avx2", "yaad_sse", "memora", "memora_avx2", "memora_sse")


@pytest.mark.parametrize("name", DEMOS)
def test_demos_were_trained_with_the_defaults_of_today(name):
    stored = report_of_demo(name)["config"]
    chosen = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {field: stored[field] for field in (*chosen, "initializer_range", "tie_word_embeddings")}
    tokens = {field: value for field, value in stored.items() if field.endswith("_token_id")}
    config = AutoConfig.for_model(name.split("_")[0], **shape, **tokens)
    # another processor may have rounded what is measured
    assert stored.pop("eta_max") == pytest.approx(config.eta_max, rel=1e-9)
    assert stored == {field: json.loads(json.dumps(getattr(config, field))) for field in stored}


def test_the_spread_by_rounding_is_that_of_three_runs():
    instructions = {"": "AVX512", "_avx2": "AVX2", "_sse": "DEFAULT"}

    def losses(name: str) -> list[float]:
        runs = {end: report_of_demo(name + end) for end in instructions}
        assert {end: run["machine"]["cpu_capability"] for end, run in runs.items()} == instructions
        return [run["validation"]["after"]["loss"] for run in runs.values()]

    usual, avx2, sse = of_memora = losses("memora")
    spread = max(of_memora) - min(of_memora)
    said = f"end {spread:.3f} apart ({usual:.3f}, {avx2:.3f} and {sse:.3f};"
    assert said in " ".join(read("README.md").split())
    page = " ".join(read("docs/does_it_learn.md").split())
    assert f"--model_type memora` ends at {usual:.3f};" in page
    assert (
        f"rounded otherwise, at {avx2:.3f}, with those that every x86 processor has (`default` and `SSE4_2`) at {sse:.3f} ("
        in page
    )
    assert f"which is {spread:.3f} apart. A Yaad" in page
    assert (
        "A Yaad in the same training ends at {:.3f}, {:.3f} and {:.3f}, and a Llama,".format(*losses("yaad")) in page
    )
    assert "make rounding grow, at {:.3f}, {:.3f} and {:.3f}.".format(*losses("llama")) in page
    of_double = losses("memora_double_steps")
    (step,), (double_step,) = (
        {report_of_demo(name + end)["config"]["eta_max"] for end in instructions}
        for name in ("memora", "memora_double_steps")
    )
    assert double_step == step * 2 and f"eta_max={double_step}`) end at" in page
    assert ("end at {:.3f}, {:.3f} and {:.3f}, which is {:.3f} apart.").format(
        *of_double, max(of_double) - min(of_double)
    ) in page


def test_tested_versions_are_those_of_the_constraints():
    section = read("README.md").split("## Tested versions")[1].split("\n## ")[0]
    tested = dict(re.findall(r"^\| (\w+) \| (.+?) \|$", section, re.M))
    assert {"transformers", "torch", "peft", "trl", "accelerate", "kernels", "triton"} <= set(tested)
    for path in ROOT.glob("constraints-*.txt"):
        for name, version in re.findall(r"^([\w-]+)==(\S+)$", path.read_text(), re.M):
            assert version in tested.get(name, version), f"{path.name} has {name} {version}, README.md {tested[name]}"


def test_changelog_names_the_version():
    version = miras_hf.__version__.removesuffix(".dev0")
    assert re.search(rf"^## \[?{re.escape(version)}\]? - unreleased$", read("CHANGELOG.md"), re.M)


def test_the_way_of_a_query_is_the_one_it_takes():
    text = read("CONTRIBUTING.md").split("## The way of a query")[1].split("## ")[0]
    names, last = [], None
    stations = {}
    for name, place in re.findall(r"^\d+\. `([\w.]+)`, (`[\w/.]+`|there):", text, re.M):
        last = last if place == "there" else place.strip("`")
        module = importlib.import_module(last.removeprefix("src/").removesuffix(".py").replace("/", "."))
        function = inspect.unwrap(functools.reduce(getattr, name.split("."), module))
        assert Path(inspect.getsourcefile(function)).resolve() == ROOT / last, name
        stations[function.__code__] = name
        names.append(name)
    assert 5 < len(names) <= 12 and len(names) == len(re.findall(r"^\d+\.", text, re.M))
    config = miras_hf.YaadConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, chunk_size=16, memory_backend="pytorch"
    )
    mixer = MirasMixer(config, 0)
    entered = []

    def look(frame, event, _):
        if event == "call" and frame.f_code in stations and stations[frame.f_code] not in entered:
            entered.append(stations[frame.f_code])

    before = sys.getprofile()
    with torch.no_grad():
        sys.setprofile(look)
        try:
            mixer(torch.randn(1, 20, 32))
        finally:
            sys.setprofile(before)
    assert entered == names


# Docstrings

_SETTING = {
    "Trainer": Trainer,
    "DynamicCache": DynamicCache,
    "torch": torch,
    "miras_hf": miras_hf,
    "book": "to be or not to be, that is the question. " * 4,
    "text": "to be or not to be",
    "questions": [" that is?", " the question?"],
}


def docstring_examples() -> dict[str, str]:
    """Every fenced block with `>>>` of a docstring of the package, by the name of what it documents."""
    found = {}
    for info in pkgutil.walk_packages(miras_hf.__path__, "miras_hf."):
        tree = ast.parse(inspect.getsource(importlib.import_module(info.name)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)):
                for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", doc, re.M | re.S)):
                    if ">>>" in text:
                        found[f"{info.name}:{getattr(node, 'name', '')}:{number}"] = text
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with `runs/demo`, a saved model and tokenizer."""
    folder = tmp_path_factory.mktemp("docstrings")
    text = [_SETTING["book"], *_SETTING["questions"], "Who did it?", "def read("]
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(text, vocab_size=300)
    torch.manual_seed(0)
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig.from_preset("tiny", vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "runs/demo")
    tokenizer.save_pretrained(folder / "runs/demo")
    return folder


@pytest.mark.parametrize("name", docstring_examples())
def test_docstring_examples(name, demo, monkeypatch):
    monkeypatch.chdir(demo)
    tokenizer = miras_hf.MirasTokenizer.from_pretrained("runs/demo")
    model = miras_hf.MonetaForCausalLM.from_pretrained("runs/demo").eval()
    rows = [dict(tokenizer("to be or not to be"), labels=tokenizer("to be or not to be").input_ids)] * 4
    module = importlib.import_module(name.split(":")[0])
    setting = {
        **vars(module),
        **_SETTING,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": lambda text: tokenizer(text, return_tensors="pt"),
        "args": TrainingArguments(output_dir="out", max_steps=1, report_to=[], save_strategy="no", use_cpu=True),
        "dataset": rows,
        "segments": torch.tensor([row["input_ids"] for row in rows]).split(2),
    }
    if "SFTTrainer" in docstring_examples()[name]:
        setting["SFTTrainer"] = pytest.importorskip("trl").SFTTrainer
    for example in doctest.DocTestParser().get_examples(docstring_examples()[name]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, name, "single"), setting)
        # as in Transformers' docstrings, results that nobody needs to read are left out
        if example.want:
            assert doctest.OutputChecker().check_output(example.want, printed.getvalue(), doctest.ELLIPSIS)
