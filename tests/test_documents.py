"""Every number of the documents is that of a record."""

from __future__ import annotations

import pytest

from debiased_laplace.evaluation.report.numbers import MINUS
from tests import documented
from tests.documented import DOCS, RECORDS, ROOT, agree, claims, differing, generated, prose, unclaimed, wrong

DOCUMENTS = (
    "README.md", "bias.md", "evidence.md", "posterior.md", "steps.md", "benchmarks.md",
    "results.md", "fidelity.md", "distributed.md", "demonstration.md", "beyond.md", "evaluation.md", "records.md",
    "paper.md", "published.md", "sets.md", "sensitivity.md", "monitor.md", "theory.md", "empirical_fisher.md",
)  # fmt: skip
#: Those where every number has its claim.
CLAIMED = (
    "README.md",
    "demonstration.md",
    "results.md",
    "results_appendix.md",
    "evidence.md",
    "fidelity.md",
    "bias.md",
    "monitor.md",
    "paper.md",
    "published.md",
    "sets.md",
    "beyond.md",
)


def path(name: str):
    return (ROOT if name == "README.md" else DOCS) / name


@pytest.fixture(scope="module")
def remade():
    return documented.remade()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_parts_are_those_of_the_records(name, remade):
    result, outstanding, parts = generated(path(name)), claims()["outstanding"], remade.get(name, {})
    assert result
    filled = {part for part, content in result.items() if content}  # others are of experiments that were not run
    # Records of an earlier version lack some of what the tables show: then these cannot be made.
    lacking = filled if name in outstanding else {part for part in result if f"{name}: {part}" in outstanding}
    assert set(parts) == filled - lacking
    for part, content in parts.items():
        assert differing(result[part], content) is None, part


def test_outstanding_documents_are_those_with_earlier_records():
    """Once its record can make a document, it leaves the list."""
    from debiased_laplace.evaluation.records import SCHEMA_VERSION, read_json

    versions = {summary.get("schema_version") for summary in read_json(RECORDS / "results.json").values()}
    lacking = {"results.md": versions != {SCHEMA_VERSION}}
    lacking["fidelity.md"] = "timing" not in read_json(RECORDS / "fidelity.json")[-1]
    whole = {name for name in claims()["outstanding"] if ":" not in name}
    assert whole == {name for name, lacks in lacking.items() if lacks}


def test_every_number_in_prose_is_claimed():
    texts, table = {name: prose(path(name)) for name in CLAIMED}, claims()
    known = [claim["text"] for claim in (*table["claims"], *table["without_record"])]
    assert [number for text in texts.values() for number in unclaimed(text, known)] == []
    for claim in known:
        assert any(" ".join(claim.split()) in text for text in texts.values()), (
            f"No document has {claim!r} any more: take it out of claims.json."
        )


def test_claims_are_what_their_records_say():
    assert [message for claim in claims()["claims"] for message in wrong(claim)] == []


def test_a_number_that_nothing_claims_is_found():
    result = unclaimed("It took 38 s, 2.5 % more, ResNet-20 (3C3D) has 1,024 and laplace-torch 0.3, ICLR 2025.", [])
    assert len(result) == 3
    for text, number in zip(result, ("38 s", "2.5 %", "1,024"), strict=True):
        assert number in text
    assert unclaimed("It took 38 s.", ["took 38 s"]) == []
    assert len(unclaimed("It took 38 s.", ["took 39 s"])) == 1
    assert unclaimed("By equation (5) of the paper, and equation 6.", []) == []
    assert len(unclaimed(f"[{MINUS}0.25, +0.46]", ["0.25"])) == 2  # the sign belongs to it


def test_a_claim_that_is_not_true_is_found(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text('{"x": [2.04, 4.0], "share": 0.5}')
    monkeypatch.setattr(documented, "RECORDS", tmp_path)
    claim = {"text": "2.0 times, 50 %", "record": "a.json", "values": ["record['x'][0]", "100 * record['share']"]}
    assert list(wrong(claim)) == []
    assert list(wrong(claim | {"values": ["median(record['x'])", "50"]})) == [
        "'2.0 times, 50 %': 2.0 is 3.02 in a.json (median(record['x']))."
    ]
    signed = {"text": f"{MINUS}2.0 and +0.5", "record": "a.json", "values": ["-record['x'][0]", "record['share']"]}
    assert list(wrong(signed)) == []
    assert len(list(wrong(signed | {"text": f"2.0 and {MINUS}0.5"}))) == 2
    setting = {
        "text": "at 95 %",
        "values": ["100 * constant('debiased_laplace.evaluation.scores.intervals', 'CONFIDENCE')"],
    }
    assert list(wrong(setting)) == []
    (said,) = wrong(setting | {"text": "at 99 %"})
    assert said.startswith("'at 99 %': 99 is 95 in the code")
    of_script = {"text": "5,000", "values": ["5000 + constant('eval/evidence.py', 'POOLS')['cifar10'] - 3000"]}
    assert list(wrong(of_script)) == []
    assert list(wrong(claim | {"values": ["1"]})) == ["'2.0 times, 50 %' has the numbers ['2.0', '50'], and 1 values."]


def test_numbers_agree_to_their_last_digit():
    assert agree("0.123", 0.1235)
    assert not agree("0.123", 0.125)
    assert agree("1,024", 1024)
    assert agree("2.5e-03", 0.00254)
    assert not agree("2.5e-03", 0.0027)
    assert differing("| a | 0.12 |\n| b | 3 |", "| a | 0.13 |\n| b | 3 |") is None
    assert differing("| a | 0.12 |", "| a | 0.15 |") == "0.12 for 0.15 in '| a | 0.12 |'"
    assert differing("| a | 1 |", "| c | 1 |") == "'| a | 1 |' for '| c | 1 |'"
    assert differing("| a | 1 |", "| a | 1 |\n| b |") == "1 lines for 2"
