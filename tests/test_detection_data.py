"""Images with boxes: the forms that are read, what is mended and reported, what is refused."""

import logging

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from iekd_hf.commands.boxes import data as detection_data
from iekd_hf.commands.boxes import shapes


BOXES = [[[2.0, 3.0, 10.0, 8.0], [20.0, 20.0, 6.0, 6.0]], [[0.0, 0.0, 40.0, 30.0]], []]


def rows(boxes=BOXES, categories=None, names=("cat", "dog"), size=(40, 30), kind="int64", **columns):
    """Make a data set of images of one size with these boxes."""
    categories = categories or [[i % 2 for i in range(len(image))] for image in boxes]
    fields = {"bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    if names:
        fields["category"] = datasets.List(datasets.ClassLabel(names=list(names)))
    else:
        fields["category"] = datasets.List(datasets.Value("string" if isinstance(categories[0][0], str) else kind))
    fields |= {name: datasets.List(datasets.Value("float32")) for name in columns}
    objects = [
        dict(zip(fields, values, strict=True)) for values in zip(boxes, categories, *columns.values(), strict=True)
    ]
    examples = [{"image": PIL.Image.new("RGB", size), "objects": image} for image in objects]
    return datasets.Dataset.from_list(examples, datasets.Features({"image": datasets.Image(), "objects": fields}))


def load(tmp_path, train=None, validation=None, **kwargs):
    for name, split in (("train", train), ("validation", validation)):
        (rows() if split is None else split).to_parquet(tmp_path / f"{name}.parquet")
    files = {f"{name}_file": str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}
    return detection_data.load_annotated(detection_data.DetectionDataArguments(**files, **kwargs), 0)


def test_lists_by_field_and_a_list_of_objects_are_the_same(tmp_path):
    splits, names = load(tmp_path, rows(area=[[50.0, 36.0], [1000.0], []]))
    assert names == ["cat", "dog"]
    assert splits["train"].truth([0, 1, 2]) == [
        {"boxes": BOXES[0], "labels": [0, 1], "area": [50.0, 36.0], "iscrowd": [0, 0]},
        {"boxes": BOXES[1], "labels": [0], "area": [1000.0], "iscrowd": [0]},
        {"boxes": [], "labels": [], "area": [], "iscrowd": []},
    ]
    as_list = [
        [{"bbox": box, "category": label} for box, label in zip(image, (0, 1), strict=False)] for image in BOXES
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.List(
                {
                    "bbox": datasets.List(datasets.Value("float32")),
                    "category": datasets.ClassLabel(names=["cat", "dog"]),
                }
            ),
        }
    )
    images = [PIL.Image.new("RGB", (40, 30))] * 3
    other = datasets.Dataset.from_dict({"image": images, "objects": as_list}, features)
    from_list, _ = load(tmp_path, other)
    for name in ("boxes", "labels"):
        assert from_list["train"].objects[name] == splits["train"].objects[name]
    assert from_list["train"].truth([1])[0]["area"] == [1200.0]


def test_classes_by_name_by_number_and_across_splits(tmp_path):
    splits, names = load(tmp_path, rows(names=None), rows(categories=[[1, 1], [0], []], names=None))
    assert names == ["0", "1"] and splits["validation"].truth([0])[0]["labels"] == [1, 1]
    strings = rows(categories=[["dog", "cat"], ["dog"], []], names=None)
    splits, names = load(tmp_path, strings, rows(names=("dog", "cat")))  # the other order
    assert names == ["cat", "dog"]
    assert splits["train"].truth([0])[0]["labels"] == splits["validation"].truth([0])[0]["labels"] == [1, 0]


