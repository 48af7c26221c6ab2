"""PASCAL VOC 2012 (21 classes) from its official folder.

    <config.data.root>/JPEGImages/<id>.jpg
    <config.data.root>/SegmentationClass/<id>.png
    <config.data.root>/ImageSets/Segmentation/{train,val,trainval,trainaug}.txt

The root may also be a folder above, as the archive has them (`VOCdevkit/VOC2012`). The label files
hold the classes themselves, of which 0 is the background; 255, the border of objects, is ignored.
The lists say which samples belong to a split and are needed.

Split "trainaug", on which the published models are trained, is `train` and the images that the
Semantic Boundaries Dataset adds; its list and its labels are not in the archive.
"""

from memseg_jax.data import official

# fmt: off
CLASS_NAMES = (
    "__background__", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
    "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
    "sofa", "train", "tvmonitor",
)
# fmt: on
PALETTE = tuple(official.voc_colour(k) for k in range(len(CLASS_NAMES)))
SPLIT_SIZES = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582}

DATA_SET = official.DataSet(
    title="PASCAL VOC 2012",
    num_classes=len(CLASS_NAMES),
    table=official.label_table({k: k for k in range(len(CLASS_NAMES))}, ignored=(255,)),
    layout="JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/ with a list per split",
    download=(
        "Unpack VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC. For trainaug, put "
        "trainaug.txt beside the other lists, and the labels of the Semantic Boundaries "
        "Dataset, as PNG files of class ids, into SegmentationClass/."
    ),
    sizes=SPLIT_SIZES,
    marks=("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
    ids=r"\d{4}_\d{6}",
    places=("", "VOC2012", "VOCdevkit/VOC2012"),
    splits=("train", "val"),
)


def open_split(data_config, split: str) -> official.OfficialSource:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds `JPEGImages`, or one above.
        split: "train", "val", "trainval" or "trainaug".

    Returns:
        The source; names are ids such as "2007_000032".

    Raises:
        UserError: a folder or a list is not there, or a listed image or its label is missing.
    """
    return official.open_listed(DATA_SET, data_config, split)
