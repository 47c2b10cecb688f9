"""Help and READMEs say what there is: `--help` explains every flag, and the READMEs name nothing that is not there."""

import argparse
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from calibration_data import CALIBRATION_GROUPS, calibration_records
from export.cli import OLD_FLAGS
from export.model.families.table import ARCHITECTURES
from export.schemes.registry import SCHEMES
from headrace import VERBS
from serve.app import create_app
from serve.observe.engine_metrics import EngineMetrics
from serve.observe.http_metrics import HttpMetrics
from tests.support.fake_text_model import fake_text_model

ROOT = Path(__file__).parents[2]
TEXTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("[!.]*/README.md"))
READMES = {str(file.relative_to(ROOT)): file.read_text() for file in TEXTS}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M))
UNITS = {
    "second": r"timeout|wait$",
    "token": r"tokens$|len$|length|window|limit|chunk",
    "memory|bytes": r"memory$|-cache$|body",
}
"""What the help of a flag that takes a number must say, by the flag's name."""


class _FoundParser(Exception):
    """Carries the parser out of a verb's main()."""


@cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The argument parser of a verb, taken from the moment at which it would parse."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _FoundParser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(_FoundParser) as found:
            importlib.import_module(VERBS[verb][0]).main([])
    parser = found.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def actions_of(verb: str) -> list[argparse.Action]:
    return [action for action in parser_of(verb)._actions if not isinstance(action, argparse._HelpAction)]


def flags_of(verb: str) -> set[str]:
    return {option for action in actions_of(verb) for option in action.option_strings}


def help_of(verb: str, action: argparse.Action) -> str:
    return parser_of(verb)._get_formatter()._expand_help(action) if action.help else ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag_with_its_default_and_its_unit(verb: str) -> None:
    assert parser_of(verb).description, "what the verb does"
    for action in actions_of(verb):
        name, text = (action.option_strings or [action.dest])[-1], help_of(verb, action)
        explained = re.sub(r"\(?(by )?default.*", "", text)
        assert len(explained.split()) >= 2, f"{name}: {text!r} does not say what it is"
        if action.option_strings and action.nargs != 0 and action.default:
            assert re.search(rf"default:? .*{re.escape(str(action.default))}", text), f"{name}: {text!r}: its default"
        if action.type is not None and action.type not in (str, Path):
            for unit, names in UNITS.items():
                if re.search(names, name):
                    assert re.search(unit, text), f"{name}: {text!r} does not say {unit}"


def code_lines(text: str) -> list[str]:
    """The lines of a README's code blocks, those that end in a backslash joined, without comments."""
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    return [line.partition(" #")[0] for line in blocks.replace("\\\n", "").splitlines()]


def commands(program: str) -> list[list[str]]:
    """The arguments of every `program` in the READMEs: of lines in code blocks, and of code in running text."""
    found = []
    for text in READMES.values():
        inline = re.findall(rf"`((?:{program}) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in [*code_lines(text), *(" ".join(code.split()) for code in inline)]:
            for piece in re.split(r"&&|;|\|", line):
                if re.match(rf"\s*(\S*/)?{program}\s", piece):
                    found.append(shlex.split(piece.replace("'", "").replace("...", ""))[1:])
    return found


def test_commands_in_the_readmes_have_verbs_and_flags_that_are_there() -> None:
    found = commands("headrace")
    assert len(found) > 10
    for verb, *arguments in found:
        if verb in ("VERB", "--help"):
            continue
        assert verb in VERBS, verb
        used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert used <= flags_of(verb) | {"--help"}, f"headrace {verb}: {used - flags_of(verb)}"


def test_make_commands_in_the_readmes_have_targets_and_variables_that_are_there() -> None:
    found = commands("make")
    assert len(found) > 5
    for arguments in found:
        for word in arguments:
            name, equals, _ = word.partition("=")
            assert name in (VARIABLES if equals else TARGETS), f"make {' '.join(arguments)}: {word}"


def test_make_lists_every_target_and_variable() -> None:
    (listed,) = re.findall(r"'variables: (.*)'", MAKEFILE)
    assert set(listed.split()) == VARIABLES - {"VENV"}
    assert {"run", "test", "test-fast", "lint", "bench", "export", "serve", "help"} <= TARGETS
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert {name for name in " ".join(phony).split() if not name.startswith("$")} == TARGETS


def test_flags_named_in_the_readmes_are_there() -> None:
    """Flags of verbs, and of the scripts in benchmarks/ and deploy/."""
    known = set.union(*map(flags_of, VERBS), OLD_FLAGS) | {"--help"}
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("deploy/*.py"), *ROOT.glob("deploy/*.sh")]:
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", script.read_text()))
    named = {flag for text in READMES.values() for flag in re.findall(r"`(--[a-z][a-z0-9-]+)", text)}
    assert len(named) > 20
    assert not named - known


def test_precisions_named_in_the_readmes_are_there() -> None:
    named = {name for text in READMES.values() for name in re.findall(r"`(w\d+a\d+|[bf]p?\d\d)`", text)}
    assert named <= set(SCHEMES)


def routes() -> set[str]:
    rules = create_app(fake_text_model()).url_map.iter_rules()
    return {rule.rule.partition("<")[0].rstrip("/") or "/" for rule in rules if rule.endpoint != "static"}


def test_every_route_is_documented_and_no_other() -> None:
    text, known = READMES["serve/README.md"], routes()
    assert len(known) >= 7
    assert not [route for route in known if f"{route}" not in text]
    named = set(re.findall(r"`(?:GET |POST )?(/(?:v1|health|ready|metrics|openapi|props|version)[a-z0-9_/.]*)", text))
    assert not {name.rstrip("/") for name in named} - known - {"/v1"}


def test_every_metric_is_documented_and_no_other() -> None:
    registries = (EngineMetrics().registry, HttpMetrics().registry)
    metrics = {metric.name for registry in registries for metric in registry.collect()}
    assert len(metrics) > 8
    text = READMES["serve/README.md"]
    assert not {name for name in metrics if name not in text}
    named = set(re.findall(r"`(headrace_[a-z_]+)", "".join(READMES.values())))
    suffixes = ("", "_total", "_bucket", "_count", "_sum", "_created")
    assert not named - {name + suffix for name in metrics for suffix in suffixes}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_named(verb: str) -> None:
    assert any(f"headrace {verb}" in text for text in READMES.values())


@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_has_a_row(precision: str) -> None:
    assert f"| `{precision}` |" in READMES["README.md"]


def test_every_family_is_named() -> None:
    assert not [name for name in ARCHITECTURES if name not in READMES["README.md"].lower()]


def test_every_file_the_readmes_name_is_there() -> None:
    text = "".join(READMES.values())
    files = re.findall(r"`((?:export|runtime|serve|calibration_data|benchmarks|deploy|tests)/[\w./]*)`", text)
    assert len(files) > 10
    assert not [file for file in files if not (ROOT / file).exists()]


def test_ci_runs_the_readme_command() -> None:
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("group", CALIBRATION_GROUPS)
def test_the_calibration_table_counts_the_records(group: str) -> None:
    table = READMES["calibration_data/README.md"]
    assert f"| `calib_{group}.jsonl` | {len(calibration_records(group))} |" in table
