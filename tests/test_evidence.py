"""The witnesses a file names in ABOUT are there, and those that are there are named."""

from pathlib import Path

import pytest

from refattn import frameworks
from refattn.registry import everything
from tests.test_golden import FILES, INDEX, case_of

HERE = Path(__file__).parent
FAMILIES = "relations", "positions", "normalisers", "heads", "streaming", "caches"
RELATIONS = "\n".join(path.read_text() for name in FAMILIES if (path := HERE / f"test_{name}.py").exists())
EVERYTHING = list(everything().values())


@pytest.mark.parametrize("mechanism", EVERYTHING, ids=str)
def test_definitions(mechanism):
    named, there = "definition" in mechanism.ABOUT.witnesses, (HERE / "definitions" / f"{mechanism}.py").exists()
    assert named == there, f"{mechanism}: names a definition: {named}; tests/definitions has one: {there}"


@pytest.mark.parametrize("mechanism", EVERYTHING, ids=str)
def test_relations(mechanism):
    if "relation" in mechanism.ABOUT.witnesses:
        assert f"{mechanism}." in RELATIONS, f"{mechanism}: names a relation that no test of its family has"


@pytest.mark.skipif(not INDEX or not FILES, reason="no recordings here")
@pytest.mark.parametrize("mechanism", EVERYTHING, ids=str)
def test_recordings(mechanism):
    """Primitives that torch.nn recorded count as authors' code of torch, not of a paper: for them it may be unnamed."""
    there = mechanism.module.__name__ in RECORDED
    named = "authors' code" in mechanism.ABOUT.witnesses
    assert named <= there, f"{mechanism}: names recordings that no map leads to"
    if mechanism.family != "primitives":
        assert named == there, f"{mechanism}: has recordings, but does not name them"


RECORDED = {case_of(record).module.__name__ for record in INDEX} if INDEX and FILES else set()


@pytest.mark.frameworks
def test_frameworks():
    """A witness that is named has a target; where a framework is missing here, it may be that one's."""
    found = frameworks.available()
    missing = {name: status.reason for name, status in found.items() if not status.version}
    covered = {like for status in found.values() for _, like, *_ in status.targets}
    named = {m.name for m in EVERYTHING if "framework" in m.ABOUT.witnesses}
    assert covered <= named, f"cross-checked but not named: {covered - named}"
    if missing:
        pytest.skip(f"whether all that is named is cross-checked cannot be seen here: {missing}")
    assert named <= covered, f"named but not cross-checked: {named - covered}"
