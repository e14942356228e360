"""Preference files of other tools in, and out again."""

import gzip
import json
import subprocess

import msgspec
import nemo_rl as schema
import pytest
import yaml

from dpo_cli.config.settings import Config, PairSection
from dpo_cli.data.columns import Cells
from dpo_cli.data.formats.export import export
from dpo_cli.data.formats.nemo_rl import batches, launch_lines
from dpo_cli.data.formats.preferences import read_ours, read_pair
from dpo_cli.data.records import Preference, preference_id
from dpo_cli.errors import UserError
from dpo_cli.stages.pair import imports


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def pair(prompt, good, bad):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    good, bad = [answer(good)], [answer(bad)]
    return Preference(id=preference_id(prompt, good, bad), prompt=prompt, chosen=good, rejected=bad)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path):
    found = imports.read([path], PairSection(), 0.0)
    return ", ".join(found.formats), [*found.pairs]


TALK = [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Hello."), user("Name a tree.")]
IMPORTS = {
    "trl-conversational": (
        {"prompt": TALK, "chosen": [answer("Oak")], "rejected": [answer("Fox")]},
        pair(TALK, "Oak", "Fox"),
    ),
    "trl-plain": ({"prompt": "Tree?", "chosen": "Oak", "rejected": "Fox", "id": 7}, pair("Tree?", "Oak", "Fox")),
    "trl-implicit-prompt": (
        {"chosen": [*TALK, answer("Oak")], "rejected": [*TALK, answer("Fox")]},
        pair(TALK, "Oak", "Fox"),
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant: Oak",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant: Fox",
        },
        pair(TALK[1:], "Oak", "Fox"),
    ),
    "prompt-good-bad": ({"prompt": "Tree?", "good": "Oak", "bad": "Fox"}, pair("Tree?", "Oak", "Fox")),
}


def ours(**more):
    return {"prompt": TALK, "chosen": [answer("Oak")], "rejected": [answer("Fox")], **more}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        (ours(), True),
        (ours(id="x", chosen_score=3, rejected_score=1.5, score_gap=9, margin=-1, weight=10**30), True),
        (ours(id="", score_gap=2.0, chosen_finish_reason="length", rejected_finish_reason=3), True),
        (ours(id=7, chosen_score=None, rejected_score=2), True),
        (ours(chosen=[answer("Oak"), user("So?"), answer("Yes.")], prompt=[*TALK, answer("Ash"), user("?")]), True),
        (ours(prompt=[*TALK, answer("Oak")]), False),  # the answer once more
        (ours(prompt=[user("\n\nHuman: Hi\n\nAssistant:")]), False),
        (ours(chosen=[*TALK, answer("Oak")], rejected=[*TALK, answer("Fox")]), False),
        (ours(chosen="Oak"), False),
        (ours(chosen=[{**answer("Oak"), "reasoning": "so"}]), False),
        (ours(chosen=[{"role": "function_call", "content": '{"name": "f", "arguments": {}}'}]), False),
        (ours(chosen_score="4", rejected_score="1"), False),
        (ours(tools=[{"type": "function", "function": {"name": "f"}}]), False),
        (ours(system="Be brief."), False),
        (ours(source="x"), False),
        (ours(margin=True), False),
        ({key.title(): value for key, value in ours().items()}, False),
    ],
)
def test_a_row_of_our_own_is_read_at_once_as_the_formats_read_it(row, read):
    found = read_ours(row)
    assert (found is not None) == read
    assert found in (None, read_pair(Cells(row))[1])


@pytest.mark.parametrize(
    "row",
    [
        ours(prompt=[]),
        ours(prompt=[user(" ")]),
        ours(chosen=None),
        ours(rejected=[]),
        ours(weight="heavy"),
        ours(score_gap=float("nan")),
        ours(chosen=[{"role": 3, "content": "Oak"}]),
    ],
)
def test_a_row_that_is_no_pair_is_left_to_the_formats(row):
    assert read_ours(row) is None
    with pytest.raises(ValueError, match=r"."):
        read_pair(Cells(row))


@pytest.mark.parametrize("name", IMPORTS)
def test_each_format_is_told_and_read(tmp_path, name):
    row, expected = IMPORTS[name]
    assert read(write(tmp_path / "pairs.jsonl", [row, row])) == (name, [expected, expected])


def test_ultrafeedback_keeps_its_scores(tmp_path):
    row = {
        "prompt": "Tree?",
        "chosen": [user("Tree?"), answer("Oak")],
        "rejected": [user("Tree?"), answer("Fox")],
        "score_chosen": 8.5,
        "score_rejected": 3,
    }
    name, [read_back] = read(write(tmp_path / "pairs.jsonl", [row]))
    assert name == "ultrafeedback"
    assert (read_back.prompt, read_back.chosen) == ([user("Tree?")], [answer("Oak")])
    assert (read_back.chosen_score, read_back.rejected_score, read_back.score_gap) == (8.5, 3.0, 5.5)


