"""Where a run goes on, by what is on the disk alone."""

import pytest

from iekd_hf.training.manifest import MANIFEST_FILE, write_manifest
from iekd_hf.training.resume import RUN_FILE, ResumePoint, begin_run, find_resume_point, last_run


@pytest.fixture
def run(tmp_path):
    """Return a function that makes folders of a run, checkpoints as Trainer leaves them."""

    def make(*folders):
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            if "checkpoint-" in folder:
                (tmp_path / folder / "trainer_state.json").write_text("{}")
        return tmp_path

    return make


@pytest.mark.parametrize("nothing", [None, False])
def test_nothing_was_asked_for(run, nothing):
    assert find_resume_point(run("checkpoint-5"), nothing) is None


def test_nothing_has_begun(run):
    assert find_resume_point(run(), True) is None
    assert find_resume_point(run("_stage_1") / "not there", True) is None
    assert find_resume_point(run("logs"), True) is None


def test_the_last_checkpoint_of_stage_2_comes_first(run):
    folder = run("checkpoint-5", "checkpoint-10", "_paraphraser", "_stage_1/checkpoint-20")
    assert find_resume_point(folder, True) == ResumePoint(
        checkpoint=str(folder / "checkpoint-10"), paraphrasers=folder / "_paraphraser"
    )


def test_stage_1_goes_on(run):
    folder = run("_stage_1/checkpoint-5", "_stage_1/checkpoint-20")
    expected = ResumePoint(stage_1_checkpoint=str(folder / "_stage_1" / "checkpoint-20"))
    assert find_resume_point(folder, True) == expected
    assert find_resume_point("elsewhere", str(folder / "_stage_1" / "checkpoint-20")) == expected


def test_stage_2_begins_with_finished_paraphrasers(run):
    folder = run("_paraphraser")
    assert find_resume_point(folder, True) == ResumePoint(paraphrasers=folder / "_paraphraser")


def test_a_named_checkpoint_has_its_paraphrasers_beside_or_inside(run):
    folder = run("checkpoint-5", "checkpoint-10", "checkpoint-10/_paraphraser")
    for name, paraphrasers in (("checkpoint-5", "_paraphraser"), ("checkpoint-10", "checkpoint-10/_paraphraser")):
        point = find_resume_point("elsewhere", str(folder / name))
        assert point == ResumePoint(str(folder / name), paraphrasers=folder / paraphrasers)


@pytest.mark.parametrize("state", [None, "", '{"epoch"'])
def test_a_checkpoint_that_was_being_written_is_passed_over(run, state, caplog):
    folder = run("checkpoint-5", "checkpoint-10", "_paraphraser")
    (folder / "checkpoint-10" / "trainer_state.json").unlink()
    if state is not None:
        (folder / "checkpoint-10" / "trainer_state.json").write_text(state)
    assert find_resume_point(folder, True).checkpoint == str(folder / "checkpoint-5")
    assert f"Skipping {folder / 'checkpoint-10'}: trainer_state.json is" in caplog.text


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.unlink(), "optimizer.pt is missing"),
        (lambda file: file.write_bytes(b"12"), "optimizer.pt has 2 bytes instead of 4"),
        (lambda file: file.write_bytes(b"1235"), "optimizer.pt has changed since it was written"),
        (lambda file: file.with_name(MANIFEST_FILE).write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named(run, harm, words, caplog):
    folder = run("checkpoint-5", "checkpoint-10")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"1234")
        write_manifest(checkpoint, run="")
    harm(folder / "checkpoint-10" / "optimizer.pt")
    with pytest.raises(ValueError, match=f"a whole checkpoint to resume from, got '.*checkpoint-10': {words}"):
        find_resume_point(folder, str(folder / "checkpoint-10"))
    assert find_resume_point(folder, True).checkpoint == str(folder / "checkpoint-5")
    assert words in caplog.text


def test_a_new_run_never_goes_on_from_an_old_one(run, caplog):
    folder = run("checkpoint-5", "_paraphraser")
    old = begin_run(folder, None)
    for each in ("checkpoint-5", "_paraphraser"):
        write_manifest(folder / each, run=old)
    point = find_resume_point(folder, True)
    assert begin_run(folder, point) == last_run(folder) == old  # it goes on
    new = begin_run(folder, None)
    assert new != old
    assert find_resume_point(folder, True) == ResumePoint()  # it starts again
    assert "belongs to an earlier run" in caplog.text
    named = find_resume_point(folder, str(folder / "checkpoint-5"))
    assert begin_run(folder, named) == old
    assert find_resume_point("elsewhere", named) is named  # found before, and not looked for again


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_run_file_that_cannot_be_read(run, content):
    folder = run("checkpoint-5")
    begin_run(folder, None)
    (folder / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"the name of the run in .*_run\.json, got a file that cannot be read"):
        find_resume_point(folder, True)
    begin_run(folder, None)  # a new run needs no name of an old one
    assert last_run(folder)
