"""Reads every format that `florence label` has written of the sample pictures, as the tool it is for
reads it, and holds it against the lines.

usage: formats.py DIRECTORY: it has `labels.jsonl`, the pictures, and a file or folder for each format.
"""

import csv
import json
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import supervision as sv
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

root = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in (root / "labels.jsonl").read_text().splitlines()]
files = list(dict.fromkeys(line["file"] for line in lines))
sizes = {line["file"]: (line["width"], line["height"]) for line in lines}


def answers(file, task):
    found = [line for line in lines if (line["file"], line["task"]) == (file, task)]
    assert len(found) == 1, (file, task)
    return found[0]["answer"][task], found[0]["scores"]


OD, SEGMENTATION = "<OD>", "<REFERRING_EXPRESSION_SEGMENTATION>"
boxes = {}  # file -> [(label, [x1, y1, x2, y2], score)]
polygons = {}  # file -> [[x, y, x, y, ..]]
captions = {}
for file in files:
    answer, scores = answers(file, OD)
    boxes[file] = list(zip(answer["labels"], answer["bboxes"], scores))
    polygons[file] = answers(file, SEGMENTATION)[0]["polygons"]
    captions[file] = answers(file, "<CAPTION>")[0]
assert sum(map(len, boxes.values())) >= 8 and sum(map(len, polygons.values())) >= 3
names = sorted({label for of in boxes.values() for label, _, _ in of} | {"a red square"})