def test_boxes_outside_are_clipped_or_dropped_and_counted_once(tmp_path, caplog):
    boxes = [
        [[-5.0, 3.0, 10.0, 8.0], [38.0, 1.0, 5.0, 5.0], [4.0, 4.0, 4.0, 4.0]],
        [[50.0, 5.0, 5.0, 5.0]],
        [[1.0, 1.0, 0.0, 7.0]],
    ]
    splits, _ = load(tmp_path, rows(boxes))
    assert splits["train"].objects["boxes"] == [
        [[0.0, 3.0, 5.0, 8.0], [38.0, 1.0, 2.0, 5.0], [4.0, 4.0, 4.0, 4.0]],
        [],
        [],
    ]
    assert splits["train"].objects["labels"] == [[0, 1, 0], [], []]
    assert splits["train"].objects["area"] == [[40.0, 10.0, 16.0], [], []]
    (record,) = [record for record in caplog.records if record.name == detection_data.__name__]
    assert record.levelno == logging.WARNING and record.getMessage() == (
        "Boxes outside their image: 4 of 5 in the train split (2 clipped, 2 without area inside left out)."
    )


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([[[0.1, 0.2, 0.3, 0.3]], [[0.5, 0.5, 0.5, 0.5]]], "in pixels in the train split, got numbers from 0 to 1"),
        ([[[20.0, 10.0, 39.0, 29.0]], [[25.0, 3.0, 40.0, 30.0]]], r"got what looks like corners \[x0, y0, x1, y1\]"),
        ([[[1.0, 1.0, 4.0, 4.0]], [[1.0, 2.0, 3.0]]], r"got \[\[1.0, 2.0, 3.0\]\] in row 1 of the train split"),
        ([[[1.0, 1.0, float("nan"), 4.0]], []], "in row 0 of the train split: fix"),
        ([[], []], "boxes in the train split, got none in 2 images"),
    ],
)
def test_boxes_of_another_form_are_refused(tmp_path, boxes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows(boxes))


def test_annotations_of_another_format_are_refused(tmp_path):
    flat = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", (8, 8))], "bboxes": [[[1, 1, 2, 2]]]})
    flat = flat.cast_column("image", datasets.Image())
    with pytest.raises(
        ValueError,
        match=r"a column 'objects' in the train split, with `bbox` \[x, y, width, height\] in pixels and `category` "
        r"of each object, got the columns image, bboxes: bring .* --objects_column_name",
    ):
        load(tmp_path, flat)
    with pytest.raises(ValueError, match="got the columns image, objects"):
        load(tmp_path, objects_column_name="annotations")
    other = datasets.Dataset.from_dict({"image": [b""], "objects": [{"boxes": [[1, 1, 2, 2]], "category": [0]}]})
    with pytest.raises(ValueError, match="got the fields boxes, category"):
        load(tmp_path, other.cast_column("image", datasets.Image()))
    with pytest.raises(ValueError, match="a category for each bbox, got 1 for 2 in row 0 of the train split"):
        load(tmp_path, rows(categories=[[0], [0], []]))
    for field, values, words in (
        ("area", [[50.0], [9.0], []], "a number of at least 0 as area for each bbox, got 1 for 2 in row 0"),
        ("area", [[50.0, 9.0], [None], []], "a number of at least 0 as area for each bbox, got None in row 1"),
        ("area", [[50.0, float("nan")], [9.0], []], "as area for each bbox, got nan in row 0"),
        ("area", [[50.0, 9.0], [-5.0], []], "as area for each bbox, got -5.0 in row 1"),
        ("iscrowd", [[0.0, 7.0], [0.0], []], "Expected 0 or 1 as iscrowd for each bbox, got 7.0 in row 0"),
    ):
        with pytest.raises(ValueError, match=f"{words} of the train split: fix or remove"):
            load(tmp_path, rows(**{field: values}))


def test_categories_as_tables_have_them(tmp_path):
    """Numbers that pandas has made floats are their integers; what is between two classes is none."""
    kind = rows(names=None).features
    kind["objects"]["category"] = datasets.List(datasets.Value("float64"))
    splits, names = load(tmp_path, rows(names=None).cast(kind), rows(names=None).cast(kind))
    assert names == ["0", "1"] and splits["train"].truth([0])[0]["labels"] == [0, 1]
    with pytest.raises(ValueError, match=r"a category for every object in the train split, got 1\.5 in row 1"):
        load(tmp_path, rows(categories=[[0, 1], [1.5], []], names=None, kind="float64"))
    nested = rows(names=None).remove_columns("objects")
    nested = nested.add_column("objects", [{"bbox": [[1, 1, 5, 5]], "category": [[0, 1]]}] * 3)
    with pytest.raises(ValueError, match="one `category` of each object in the train split, a name or a number, got"):
        load(tmp_path, nested)


@pytest.mark.parametrize("form", ["no column", "null", "empty"])
def test_a_test_split_without_objects_is_predicted(tmp_path, form):
    (tmp_path / "data").mkdir()
    test = rows().remove_columns("objects")
    if form == "null":
        test = test.add_column("objects", [None] * 3)
    elif form == "empty":
        test = rows([[], [], []], categories=[[], [], []])
    for name, split in (("train", rows()), ("validation", rows()), ("test", test)):
        split.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    args = detection_data.DetectionDataArguments(dataset_name=str(tmp_path))
    splits, _ = detection_data.load_annotated(args, 0)
    assert splits["test"].truth([0, 2]) == [{"boxes": [], "labels": [], "area": [], "iscrowd": []}] * 2
    assert [image.size for _, image, _ in splits["test"].rows([0, 1, 2])] == [(40, 30)] * 3


