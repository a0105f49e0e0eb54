import gc
import threading
import warnings
import weakref

import pytest
from gate import WAIT, Gate, eventually
from tiue_runtime import Cancelled, InferenceError, OutOfMemoryError, RequestError
from tiue_runtime.serve import jobs as jobs_module
from tiue_runtime.serve.jobs import Drawing, JobQueue, Late, QueueClosed, QueueFull


@pytest.fixture
def gate(pipe):
    return Gate(pipe)


def pixels(pictures):
    return [picture.tobytes() for picture in pictures]


def test_pictures_of_a_job_equal_those_of_the_library(pipe):
    with JobQueue(pipe) as queue:
        drawn = queue.submit(Drawing("a red heart", seed=5, count=3)).future.result(WAIT)
    expected = [pipe("a red heart", seed=seed).images[0] for seed in (5, 6, 7)]
    assert pixels(drawn.pictures) == pixels(expected)
    assert drawn.seeds == (5, 6, 7)
    assert {"waiting", "unet_decoder", "total"} <= set(drawn.timings)
    assert [picture.record.seed for picture in drawn.pictures] == [5, 6, 7]


def test_without_a_listener_the_mode_is_that_of_the_library(pipe):
    with JobQueue(pipe) as queue:
        plain = queue.submit(Drawing("a red heart", seed=1)).future.result(WAIT)
        heard = queue.submit(Drawing("a red heart", seed=1), on_progress=lambda _: None).future.result(WAIT)
    assert plain.pictures[0].record.memory == pipe("a red heart", seed=1).memory == "parallel"
    assert heard.pictures[0].record.memory == "sequential"


def test_a_batch_of_several_jobs_draws_what_each_draws_alone(gate):
    with JobQueue(gate, batch=4) as queue:
        first = queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        jobs = [queue.submit(Drawing(prompt, seed=seed, count=count)) for prompt, seed, count in WAITING]
        gate.open.set()
        drawn = [job.future.result(WAIT) for job in jobs]
        first.future.result(WAIT)
    assert [len(prompt) if isinstance(prompt, list) else 1 for prompt, _ in gate.requests] == [1, 4]
    for (prompt, seed, count), result in zip(WAITING, drawn, strict=True):
        alone = [gate.pipeline(prompt, seed=seed + i).images[0] for i in range(count)]
        assert pixels(result.pictures) == pixels(alone)
        for picture, picture_seed in zip(result.pictures, range(seed, seed + count), strict=True):
            assert picture.record.seed == picture_seed and picture.record.prompt == prompt
            assert gate.pipeline.repeat(picture.record).images[0].tobytes() == picture.tobytes()


WAITING = [("a red heart", 0, 2), ("a blue star", 1, 1), ("a red heart", 2**64 - 1, 1)]


@pytest.mark.parametrize(
    "error",
    [
        RequestError("latents: 4 pictures need 9.0 GiB"),
        OutOfMemoryError("no memory"),
        InferenceError("image has NaN or infinity"),  # perhaps of one picture, and those of other jobs are good
    ],
)
def test_pictures_that_fail_together_are_drawn_one_by_one(pipe, error):
    class Narrow(Gate):
        def __call__(self, prompt, **options):
            result = super().__call__(prompt, **options)
            if len(result.images) > 1:
                raise error
            return result

    gate = Narrow(pipe)
    with JobQueue(gate, batch=4) as queue:
        queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        jobs = [queue.submit(Drawing(prompt, seed=seed, count=count)) for prompt, seed, count in WAITING]
        gate.open.set()
        drawn = [job.future.result(WAIT) for job in jobs]
    for (prompt, seed, count), result in zip(WAITING, drawn, strict=True):
        assert pixels(result.pictures) == pixels(pipe(prompt, seed=seed + i).images[0] for i in range(count))
        assert result.warnings == ("4 pictures cannot be drawn together, but one by one",)


def test_a_mistake_in_a_batch_is_one_of_its_job_only(gate):
    with JobQueue(gate, batch=4) as queue:
        queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        wrong, right = (queue.submit(Drawing(prompt, seed=1, count=2)) for prompt in ("\ud800", "a red heart"))
        gate.open.set()
        with pytest.raises(RequestError, match="prompt"):
            wrong.future.result(WAIT)
        drawn = right.future.result(WAIT)
    assert len(drawn.pictures) == 2
    assert drawn.warnings == ("4 pictures cannot be drawn together, but one by one",)
    assert len(gate.requests) == 5  # the first, all four together, one of the wrong job, two of the right one


def test_other_shapes_are_not_in_a_batch_and_keep_their_turn(gate):
    with JobQueue(gate, batch=8) as queue:
        queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        drawings = [Drawing("a", seed=0), Drawing("a", seed=1, steps=2), Drawing("a", seed=2)]
        jobs = [queue.submit(each) for each in drawings]
        gate.open.set()
        for job in jobs:
            job.future.result(WAIT)
    assert [options["steps"] for _, options in gate.requests] == [None, None, 2]


