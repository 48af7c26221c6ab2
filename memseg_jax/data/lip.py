"""LIP (Look Into Person, single person, 20 classes) from its official folders.

    <config.data.root>/{train,val}_images/<id>.jpg
    <config.data.root>/{train,val}_segmentations/<id>.png
    <config.data.root>/testing_images/<id>.jpg

The folders may lie deeper, as the archives have them (`TrainVal_images/train_images` and
`TrainVal_parsing_annotations/train_segmentations`), and are found by their names. The label files
hold the classes themselves; 0, the background, is a class like the others and nothing is ignored.
The labels of split "test" are not public.

`train_id.txt` and `val_id.txt`, in the root or beside the images, choose and order the samples of
their split where they are present.
"""

from pathlib import Path

from memseg_jax.data import official, scanning
from memseg_jax.errors import UserError

# fmt: off
CLASS_NAMES = (
    "__background__", "hat", "hair", "glove", "sunglasses", "upperclothes", "dress", "coat",
    "socks", "pants", "jumpsuits", "scarf", "skirt", "face", "leftArm", "rightArm", "leftLeg",
    "rightLeg", "leftShoe", "rightShoe",
)
PALETTE = (
    (0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85),
    (0, 119, 221), (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255),
    (51, 170, 221), (0, 255, 255), (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0),
)
# fmt: on
FLIP_PAIRS = ((14, 15), (16, 17), (18, 19))  # what mirroring swaps: arms, legs, shoes
SPLIT_SIZES = {"train": 30462, "val": 10000, "test": 10000}

DATA_SET = official.DataSet(
    title="LIP",
    num_classes=len(CLASS_NAMES),
    table=official.label_table({k: k for k in range(len(CLASS_NAMES))}, ignored=()),
    layout=(
        "the folders train_images/, val_images/, train_segmentations/ and val_segmentations/, "
        "directly in config.data.root or up to two folders deeper"
    ),
    download=(
        "Unpack TrainVal_images.zip and TrainVal_parsing_annotations.zip of the single-person set "
        "of the Look Into Person benchmark (sysu-hcp.net/lip) in one folder."
    ),
    sizes=SPLIT_SIZES,
)
_FOLDERS = {
    "train": ("train_images", "train_segmentations"),
    "val": ("val_images", "val_segmentations"),
    "test": ("testing_images", None),
}


def open_split(data_config, split: str) -> official.OfficialSource:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds the data set's folders.
        split: "train", "val" or "test".

    Returns:
        The source; names are ids such as "77_471474".

    Raises:
        UserError: a folder is not there, or images and labels do not belong together.
    """
    official.check_split(DATA_SET, split, SPLIT_SIZES)
    root = official.root_folder(DATA_SET, data_config)
    image_name, label_name = _FOLDERS[split]
    places = [root, _find(root, image_name)]
    images = official.files_by_id(places[1], scanning.IMAGE_SUFFIXES)
    labels = None
    if label_name:
        places.append(_find(root, label_name))
        labels = official.files_by_id(places[2], (".png",))
    beside = [place / f"{split}_id.txt" for place in (root, *(p.parent for p in places[1:]))]
    list_file = next((path for path in beside if path.is_file()), None)
    return official.make_source(DATA_SET, split, images, labels, list_file)


def _find(root: Path, name: str) -> Path:
    """The folder of that name: in the root, or one or two folders deeper."""
    level = [root]
    for _ in range(3):
        found = [parent / name for parent in level if (parent / name).is_dir()]
        if len(found) > 1:
            raise UserError(
                f"{found[0]} and {found[1]}: LIP has one folder {name}. Remove or move one of them."
            )
        if found:
            return found[0]
        level = [child for parent in level for child in _folders(parent)]
    raise UserError(
        f"{root}: there is no folder {name} in it or up to two folders deeper. "
        f"{scanning.holds(root)} {DATA_SET.help()}"
    )


def _folders(parent: Path) -> list[Path]:
    """The folders in which others can be; those of the images hold tens of thousands of files."""
    return sorted(
        child
        for child in parent.iterdir()
        if child.name[0] != "."
        and child.name != "__MACOSX"
        and not child.name.startswith(("train_", "val_", "testing_"))
        and child.is_dir()
    )
