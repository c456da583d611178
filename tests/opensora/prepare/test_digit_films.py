"""Laws of the second demo's raw videos: every shot of a digit is found once, whole and with its true words, and nothing else is."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from opensora.data import video
from opensora.dataset.prepare_config import Clips, Cut, Filter, Limits
from opensora.dataset.rows import Clip, Media, Provenance, Quarantine, Shot, Source
from opensora.prepare import clip_files, digit_films
from opensora.prepare.captions import digits
from opensora.prepare.digit_films import AGAIN, BEFORE_BLACK, FRAMES, SHOTS, film, write_films, write_ready
from opensora.prepare.filters import judged
from opensora.prepare.look import look
from opensora.prepare.probe import probe

RECIPE = yaml.safe_load((Path(__file__).parents[3] / "configs/demo-videos/pipeline.yaml").read_text())["prepare"]
CUT, FILTER = Cut(**RECIPE["cut"]), Filter(**RECIPE["filter"])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    write_films(folder, 2)
    return folder


def clips_of(path: Path) -> list[tuple[Media, Shot]]:
    looked = look(path, probe(path, Limits()), CUT)
    return [(looked.media, shot) for shot in looked.shots]


def row(number: int, media: Media, shot: Shot) -> Clip:
    return Clip(f"{number:03d}", "0" * 64, Source("x", "x", Provenance()), media, shot, measures=shot.measures)


@pytest.mark.parametrize("number", [0, 1])
def test_each_shot_of_a_digit_becomes_one_clip_and_nothing_else_does(films: Path, number: int) -> None:
    found = clips_of(films / f"film-{number:03d}.mp4")
    assert [shot.start_frame for _, shot in found] == [FRAMES * each for each in range(SHOTS + 3)]
    assert {media.rotation for media, _ in found} == {90 if number == 0 else 0}
    answer = judged([row(place, *each) for place, each in enumerate(found)], FILTER)
    title, black, again = "000", f"{1 + BEFORE_BLACK:03d}", f"{SHOTS + 2:03d}"
    assert set(answer.dropped) == {title, black, again}


@pytest.mark.long
def test_the_clips_of_a_turned_film_say_what_was_drawn(films: Path, tmp_path: Path) -> None:
    found = clips_of(films / "film-000.mp4")
    shots = [each for place, each in enumerate(found) if place not in (0, 1 + BEFORE_BLACK, SHOTS + 2)]
    right = 0
    for place, (media, shot) in enumerate(shots):
        file = clip_files.write(films / "film-000.mp4", media, shot, tmp_path / "clip.mp4", Clips())
        clip = Clip("0", "0" * 64, Source("x", "x", Provenance()), media, shot, file=replace(file, path="clip.mp4"))
        right += digits.caption(clip, tmp_path).text == film(0, 0).captions[place]
    assert right >= SHOTS - 1  # the classifier reads 98 of 100 real digits


def test_the_broken_film_is_one_that_nobody_can_open(films: Path) -> None:
    with pytest.raises(Quarantine):
        probe(films / "broken.mp4", Limits())


def test_clips_given_ready_are_the_same_shots_with_their_words(tmp_path: Path) -> None:
    write_ready(tmp_path, 1)
    with (tmp_path / "captions.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = film(0, 0)
    assert [each["text"] for each in rows] == list(made.captions)
    frames = np.stack(list(video.decode(tmp_path / rows[3]["path"], FRAMES, 1)))
    assert np.abs(frames.astype(int) - made.shots[3]).mean() < 8


def test_a_film_depends_on_seed_and_number_alone() -> None:
    assert np.array_equal(film(1, 2).shots, film(1, 2).shots)
    assert not np.array_equal(film(1, 2).shots, film(1, 3).shots)
    assert not np.array_equal(film(0, 2).shots, film(1, 2).shots)
    assert digit_films.BRIGHTER > 0
    assert AGAIN % 2 == 1, "shown again after a shot with another background"