def test_progress_has_previews_and_pictures_come_as_they_are_finished(pipe):
    heard, pictures = [], []

    def hear(progress):
        heard.append((progress.index, progress.progress.stage, progress.job.fraction, progress.preview()))

    with JobQueue(pipe) as queue:
        drawing = Drawing("a red heart", seed=1, count=2)
        job = queue.submit(drawing, on_progress=hear, on_picture=lambda job, i, picture: pictures.append((i, picture)))
        drawn = job.future.result(WAIT)
    assert [index for index, _ in pictures] == [0, 1]
    assert [picture for _, picture in pictures] == drawn.pictures
    fractions = [fraction for *_, fraction, _ in heard]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    for index in (0, 1):
        previews = [preview for i, stage, _, preview in heard if i == index and stage == "unet_decoder"]
        assert len(previews) == 4 and all(preview.size == (12, 8) for preview in previews)


def test_a_full_queue_refuses_and_says_when(gate):
    with JobQueue(gate, most=2) as queue:
        queue.submit(Drawing("a", seed=0))
        assert gate.entered.wait(WAIT)
        for seed in (1, 2):
            queue.submit(Drawing("a", seed=seed))
        with pytest.raises(QueueFull) as caught:
            queue.submit(Drawing("a", seed=3))
        assert caught.value.seconds >= 1
        assert (queue.waiting, queue.running) == (2, 1)


@pytest.mark.parametrize("running", [False, True])
def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(gate, running):
    with JobQueue(gate) as queue:
        jobs = [queue.submit(Drawing("a", seed=seed)) for seed in range(3)]
        assert gate.entered.wait(WAIT)
        gone = jobs[0 if running else 1]
        assert queue.cancel(gone.id) and not queue.cancel(gone.id)
        with pytest.raises(Cancelled):
            gone.future.result(WAIT)
        gate.open.set()
        for job in jobs:
            if job is not gone:
                assert len(job.future.result(WAIT).pictures) == 1
    assert queue.job(gone.id).state == "cancelled"
    assert len(gate.requests) == (3 if running else 2)


def test_one_job_of_a_batch_is_cancelled_and_the_others_are_drawn(gate):
    with JobQueue(gate, batch=2) as queue:
        queue.submit(Drawing("a", seed=0), on_picture=lambda *_: gate.open.clear())
        assert gate.entered.wait(WAIT)
        gone, other = (queue.submit(Drawing("a red heart", seed=seed)) for seed in (1, 2))
        gate.open.set()
        eventually(lambda: len(gate.requests) == 2)  # Both jobs are at the gate, which is closed again.
        assert queue.cancel(gone.id)
        gate.open.set()
        assert pixels(other.future.result(WAIT).pictures) == pixels(gate.pipeline("a red heart", seed=2).images)
        with pytest.raises(Cancelled):
            gone.future.result(WAIT)
    assert queue.job(gone.id).state == "cancelled" and len(gate.requests) == 2


def test_a_job_that_has_ended_does_not_cancel_a_later_one_of_its_id(gate):
    gate.open.set()
    with JobQueue(gate) as queue:
        first = queue.submit(Drawing("a red heart", seed=1), id="same")
        assert first.future.result(WAIT)
        gate.open.clear()
        running = queue.submit(Drawing("a red heart", seed=1))
        later = queue.submit(Drawing("a red heart", seed=1), id="same")
        assert not queue.cancel(first) and not later.ended
        assert (queue.position(first), queue.position(later)) == (0, 1)
        assert queue.cancel("same") and later.ended and not running.ended


def test_time_ends_for_jobs_that_wait_and_that_run(gate):
    with JobQueue(gate) as queue:
        jobs = [queue.submit(Drawing("a", seed=seed, timeout=0.05)) for seed in range(2)]
        for job in jobs:
            with pytest.raises(Late, match=r"within 0.05 seconds"):
                job.future.result(WAIT)
        gate.open.set()
        assert queue.submit(Drawing("a", seed=3)).future.result(WAIT)


@pytest.mark.parametrize("where", ["on_progress", "on_picture"])
def test_an_error_of_a_listener_is_that_of_its_job_only(pipe, where):
    def fail(*_):
        raise KeyError("mine")

    with JobQueue(pipe) as queue:
        job = queue.submit(Drawing("a", seed=1, count=2), **{where: fail})
        with pytest.raises(KeyError, match="mine"):
            job.future.result(WAIT)
        assert queue.submit(Drawing("a", seed=1)).future.result(WAIT)
    assert job.state == "failed"


def test_an_error_of_the_listener_to_all_jobs_does_not_end_the_worker(pipe):
    heard = []

    def on_drawn(timings, pictures):
        heard.append(pictures)
        if len(heard) == 1:
            raise KeyError("mine")

    with JobQueue(pipe, on_drawn=on_drawn) as queue:
        with pytest.raises(KeyError, match="mine"):
            queue.submit(Drawing("a", seed=1)).future.result(WAIT)
        assert queue.submit(Drawing("a", seed=1)).future.result(WAIT)
    assert heard == [1, 1]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": None}, {"timeout": "5"}, {"timeout": -1.0}, {"seed": None}])
