"""A reader's summary tells counts, reasons and first names."""

from poisonshield.data.summary import Summary


def test_lines_tell_what_was_read_left_out_and_decided():
    summary = Summary("photos")
    summary.take("images", 1200)
    summary.take("masks")
    for n in range(7):
        summary.leave_out("damaged pictures", f"{n}.jpg")
    summary.leave_out("files that are no pictures", "notes.txt")
    for _ in range(2):
        summary.choose("val/ is the test split.")
    assert list(summary.lines()) == [
        "photos: read 1,200 images, 1 masks.",
        "left out: 7 damaged pictures: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more.",
        "left out: 1 files that are no pictures: notes.txt.",
        "val/ is the test split.",
    ]
    assert summary.number_left_out == 8


def test_empty_source_is_told_too():
    assert list(Summary("photos").lines()) == ["photos: read nothing."]
