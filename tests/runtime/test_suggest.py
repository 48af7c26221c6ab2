"""Names that were probably meant."""

from memseg_jax.runtime import suggest


def test_nearest():
    fields = ["train.batch_size", "eval.batch_size", "optimizer.lr", "seed"]
    assert suggest.nearest("train.batchsize", fields)[0] == "train.batch_size"
    assert set(suggest.nearest("batch_size", fields)) == {"train.batch_size", "eval.batch_size"}
    assert suggest.nearest("zzz", fields) == []
    assert suggest.nearest("x", []) == []
    assert suggest.did_you_mean("zzz", [str(n) for n in range(30)]).endswith("19, and 10 more.")
    assert suggest.did_you_mean("zzz", []) == "There are: none."