def test_values_that_the_queue_itself_needs_are_checked_at_once(wrong):
    (name,) = wrong
    with pytest.raises(RequestError, match=f"{name}: expected a number of at least"):
        Drawing(**{"prompt": "a", "seed": 1, **wrong})


def test_a_job_is_found_at_every_moment(pipe, monkeypatch):
    found = []
    with JobQueue(pipe) as queue:
        monkeypatch.setattr(jobs_module, "_without_result", lambda job: found.append(queue.job(job.id)) or job)
        job = queue.submit(Drawing("a", seed=1))
        job.future.result(WAIT)
    assert found == [job]


def test_a_wrong_drawing_is_an_error_of_its_job(pipe):
    with JobQueue(pipe) as queue:
        with pytest.raises(RequestError, match="steps"):
            queue.submit(Drawing("a", seed=1, steps=3)).future.result(WAIT)
        assert queue.submit(Drawing("a", seed=1)).future.result(WAIT)


def test_closing_cancels_and_ends_the_thread(gate):
    queue = JobQueue(gate)
    jobs = [queue.submit(Drawing("a", seed=seed)) for seed in range(2)]
    queue.close()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.future.result(0)
    assert not queue._thread.is_alive()
    with pytest.raises(QueueClosed):
        queue.submit(Drawing("a", seed=1))


def test_closing_gives_time_to_end(gate):
    queue = JobQueue(gate)
    jobs = [queue.submit(Drawing("a", seed=seed)) for seed in range(2)]
    threading.Timer(0.05, gate.open.set).start()
    queue.close(WAIT)
    assert all(len(job.future.result(0).pictures) == 1 for job in jobs)


def test_ids_are_found_until_many_others_have_ended(pipe, monkeypatch):
    monkeypatch.setattr("tiue_runtime.serve.jobs._ENDED", 2)
    with JobQueue(pipe) as queue:
        for name in ("one", "two", "three"):
            queue.submit(Drawing("a", seed=1), id=name).future.result(WAIT)
        assert [queue.job(name) is not None for name in ("one", "two", "three")] == [False, True, True]
        assert queue.submit(Drawing("a", seed=1), id="three").future.result(WAIT)


def test_ended_jobs_keep_no_pictures(pipe):
    with JobQueue(pipe) as queue:
        job = queue.submit(Drawing("a", seed=1))
        picture = weakref.ref(job.future.result(WAIT).pictures[0])
        eventually(lambda: not queue.running)
        del job
        eventually(lambda: gc.collect() is not None and picture() is None)


def test_two_jobs_of_one_id_are_refused(gate):
    with JobQueue(gate) as queue:
        queue.submit(Drawing("a", seed=1), id="same")
        with pytest.raises(RequestError, match="already there"):
            queue.submit(Drawing("a", seed=1), id="same")


def test_warnings_of_drawing_belong_to_their_job(pipe, recwarn):
    with JobQueue(pipe) as queue:
        warnings.warn("of another thread", stacklevel=1)
        for _ in range(2):  # Python's own filter shows a warning once.
            drawn = queue.submit(Drawing("an elephant", seed=1)).future.result(WAIT)
            assert len(drawn.warnings) == 1 and "knows no word of 'an elephant'" in drawn.warnings[0]
        assert queue.submit(Drawing("a red heart", seed=1)).future.result(WAIT).warnings == ()
    assert [str(warning.message) for warning in recwarn] == ["of another thread"]


def test_warnings_that_quote_a_prompt_belong_to_its_job_alone(gate):
    """Also in a batch, since two clients may have asked."""
    long = [word + f" {word}" * 500 for word in ("heart", "star")]
    asked = ["an elephant", "a red heart", "a walrus", *long]
    with JobQueue(gate, batch=8) as queue:
        queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        jobs = [queue.submit(Drawing(prompt, seed=1)) for prompt in asked]
        gate.open.set()
        found = [job.future.result(WAIT).warnings for job in jobs]
    assert [len(prompt) if isinstance(prompt, list) else 1 for prompt, _ in gate.requests] == [1, len(asked)]
    unknown, known, other, *cut = found
    assert len(unknown) == 1 and "'an elephant'" in unknown[0] and known == ()
    assert len(other) == 1 and "'a walrus'" in other[0]
    assert [len(one) for one in cut] == [1, 1]
    assert "cut off: 'heart heart" in cut[0][0] and "cut off: 'star star" in cut[1][0]


def test_an_error_of_one_listener_ends_its_job_alone(gate):
    def fails(progress):
        raise KeyError("of the listener")

    with JobQueue(gate, batch=4) as queue:
        queue.submit(Drawing("a red heart", seed=9))
        assert gate.entered.wait(WAIT)
        first = queue.submit(Drawing("a red heart", seed=1), on_progress=fails)
        second = queue.submit(Drawing("a blue star", seed=2), on_progress=lambda _: None)
        gate.open.set()
        assert len(second.future.result(WAIT).pictures) == 1
        assert isinstance(first.future.exception(WAIT), KeyError)


def test_many_queues_change_the_showing_of_warnings_once(pipe):
    JobQueue(pipe).close()
    show = warnings.showwarning
    JobQueue(pipe).close()
    assert warnings.showwarning is show
