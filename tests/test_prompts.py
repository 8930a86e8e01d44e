"""Prompt files, and what becomes of prompts: file names, seeds and sizes of the videos."""

from __future__ import annotations

import pytest

from ospnext.config import resolve
from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig
from ospnext.generation.jobs import file_stem, make_jobs
from ospnext.generation.prompt_files import LocatedPrompt, PromptRow, read_prompts
from ospnext.pipelines.prompts import WAN_NEGATIVE_PROMPT


def write(tmp_path, content: str | bytes, name: str = "p.txt"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def config(**values) -> GenerateConfig:
    return resolve(GenerateConfig, ("test", values))


def jobs(*rows: PromptRow, **values):
    return make_jobs(config(**values), [LocatedPrompt(row, f"p.jsonl:{i}") for i, row in enumerate(rows, 1)])


# ---- files


def test_lines_are_prompts_and_blank_ones_are_skipped(tmp_path):
    found = read_prompts(write(tmp_path, "\n  a cat \n\n\t\n雪中的狐狸\n# not a comment\n"))
    assert [p.row for p in found] == [PromptRow("a cat"), PromptRow("雪中的狐狸"), PromptRow("# not a comment")]
    assert [p.where.rpartition(":")[2] for p in found] == ["2", "5", "6"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_bom_and_crlf_leave_no_trace(tmp_path, newline, bom, name):
    rows = ["a cat", "a dög"] if name == "p.txt" else ['{"prompt": "a cat"}', '{"prompt": "a dög"}']
    found = read_prompts(write(tmp_path, bom + newline.join([*rows, ""]).encode(), name))
    assert [p.row.prompt for p in found] == ["a cat", "a dög"]


def test_jsonl_rows_carry_their_settings(tmp_path):
    row = '{"prompt": "a", "negative_prompt": "", "seed": 7, "num_frames": 5, "height": 32, "width": 48, "id": "x"}'
    text = row + '\n{"prompt": "two\u2028lines", "id": 3, "seed": null}\n'
    for name in ("p.jsonl", "p.txt"):  # told by the name, or by the first character
        assert [p.row for p in read_prompts(write(tmp_path, text, name))] == [
            PromptRow("a", "", 7, 5, 32, 48, "x"),
            PromptRow("two\u2028lines", id=3),
        ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "not a JSON row: .* at column"),
        ('{"prompt": "b", "sed": 3}', r"unknown key 'sed' \(did you mean 'seed'\?\)"),
        ('{"prompt": "b", "seed": "3"}', r"seed must be an integer or null, found '3' \(text\)"),
        ('{"prompt": "b", "seed": 3.0}', "seed must be an integer or null, found 3.0"),
        ('{"prompt": "b", "seed": true}', "seed must be an integer or null, found true"),
        ('{"seed": 3}', "prompt is required"),
        ('{"prompt": null}', "prompt must be text, found null"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": "b", "id": ""}', "the id is empty"),
        ('{"prompt": "b", "seed": 1, "seed": 2}', "'seed' is given twice"),
        ('["b"]', "a row must be a JSON object"),
        ("plain text", "not a JSON row"),
        ('{"prompt": "b", "id": "first"}', r"the id 'first' was already given at .*p\.jsonl:1"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path, '{"prompt": "a", "id": "first"}\n\n' + line + "\n", "p.jsonl")
    with pytest.raises(ConfigError, match=rf"^.*p\.jsonl:3: .*{message}"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(write(tmp_path, content))


def test_a_missing_or_undecodable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*nowhere"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*p\.txt.*utf-8"):
        read_prompts(write(tmp_path, b"caf\xe9\n"))


# ---- seeds


def test_per_prompt_seeds_count_on_and_never_repeat():
    made = jobs(*[PromptRow("p")] * 3, seed=10, sampling={"num_videos_per_prompt": 2})
    assert [job.seed for job in made] == [10, 11, 12, 13, 14, 15]
    assert [job.name for job in made] == [f"video_{i}_{j}.mp4" for i in range(3) for j in range(2)]


def test_shared_seeds_give_every_prompt_the_same_noise():
    made = jobs(*[PromptRow("p")] * 2, seed=10, seed_mode="shared", sampling={"num_videos_per_prompt": 2})
    assert [job.seed for job in made] == [10, 11, 10, 11]


@pytest.mark.parametrize("mode", ["shared", "per-prompt"])
def test_a_seed_of_a_row_wins_and_moves_no_other(mode):
    seeds = [job.seed for job in jobs(PromptRow("a"), PromptRow("b", seed=0), PromptRow("c"), seed=5, seed_mode=mode)]
    assert seeds == ([5, 0, 5] if mode == "shared" else [5, 0, 7])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(ConfigError, match="between 0 and"):
        config(seed=seed)
    with pytest.raises(ConfigError, match=r"^p\.jsonl:1: the seed"):
        jobs(PromptRow("a", seed=seed))


# ---- negative prompts, sizes, names


def test_negative_prompt_null_is_wans_and_empty_is_empty():
    rows = [PromptRow("a"), PromptRow("b", negative_prompt=""), PromptRow("c", negative_prompt="rain")]
    assert [job.negative_prompt for job in jobs(*rows)] == [WAN_NEGATIVE_PROMPT, "", "rain"]
    assert [job.negative_prompt for job in jobs(*rows, sampling={"negative_prompt": ""})] == ["", "", "rain"]


def test_a_row_changes_only_its_own_size():
    made = jobs(PromptRow("a", height=32, num_frames=5), PromptRow("b"), video={"width": 64})
    assert [(j.video.height, j.video.width, j.video.num_frames) for j in made] == [(32, 64, 5), (480, 64, 81)]


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("height", 40, "32 or 48"),
        ("width", 8, "16"),
        ("width", 0, "16"),
        ("height", -16, "16"),
        ("num_frames", 80, "77 or 81"),
        ("num_frames", 0, "1"),
        ("num_frames", 2, "1 or 5"),
    ],
)
def test_a_size_the_model_cannot_make_is_refused_with_its_neighbours(key, value, nearest):
    with pytest.raises(ConfigError, match=rf"^video\.{key} must be .*found {value}; nearest: {nearest}$"):
        config(video={key: value})
    with pytest.raises(ConfigError, match=rf"^p\.jsonl:1: video\.{key} must be .*nearest: {nearest}$"):
        jobs(PromptRow("a", **{key: value}))


@pytest.mark.parametrize("value", [1, 5, 81])
def test_4k_plus_1_frames_are_taken(value):
    assert config(video={"num_frames": value}).video.num_frames == value


@pytest.mark.parametrize(
    ("identifier", "stem"),
    [
        ("cat-01_b.c", "cat-01_b.c"),
        (12, "12"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a/b\\c:d*e", "a_b_c_d_e"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("...", "_"),
        ("狐狸", "狐狸"),
        ("new\nline\0", "new_line_"),
    ],
)
def test_ids_become_safe_file_names(identifier, stem):
    assert file_stem(identifier, 0) == stem


def test_a_long_id_still_fits_a_file_name(tmp_path):
    for identifier in ("x" * 1000, "狐" * 1000):
        (tmp_path / f".{file_stem(identifier, 0)}.mp4.{'0' * 32}.tmp").touch()


@pytest.mark.parametrize(("first", "second"), [("a/b", "a:b"), ("Fox", "fox"), ("video_1", None)])
def test_two_videos_under_one_name_are_refused(first, second):
    with pytest.raises(ConfigError, match=r"^p\.jsonl:2: the file name .* is already taken by p\.jsonl:1"):
        jobs(PromptRow("a", id=first), PromptRow("b", id=second))


def test_shift_and_dynamic_shifting_exclude_each_other():
    with pytest.raises(ConfigError, match="has no effect"):
        config(scheduler={"shift": 3, "use_dynamic_shifting": True})