def test_our_own_rows_come_back_with_id_and_scores(tmp_path):
    row = pair("Tree?", "Oak", "Fox")
    row.chosen_score, row.rejected_score, row.score_gap = 9.0, 2.0, 7.0
    name, rows = read(write(tmp_path / "pairs.jsonl", [msgspec.to_builtins(row)]))
    assert (name, rows) == ("trl-conversational", [row])


def test_identical_sides_keep_their_message(tmp_path):
    same = [user("Tree?"), answer("Oak")]
    _, [row] = read(write(tmp_path / "pairs.jsonl", [{"chosen": same, "rejected": same}]))
    assert row.prompt == [user("Tree?")] and row.chosen == row.rejected == [answer("Oak")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.csv", 'prompt,good,bad\n"Tree?","Oak,\nan old one",Fox\n'),
        ("pairs.csv", 'note,Bad,Question,Good\nx,Fox,Tree?,"Oak,\nan old one"\n'),
        ("pairs.tsv", 'Tree?\t"Oak,\nan old one"\tFox and so on\n'),
        ("pairs.csv", '\ufeffprompt,chosen,rejected\nTree?,"Oak,\nan old one",Fox\n'),
    ],
)
def test_tables(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    _, [row] = read(tmp_path / name)
    assert row.prompt == [user("Tree?")] and row.chosen == [answer("Oak,\nan old one")]
    assert row.rejected[0]["content"].startswith("Fox")


def test_gzipped(tmp_path):
    row, expected = IMPORTS["hh"]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert read(tmp_path / "train.jsonl.gz") == ("hh", [expected])


GOOD = {"prompt": "Tree?", "chosen": "Oak", "rejected": "Fox"}


@pytest.mark.parametrize(
    ("name", "text", "where", "what"),
    [
        ("a.jsonl", f'{json.dumps(GOOD)}\n\n{{"prompt": "x"}}\n', "a.jsonl:3", 'no "chosen"'),
        ("a.jsonl", f"{json.dumps(GOOD)}\n{{torn", "a.jsonl:2", "not a JSON object"),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl:1", "no known preference format"),
        ("a.jsonl", '{"chosen": "x", "rejected": "y"}\n', "a.jsonl:1", "have no beginning in common"),
        ("a.jsonl", "\n", "a.jsonl", "no rows"),
        ("a.csv", "prompt,good,bad\na,b,c\na,b\n", "a.csv:3", "2 columns"),
        ("a.csv", "q,a,b\nTree or not?,Oak,Fox\n", "a.csv", "unknown columns: q, a, b"),
        (
            "a.jsonl",
            json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}),
            "a.jsonl:1",
            '"rejected" is not a',
        ),
        (
            "a.jsonl",
            json.dumps({"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("d")]}),
            "a.jsonl:1",
            "share no first message",
        ),
        (
            "a.jsonl",
            json.dumps({"prompt": "z", "chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("d")]}),
            "a.jsonl:1",
            '"prompt" is not what',
        ),
        (
            "a.jsonl",
            json.dumps({"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("d")],
                        "score_chosen": "high", "score_rejected": 1}),
            "a.jsonl:1",
            "is not a number",
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, text, where, what):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert error.value.where == str(tmp_path / where)
    assert what in error.value.message


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl")


TRAIN = [pair(f"Tree {i}?", f"Oak {i}", f"Fox {i}") for i in range(40)]
VAL = [pair("Flower?", "Rose", "Rat")]
CHAT = [pair([*TALK[:-1], user(f"Tree {i}?")], "Oak", "Fox") for i in range(40)]


def without_adapter():
    config = Config()
    config.model.adapter = None
    return config


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_export_to_trl(tmp_path):
    files = export(CHAT, VAL, tmp_path, "trl", Config())
    assert files == [tmp_path / "train.jsonl", tmp_path / "val.jsonl"]
    assert lines(files[0])[0] == {"prompt": CHAT[0].prompt, "chosen": [answer("Oak")], "rejected": [answer("Fox")]}
    assert read(files[0]) == ("trl-conversational", CHAT)


def test_export_without_held_out_pairs_leaves_no_old_ones(tmp_path):
    export(TRAIN, VAL, tmp_path, "trl", Config())
    assert export(TRAIN, [], tmp_path, "trl", Config()) == [tmp_path / "train.jsonl"]
    assert not (tmp_path / "val.jsonl").exists()


def test_export_to_parquet_and_back(tmp_path):
    pytest.importorskip("pyarrow")
    files = export(CHAT, VAL, tmp_path, "parquet", Config())
    assert read(files[0]) == ("trl-conversational", CHAT)
    assert read(files[1]) == ("trl-conversational", VAL)


@pytest.mark.parametrize(
    ("rows", "val", "dataset"),
    [
        (TRAIN, VAL, "BinaryPreferenceDataset"),
        (CHAT, VAL, "PreferenceDataset"),
        (TRAIN, [], "BinaryPreferenceDataset"),
    ],
)
def test_export_to_nemo_rl_is_what_it_documents(tmp_path, rows, val, dataset):
    files = export(rows, val, tmp_path, "nemo-rl", without_adapter())
    names = ["train.jsonl", *(["val.jsonl"] if val else []), "nemo_rl.yaml", "launch.sh"]  # no SFT adapter to merge
    assert [file.name for file in files] == names
    config = yaml.safe_load((tmp_path / "nemo_rl.yaml").read_text())
    schema.check_config(config)
    assert config["data"]["default"]["dataset_name"] == dataset
    for file in files[:-2]:
        for row in lines(file):
            schema.check_row(row, dataset)
    first = lines(files[0])[0]
    if dataset == "BinaryPreferenceDataset":
        assert first == {"prompt": "Tree 0?", "chosen": "Oak 0", "rejected": "Fox 0"}
    else:
        assert first["context"] == CHAT[0].prompt and first["completions"][0]["completion"] == [answer("Oak")]


def test_the_nemo_rl_recipe_is_ours(tmp_path):
    config = without_adapter()
    config.train.beta, config.train.eval_steps, config.train.max_length, config.train.r = 0.3, 7, 512, 8
    config.train.target_modules = ["q_proj"]
    export(TRAIN, VAL, tmp_path, "nemo-rl", config)
    recipe = yaml.safe_load((tmp_path / "nemo_rl.yaml").read_text())
    assert recipe["dpo"]["reference_policy_kl_penalty"] == 0.3
    assert recipe["dpo"]["val_period"] == 7
    assert recipe["dpo"]["max_num_steps"] == 40 // 16
    assert recipe["policy"]["model_name"] == config.model.base
    assert recipe["policy"]["max_total_sequence_length"] == 512
    lora = recipe["policy"]["dtensor_cfg"]["lora_cfg"]
    assert (lora["dim"], lora["target_modules"], lora["match_all_linear"]) == (8, ["q_proj"], False)


def test_a_full_recipe_has_no_lora(tmp_path):
    config = without_adapter()
    config.train.full = True
    export(TRAIN, VAL, tmp_path, "nemo-rl", config)
    recipe = yaml.safe_load((tmp_path / "nemo_rl.yaml").read_text())
    assert recipe["policy"]["dtensor_cfg"]["lora_cfg"]["enabled"] is False


def test_launch_lines_keep_the_batch_and_fit_the_gpus(tmp_path):
    one, eight, many = launch_lines(tmp_path, 40, without_adapter()).values()
    assert schema.overrides(one) == {}
    assert schema.overrides(eight) == {
        "cluster.gpus_per_node": 8, "policy.train_global_batch_size": 16, "policy.train_micro_batch_size": 2,
    }  # fmt: skip
    inner = next(word for word in many.split("COMMAND=")[1:])
    assert schema.overrides(inner.split("'")[1])["cluster.num_nodes"] == 2
    assert "sbatch --nodes=2" in many


@pytest.mark.parametrize(("pairs", "gpus", "expected"), [(40, 1, (16, 4)), (10, 1, (10, 2)), (40, 6, (12, 2))])
def test_a_step_divides_over_the_gpus_and_is_no_larger_than_the_data(pairs, gpus, expected):
    assert batches(Config(), pairs, gpus) == expected


def test_the_launch_script_merges_the_sft_adapter_first(tmp_path):
    config = Config()
    config.model.adapter = str(tmp_path / "sft 1")
    (tmp_path / "sft 1").mkdir()
    (tmp_path / "sft 1" / "adapter_config.json").write_text("{}")
    out = tmp_path / "a folder"
    export(TRAIN, VAL, out, "nemo-rl", config)
    assert yaml.safe_load((out / "nemo_rl.yaml").read_text())["policy"]["model_name"] == str(out / "sft")
    script = (out / "launch.sh").read_text()
    assert f"'{tmp_path}/sft 1'" in script and "merge_and_unload" in (out / "merge_sft.py").read_text()
    first = next(iter(launch_lines(out, len(TRAIN), config).values()))
    assert first in script and f"'{tmp_path}/sft 1'" in first, "what is printed needs the merged model as well"
    subprocess.run(["bash", "-n", str(out / "launch.sh")], check=True)


def test_a_missing_sft_adapter_is_not_replaced_by_the_base(tmp_path):
    config = Config()
    config.model.adapter = str(tmp_path / "none")
    with pytest.raises(UserError, match="no SFT adapter"):
        export(TRAIN, VAL, tmp_path / "out", "nemo-rl", config)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_nemo_rl_lacks_is_refused(tmp_path):
    config = without_adapter()
    config.train.loss_type = "ipo"
    with pytest.raises(UserError) as error:
        export(TRAIN, VAL, tmp_path, "nemo-rl", config)
    assert error.value.where == "train.loss_type"


@pytest.mark.parametrize(("rows", "to", "what"), [(TRAIN, "csv", "unknown export target"), ([], "trl", "no pairs")])
def test_what_cannot_be_exported(tmp_path, rows, to, what):
    with pytest.raises(UserError, match=what):
        export(rows, [], tmp_path, to, Config())
