"""Preference lint: each rule on a row that breaks it and on a near one that does not; and the cleaned copy."""

import random
import re
import subprocess
import sys

import msgspec
import pytest

from dpo_cli.analysis.lint.findings import make_pair
from dpo_cli.analysis.lint.rules import estimate_tokens
from dpo_cli.analysis.lint.run import check, fix, lint, read_split, write_fixed
from dpo_cli.analysis.lint.similar import near_duplicates
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Preference, preference_id
from dpo_cli.errors import UserError

WORDS = [
    start + end for start in re.findall("..", "bakolimuneparisotuve") for end in re.findall("...", "bardokfingulkemlop")
]
SYSTEM = {"role": "system", "content": "Go on with the scene."}
MAX_LENGTH = 400


def words(count, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def pair(prompt, good, bad, **fields):
    prompt = [SYSTEM, user(prompt)] if isinstance(prompt, str) else prompt
    good, bad = ([answer(side)] if isinstance(side, str) else side for side in (good, bad))
    return Preference(id=preference_id(prompt, good, bad), prompt=prompt, chosen=good, rejected=bad, **fields)


def scene(seed, lines=3):
    return "\n".join(f"[ANNA] {words(8, seed * 100 + line)}" for line in range(lines))


def sound(seed):
    """A row with nothing wrong; the longer side is chosen every other time."""
    sides = scene(3 * seed + 1, 4), scene(3 * seed + 2, 3)
    return pair(scene(3 * seed), *(sides if seed % 2 else sides[::-1]))


SOUND = [sound(seed) for seed in range(60)]


def pairs_of(train, val=()):
    return [make_pair(row, "train", f"train.jsonl:{line}") for line, row in enumerate(train, 1)] + [
        make_pair(row, "val", f"val.jsonl:{line}") for line, row in enumerate(val, 1)
    ]


def found(train, val=(), **settings):
    """(rule, severity, `file:line`s) of what lint says."""
    findings = check(pairs_of(train, val), MAX_LENGTH, **settings)
    return [(finding.rule, finding.severity, [row.where for row in finding.rows]) for finding in findings]


def test_nothing_is_wrong_with_sound_rows():
    assert found(SOUND[:50], SOUND[50:]) == []


TEXT, OTHER = scene(900), scene(901)


def calling(arguments):
    return [{"role": "assistant", "content": TEXT, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


TURNS = [*calling({}), {"role": "tool", "content": "x"}, answer(TEXT)]


@pytest.mark.parametrize(
    ("rule", "severity", "broken", "near"),
    [
        ("empty-side", "error", pair(TEXT, " \n", OTHER), pair(TEXT, ".", OTHER)),
        ("empty-side", "error", pair(TEXT, OTHER, []), pair(TEXT, OTHER, "No.")),
        ("identical-sides", "error", pair(TEXT, "[ANNA] é  x", "[ANNA] e\u0301 x"), pair(TEXT, OTHER, OTHER + "!")),
        (
            "cut-side", "error",
            pair(TEXT, TEXT, OTHER, chosen_finish_reason="length", rejected_finish_reason="stop"),
            pair(TEXT, TEXT, OTHER, chosen_finish_reason="length", rejected_finish_reason="length"),
        ),
        (
            "cut-side", "warning",
            pair(TEXT, TEXT, OTHER, chosen_finish_reason="stop", rejected_finish_reason="length"),
            pair(TEXT, TEXT, OTHER, rejected_finish_reason="length"),
        ),
        ("template", "error", pair(TEXT, TEXT + "<|eot_id|>", OTHER), pair(TEXT, TEXT + " <eot_id>", OTHER)),
        ("template", "error", pair(TEXT + "[INST]", TEXT, OTHER), pair(TEXT + " [INSTANT] x", TEXT, OTHER)),
        ("template", "error", pair(TEXT, TEXT, OTHER + "<|im_start|>"), pair(TEXT, TEXT, OTHER + " <|a or b|>")),
        ("template", "error", pair([user(TEXT), SYSTEM], TEXT, OTHER), pair([SYSTEM, user(TEXT)], TEXT, OTHER)),
        (
            "template", "error",
            pair([user(TEXT), answer("x")], TEXT, OTHER), pair([user("x"), answer("y"), user(TEXT)], TEXT, OTHER),
        ),
        ("template", "error", pair([user("x"), user(TEXT)], TEXT, OTHER), pair([user(TEXT)], TEXT, OTHER)),
        ("template", "error", pair([{"role": "tool", "content": "x"}, user(TEXT)], TEXT, OTHER), SOUND[0]),
        ("template", "error", pair([SYSTEM], TEXT, OTHER), SOUND[0]),
        ("template", "warning", pair(TEXT, [answer(TEXT), user("x"), answer("y")], OTHER), pair(TEXT, TURNS, OTHER)),
        ("template", "error", pair(TEXT, TURNS[:2], OTHER), pair(TEXT, TURNS[:1], OTHER)),
        ("template", "error", pair(TEXT, TURNS[::2], OTHER), pair([user(TEXT), *TURNS[:2]], TEXT, OTHER)),
        ("template", "warning", pair(TEXT, calling('{"day": mon'), OTHER), pair(TEXT, calling({"day": "mon"}), OTHER)),
        ("thinking", "warning", pair(TEXT, [{**answer(TEXT), "reasoning_content": "Hm."}], OTHER),
         pair(TEXT, [{**answer(TEXT), "reasoning_content": "Hm."}], f"<think>Ah.</think>{OTHER}")),
        ("template", "error", pair(TEXT, [user(TEXT)], OTHER), SOUND[0]),
        ("template", "warning", pair(TEXT, TEXT + "\nUser: And?", OTHER), pair(TEXT, TEXT + " the user: and", OTHER)),
        ("length", "error", pair(TEXT, OTHER, "x" * 1450), pair(TEXT, OTHER, "x" * 300)),
        ("length", "warning", pair(scene(902, 25), TEXT, OTHER), pair(scene(902, 10), TEXT, OTHER)),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_in_itself(rule, severity, broken, near):
    def of_rule(row):
        return [finding for finding in found([*SOUND[:3], row]) if finding[0] == rule]

    assert (rule, severity, ["train.jsonl:4"]) in of_rule(broken)
    assert of_rule(near) == []


def changed(text, count):
    """A text with `count` of its words replaced by a new one."""
    parts = text.split(" ")
    for index in range(count):
        parts[(index * 7) % (len(parts) - 1) + 1] = f"new{index}"
    return " ".join(parts)


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        (["user", "system", "user"], "a system message after its first turn"),
        (["system", "narrator", "user"], "a message of role narrator"),
        (["user", "tool"], "a tool's result that no call asked for"),
        (["system"], "does not end with a user message"),
        (["user", "assistant", "assistant", "user"], "do not take turns"),
    ],
)
def test_the_order_of_roles_is_named(roles, fault):
    row = pair([{"role": role, "content": TEXT} for role in roles], TEXT, OTHER)
    [finding] = check(pairs_of([row]), 10 * MAX_LENGTH)
    assert fault in finding.message


LONG = [f"[ANNA] {words(60, 700 + part)}" for part in range(3)]


@pytest.mark.parametrize(
    ("rule", "severity", "train", "val", "where"),
    [
        ("duplicate", "error", [pair("p", "a", "b"), pair(" p ", "a", "b")], [], ["train.jsonl:1", "train.jsonl:2"]),
        ("duplicate", "error", [pair("p", "a", "b")], [pair("p", "a", "b")], ["val.jsonl:1", "train.jsonl:1"]),
        ("near-duplicate", "warning", [pair(*LONG), pair(LONG[0], changed(LONG[1], 1), LONG[2])], [],
         ["train.jsonl:1", "train.jsonl:2"]),
        ("contradiction", "error", [pair("p", "a", "b"), pair("p", "b", "a")], [], ["train.jsonl:1", "train.jsonl:2"]),
        ("leakage", "error", [pair("p", "a", "b")], [pair("p", "c", "d")], ["train.jsonl:1", "val.jsonl:1"]),
        ("near-leakage", "warning", [pair(LONG[0], "a", "b")], [pair(changed(LONG[0], 1), "c", "d")],
         ["train.jsonl:1", "val.jsonl:1"]),
    ],
)  # fmt: skip
def test_rows_that_do_not_go_together(rule, severity, train, val, where):
    assert (rule, severity, where) in found(train, val)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ([pair("p", "a", "b"), pair("p", "a", "c"), pair("q", "b", "a")], []),
        ([pair(*LONG), pair(LONG[0], changed(LONG[1], 12), LONG[2])], []),  # another chosen text
        ([pair(*LONG), pair(words(60, 800), LONG[1], LONG[2])], []),  # another prompt
        ([pair(LONG[0], "a", "b")], [pair(changed(LONG[0], 12), "c", "d")]),
        ([pair(LONG[0], "a", "b"), pair(changed(LONG[0], 1), "c", "d")], []),  # near prompts on one side
        (
            [pair([{"role": "system", "content": LONG[0]}, user("p")], "a", "b")],
            [pair([{"role": "system", "content": LONG[0]}, user("q")], "c", "d")],
        ),
    ],
)
def test_rows_that_go_together(train, val):
    assert found(train, val) == []


def test_prompts_of_one_template_are_no_leakage():
    template = words(50, 600) + " {} " + words(50, 601)
    rows = [pair(template.format(words(3, seed)), words(20, 2 * seed), words(20, 2 * seed + 1)) for seed in range(60)]
    assert "near-leakage" not in {rule for rule, *_ in found(rows[:40], rows[40:])}


def test_near_duplicates_are_those_that_comparing_all_would_find():
    texts = []
    for seed in range(80):
        text = words(50, seed)
        texts += [text] if seed % 4 else [text, changed(text, 1 + seed % 3)]
    documents = [(text,) for text in texts]

    def shingles(text):
        parts = text.split()
        return set(zip(parts, parts[1:], parts[2:], strict=False))

    def similarity(one, other):
        return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))

    every = {
        (i, j) for j in range(len(texts)) for i in range(j) if similarity(texts[i], texts[j]) >= 0.8
    }  # fmt: skip
    assert len(every) > 8
    assert set(near_duplicates(documents)) == every


