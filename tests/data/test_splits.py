import logging

import numpy as np
import pytest

from hf_msn.data.splits import low_shot_indices, match_list_file, read_list_file

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0, 0]


@pytest.fixture
def write(tmp_path):
    def make(lines: list[str], name: str = "subset.txt", ending: str = "\n") -> str:
        (tmp_path / name).write_bytes(ending.join(lines).encode())
        return str(tmp_path / name)

    return make


def test_k_images_of_each_class_are_drawn():
    rows = low_shot_indices(LABELS, images_per_class=2, seed=0)
    assert np.bincount(np.array(LABELS)[rows]).tolist() == [2, 2, 2]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_split_is_the_same_on_every_machine():
    labels = np.repeat(np.arange(3), 10)
    assert low_shot_indices(labels, images_per_class=2, seed=0).tolist() == [1, 6, 13, 17, 23, 24]
    assert low_shot_indices(labels, images_per_class=2, seed=1).tolist() != [1, 6, 13, 17, 23, 24]


def test_classes_are_drawn_independently():
    labels = np.repeat(np.arange(5), 40)
    drawn = low_shot_indices(labels, images_per_class=3, seed=4).reshape(5, 3)
    assert len({tuple(rows % 40) for rows in drawn}) == 5
    fewer = low_shot_indices(labels[:120], images_per_class=3, seed=4)
    np.testing.assert_array_equal(fewer, drawn[:3].ravel())


def test_smaller_split_is_a_part_of_the_larger_one():
    labels = np.repeat(np.arange(4), 30)
    small = low_shot_indices(labels, images_per_class=1, seed=2)
    large = low_shot_indices(labels, images_per_class=5, seed=2)
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, [1, 1, 1]), (0.1, [13, 5, 1]), (0.5, [65, 25, 2]), (1, [130, 50, 4])]
)
def test_fraction_of_each_class_is_rounded_with_at_least_one(fraction, expected):
    labels = np.repeat([0, 1, 2], [130, 50, 4])
    rows = low_shot_indices(labels, fraction=fraction, seed=0)
    assert np.bincount(labels[rows]).tolist() == expected


def test_classes_with_too_few_images_are_named():
    with pytest.raises(ValueError, match=r"2 have fewer: 1 has 3, 2 has 2\."):
        low_shot_indices(LABELS, images_per_class=4, seed=0)
    with pytest.raises(ValueError, match="1 have fewer: fox has 2"):
        low_shot_indices(LABELS, images_per_class=3, seed=0, class_names=["cat", "dog", "fox"])
    with pytest.raises(ValueError, match="1 have fewer: owl has 0"):
        low_shot_indices(LABELS, images_per_class=1, seed=0, class_names=["cat", "dog", "fox", "owl"])


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 1, -1], {"images_per_class": 1}, "row 2 has label -1"),
        ([0, 1], {"images_per_class": 0}, "`images_per_class` .* but is 0"),
        ([0, 1], {"images_per_class": 1.5}, "`images_per_class` .* but is 1.5"),
        ([0, 1], {"fraction": 0}, "`fraction` .* but is 0"),
        ([0, 1], {"fraction": 1.5}, "`fraction` .* but is 1.5"),
        ([0, 1], {}, "None and None"),
        ([0, 1], {"fraction": 0.5, "images_per_class": 1}, "1 and 0.5"),
        ([0, 1], {"images_per_class": 1, "seed": -1}, "`seed` .* but is -1"),
    ],
)
def test_arguments_out_of_range_are_refused(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        low_shot_indices(labels, **{"seed": 0, **settings})


def test_list_file_is_read_line_by_line(write):
    path = write(["n01_1.JPEG", "", "  n02_7.JPEG  ", ""], ending="\r\n")
    assert read_list_file(path) == ["n01_1.JPEG", "n02_7.JPEG"]


def test_files_in_another_format_are_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.txt"):
        read_list_file(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"subset.txt"):
        read_list_file(write(["", " "]))
    with pytest.raises(ValueError, match=r"2 of 3 .* hello, x y\."):
        read_list_file(write(["hello", "n01_1.JPEG", "x y"]))
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"image.txt"):
        read_list_file(tmp_path / "image.txt")


