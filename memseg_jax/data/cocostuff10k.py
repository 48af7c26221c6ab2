"""COCO-Stuff 10k (version 1.1, 182 ids of things and stuff) from its official folder.

    <config.data.root>/images/<id>.jpg
    <config.data.root>/annotations/<id>.mat
    <config.data.root>/imageLists/{train,test}.txt

The label maps are in field `S` of the MATLAB files: 0 is "unlabeled" and ignored, and so is 255;
id k is class k - 1. Eleven of the 182 ids never occur (street sign, hat, shoe, eye glasses, plate,
mirror, window, desk, door, blender, hair brush): they are classes all the same, as in the published
models. The lists say which samples belong to a split and are needed.
"""

import numpy as np
import scipy.io

from memseg_jax.data import official, scanning
from memseg_jax.errors import PROCESS_ERRORS, UserError

# fmt: off
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird",
    "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "hat",
    "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window", "desk",
    "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "blender", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "hair brush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on
SPLIT_SIZES = {"train": 9000, "test": 1000}
FIELD = "S"

# The data set has no colours of its own.
PALETTE = tuple(official.voc_colour(k) for k in range(len(CLASS_NAMES)))

DATA_SET = official.DataSet(
    title="COCO-Stuff 10k",
    num_classes=len(CLASS_NAMES),
    table=official.label_table({k + 1: k for k in range(len(CLASS_NAMES))}, ignored=(0, 255)),
    layout="images/ (*.jpg), annotations/ (*.mat) and imageLists/ (train.txt, test.txt)",
    download=(
        "Unpack cocostuff-10k-v1.1.zip of github.com/nightrome/cocostuff10k and give the folder "
        "that holds these as config.data.root."
    ),
    sizes=SPLIT_SIZES,
    marks=("images", "annotations", "imageLists/train.txt", "imageLists/test.txt"),
    ids=r"COCO_train2014_\d{12}",
    splits=("train", "test"),
)


class CocoStuff10k(official.OfficialSource):
    """Samples of one split."""

    def read_values(self, path: str) -> np.ndarray:
        """Returns the label map of a MATLAB file; see `read_mat`."""
        return read_mat(path)


def read_mat(path: str) -> np.ndarray:
    """Reads the label map of a MATLAB file.

    Args:
        path: a .mat file with field `S`.

    Returns:
        Numbers [height, width], of the type that they are stored in.

    Raises:
        UserError: the file is missing or damaged, or `S` is not there or not a map of numbers.
    """
    try:
        # Warnings are not turned into errors here: that would be for all threads at once. What
        # scipy warns about and cannot read becomes a text, which is refused below.
        fields = scipy.io.loadmat(path, variable_names=[FIELD], appendmat=False)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except PROCESS_ERRORS:
        raise
    except Exception as error:
        # scipy's readers raise ValueError, TypeError, zlib.error, MatReadError, OSError and others.
        raise UserError(
            f"{path}: not a MATLAB file that can be read, or damaged ({error}). Replace it "
            "with that of the official download."
        ) from error
    if FIELD not in fields:
        there = ", ".join(name for name, *_ in scipy.io.whosmat(path, appendmat=False)) or "nothing"
        raise UserError(
            f"{path}: there is no field {FIELD!r}, which should hold the label map; the file holds "
            f"{there}. Replace it with that of the official download."
        )
    values = fields[FIELD]
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "uif":
        raise UserError(
            f"{path}: field {FIELD!r} holds {getattr(values, 'dtype', type(values).__name__)} "
            f"{getattr(values, 'shape', '')}; expected a map of numbers [height, width]."
        )
    return values


def open_split(data_config, split: str) -> CocoStuff10k:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds `images`, `annotations` and
            `imageLists`.
        split: "train" or "test".

    Returns:
        The source; names are ids such as "COCO_train2014_000000000077".

    Raises:
        UserError: a folder or a list is not there, or a listed image or its label is missing.
    """
    official.check_split(DATA_SET, split, SPLIT_SIZES)
    root = official.root_folder(DATA_SET, data_config)
    images = official.subfolder(DATA_SET, root, "images")
    labels = official.subfolder(DATA_SET, root, "annotations")
    lists = official.subfolder(DATA_SET, root, "imageLists")
    return official.make_source(
        DATA_SET,
        split,
        official.files_by_id(images, scanning.IMAGE_SUFFIXES),
        official.files_by_id(labels, (".mat",)),
        lists / f"{split}.txt",
        source_class=CocoStuff10k,
    )