def test_near_duplicates_in_a_script_without_spaces():
    text = "春眠不覚暁処処聞啼鳥夜来風雨声花落知多少床前明月光疑是地上霜挙頭望明月低頭思故郷"
    assert list(near_duplicates([(text,), (text.replace("鳥", "虫"),), (text[::-1],)])) == [(0, 1)]


def test_tokens_are_counted_by_the_tokenizer_where_there_is_one():
    row = pair("one two", "three", "four five")
    assert [rule for rule, *_ in found([row], count_tokens=lambda text: 100 * len(text.split()))] == ["length"]
    assert found([row], count_tokens=lambda text: len(text.split())) == []
    assert estimate_tokens("x" * 35) == 10


@pytest.mark.parametrize(("longer", "of", "biased"), [(48, 60, True), (38, 60, False), (12, 60, True), (5, 6, False)])
def test_length_bias_needs_more_than_chance(longer, of, biased):
    rows = []
    for seed in range(of):
        sides = scene(3 * seed + 1, 4), scene(3 * seed + 2, 3)
        rows.append(pair(scene(3 * seed), *(sides if seed < longer else sides[::-1])))
    findings = found(rows)
    assert [rule for rule, *_ in findings] == (["length-bias"] if biased else [])
    assert all(len(where) == 10 for _, _, where in findings)
    assert found(rows, length_bias=0.95) == []


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        ("[ANNA] Это совсем другая история, и она длинная.", "are Latin"),
        ("Once there was a scene without any names in it at all.", "`[NAME] text`"),
        ("[ANNA] 12345 67890 !!! ??? 11111 22222 :::: 33333 4444", "are letters"),
    ],
)
def test_outliers_differ_from_the_rest(odd, what):
    rows = [*SOUND, pair(TEXT, OTHER, odd)]
    [finding] = check(pairs_of(rows), MAX_LENGTH)
    assert (finding.rule, finding.severity, finding.rows[0].where) == ("outlier", "warning", "train.jsonl:61")
    assert what in finding.message and "rejected" in finding.message


