"""Where a run goes on, by what is on the disk alone."""

import pytest

from iekd_hf.training.resume import ResumePoint, find_resume_point


@pytest.fixture
def run(tmp_path):
    """Return a function that makes folders of a run."""

    def make(*folders):
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
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
    folder = run("checkpoint-5", "checkpoint-10/_paraphraser")
    for name, paraphrasers in (("checkpoint-5", "_paraphraser"), ("checkpoint-10", "checkpoint-10/_paraphraser")):
        point = find_resume_point("elsewhere", str(folder / name))
        assert point == ResumePoint(str(folder / name), paraphrasers=folder / paraphrasers)