def test_rows_are_named_as_in_the_file(tmp_path):
    boxes = [[[1.0, 1.0, 4.0 + i, 4.0]] for i in range(10)]
    rows(boxes, area=[[9.0]] * 6 + [[-1.0]] + [[9.0]] * 3).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"got -1\.0 in row 6 of the"):
        detection_data.load_annotated(
            detection_data.DetectionDataArguments(train_file=str(tmp_path / "train.parquet")), seed=1
        )


def test_categories_outside_the_label_map_are_refused(tmp_path):
    with pytest.raises(ValueError, match="among the training split's 2 classes, got 'cow' in row 1: fix it"):
        load(tmp_path, validation=rows(categories=[[0, 1], [2], []], names=("cat", "dog", "cow")))
    beyond = rows(categories=[[0, 7], [1], []], names=None)
    features = rows().features
    beyond = datasets.Dataset(beyond.data.cast(features.arrow_schema), datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match="classes, got 7 in row 0"):
        load(tmp_path, beyond)


def test_empty_splits_and_files_that_are_no_image(tmp_path):
    with pytest.raises(ValueError, match="images in the train split, got an empty one"):
        load(tmp_path, rows().select([]))
    broken = rows().to_dict()
    broken["image"][1] = {"bytes": b"no image", "path": "b.png"}
    broken = datasets.Dataset.from_dict(broken, rows().features)
    with pytest.raises(ValueError, match=r"image in row 1 of the train split \(b.png\), got something that cannot"):
        load(tmp_path, broken)


def test_a_photograph_taken_upright_is_as_high_as_it_is_decoded(tmp_path):
    """Its pixels are stored lying, and turned by its EXIF data; boxes are in the turned image."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", exif=exif)
    split = rows([[[2.0, 30.0, 10.0, 28.0]]], size=(40, 60)).remove_columns("image")
    split = split.add_column("image", [str(tmp_path / "photo.jpg")]).cast_column("image", datasets.Image())
    splits, _ = load(tmp_path, split)
    ((_, image, objects),) = splits["train"].rows([0])
    assert image.size == (40, 60) and objects["boxes"] == [[2.0, 30.0, 10.0, 28.0]]


def test_a_part_of_the_training_split_validates(tmp_path):
    split = rows([[[1.0, 1.0, 4.0 + i, 4.0]] for i in range(10)])
    split.to_parquet(tmp_path / "train.parquet")
    arguments = detection_data.DetectionDataArguments(train_file=str(tmp_path / "train.parquet"), train_val_split=0.3)
    splits, _ = detection_data.load_annotated(arguments, seed=1)
    assert {name: len(part) for name, part in splits.items()} == {"train": 7, "validation": 3}
    boxes = [image[0] for part in splits.values() for image in part.objects["boxes"]]
    assert sorted(boxes) == [[1.0, 1.0, 4.0 + i, 4.0] for i in range(10)]


def test_wrong_sizes_are_refused():
    for wrong, message in (
        ({"image_size": [32]}, "height and width, got"),
        ({"image_size": [32, 32], "image_square_size": 32}, "got both: keep one"),
        ({"image_square_size": 0}, "image_square_size of at least 1 pixel, got 0"),
        ({"scale_jitter": 0.5}, "scale_jitter of at least 1, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            detection_data.DetectionDataArguments(**wrong)


def test_shapes_are_what_their_boxes_say():
    """Drawn again, mask by mask, from the same numbers: each box just encloses its shape's pixels."""
    first, second = shapes.make_shapes(20, seed=3), shapes.make_shapes(20, seed=3)
    assert first[:]["objects"] == second[:]["objects"]
    assert np.array_equal(np.asarray(first[7]["image"]), np.asarray(second[7]["image"]))
    assert shapes.make_shapes(5, seed=4)[:]["objects"] != first[:5]["objects"]
    assert {label for image in first["objects"] for label in image["category"]} == {0, 1, 2, 3}
    for category in range(4):
        mask = shapes.draw_mask(category, np.random.default_rng(category), 96)
        x0, y0, x1, y1 = mask.getbbox()
        assert shapes.box_of(np.asarray(mask) > 0) == [x0, y0, x1 - x0, y1 - y0]
    for objects in first["objects"]:
        for x, y, width, height in objects["bbox"]:
            assert min(x, y) >= 0 and max(x + width, y + height) <= 96 and min(width, height) > 4