def check_supervision():
    for line in lines:
        if line["task"] not in (OD, SEGMENTATION):
            continue
        found = sv.Detections.from_vlm(
            sv.VLM.FLORENCE_2, line["answer"], resolution_wh=(line["width"], line["height"])
        )
        if line["task"] == OD:
            np.testing.assert_allclose(found.xyxy, line["answer"][OD]["bboxes"], rtol=1e-6)


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def check_coco():
    coco = COCO(root / "coco.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == names
    for image in coco.loadImgs(coco.getImgIds()):
        file = image["file_name"]
        assert (image["width"], image["height"]) == sizes[file]
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        plain = [a for a in annotations if not a["segmentation"]]
        for (label, box, score), annotation in zip(boxes[file], plain, strict=True):
            assert names[annotation["category_id"] - 1] == label
            np.testing.assert_allclose(annotation["bbox"], xywh(box), rtol=1e-6)
            np.testing.assert_allclose(annotation["area"], np.prod(annotation["bbox"][2:]))
            np.testing.assert_allclose(annotation["score"], score)
        outlined = [a for a in annotations if a["segmentation"]]
        for parts, annotation in zip(polygons[file], outlined, strict=True):
            np.testing.assert_allclose(np.concatenate(annotation["segmentation"]), np.concatenate(parts))
            covered = coco.annToMask(annotation).sum()
            assert abs(covered - annotation["area"]) < 0.1 * annotation["area"] + 50
    results = coco.loadRes(str(root / "results.json"))
    evaluation = COCOeval(coco, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.99, evaluation.stats
    dataset = sv.DetectionDataset.from_coco(str(root), str(root / "coco.json"))
    assert len(dataset) == len(files) and dataset.classes == names


# https://docs.ultralytics.com/datasets/detect and /segment: a file for each picture, its path that of
# the picture with `labels` for `images`; rows of a class and numbers from 0 to 1, five columns for
# boxes, an odd number of at least seven for outlines; names by index in data.yaml.
def yolo(folder):
    data = yaml.safe_load((folder / "data.yaml").read_text())
    assert data["names"] == dict(enumerate(names)) and data["train"] and data["val"]
    pictures = pathlib.Path(data["path"]) / data["train"]
    for file in files:
        picture = pictures / file
        Image.open(picture).verify()
        labels = pathlib.Path(str(picture).replace("/images/", "/labels/")).with_suffix(".txt")
        rows = [list(map(float, row.split())) for row in labels.read_text().splitlines()]
        for row in rows:
            assert row[0] in data["names"] and all(0 <= number <= 1 for number in row[1:])
        yield file, rows


def check_yolo():
    for file, rows in yolo(root / "yolo"):
        (width, height), scale = sizes[file], np.array([*sizes[file]] * 2)
        assert all(len(row) == 5 for row in rows)
        assert len(rows) == len(boxes[file]) + len(polygons[file])
        for (label, box, _), (name, x, y, w, h) in zip(boxes[file], rows):
            assert names[int(name)] == label
            corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * scale
            np.testing.assert_allclose(corners, box, atol=0.01)
    dataset = sv.DetectionDataset.from_yolo(
        str(root / "yolo/images/pics"), str(root / "yolo/labels/pics"), str(root / "yolo/data.yaml")
    )
    assert len(dataset) == len(files)
    for file, rows in yolo(root / "yolo-seg"):
        assert all(len(row) >= 7 and len(row) % 2 == 1 for row in rows)
        outlines = [row[1:] for row in rows if names[int(row[0])] == "a red square"]
        expected = [part for parts in polygons[file] for part in parts]
        for part, outline in zip(expected, outlines, strict=True):
            scale = np.tile(sizes[file], len(outline) // 2)
            np.testing.assert_allclose(np.array(outline) * scale, part, atol=0.01)


def check_voc():
    dataset = sv.DetectionDataset.from_pascal_voc(str(root / "pics"), str(root / "voc/pics"))
    assert len(dataset) == len(files)
    for path, _, found in dataset:
        file = str(pathlib.Path(path).relative_to(root))
        of_boxes = found.xyxy[: len(boxes[file])]
        np.testing.assert_allclose(of_boxes, [box for _, box, _ in boxes[file]], atol=0.51)
        labels = [dataset.classes[i] for i in found.class_id[: len(boxes[file])]]
        assert labels == [label for label, _, _ in boxes[file]]


# https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/: annotations of images, 1.1.
def check_cvat():
    tree = ElementTree.parse(root / "cvat.xml").getroot()
    assert tree.tag == "annotations" and tree.findtext("version") == "1.1"
    assert [it.text for it in tree.findall("meta/task/labels/label/name")] == names
    images = tree.findall("image")
    assert [int(image.get("id")) for image in images] == list(range(len(files)))
    for file, image in zip(files, images, strict=True):
        assert image.get("name") == file
        assert (int(image.get("width")), int(image.get("height"))) == sizes[file]
        for (label, box, _), found in zip(boxes[file], image.findall("box"), strict=True):
            assert found.get("label") == label and found.get("occluded") == "0"
            corners = [float(found.get(name)) for name in ("xtl", "ytl", "xbr", "ybr")]
            np.testing.assert_allclose(corners, box, atol=0.01)
        outlines = [part for parts in polygons[file] for part in parts]
        for part, found in zip(outlines, image.findall("polygon"), strict=True):
            points = [list(map(float, point.split(","))) for point in found.get("points").split(";")]
            np.testing.assert_allclose(np.concatenate(points), part, atol=0.01)


# labelme/_label_file.py: these keys are needed, points are pairs, a rectangle has two.
def check_labelme():
    for file in files:
        found = json.loads((root / "labelme" / file).with_suffix(".json").read_text())
        assert found["imageData"] is None and isinstance(found["version"], str)
        assert (found["imageWidth"], found["imageHeight"]) == sizes[file]
        Image.open(root / "labelme" / found["imagePath"]).verify()
        for shape in found["shapes"]:
            assert set(shape) >= {"label", "points", "group_id", "shape_type", "flags"}
        rectangles = [it for it in found["shapes"] if it["shape_type"] == "rectangle"]
        for (label, box, _), shape in zip(boxes[file], rectangles, strict=True):
            assert shape["label"] == label
            np.testing.assert_allclose(np.concatenate(shape["points"]), box, rtol=1e-6)
        outlines = [it for it in found["shapes"] if it["shape_type"] == "polygon"]
        expected = [part for parts in polygons[file] for part in parts]
        for part, shape in zip(expected, outlines, strict=True):
            np.testing.assert_allclose(np.concatenate(shape["points"]), part, rtol=1e-6)


# https://labelstud.io/guide/predictions: places in percent, regions named by type.
def check_label_studio():
    tasks = json.loads((root / "label-studio.json").read_text())
    for file, task in zip(files, tasks, strict=True):
        assert task["data"]["image"] == file
        [prediction] = task["predictions"]
        assert prediction["model_version"] == "tiny" and 0 < prediction["score"] <= 1
        regions = prediction["result"]
        assert len({region["id"] for region in regions}) == len(regions)
        for region in regions:
            assert region["type"] in region["value"] or region["type"] == "textarea"
            assert (region["original_width"], region["original_height"]) == sizes[file]
        rectangles = [it["value"] for it in regions if it["type"] == "rectanglelabels"]
        for (label, box, _), value in zip(boxes[file], rectangles, strict=True):
            assert value["rectanglelabels"] == [label] and value["rotation"] == 0
            scale = np.array([*sizes[file]] * 2) / 100
            placed = np.array([value["x"], value["y"], value["width"], value["height"]]) * scale
            np.testing.assert_allclose(placed, xywh(box), rtol=1e-6)
        [text] = [it["value"]["text"] for it in regions if it["type"] == "textarea"]
        assert text == [captions[file]]


# fiftyone/utils/data/importers.py, FiftyOneImageDetectionDatasetImporter: labels by the name of the
# picture without ending, boxes as [x, y, width, height] from 0 to 1.
def check_fiftyone():
    found = json.loads((root / "fiftyone.json").read_text())
    assert found["classes"] == names
    for file in files:
        detections = found["labels"][file.rsplit(".", 1)[0]]
        for (label, box, score), detection in zip(boxes[file], detections):
            assert found["classes"][detection["label"]] == label
            scale = np.array([*sizes[file]] * 2)
            np.testing.assert_allclose(np.array(detection["bounding_box"]) * scale, xywh(box))
            np.testing.assert_allclose(detection["confidence"], score)


def check_csv():
    with open(root / "csv.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    for file in files:
        of_file = [row for row in rows if row["file"] == file]
        found = [row for row in of_file if row["prompt"] == OD]
        for (label, box, score), row in zip(boxes[file], found, strict=True):
            assert row["label"] == label and float(row["score"]) == score
            np.testing.assert_allclose([float(row[n]) for n in ("x1", "y1", "x2", "y2")], box)
        assert [row["text"] for row in of_file if row["text"]] == [captions[file]]


# maestro's Florence-2 loader: image, prefix, suffix; the suffix is what the model has generated.
def check_florence():
    found = [json.loads(line) for line in (root / "florence.jsonl").read_text().splitlines()]
    assert len(found) == len(lines)
    generated = {(line["file"], line["prompt"]): line["text"] for line in lines}
    for line in found:
        text = re.sub("</?s>|<pad>", "", generated[line["image"], line["prefix"]])
        assert line["suffix"] == text, line


def check_captions():
    for file in files:
        text = (root / "captions" / file).with_suffix(".txt").read_text()
        assert text == captions[file] + "\n"
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    assert len({tuple(row) for row in rows}) == 1, "not the same columns in all"
    for file, row in zip(files, rows, strict=True):
        assert (row["file_name"], row["text"]) == (file, captions[file])
        count = len(boxes[file])
        assert row["objects"]["category"][:count] == [label for label, _, _ in boxes[file]]
        np.testing.assert_allclose(
            row["objects"]["bbox"][:count], [xywh(box) for _, box, _ in boxes[file]], rtol=1e-6
        )


def check_masks():
    assert (root / "masks/classes.txt").read_text().splitlines() == names
    for file in files:
        mask = Image.open((root / "masks" / file).with_suffix(".png"))
        assert mask.mode == "P" and mask.size == sizes[file]
        mask = np.array(mask)
        # The smallest object lies above the others.
        label, box, _ = min(boxes[file], key=lambda it: np.prod(xywh(it[1])[2:]))
        inner = mask[round(box[1]) + 2 : round(box[3]) - 2, round(box[0]) + 2 : round(box[2]) - 2]
        covered = {names.index(label) + 1, names.index("a red square") + 1}
        assert set(np.unique(inner)) <= covered and names.index(label) + 1 in inner
        assert mask[0, 0] == 0


for check in [value for name, value in list(globals().items()) if name.startswith("check_")]:
    check()
    print(check.__name__, "ok")
