import itertools

import numpy as np
import pytest
from PIL import Image

from lmjax.data.images import Images, validation
from lmjax.data.pictures import grid
from lmjax.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of pictures in colour, a copy among them; a text and a broken picture."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    root, random = tmp_path / "in", np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (root / name / "deep").mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 100, (9, 13, 3), np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / name / ("deep" if i % 2 else "") / f"{i}.png")
    (root / "cat" / "copy.png").write_bytes((root / "cat" / "0.png").read_bytes())
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / "dog" / "torn.png").write_bytes((root / "dog" / "0.png").read_bytes()[:40])
    return root


def rows_of(data):
    batches = list(data.epoch_batches(batch_size=8))
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def test_a_folder_of_pictures_by_class(folder, caplog):
    data = Images(path=str(folder), size=4, channels=3)
    data.check()
    assert data.classes == ("cat", "dog")
    assert "2 files are left out" in caplog.text
    held = rows_of(data), rows_of(validation(data))
    assert sum(int(rows["weights"].sum()) for rows in held) == 25
    for rows in held:
        real = rows["weights"] > 0
        brightest = rows["images"][real].mean((1, 2)).argmax(-1)
        np.testing.assert_array_equal(brightest, rows["labels"][real])
        assert (
            rows["images"].dtype == np.float32
            and 0 <= rows["images"].min() <= rows["images"].max() <= 1
        )
    seen = [{x.tobytes() for x in rows["images"][rows["weights"] > 0]} for rows in held]
    assert sum(map(len, seen)) == 24 and not seen[0] & seen[1]  # copies are on one side


def test_batches_are_of_seed_and_step_alone(folder):
    data = Images(path=str(folder), size=4, channels=3)
    first = list(itertools.islice(data.batches(batch_size=6, seed=3), 9))
    for start, shard in ((4, 0), (7, 1)):
        part = next(data.batches(batch_size=6, seed=3, start=start, shard=shard, num_shards=2))
        for name, array in part.items():
            np.testing.assert_array_equal(array, first[start][name][3 * shard : 3 * shard + 3])
    other = next(data.batches(batch_size=6, seed=4))
    assert not np.array_equal(other["images"], first[0]["images"])


def test_an_epoch_holds_every_picture_once(folder):
    data = Images(path=str(folder), size=4, channels=3)
    n = data.num_examples
    batch = next(data.batches(batch_size=n, seed=0))
    whole = rows_of(data)["images"][:n]
    assert sorted(x.tobytes() for x in batch["images"]) == sorted(x.tobytes() for x in whole)
    assert not np.array_equal(batch["images"], whole)


def test_the_cache_serves_a_second_reader_and_sees_a_new_file(folder):
    before = Images(path=str(folder), size=4).fingerprint
    assert Images(path=str(folder), size=4).fingerprint == before
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "cat" / "new.png")
    assert Images(path=str(folder), size=4).fingerprint != before


def test_arrays_in_a_file(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    data = Images(path=str(tmp_path / "x.npz"), valid_fraction=0.0)
    rows = rows_of(data)
    np.testing.assert_allclose(rows["images"][:20, ..., 0], images / 255, atol=1e-6)
    np.savez(tmp_path / "y.npz", images=images.astype(np.float32), labels=labels)
    with pytest.raises(UserError, match="give uint8"):
        Images(path=str(tmp_path / "y.npz")).check()


def test_what_cannot_be_learned_from_is_refused(folder):
    with pytest.raises(UserError, match="one class only"):
        Images(path=str(folder), size=4, labels=("cat",)).check()
    with pytest.raises(UserError, match=r"no picture of 'dgo'.*Did you mean 'dog'"):
        Images(path=str(folder), size=4, labels=("cat", "dgo")).check()
    with pytest.raises(UserError, match="no folder with files"):
        Images(path=str(folder / "cat" / "deep"), size=4).check()
    with pytest.raises(UserError, match="no pictures at"):
        Images(path=str(folder / "bird")).check()


def test_the_grid_is_a_picture(tmp_path):
    images = np.linspace(0, 1, 3 * 4 * 4).reshape(3, 4, 4, 1)
    (tmp_path / "g.png").write_bytes(grid(images, columns=2, scale=2))
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.size == (24, 24)
        assert np.asarray(picture)[2, 2] == 0
