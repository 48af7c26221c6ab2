"""PASCAL-Context (59 classes) from the folder of PASCAL VOC 2010.

    <config.data.root>/JPEGImages/<id>.jpg
    <config.data.root>/SegmentationClassContext/<id>.png
    <config.data.root>/ImageSets/SegmentationContext/{train,val}.txt

The root may also be a folder above, as the archive has them (`VOCdevkit/VOC2010`). The label files
hold 0 for the background and 1..59 for the classes; here 0 and 255 are ignored and the classes are
0..58. The lists say which samples belong to a split and are needed.
"""

from memseg_jax.data import official

# fmt: off
CLASS_NAMES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
    "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow",
    "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse",
    "keyboard", "light", "motorbike", "mountain", "mouse", "person", "plate", "platform",
    "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa",
    "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window", "wood",
)
PALETTE = (
    (180, 120, 120), (6, 230, 230), (80, 50, 50), (4, 200, 3), (120, 120, 80), (140, 140, 140),
    (204, 5, 255), (230, 230, 230), (4, 250, 7), (224, 5, 255), (235, 255, 7), (150, 5, 61),
    (120, 120, 70), (8, 255, 51), (255, 6, 82), (143, 255, 140), (204, 255, 4), (255, 51, 7),
    (204, 70, 3), (0, 102, 200), (61, 230, 250), (255, 6, 51), (11, 102, 255), (255, 7, 71),
    (255, 9, 224), (9, 7, 230), (220, 220, 220), (255, 9, 92), (112, 9, 255), (8, 255, 214),
    (7, 255, 224), (255, 184, 6), (10, 255, 71), (255, 41, 10), (7, 255, 255), (224, 255, 8),
    (102, 8, 255), (255, 61, 6), (255, 194, 7), (255, 122, 8), (0, 255, 20), (255, 8, 41),
    (255, 5, 153), (6, 51, 255), (235, 12, 255), (160, 150, 20), (0, 163, 255), (140, 140, 140),
    (250, 10, 15), (20, 255, 0), (31, 255, 0), (255, 31, 0), (255, 224, 0), (153, 255, 0),
    (0, 0, 255), (255, 71, 0), (0, 235, 255), (0, 173, 255), (31, 0, 255),
)
# fmt: on
SPLIT_SIZES = {"train": 4998, "val": 5105}

DATA_SET = official.DataSet(
    title="PASCAL-Context",
    num_classes=len(CLASS_NAMES),
    table=official.label_table({k + 1: k for k in range(len(CLASS_NAMES))}, ignored=(0, 255)),
    layout=(
        "JPEGImages/, SegmentationClassContext/ and ImageSets/SegmentationContext/ with a list of "
        "every split"
    ),
    download=(
        "Unpack VOCtrainval_03-May-2010.tar of host.robots.ox.ac.uk/pascal/VOC, and put the labels "
        "of PASCAL-Context (cs.stanford.edu/~roozbeh/pascal-context), as PNG files of 0 to 59, and "
        "their lists into it."
    ),
    sizes=SPLIT_SIZES,
    # Of the lists of trainval_merged.json, which other toolkits use.
    other_sizes={"train": 4996, "val": 5104},
    marks=("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"),
    ids=r"\d{4}_\d{6}",
    places=("", "VOC2010", "VOCdevkit/VOC2010"),
    splits=("train", "val"),
)


def open_split(data_config, split: str) -> official.OfficialSource:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds `JPEGImages`, or one above.
        split: "train" or "val".

    Returns:
        The source; names are ids such as "2008_000008".

    Raises:
        UserError: a folder or a list is not there, or a listed image or its label is missing.
    """
    return official.open_listed(DATA_SET, data_config, split)
