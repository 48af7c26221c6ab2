"""The fields that every config has, with their defaults: the published recipe's common part.

A config file is a Python module with `get_config(arg=None)` that starts from `common.get_config()`,
sets what is different, and returns it. Every field can be overridden on the command line, for
example `--config.train.batch_size=8`. What each may hold is in `memseg_jax/config_rules/fields.py`.
"""

import ml_collections
from ml_collections import config_dict

from memseg_jax.errors import UserError


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults (DeepLabV3 + feature memory, ResNet-50, 512x512 crops)."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # The numbers of the PyTorch reference depend on how many processes ran it: cross entropy is
    # a mean of per-process means, and the memory is updated per process and then averaged. The
    # global batch is split into this many equal groups and both are computed per group. 1 is
    # the plain form; the published models were trained with 8.
    config.replica_groups = 1

    # How the devices are arranged; -1: the rest of them. The images of a batch are split over
    # "data" and "fsdp", the rows of every image over "rows", for more devices than images. Over
    # "fsdp" parameters and the optimiser's state are split, too, so that each device holds a share
    # of them; over the others they are replicated. The numbers do not depend on it, rounding aside.
    config.sharding = ml_collections.ConfigDict({"data": -1, "rows": 1, "fsdp": 1})
    # "shared": parameters and the optimiser's state are split over all devices instead of "fsdp".
    config.sharding.weight_update = "each"

    config.init = init = ml_collections.ConfigDict()
    # What a new run starts from; both empty: random values.
    # File of weights for the backbone, .pth or .safetensors: one that the published models started
    # from, or one of torchvision, timm or Hugging Face (docs/own_images.md)
    init.backbone = ""
    init.checkpoint = ""  # --workdir of a trained or converted model, of the same or other classes

    config.data = data = ml_collections.ConfigDict()
    data.name = "folder"  # the module memseg_jax/data/<name>.py
    data.root = ""
    data.packed = ""  # folder that --mode pack writes and all others read instead of `root`
    # Data in a bucket are copied to a folder of this machine while they are read. "auto": in
    # ~/.cache/memseg_jax/data if there is room, else they are read from the bucket; "none": always.
    data.stage = "auto"
    data.stage_gb = 100.0  # most that the folder may hold; what was not used for longest goes first
    data.train_split = "train"
    data.eval_split = "val"
    data.class_names = ("",)  # a tuple of strings; its length is the number of classes
    data.palette = ()  # one (red, green, blue) per class; empty: generated colours
    data.ignore_label = 255  # the value in label files that means "not labelled"; -1: there is none
    # For label files with any ids: pairs of a value and the class it means, or "ignore", such as
    # tuple({0: "ignore", 7: "road", 8: "road"}.items()); empty: 0 is the first class, and so on.
    data.label_map = ()
    # Also for names in JSON files of LabelMe or COCO: ("lorry", "truck"). There, this is the class
    # of pixels in no polygon; or "ignore".
    data.outside_polygons = "ignore"
    # For colour masks: the colour of every class, or a tuple of its colours; empty: the values of
    # label files are class ids.
    data.label_colors = ()
    data.ignore_colors = ()  # colours that mean "not labelled"
    data.unknown_color = "error"  # what any other colour is; or "ignore", "nearest" (known colour)
    data.image_dir = "images/{split}"
    data.label_dir = "labels/{split}"  # or a JSON file of COCO: "annotations/{split}.json"
    # What labels are called, such as "{stem}_mask.png"; {stem}: the image's name without suffix,
    # {name}: with it, {parent}: its folder below image_dir. Empty: like the image, but for the
    # suffix. Without {parent}, labels are in the same folders below label_dir as the images below
    # image_dir.
    data.label_name = ""
    data.list_file = ""  # such as "{split}.txt"; empty: every file of the folders
    # Above 0: there is no folder or list for eval_split; it gets this share of the samples of
    # train_split, by a hash of their names. Samples that are added later change no other's place.
    data.val_share = 0.0
    data.image_size = (96, 96)  # of generated images (data.name = "shapes"): height, width
    data.num_train = 0  # number of generated training images (data.name = "shapes")
    data.num_val = 0
    data.workers = 0  # worker processes; 0: threads of the main process
    data.threads = 4
    data.prefetch = 4  # batches prepared ahead

    config.augment = augment = ml_collections.ConfigDict()
    augment.base_size = (2048, 512)  # long and short side at scale 1; empty: image's own
    augment.keep_ratio = True
    augment.scale_range = (0.5, 2.0)
    augment.crop = (512, 512)  # height, width
    augment.max_category_share = 0.75  # a crop in which one class covers more is drawn again
    augment.flip = 0.5  # probability
    augment.flip_pairs = ()  # pairs of classes that mirroring swaps, e.g. ((14, 15),)
    augment.rotation = 0.0  # probability
    augment.rotation_degrees = 30
    augment.photometric = True

    config.eval = evaluate = ml_collections.ConfigDict()
    evaluate.base_size = (2048, 512)
    evaluate.keep_ratio = True
    evaluate.scales = (1.0,)  # scores are averaged over these factors on the image's size
    evaluate.flip = False  # also over mirror images
    # "whole": one network input per image. "slide": windows of `window` every `stride` pixels, the
    # published test of some models. "auto": whole up to four times the area of `augment.crop`;
    # beyond, windows of the crop's size that overlap by `overlap` of their sides, and are blended.
    evaluate.mode = "auto"
    evaluate.overlap = 0.5  # more: windows agree better where they meet, and there are more of them
    evaluate.window = (512, 512)  # height, width of a sliding window
    evaluate.stride = (341, 341)
    evaluate.softmax_before_resize = False
    evaluate.batch_size = 1  # images (whole) or windows (slide) per forward pass and device
    # Devices of a process that share each of them, by its rows: for images that are too large for
    # one device, or one that has to be quick. Must divide their number.
    evaluate.rows = 1
    # Images of many sizes: the first `exact_sizes` sizes get a compiled program each, all others
    # are padded, with the padding masked out in every layer: to the smallest of `canvases` that
    # holds them, or else to 1, 2, 3, 4, 6, 8, 12, ... times `size_multiple`.
    evaluate.exact_sizes = 4
    evaluate.canvases = ()  # pairs (height, width)
    evaluate.size_multiple = 128
    evaluate.save_predictions = ""  # folder for the label maps of --mode evaluate; "": none
    evaluate.max_megapixels = 179.0  # larger pictures are refused by --mode predict

    config.serve = serve = ml_collections.ConfigDict()  # limits of --mode serve
    serve.batch_size = 4  # pictures of like size per forward pass and device, if so many wait
    serve.queue = 32  # requests that are read, wait or are answered at a time; others get 503
    serve.seconds = 60.0  # for one request, its upload and its wait included
    serve.max_megabytes = 20.0  # of a request
    serve.max_megapixels = 16.0  # of a picture, from its header, before it is decoded
    # Origin of other web pages that may use the API, such as "https://example.org"; "": none.
    serve.origin = ""

    config.model = model = ml_collections.ConfigDict()
    # "mcibi": the memory holds features of every class. "mcibi_plus_plus", its successor: it holds
    # mean and standard deviation of every class, from which features are drawn.
    model.method = "mcibi"
    model.context = "aspp"  # context within the image; or "pyramid_pooling", "none"
    # resnet18, resnet50, resnet101, resnest101, hrnetv2w48 (hrnetv2w48_relu: the reference's stem
    # since 2025), vitlarge (vitlarge_473: the COCO-Stuff model of 2021), vitbase; resnet18_v1b,
    # resnet50_v1b, resnet101_v1b (torchvision's and timm's ResNets); swintiny, swinsmall, swinbase,
    # swinlarge
    model.backbone = "resnet50"
    model.backbone_width = 1.0  # multiplies the backbone's channels; 1.0: as published
    model.downsample = 1  # 2: the backbone's map is halved first (HRNet on large crops)
    model.feature_dim = 512  # channels of the bottleneck, the memory and the decoders
    model.aspp_dim = 512  # channels of the context, whichever it is
    model.aspp_dilations = (1, 12, 24, 36)
    model.pool_scales = (1, 2, 3, 6)  # cells per side of pyramid pooling
    model.fpn = False  # feature pyramid over the backbone's maps and the context: UPerNet
    model.fpn_dim = 512  # channels of its outputs but the top, which stays as it is
    model.drop_path = 0.0  # Swin: rate of the last block, rising linearly from 0
    # MCIBI++: kernel of the first convolution of the decoders that predict from the pixels'
    # features, from the context's, and from all of them.
    model.decoder_kernels = ml_collections.ConfigDict({"pixels": 1, "context": 1, "final": 1})
    model.dropout = 0.1
    model.activation = "relu"  # of the head; or "leaky_relu" (slope 0.01)
    # Images over which batch normalisation takes its statistics in training: consecutive ones of a
    # batch (of each of its train.accumulate parts). 0: all of them. The published models have 16.
    model.norm_group = 0
    model.auxiliary = True
    model.compute_dtype = "float32"  # or "bfloat16"; parameters and statistics stay float32
    # Convolutions and matrix products of float32: "highest" computes in full precision. "high" and
    # "default" are faster: on TPUs with 16 and 8 significant bits of every factor, on GPUs both
    # with 11 (TF32). On CPUs, and with compute_dtype "bfloat16", it makes no difference.
    model.precision = "highest"
    # What a training step keeps for its backward pass. "none": everything. "blocks": the inputs of
    # residual and transformer blocks, of the attentions and of the layers between them; the inside
    # is recomputed. The numbers are the same, the memory is a fraction.
    model.remat = "none"

    model.memory = memory = ml_collections.ConfigDict()
    # False: the plain baseline of the context: DeepLabV3 (aspp), PSPNet (pyramid_pooling), FCN
    # (none), UPerNet (pyramid_pooling with fpn).
    memory.enabled = True
    memory.attention_dim = 256
    memory.slots = 1  # rows per class
    memory.hard = False  # read by the arg-max class instead of the class probabilities
    memory.within_image_context = True  # a second attention, from the context to what was read
    # "residual", of MCIBI alone: the head is that of the plain baseline, to whose features what was
    # read is added by a normalisation whose scale starts at 0: training starts as the baseline.
    memory.fusion = "published"
    memory.strategy = "cosine"  # weights of a class's pixels: 1 - cosine; or "mean"
    memory.momentum = 0.9
    memory.base_lr = 0.01  # momentum at learning rate lr is momentum / base_lr * lr; 0: fixed
    # The first epoch that writes it, from 1; until then what is read is as empty as at first. If it
    # is after the last one, the memory stays empty: its layers are all that is left of the method.
    memory.start_epoch = 1
    # The rest is of MCIBI++ alone, which has neither slots nor strategy.
    memory.downsample = 1  # 2: rows are read at half the size (HRNet on large crops)
    # Whose class probabilities weigh the rows: those predicted from the context, or "pixels".
    memory.read_by = "context"
    memory.fuse_before_fpn = False  # what was read enters the pyramid; else it joins its outputs

    config.loss = loss = ml_collections.ConfigDict()
    loss.stage2 = 1.0
    loss.stage1 = 0.4
    loss.context = 1.0  # MCIBI++: of the prediction from the context
    loss.auxiliary = 0.4
    loss.consistency = 0.0  # representation-consistency loss on the memory rows
    loss.consistency_from_epoch = 2  # epochs count from 1; not before the memory's first
    # One per class; empty: all 1; "balanced": the rarer a class is in the images that show it, the
    # more its pixels weigh (median frequency), counted once, before the training.
    loss.class_weights = config_dict.FieldReference((), field_type=object)

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # "sgd"; "adamw": decay beside Adam's means; "lars": SGD whose steps are in proportion to the
    # norms of the parameters, for batches of thousands.
    optimizer.name = "sgd"
    optimizer.lr = 0.01
    optimizer.min_lr = 1e-4  # at the end of the run
    optimizer.power = 0.9  # lr(step) = (lr - min_lr) * (1 - step / steps)^power + min_lr
    optimizer.warmup_steps = 0  # the first ones, in which lr(step) rises linearly to this curve
    optimizer.warmup_start = 1e-6  # from this share of it
    # Above 0: the batch that lr, min_lr and model.memory.base_lr are for. All three are multiplied
    # by train.batch_size / base_batch. 0: they are as given, whatever the batch.
    optimizer.base_batch = 0
    optimizer.momentum = 0.9  # for "adamw", Adam's first decay; its second is 0.999
    optimizer.weight_decay = 5e-4
    # Module -> (learning-rate factor, weight-decay factor), e.g. {"backbone": (0.1, 0.1)}. Also
    # patterns as in train.freeze; of several that fit a parameter, the longest counts.
    optimizer.multipliers = ml_collections.ConfigDict()

    config.train = train = ml_collections.ConfigDict()
    train.batch_size = 16
    # Gradient accumulation: parts in which a batch is computed, one after the other, where it does
    # not fit into memory as a whole. Losses, gradients and memory are those of the whole batch,
    # with two exceptions: every part is normalised with its own batch statistics, as if it were the
    # batch, and draws its own dropout. Costs one more forward pass of the backbone, as the memory's
    # update comes first; not with MCIBI++.
    train.accumulate = 1
    train.epochs = 130
    train.log_every = 50  # steps
    train.eval_every = 10  # epochs; 0: only at the end
    # Evaluations in a row without a higher mIoU that end the run; 0: it takes all its epochs.
    train.early_stop = 0
    # Parameters that keep their values: paths of modules or parameters, such as "backbone" or
    # ("backbone/stem*", "backbone/layer1*"); "*" stands for any text. Batch normalisations that are
    # frozen as a whole keep their running statistics, too, and normalise with them.
    train.freeze = ()
    # What to do about a step whose loss, gradients or result are not finite. Such a step never
    # changes the model. "raise": end the run. "skip": go on. "rollback": go back to the state of
    # the last checkpoint and continue with the data after the step.
    train.on_nonfinite = "raise"
    train.max_nonfinite = 10  # skipped steps, or rollbacks, in a row that end the run
    # Minutes without a finished step after which all stacks are printed; 0: never.
    train.watchdog_minutes = 10.0
    # Steps that are traced after every start, into <workdir>/profile, for TensorBoard or Perfetto.
    # The first few, which are slower, are left out; 0: none.
    train.profile_steps = 0

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 1000  # steps; also at every evaluation and at the end
    checkpoint.keep = 2  # the last ones; the best by mIoU is kept as well
    # A training run locks its workdir (run.lock). A run on another host that has not renewed its
    # lock for this many minutes counts as dead.
    checkpoint.lock_minutes = 10.0
    return config


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the published test-time settings