def test_names_are_matched_without_folder_and_extension(write):
    path = write(["n02_7.JPEG", "n01_1.JPEG"])
    rows = match_list_file(path, ["/data/train/n01/n01_1.jpg", None, "n01_2.JPEG", "n02/n02_7.png"])
    assert rows.tolist() == [3, 0]
    assert rows.dtype == np.int64


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["n1_2_n1.JPEG", "n1_3_n1.JPEG", "n1_1_n1.JPEG"], [2, 0]),  # as on the Hub
        (["n1_1_n1.JPEG", "n1_1.JPEG", "n1_2.JPEG"], [1, 2]),  # the exact name wins
    ],
)
def test_names_may_end_in_their_class(write, names, rows):
    assert match_list_file(write(["n1_1.JPEG", "n1_2.JPEG"]), names).tolist() == rows


CLASS_FOLDERS = ["cat/000.jpg", "cat/001 (1).jpg", "big dog/000.jpg", "big dog/IMG 7.png", "fox/x_1.jpg"]
FILES = [f"/d/{name}" for name in CLASS_FOLDERS]


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (["cat/000.jpg", "big dog/000.jpg", "cat/001 (1).jpg"], [0, 2, 1]),  # relative paths
        (["./cat/000.jpg", "d/big dog/000.jpg", "cat\\001 (1).JPEG"], [0, 2, 1]),
        (["cat_000.jpg", "big dog_000.jpg", "fox_x_1"], [0, 2, 4]),  # <class>_<name>
        (["IMG 7.png", "001 (1).jpg", "x_1.jpg"], [3, 1, 4]),  # unique file names
        (["x_1.jpg", "fox/x_1.jpg", "cat/000.jpg"], [4, 0]),  # one image twice
    ],
)
def test_images_in_class_folders_are_found(write, lines, rows):
    assert match_list_file(write(lines), FILES).tolist() == rows


@pytest.mark.parametrize(
    "line", ["000.jpg", "fox/000.jpg", "cat/IMG 7.png", "dog_000.jpg", "owl/IMG 7.png", "cat/x_1.jpg"]
)
def test_names_of_several_files_and_of_other_folders_are_refused(write, line):
    with pytest.raises(ValueError, match=line.split(".")[0]):
        match_list_file(write([line]), FILES)


def test_file_of_another_class_is_not_the_listed_one(write):
    with pytest.raises(ValueError, match="bird/my_000"):
        match_list_file(write(["bird/my_000.png"]), ["cat/my_000.png", "dog/my_001.png"])
    assert match_list_file(write(["all/cat_000.png"]), ["cat/cat_000.png"]).tolist() == [0]


@pytest.mark.parametrize(
    ("lines", "rows"), [(["cat/000.png"], [1]), (["000.jpg"], [0]), (["cat\\000.png", "cat/000.jpg"], [1, 0])]
)
def test_extension_decides_where_files_differ_in_nothing_else(write, lines, rows):
    assert match_list_file(write(lines), ["cat/000.jpg", "cat/000.png"]).tolist() == rows


def test_names_without_a_row_are_refused(write):
    path = write([f"a_{number}.JPEG" for number in range(9)])
    with pytest.raises(ValueError, match=r"7 of 9 are not: a_2, a_3, a_4, a_5, a_6, \.\.\."):
        match_list_file(path, ["a_0.JPEG", "a_1.JPEG", "a_2_b.JPEG"])


def test_names_in_several_rows_are_refused(write):
    with pytest.raises(ValueError, match=r"1 names .* a_1 \(rows 0, 2\)"):
        match_list_file(write(["a_1.JPEG", "a_2.JPEG"]), ["x/a_1.png", "a_2.png", "y/a_1.png"])


@pytest.mark.parametrize(
    ("lines", "name", "logged"),
    [
        (
            ["a_1.JPEG", "a_2.JPEG", "b_1.JPEG", "b_2.JPEG"],
            "3imgs_class.txt",
            "2 per class, although its name says 3",
        ),
        (["a_1.JPEG", "a_2.JPEG", "b_1.JPEG"], "subset.txt", "1 to 2 per class"),
        (["a_1.JPEG", "b_1.JPEG"], "1imgs_class.txt", None),
        (["a_1.JPEG", "a_2.JPEG", "b_1.JPEG"], "1percent.txt", None),
    ],
)
def test_uneven_list_and_one_that_differs_from_its_name_are_logged(write, caplog, lines, name, logged):
    with caplog.at_level(logging.WARNING):
        match_list_file(write(lines, name), lines)
    assert (logged in caplog.text) if logged else caplog.text == ""


def test_repeated_names_count_once_and_are_logged(write, caplog):
    lines = ["a_1.JPEG", "b_1.JPEG", "a_1.JPEG"]
    path = write(lines, "1imgs_class.txt")
    assert match_list_file(path, ["a_1.JPEG", "b_1.JPEG"]).tolist() == [0, 1]
    assert "1 names occur more than once (a_1) and count once" in caplog.text