def test_a_second_style_is_no_outlier():
    plain = [pair(words(20, seed), words(30, seed + 1000), words(30, seed + 2000)) for seed in range(20)]
    assert [rule for rule, *_ in found([*SOUND, *plain]) if rule == "outlier"] == []


BROKEN = [
    pair(TEXT, " ", OTHER), pair(TEXT, OTHER, OTHER), pair(TEXT + "<|eot_id|>", TEXT, OTHER), SOUND[1], SOUND[2],
    pair(TEXT, OTHER, "x" * 1500), pair("p", "a", "b"), pair("p", "b", "a"), pair("p", "b", "a"),
    pair(TEXT, TEXT, OTHER, chosen_finish_reason="length", rejected_finish_reason="stop"),
    pair(SOUND[3].prompt, scene(50), scene(51)), pair(*LONG), pair(LONG[0], changed(LONG[1], 1), LONG[2]),
]  # fmt: skip


def test_the_cleaned_copy_has_no_errors_and_keeps_the_rest():
    pairs = pairs_of([*SOUND[:20], *BROKEN], [*SOUND[20:25], SOUND[3], SOUND[4]])
    fixed = fix(pairs, check(pairs, MAX_LENGTH))
    assert check(fixed, MAX_LENGTH) == []
    assert {pair.row.id for pair in fixed} == {row.id for row in [*SOUND[:25], BROKEN[-3], BROKEN[-2]]}
    sides = {pair.row.id: pair.side for pair in fixed}
    assert sides[SOUND[4].id] == "val", "of copies the held-out one stays"
    assert sides[SOUND[1].id] == "train" and sides[SOUND[21].id] == "val"


