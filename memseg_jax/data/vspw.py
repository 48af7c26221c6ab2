"""VSPW (videos of 124 classes) from its official folder.

    <config.data.root>/data/<video>/origin/<frame>.jpg
    <config.data.root>/data/<video>/mask/<frame>.png
    <config.data.root>/{train,val}.txt                  one video a line

The root may also be the folder above `VSPW_480p`, as the archive has it. The label files hold
1..124 for the classes; here 0, 253, 254 and 255 are ignored and the classes are 0..123.

A sample is a frame. In training, an epoch draws one frame of every video (`VspwSource.groups`);
all else, such as the evaluation, sees all frames.
"""

import itertools
from pathlib import Path

from memseg_jax.data import lists, official, scanning
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

# fmt: off
CLASS_NAMES = (
    "wall", "ceiling", "door", "stair", "ladder", "escalator", "Playground_slide",
    "handrail_or_fence", "window", "rail", "goal", "pillar", "pole", "floor", "ground", "grass",
    "sand", "athletic_field", "road", "path", "crosswalk", "building", "house", "bridge", "tower",
    "windmill", "well_or_well_lid", "other_construction", "sky", "mountain", "stone", "wood", "ice",
    "snowfield", "grandstand", "sea", "river", "lake", "waterfall", "water",
    "billboard_or_Bulletin_Board", "sculpture", "pipeline", "flag", "parasol_or_umbrella",
    "cushion_or_carpet", "tent", "roadblock", "car", "bus", "truck", "bicycle", "motorcycle",
    "wheeled_machine", "ship_or_boat", "raft", "airplane", "tyre", "traffic_light", "lamp",
    "person", "cat", "dog", "horse", "cattle", "other_animal", "tree", "flower", "other_plant",
    "toy", "ball_net", "backboard", "skateboard", "bat", "ball",
    "cupboard_or_showcase_or_storage_rack", "box", "traveling_case_or_trolley_case", "basket",
    "bag_or_package", "trash_can", "cage", "plate", "tub_or_bowl_or_pot", "bottle_or_cup", "barrel",
    "fishbowl", "bed", "pillow", "table_or_desk", "chair_or_seat", "bench", "sofa", "shelf",
    "bathtub", "gun", "commode", "roaster", "other_machine", "refrigerator", "washing_machine",
    "Microwave_oven", "fan", "curtain", "textiles", "clothes", "painting_or_poster", "mirror",
    "flower_pot_or_vase", "clock", "book", "tool", "blackboard", "tissue", "screen_or_television",
    "computer", "printer", "Mobile_phone", "keyboard", "other_electronic_product", "fruit", "food",
    "instrument", "train",
)
# fmt: on
# The data set has no colours of its own; these are those of its label files as PNGs usually are.
PALETTE = tuple(official.voc_colour(k + 1) for k in range(len(CLASS_NAMES)))
SPLIT_SIZES = {"train": 198244, "val": 24502}  # frames
EPOCH_SIZES = {"train": 2806, "val": 343}  # videos

DATA_SET = official.DataSet(
    title="VSPW",
    num_classes=len(CLASS_NAMES),
    table=official.label_table(
        {k + 1: k for k in range(len(CLASS_NAMES))}, ignored=(0, 253, 254, 255)
    ),
    layout="data/ with a folder per video, origin/ and mask/ in each, and train.txt and val.txt",
    download=(
        "Unpack VSPW_480p.tar of www.vspwdataset.com and give the folder that holds these as "
        "config.data.root."
    ),
    sizes=SPLIT_SIZES,
    marks=("data", "train.txt", "val.txt"),
    ids=r"\d+_.{11}",
    places=("", "VSPW_480p"),
    splits=("train", "val"),
)


class VspwSource(official.OfficialSource):
    """Frames of one split, those of a video one after the other."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of frames of every video, of which training draws one an epoch."""
        videos = itertools.groupby(self.names, lambda name: name.split("/")[0])
        return tuple(sum(1 for _ in frames) for _, frames in videos)


def open_split(data_config, split: str) -> VspwSource:
    """Finds the frames and labels of a split.

    Args:
        data_config: `config.data`; `root` is the folder that holds `data`, or the one above.
        split: "train" or "val".

    Returns:
        The source; names are such as "127_-hIVCYO4C90/00000402".

    Raises:
        UserError: a list or a video is not there, or some frame has no label.
    """
    official.check_split(DATA_SET, split, SPLIT_SIZES)
    root = official.base_folder(DATA_SET, official.root_folder(DATA_SET, data_config))
    data = official.subfolder(DATA_SET, root, "data")
    videos = _videos(data, root / f"{split}.txt", split)
    return official.make_source(
        DATA_SET,
        split,
        _frames(data, videos, "origin", scanning.IMAGE_SUFFIXES),
        _frames(data, videos, "mask", (".png",)),
        source_class=VspwSource,
    )


def _videos(data: Path, list_file: Path, split: str) -> list[str]:
    """The videos that a list names, each with frames and labels."""
    lines = lists.read_list(list_file, f"split {split!r}", DATA_SET.help())
    videos = [line for _, line in lines]
    twice = sorted({video for video in videos if videos.count(video) > 1})
    if twice:
        raise UserError(f"{list_file}: videos that are named twice: {', '.join(first_few(twice))}.")
    missing = [
        f"{video}/{kind} (line {number})"
        for number, video in lines
        for kind in ("origin", "mask")
        if not (data / video / kind).is_dir()
    ]
    if missing:
        raise UserError(
            f"{list_file}: split {split!r} names videos, and there is no folder of them in {data}: "
            f"{', '.join(first_few(missing))}. {DATA_SET.help()}"
        )
    return videos


def _frames(data: Path, videos: list[str], kind: str, suffixes: tuple[str, ...]) -> official.Files:
    """The images or the labels of some videos, by "<video>/<frame>"."""
    found = {}
    for video in videos:
        frames = scanning.files_by_stem(data / video / kind)
        for stem, path in scanning.one_of_each(frames, suffixes, kind).items():
            found[f"{video}/{stem}"] = path
    return official.Files(str(data), found)