# For `config.eval.canvases`, by the largest scale: of nine sizes that hold every image of short
# side up to 512 and long side up to 2048 at the published scales, those that pad photographs least;
# `python -m benchmarks.many_sizes --plan 9 --config configs/ade20k_resnet50.py`, the same with
# `:ms_flip`, and `cocostuff10k_resnet50.py:ms_flip`.
CANVASES = {
    1.0: (
        (512, 512), (512, 704), (512, 768), (512, 832), (512, 960), (512, 2048),
        (768, 512), (960, 512), (2048, 512),
    ),
    1.5: (
        (384, 576), (512, 768), (640, 960), (768, 1152), (768, 1536), (768, 3072),
        (768, 512), (1152, 768), (3072, 768),
    ),
    1.75: (
        (384, 512), (512, 704), (768, 1024), (896, 1216), (896, 1792), (896, 3584),
        (768, 512), (1408, 896), (3584, 896),
    ),
}  # fmt: skip

_WORDS = {
    "ms_flip": "the published test with several scales and mirror images",
    "2021": "the form of the published models, the default",
    "2025": "the reference's present form",
}


def words_of(arg: str | None, forms: bool = False) -> frozenset[str]:
    """Reads a config's argument: `--config FILE.py:WORD` or `--config FILE.py:WORD,WORD`.

    Args:
        arg: words with commas between them, or None.
        forms: whether the model has a form of 2021 and one of 2025.

    Returns:
        The words: "ms_flip" and, with `forms`, "2021" or "2025".

    Raises:
        UserError: a word is not known, or both forms are given.
    """
    words = frozenset(arg.split(",") if arg else ())
    known = {word: _WORDS[word] for word in _WORDS if forms or word == "ms_flip"}
    meanings = ", ".join(f"{word} ({meaning})" for word, meaning in known.items())
    for word in sorted(words - set(known)):
        raise UserError(f"--config FILE:{arg}: this config has no {word!r}. It has: {meanings}")
    if words >= {"2021", "2025"}:
        raise UserError(f"--config FILE:{arg}: choose one of 2021 and 2025")
    return words


def set_ms_flip(
    config: ml_collections.ConfigDict,
    scales: tuple[float, ...] = SCALES,
    window: tuple[int, int] | None = None,
) -> None:
    """Sets the reference's test with several scales and mirror images.

    The reference recorded these settings after the models were published; its scores with them
    differ from the published ones by 0.0 to 0.3.

    Args:
        config: changed in place.
        scales: factors on the image's size.
        window: height and width of sliding windows; None: whole images.
    """
    config.eval.scales = scales
    config.eval.flip = True
    config.eval.softmax_before_resize = True
    if config.eval.canvases:
        config.eval.canvases = CANVASES[max(scales)]
        # A window smaller than the full one, which only the smallest scales have, is padded to it.
        config.eval.size_multiple = 512
        config.eval.exact_sizes = 0
    if window:
        config.eval.mode = "slide"
        config.eval.window = window
        config.eval.stride = (341, 341)