@pytest.mark.parametrize(
    ("train", "val", "side"),
    [
        ([pair("p", "a", "b"), pair("p", "a", "c")], [pair("p", "a", "d")], "train"),
        ([pair("p", "a", "b")], [pair("p", "a", "d")], "val"),
        ([pair(LONG[0], "a", "b"), pair(LONG[0], "a", "c")], [pair(changed(LONG[0], 1), "e", "d")], "train"),
    ],
)
def test_a_leaked_prompt_moves_to_the_side_with_more_of_its_rows(train, val, side):
    pairs = pairs_of(train, val)
    assert [pair.side for pair in fix(pairs, check(pairs, MAX_LENGTH))] == [side] * len(pairs)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_thrown_together_is_clean_once_fixed(seed):
    rng = random.Random(seed)
    texts = ["a", "b", " ", "c <|eot_id|>", "a ", LONG[0], changed(LONG[0], 1), LONG[1], "x" * 2000]
    prompts = ["p", "q", [user("p"), answer("x")], LONG[2], changed(LONG[2], 1), []]
    rows = [
        pair(rng.choice(prompts), rng.choice(texts), rng.choice(texts),
             chosen_finish_reason=rng.choice(["stop", "length"]), rejected_finish_reason="stop")
        for _ in range(80)
    ]  # fmt: skip
    pairs = pairs_of(rows[:60], rows[60:])
    fixed = fix(pairs, check(pairs, MAX_LENGTH))
    assert [finding for finding in check(fixed, MAX_LENGTH) if finding.severity == "error"] == []
    assert fixed == fix(pairs, check(pairs, MAX_LENGTH))


def files(folder, train, val):
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "val.jsonl", val)
    return folder / "train.jsonl", folder / "val.jsonl"


def test_files_are_checked_and_a_cleaned_copy_is_written(tmp_path):
    train, val = files(tmp_path, [*SOUND[:20], SOUND[0], pair(TEXT, " ", OTHER)], [*SOUND[20:24], SOUND[1]])
    result = lint(train, val, MAX_LENGTH)
    assert (result.train, result.val, result.errors, result.warnings) == (22, 5, 4, 0)
    assert [finding.severity for finding in result.findings] == ["error"] * 4
    assert result.findings[0].rows[0].where == f"{train}:22"
    assert "estimated" in result.tokens and "tokenizer" in lint(train, val, MAX_LENGTH, len).tokens
    with read_split(train, val) as pairs:
        fixed = write_fixed(pairs, result.findings, tmp_path / "clean")
    assert (fixed.train, fixed.val, fixed.dropped, fixed.moved) == (19, 5, 3, 0)
    assert lint(tmp_path / "clean/train.jsonl", tmp_path / "clean/val.jsonl", MAX_LENGTH).errors == 0
    assert (tmp_path / "clean/val.jsonl").read_bytes() == val.read_bytes()


def test_without_a_held_out_side(tmp_path):
    write_rows(tmp_path / "train.jsonl", SOUND)
    assert lint(tmp_path / "train.jsonl", tmp_path / "val.jsonl", MAX_LENGTH).val == 0
    with pytest.raises(UserError, match="no such file"):
        lint(tmp_path / "none.jsonl", tmp_path / "val.jsonl", MAX_LENGTH)


def test_findings_are_the_same_in_every_process(tmp_path):
    rows = [*SOUND, pair(*LONG), pair(LONG[0], changed(LONG[1], 1), LONG[2])]
    train, val = files(tmp_path, rows, [pair(changed(LONG[0], 2), "a", "b")])
    code = (
        "import sys, msgspec; from pathlib import Path\n"
        "from dpo_cli.analysis.lint import similar; from dpo_cli.analysis.lint.run import lint; "
        "print([similar.Shingler().shingles(text) for text in ('one', 'one two three')], flush=True); "
        f"sys.stdout.buffer.write(msgspec.json.encode(lint(Path({str(train)!r}), Path({str(val)!r}), {MAX_LENGTH})))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    [output] = outputs
    assert output.endswith(msgspec.json.encode(lint(train, val, MAX_LENGTH))) and b"near-duplicate" in output
