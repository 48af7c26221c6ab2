"""Cityscapes (fine annotations, 19 classes) from its official folders.

    <config.data.root>/leftImg8bit/{train,val,test}/<city>/<id>_leftImg8bit.png
    <config.data.root>/gtFine/{train,val,test}/<city>/<id>_gtFine_labelIds.png

The label files hold official label ids; 19 of them are classes and all others are ignored. Split
"trainval" is train and val together, from their own folders. The labels of "test" are not public:
its images can be segmented for the benchmark server, but not scored here.

A list of ids (`train.txt`, `val.txt`, `trainval.txt`, `test.txt` in the root; "<id>", "<city>/<id>"
or "<city>/<id>_leftImg8bit" per line) chooses and orders the samples of its split; the download has
none and needs none.
"""

from memseg_jax.data import official

# fmt: off
CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic_light", "traffic_sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle",
)
PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)
# Official label id of each class, in order; the benchmark server wants these.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: on
SPLIT_SIZES = {"train": 2975, "val": 500, "trainval": 3475, "test": 1525}

DATA_SET = official.DataSet(
    title="Cityscapes",
    num_classes=len(CLASS_NAMES),
    # License plates have the id -1, which is 255 in an 8-bit file.
    table=official.label_table(
        {label_id: k for k, label_id in enumerate(LABEL_IDS)}, ignored=[*range(34), 255]
    ),
    layout="leftImg8bit/ and gtFine/ with train/, val/ and test/ in each, and a folder per city",
    download=(
        "Unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        "www.cityscapes-dataset.com in one folder and give that as config.data.root."
    ),
    sizes=SPLIT_SIZES,
    marks=("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"),
    ids=r"[a-z-]+",
)
_IMAGE_ENDING = "_leftImg8bit"
BENCHMARK = official.Benchmark("Cityscapes", f"{_IMAGE_ENDING}.png", LABEL_IDS)
_LABEL_ENDING = "_gtFine_labelIds"


def open_split(data_config, split: str) -> official.OfficialSource:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds `leftImg8bit` and `gtFine`.
        split: "train", "val", "trainval" or "test".

    Returns:
        The source; names are ids such as "aachen_000000_000019".

    Raises:
        UserError: a folder is not there, or images and labels do not belong together.
    """
    official.check_split(DATA_SET, split, SPLIT_SIZES)
    root = official.root_folder(DATA_SET, data_config)
    parts = ("train", "val") if split == "trainval" else (split,)
    images = _files(root, "leftImg8bit", parts, _IMAGE_ENDING)
    labels = None if split == "test" else _files(root, "gtFine", parts, _LABEL_ENDING)
    list_file = root / f"{split}.txt"
    return official.make_source(
        DATA_SET,
        split,
        images,
        labels,
        list_file if list_file.is_file() else None,
        _IMAGE_ENDING,
    )


def _files(root, kind: str, parts: tuple[str, ...], ending: str) -> official.Files:
    """The images or the labels of one or two official splits."""
    found = [
        official.files_by_id(
            official.subfolder(DATA_SET, root, f"{kind}/{part}"), (".png",), ending
        )
        for part in parts
    ]
    where = found[0].where if len(found) == 1 else str(root / kind)
    return official.Files(where, {key: path for one in found for key, path in one.by_id.items()})
